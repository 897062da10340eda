//! Makes a Kubernetes of one node and saves the machine that it runs in, once for all tests: its
//! start takes minutes in a lab, and to resume such a machine takes a second.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use xtask::bench::pods::CGROUP;
use xtask::cache::{self, DirLock};
use xtask::images::{POD_INIT, pod_initrd};
use xtask::lab::Layout;
use xtask::pods::{Containerd, Pods};

use super::{Cluster, MACHINE};
use crate::api_server::certificates;
use crate::command::Command;
use crate::containerd::wait_for;
use crate::daemon::Daemon;
use crate::host::{Host, Limit};
use crate::prepare;
use crate::{Image, image};

/// What a saved cluster depends on beside programs and images.
const SOURCES: &[&str] = &[
    include_str!("make.rs"),
    include_str!("../daemon.rs"),
    include_str!("../api_server/certificates.rs"),
    POD_INIT,
];

/// The node's address, on an interface of its own.
const ADDRESS: &str = "10.222.0.1";
const NODE: &str = "node1";

/// A bridge with the pods of the node on it.
const NETWORK: &str = r#"{"cniVersion": "0.4.0", "name": "pods", "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.223.0.0/24"}]],
              "routes": [{"dst": "0.0.0.0/0"}]}}]}"#;

/// What containers are made of that only keep a pod's namespaces.
const SANDBOX_IMAGE: &str = "local.test/sandbox:1";

const RUNTIME_CLASS: &str = "
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: edgevmm}
handler: edgevmm
";

/// A saved machine with a Kubernetes in it, which nobody replaces as long as this lives.
pub(crate) struct Saved {
    pub(crate) snapshot: PathBuf,
    _lock: DirLock,
}

/// Makes it unless it is there, made by this recipe. None where there are no programs for it.
pub(crate) fn saved() -> Result<Option<Saved>> {
    let pods = prepare::pods()?;
    let Some(kubernetes) = pods.kubernetes()? else {
        return Ok(None);
    };
    prepare::lab()?;
    image(Image::Kernel)?;
    let images = image(Image::Mini)?;
    let parts = [
        Layout::of_this_user().stamp(),
        cache::stamp(&kubernetes),
        cache::stamp(&pods.runc()),
        cache::stamp(&images.vmlinux()),
        cache::stamp(&images.mini_qcow2()),
    ];
    let dir = cache::pods_dir().join("cluster");
    let (snapshot, recipe) = (dir.join("snapshot"), cache::recipe((parts, SOURCES)));
    if !cache::is_fresh(&snapshot, recipe) {
        let _lock = DirLock::exclusive(&dir)?;
        cache::ensure(&snapshot, recipe, |dir| {
            Host::save(&MACHINE, dir, |host| {
                let cluster = make(host, &pods, &kubernetes)?;
                import_machines(&cluster)
            })
        })?;
    }
    let lock = DirLock::shared(&dir)?;
    Ok(Some(Saved {
        snapshot,
        _lock: lock,
    }))
}

/// The part of containerd's configuration for a kubelet.
fn containerd_config(host: &Host) -> String {
    // On this machine it may be forbidden to lower a process's score for lack of memory.
    let restricted = host.is_this_machine();
    let (plugins, networks) = (host.path("plugins"), host.path("networks"));
    format!(
        r#"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{SANDBOX_IMAGE}"
restrict_oom_score_adj = {restricted}
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{networks}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.edgevmm]
runtime_type = "io.containerd.edgevmm.v1"
pod_annotations = ["edgevmm.io/*"]
container_annotations = ["edgevmm.io/*"]
"#
    )
}

