//! A Kubernetes of one node, on a host of the test's own.

use std::time::Duration;

use anyhow::{Context, Result};
use xtask::bench::pods::CGROUP;
use xtask::pods::Containerd;

use crate::api_server::certificates;
use crate::command::{Command, Output};
use crate::containerd::{Node, SANDBOX_IMAGE, wait_for};
use crate::host::{Host, Limit};
use crate::prepare;
use crate::process::Process;

/// The node's address, on an interface of its own.
const ADDRESS: &str = "10.222.0.1";
const NODE: &str = "node1";

/// A bridge with the pods of the node on it.
const NETWORK: &str = r#"{"cniVersion": "0.4.0", "name": "pods", "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.223.0.0/24"}]],
              "routes": [{"dst": "0.0.0.0/0"}]}}]}"#;

const RUNTIME_CLASS: &str = "
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: edgevmm}
handler: edgevmm
";

/// Kubernetes as it runs. Dropping it ends it.
#[derive(Debug)]
pub struct Cluster<'h> {
    host: &'h Host,
    /// The node's containerd.
    pub node: Node<'h>,
    programs: String,
    processes: Vec<Process<'h>>,
}

impl<'h> Cluster<'h> {
    /// Starts a Kubernetes and waits until its node is ready. None where there are no programs.
    ///
    /// # Errors
    /// A part of it can't be had, or does not start.
    pub fn start(host: &'h Host, which: Containerd) -> Result<Option<Self>> {
        let Some(programs) = prepare::pods()?.kubernetes()? else {
            eprintln!("Skipped: this distribution has no sources of Kubernetes");
            return Ok(None);
        };
        let programs = host.shared(&programs)?;
        host.ok(&Command::script(format!(
            "mkdir -p networks volumes secrets sandbox/bin; cp {busybox} sandbox/bin/busybox
             ip link set lo up; ip link add node0 type bridge; ip link set node0 up
             ip address add {ADDRESS}/24 dev node0; echo 1 > /proc/sys/net/ipv4/ip_forward
             ssh-keygen -q -t rsa -m PEM -N '' -f secrets/accounts.key
             : > resolv.conf",
            busybox = host.busybox()?
        )))?;
        host.write("networks/10-pods.conflist", NETWORK)?;
        let node = Node::for_kubelet(host, which)?;
        let sleep = ["/bin/busybox", "sleep", "2000000000"];
        node.import_program(&host.path("sandbox"), SANDBOX_IMAGE, &sleep)?;
        let mut cluster = Self {
            host,
            node,
            programs,
            processes: Vec::new(),
        };
        cluster.start_control_plane()?;
        cluster.start_kubelet()?;
        let ready = [
            "wait",
            "--for=condition=Ready",
            "--timeout=240s",
            "node/node1",
        ];
        host.ok(&wait_for(&cluster.kubectl(["get", "node/node1"])))?;
        host.run_for(&cluster.kubectl(ready), Limit::Boot)?
            .expect_code(0)?;
        host.ok(&wait_for(
            &cluster.kubectl(["get", "serviceaccount/default"]),
        ))?;
        cluster.apply(RUNTIME_CLASS)?;
        Ok(Some(cluster))
    }