/// Starts a Kubernetes and waits until its node is ready.
pub(super) fn make<'h>(host: &'h Host, pods: &Pods, kubernetes: &Path) -> Result<Cluster<'h>> {
    // A lab can't be saved while programs of this machine's disk run there.
    let bring: &[&str] = if host.is_this_machine() {
        &["ln", "-s"]
    } else {
        &["cp", "-r"]
    };
    for (folder, name) in [
        (kubernetes, "kubernetes"),
        (&pods.containerd(Containerd::New), "containerd"),
        (&pods.runc(), "runc"),
        (&pods.plugins(), "plugins"),
    ] {
        let paths = [host.shared(folder)?, host.path(name)];
        host.ok(&Command::new(bring[0]).args([bring[1]]).args(paths))?;
    }
    host.ok(&Command::script(format!(
        "mkdir -p networks volumes secrets
         ip link set lo up; ip link add node0 type bridge; ip link set node0 up
         ip address add {ADDRESS}/24 dev node0
         ssh-keygen -q -t rsa -m PEM -N '' -f secrets/accounts.key
         echo 1 > /proc/sys/net/ipv4/ip_forward; : > resolv.conf"
    )))?;
    host.write("networks/10-pods.conflist", NETWORK)?;
    let cluster = Cluster::on(host);
    cluster.node.configure(&containerd_config(host))?;
    cluster.node.run()?;
    start_control_plane(&cluster)?;
    start_kubelet(&cluster)?;
    import_images(&cluster)?;
    let ready = ["wait", "--for=condition=Ready", "--timeout=240s"];
    host.ok(&wait_for(&cluster.kubectl(["get", "node", NODE])))?;
    let ready = cluster.kubectl(ready).args(["node", NODE]);
    host.run_for(&ready, Limit::Boot)?.expect_code(0)?;
    let account = cluster.kubectl(["get", "serviceaccount/default"]);
    host.ok(&wait_for(&account))?;
    cluster.apply(RUNTIME_CLASS)?;
    Ok(cluster)
}

/// Images of ordinary containers.
fn import_images(cluster: &Cluster<'_>) -> Result<()> {
    let host = cluster.host;
    let busybox = host.busybox()?;
    host.ok(&Command::script(format!(
        "mkdir -p busybox/bin busybox/tmp; cd busybox/bin; cp {busybox} busybox
         for applet in $(./busybox --list | grep -vx busybox); do ln -s busybox \"$applet\"; done"
    )))?;
    let folder = host.path("busybox");
    let sleep = ["/bin/sleep", "2000000000"];
    for (name, program) in [
        (SANDBOX_IMAGE, &sleep[..]),
        ("local.test/busybox:1", &["/bin/sh"]),
    ] {
        cluster.node.import_program(&folder, name, program)?;
    }
    host.ok(&Command::script("rm -r busybox image.tar"))?;
    Ok(())
}

/// Images of machines by a kernel and by a disk.
fn import_machines(cluster: &Cluster<'_>) -> Result<()> {
    let host = cluster.host;
    let images = image(Image::Kernel)?;
    let initrd = pod_initrd(&prepare::busybox()?)?;
    host.write_bytes("guest/boot/initrd", initrd)?;
    host.copy(&images.vmlinux(), "guest/boot/vmlinux")?;
    cluster
        .node
        .import(&host.path("guest"), "local.test/guest:1")?;
    host.copy(&images.mini_qcow2(), "mini/disk/mini.qcow2")?;
    cluster
        .node
        .import(&host.path("mini"), "local.test/mini:1")?;
    host.ok(&Command::script("rm -r guest mini image.tar"))?;
    Ok(())
}

fn write_users(host: &Host) -> Result<String> {
    let users = [
        ("admin", "admin", "system:masters"),
        ("controllers", "system:kube-controller-manager", ""),
        ("scheduler", "system:kube-scheduler", ""),
        ("kubelet", "system:node:node1", "system:nodes"),
    ];
    let mut tokens = String::new();
    for (number, (file, user, group)) in users.into_iter().enumerate() {
        let token = format!("token-{number}");
        tokens += &format!("{token},{user},{number},\"{group}\"\n");
        host.write(
            &format!("secrets/{file}.conf"),
            &format!(
                "apiVersion: v1\nkind: Config\ncurrent-context: x\n\
                 clusters: [{{name: c, cluster: {{server: \"https://127.0.0.1:6443\", \
                 insecure-skip-tls-verify: true}}}}]\n\
                 users: [{{name: u, user: {{token: {token}}}}}]\n\
                 contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n"
            ),
        )?;
    }
    host.write("secrets/tokens", &tokens)
}

fn start_control_plane(cluster: &Cluster<'_>) -> Result<()> {
    let host = cluster.host;
    let tokens = write_users(host)?;
    let accounts = host.path("secrets/accounts.key");
    cluster.run("etcd", &[("data-dir", &host.path("etcd"))])?;
    for (name, text) in certificates::proxy()? {
        host.write(&format!("secrets/{name}"), &text)?;
    }
    let proxy = certificates::proxy_options(|name| host.path(&format!("secrets/{name}")));
    let proxy = proxy.iter().map(|(name, value)| (*name, &**value));
    let options = [
        ("etcd-servers", "http://127.0.0.1:2379"),
        ("bind-address", "127.0.0.1"),
        ("advertise-address", ADDRESS),
        ("cert-dir", &host.path("apiserver")),
        ("token-auth-file", &tokens),
        ("anonymous-auth", "false"),
        ("authorization-mode", "Node,RBAC"),
        ("enable-admission-plugins", "NodeRestriction,RuntimeClass"),
        ("service-cluster-ip-range", "10.96.0.0/24"),
        ("service-account-issuer", "https://kubernetes.default.svc"),
        ("service-account-signing-key-file", &accounts),
        ("service-account-key-file", &accounts),
        ("kubelet-preferred-address-types", "InternalIP"),
        ("endpoint-reconciler-type", "none"),
    ];
    let options: Vec<_> = options.into_iter().chain(proxy).collect();
    cluster.run("kube-apiserver", &options)?;
    let ready = wait_for(&cluster.kubectl(["get", "--raw=/readyz"]));
    host.run_for(&ready, Limit::Boot)?.expect_code(0)?;
    let (controllers, scheduler) = (
        host.path("secrets/controllers.conf"),
        host.path("secrets/scheduler.conf"),
    );
    cluster.run(
        "kube-controller-manager",
        &[
            ("kubeconfig", &controllers),
            ("leader-elect", "false"),
            ("use-service-account-credentials", "true"),
            ("service-account-private-key-file", &accounts),
            ("cert-dir", &host.path("controllers")),
        ],
    )?;
    let more = [("kubeconfig", &*scheduler), ("leader-elect", "false")];
    cluster.run("kube-scheduler", &more)?;
    let proxy = Daemon::new(host, "kubectl", cluster.kubectl(["proxy", "--port=8001"]));
    proxy.start()
}

fn start_kubelet(cluster: &Cluster<'_>) -> Result<()> {
    let host = cluster.host;
    let root = if host.is_this_machine() {
        make_cgroups(host)?;
        CGROUP
    } else {
        "/"
    };
    host.write(
        "kubelet.yaml",
        &format!(
            "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
             address: {ADDRESS}\nauthentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}\n\
             authorization: {{mode: AlwaysAllow}}\ncgroupDriver: cgroupfs\ncgroupRoot: {root}\nfailSwapOn: false\n\
             clusterDomain: cluster.local\nresolvConf: {}\nmakeIPTablesUtilChains: false\n\
             imageGCHighThresholdPercent: 100\nsyncFrequency: 10s\nfileCheckFrequency: 0s\n\
             nodeStatusUpdateFrequency: 2s\nvolumePluginDir: {}\n\
             evictionHard: {{memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}}\n",
            host.path("resolv.conf"),
            host.path("volumes"),
        ),
    )?;
    cluster.kubelet().start()
}

/// Makes the control groups for the pods of a kubelet on this machine, which may have another one.
fn make_cgroups(host: &Host) -> Result<()> {
    host.ok(&Command::script(format!(
        "cd /sys/fs/cgroup; for folder in . *; do
             test -e $folder/cgroup.procs || continue; mkdir -p $folder/{CGROUP}
             for file in cpuset.cpus cpuset.mems; do test ! -e $folder/$file ||
                 cat $folder/$file > $folder/{CGROUP}/$file; done
         done"
    )))?;
    Ok(())
}

impl<'h> Cluster<'h> {
    /// The kubelet, which may run already.
    pub(super) fn kubelet(&self) -> Daemon<'h> {
        let path = |name: &str| self.host.path(name);
        let score = if self.host.is_this_machine() {
            "0"
        } else {
            "-999"
        };
        self.daemon(
            "kubelet",
            &[
                ("config", &path("kubelet.yaml")),
                ("kubeconfig", &path("secrets/kubelet.conf")),
                ("root-dir", &path("kubelet")),
                ("container-runtime", "remote"),
                (
                    "container-runtime-endpoint",
                    &format!("unix://{}", path("node/sock")),
                ),
                ("hostname-override", NODE),
                ("node-ip", ADDRESS),
                // On a test's own machine only it may be lowered.
                ("oom-score-adj", score),
            ],
        )
    }

    fn run(&self, program: &'static str, options: &[(&str, &str)]) -> Result<()> {
        let daemon = self.daemon(program, options);
        daemon
            .start()
            .with_context(|| format!("Cannot start {program}"))
    }

    fn daemon(&self, program: &'static str, options: &[(&str, &str)]) -> Daemon<'h> {
        let options = options
            .iter()
            .map(|(name, value)| format!("--{name}={value}"));
        let command = Command::new(self.host.path(&format!("kubernetes/{program}")))
            .args(options)
            // The kubelet asks for a cloud's metadata for seconds otherwise.
            .env("AWS_EC2_METADATA_DISABLED", "true");
        Daemon::new(self.host, program, command)
    }
}