    /// A call of `kubectl`.
    #[must_use]
    pub fn kubectl<S: Into<String>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        Command::new(format!("{}/kubectl", self.programs))
            .args(["--kubeconfig", &self.host.path("secrets/admin.conf")])
            .args(["--cache-dir", &self.host.path("kubectl")])
            .args(arguments)
    }

    /// Makes or changes objects.
    ///
    /// # Errors
    /// They are refused.
    pub fn apply(&self, objects: &str) -> Result<()> {
        let file = self.host.write("objects.yaml", objects)?;
        self.host.ok(&self.kubectl(["apply", "-f", &file]))?;
        Ok(())
    }

    /// Waits until a pod is in a phase, or that does not come; gives how `kubectl` sees it then.
    ///
    /// # Errors
    /// Another phase, with what Kubernetes tells of the pod.
    pub fn expect_phase(&self, pod: &str, phase: &str) -> Result<()> {
        let path = "jsonpath={.status.phase}";
        let get = self.kubectl(["get", "pod", pod, "-o", path]);
        let script = r#"phase=$0; for i in $(seq 400); do
            now=$("$@"); test "$now" = "$phase" && exit
            case $now in Failed|Succeeded) exit 1; esac; sleep 0.5
        done; exit 1"#;
        let wait = Command::new("bash")
            .args(["-c", script, phase])
            .wrapping(&get);
        let output = self.host.run_for(&wait, Limit::Boot)?;
        let described = self.host.run(&self.kubectl(["describe", "pod", pod]))?;
        output.expect_code(0).with_context(|| described.stdout)?;
        Ok(())
    }

    /// Waits until a pod's log has a text.
    ///
    /// # Errors
    /// It does not come.
    pub fn expect_log(&self, pod: &str, text: &str) -> Result<()> {
        let script = r#"text=$0; for i in $(seq 300); do
            "$@" | grep -q "$text" && exit; sleep 0.5
        done; "$@"; exit 1"#;
        let logs = self.kubectl(["logs", pod]);
        let wait = Command::new("bash")
            .args(["-c", script, text])
            .wrapping(&logs);
        self.host.run_for(&wait, Limit::Boot)?.expect_code(0)?;
        Ok(())
    }

    /// Deletes a pod and waits until it is gone.
    ///
    /// # Errors
    /// It stays.
    pub fn delete(&self, pod: &str) -> Result<Output> {
        let delete = self.kubectl(["delete", "pod", pod, "--wait", "--timeout=120s"]);
        let output = self.host.run_for(&delete, Limit::Boot)?;
        output.expect_code(0)?;
        Ok(output)
    }

    fn start_control_plane(&mut self) -> Result<()> {
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
            self.host.write(
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
        let tokens = self.host.write("secrets/tokens", &tokens)?;
        let accounts = self.host.path("secrets/accounts.key");
        self.spawn("etcd", &[("data-dir", &self.host.path("etcd"))])?;
        for (name, text) in certificates::proxy()? {
            self.host.write(&format!("secrets/{name}"), &text)?;
        }
        let secret = |name: &str| self.host.path(&format!("secrets/{name}"));
        let proxy = certificates::proxy_options(secret);
        let proxy = proxy.iter().map(|(name, value)| (*name, &**value));
        let options = [
            ("etcd-servers", "http://127.0.0.1:2379"),
            ("bind-address", "127.0.0.1"),
            ("advertise-address", ADDRESS),
            ("cert-dir", &self.host.path("apiserver")),
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
        self.spawn("kube-apiserver", &options)?;
        self.host
            .run_for(
                &wait_for(&self.kubectl(["get", "--raw=/readyz"])),
                Limit::Boot,
            )?
            .expect_code(0)?;
        let (controllers, scheduler) = (
            self.host.path("secrets/controllers.conf"),
            self.host.path("secrets/scheduler.conf"),
        );
        self.spawn(
            "kube-controller-manager",
            &[
                ("kubeconfig", &controllers),
                ("leader-elect", "false"),
                ("use-service-account-credentials", "true"),
                ("service-account-private-key-file", &accounts),
                ("cert-dir", &self.host.path("controllers")),
            ],
        )?;
        let more = [("kubeconfig", &*scheduler), ("leader-elect", "false")];
        self.spawn("kube-scheduler", &more)
    }

    fn start_kubelet(&mut self) -> Result<()> {
        let native = self.host.is_this_machine();
        let root = if native { self.make_cgroups()? } else { "/" };
        let config = self.host.write(
            "kubelet.yaml",
            &format!(
                "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n\
                 address: {ADDRESS}\nauthentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}\n\
                 authorization: {{mode: AlwaysAllow}}\ncgroupDriver: cgroupfs\ncgroupRoot: {root}\nfailSwapOn: false\n\
                 clusterDomain: cluster.local\nresolvConf: {}\nmakeIPTablesUtilChains: false\n\
                 imageGCHighThresholdPercent: 100\nsyncFrequency: 10s\nfileCheckFrequency: 0s\n\
                 nodeStatusUpdateFrequency: 2s\nvolumePluginDir: {}\n\
                 evictionHard: {{memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}}\n",
                self.host.path("resolv.conf"),
                self.host.path("volumes"),
            ),
        )?;
        let runtime = format!("unix://{}", self.host.path("node/sock"));
        self.spawn(
            "kubelet",
            &[
                ("config", &config),
                ("kubeconfig", &self.host.path("secrets/kubelet.conf")),
                ("root-dir", &self.host.path("kubelet")),
                ("container-runtime", "remote"),
                ("container-runtime-endpoint", &runtime),
                ("hostname-override", NODE),
                ("node-ip", ADDRESS),
                // On a test's own machine only it may be lowered.
                ("oom-score-adj", if native { "0" } else { "-999" }),
            ],
        )
    }

    /// Makes the control groups for the pods of a kubelet on this machine, which may have another one.
    fn make_cgroups(&self) -> Result<&'static str> {
        self.host.ok(&Command::script(format!(
            "cd /sys/fs/cgroup; for folder in . *; do
                 test -e $folder/cgroup.procs || continue; mkdir -p $folder/{CGROUP}
                 for file in cpuset.cpus cpuset.mems; do test ! -e $folder/$file ||
                     cat $folder/$file > $folder/{CGROUP}/$file; done
             done"
        )))?;
        Ok(CGROUP)
    }

    fn spawn(&mut self, program: &str, options: &[(&str, &str)]) -> Result<()> {
        let options = options
            .iter()
            .map(|(name, value)| format!("--{name}={value}"));
        // Messages go to a file: kilobytes a second, which nobody reads unless a test fails.
        let script = format!("exec \"$@\" > {program}.log 2>&1");
        let command = Command::new("bash")
            .args(["-c", &script, program])
            .args([format!("{}/{program}", self.programs)])
            .args(options)
            // The kubelet asks for a cloud's metadata for seconds otherwise.
            .env("AWS_EC2_METADATA_DISABLED", "true");
        self.processes.push(self.host.spawn(&command)?);
        Ok(())
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        for process in self.processes.iter().rev() {
            let _ = process.signal(15);
        }
        for process in self.processes.drain(..) {
            let _ = process.wait(Duration::from_secs(20));
        }
    }
}
