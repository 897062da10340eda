//! Kubernetes' API server on this machine, without nodes: what a controller talks to.

mod audit;
pub(crate) mod certificates;
mod kubelet;
mod operator;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use crate::command::Output;
use crate::host::tail;
use crate::native::Running;
use crate::{binary, prepare};

pub use audit::Request;
pub use kubelet::FakeKubelet;

/// How long anything may take, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at what a test waits for.
const GLANCE: Duration = Duration::from_millis(50);
/// Attempts at a start, as somebody else may take a port that was free.
const ATTEMPTS: u32 = 3;

const SERVER: &str = "kube-apiserver";

const RUNTIME_CLASS: &str = "
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: edgevmm}
handler: edgevmm
";

/// An API server with its etcd. Dropping it ends all that was started by it and removes all files.
///
/// Requests of others that it passes on (aggregated APIs, webhooks) reach a server of the test's by
/// [`ApiServer::route`].
pub struct ApiServer {
    programs: PathBuf,
    port: u16,
    etcd: u16,
    operator: u16,
    processes: Vec<(String, Running)>,
    runtime: Runtime,
    client: Client,
    dir: TempDir,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { port, dir, .. } = self;
        write!(formatter, "ApiServer({port}, {})", dir.path().display())
    }
}

impl ApiServer {
    /// Starts one and waits until it is ready. None where there are no programs for it.
    ///
    /// # Errors
    /// The programs can't be had, or don't start.
    pub fn start() -> Result<Option<Self>> {
        let Some(programs) = prepare::pods()?.kubernetes()? else {
            eprintln!("Skipped: this distribution has no sources of Kubernetes");
            return Ok(None);
        };
        let mut attempt = 1;
        loop {
            match Self::attempt(&programs) {
                Err(error) if attempt < ATTEMPTS => eprintln!("Once more: {error:#}"),
                result => return result.map(Some),
            }
            attempt += 1;
        }
    }

    fn attempt(programs: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("evm-api-").tempdir()?;
        certificates::write(dir.path())?;
        // All three at once, so that they differ.
        let taken = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0"));
        let mut ports = Vec::new();
        for listener in taken {
            ports.push(listener?.local_addr()?.port());
        }
        let &[port, etcd, peers] = &*ports else {
            bail!("No three ports")
        };
        write_config(dir.path(), "admin", port)?;
        write_config(dir.path(), "controllers", port)?;
        write_config(dir.path(), "operator", port)?;
        write_config(dir.path(), "user", port)?;
        // By whom, with which token, in which groups.
        let tokens = format!(
            "admin,admin,1,system:masters\n\
             controllers,system:kube-controller-manager,2,system:masters\n\
             operator,{},3,system:serviceaccounts\n\
             user,user,4,users\n",
            operator::USER
        );
        fs::write(dir.path().join("tokens"), tokens)?;
        fs::write(dir.path().join("audit.yaml"), audit::policy(operator::USER))?;
        let runtime = runtime()?;
        let config = dir.path().join("admin.conf");
        let client = runtime.block_on(connect(&config))?;
        let mut server = Self {
            programs: programs.to_owned(),
            port,
            etcd,
            operator: 0,
            processes: Vec::new(),
            runtime,
            client,
            dir,
        };
        server.start_etcd(etcd, peers)?;
        server.start_server()?;
        server.apply(RUNTIME_CLASS)?;
        Ok(server)
    }

    /// Starts the controller manager with these controllers of it, like `garbagecollector`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start_controllers(&mut self, names: &[&str]) -> Result<()> {
        let options = [
            ("kubeconfig", self.path("controllers.conf")),
            ("leader-elect", "false".to_owned()),
            ("controllers", names.join(",")),
            ("use-service-account-credentials", "false".to_owned()),
            ("cert-dir", self.path("controllers")),
            ("secure-port", "0".to_owned()),
            ("port", "0".to_owned()),
        ];
        self.spawn_part("kube-controller-manager", &options)
    }

    /// The configuration of a client that may do everything.
    #[must_use]
    pub fn kubeconfig(&self) -> String {
        self.path("admin.conf")
    }

    /// The path of a file in the test's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// A client of Rust's, and the runtime for it.
    #[must_use]
    pub const fn client(&self) -> (&Client, &Runtime) {
        (&self.client, &self.runtime)
    }

    /// Runs `kubectl` to its end.
    ///
    /// # Errors
    /// It can't be started, or takes too long.
    pub fn kubectl<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Output> {
        let mut command = Command::new(self.programs.join("kubectl"));
        command.args(["--kubeconfig", &self.kubeconfig()]);
        command.args(["--cache-dir", &self.path("kubectl")]);
        let arguments: Vec<_> = arguments.into_iter().collect();
        let shown: Vec<_> = arguments.iter().map(AsRef::as_ref).collect();
        command.args(&shown).current_dir(self.dir.path());
        let running = Running::spawn(&mut command, false)?;
        running.close_stdin();
        let output = running.wait(PATIENCE);
        let output = output.with_context(|| format!("kubectl {}", shown.join(" ")))?;
        let said = tail(&output.stderr, 2000).trim_end();
        eprintln!("+ kubectl {} -> {} {said}", shown.join(" "), output.code);
        Ok(output)
    }

    /// Makes or changes objects, by `kubectl apply`.
    ///
    /// # Errors
    /// They are refused.
    pub fn apply(&self, objects: &str) -> Result<()> {
        let file = tempfile::NamedTempFile::new_in(self.dir.path())?;
        fs::write(file.path(), objects)?;
        let path = file.path().display().to_string();
        self.kubectl(["apply", "-f", &path])?.expect_code(0)?;
        Ok(())
    }

    /// The object at a path of the API, unless there is none.
    ///
    /// # Errors
    /// The request fails otherwise.
    pub fn get(&self, path: &str) -> Result<Option<Value>> {
        match self.request("GET", path, None) {
            Err(error) if is_not_found(&error) => Ok(None),
            result => result.map(Some),
        }
    }

    /// Makes an object, in the collection at a path.
    ///
    /// # Errors
    /// It is refused.
    pub fn create(&self, path: &str, object: &Value) -> Result<Value> {
        self.request("POST", path, Some(("application/json", object)))
    }

    /// Merges something into the object, or its part, at a path: what is null is removed.
    ///
    /// # Errors
    /// It is refused.
    pub fn patch(&self, path: &str, change: &Value) -> Result<Value> {
        self.request(
            "PATCH",
            path,
            Some(("application/merge-patch+json", change)),
        )
    }

    /// Puts something to a path, as parts of machines take it.
    ///
    /// # Errors
    /// It is refused.
    pub fn put(&self, path: &str, object: &Value) -> Result<()> {
        let object = serde_json::to_vec(object)?;
        let request = http::Request::put(path).header("content-type", "application/json");
        let answer = self.client.request_text(request.body(object)?);
        let answer = self.runtime.block_on(answer);
        answer.map(drop).with_context(|| format!("PUT {path}"))
    }

    /// Does something as `user`, of whom the cluster knows no more than that name.
    ///
    /// # Errors
    /// It is refused.
    pub fn as_user(&self, method: &str, path: &str, object: &Value) -> Result<Value> {
        let config = self.dir.path().join("user.conf");
        let kind = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let request = http::Request::builder().method(method).uri(path);
        let request = request.header("content-type", kind);
        let request = request.body(serde_json::to_vec(object)?)?;
        let answer = self.runtime.block_on(async {
            let client = connect(&config).await?;
            anyhow::Ok(client.request_text(request).await?)
        });
        let text = answer.with_context(|| format!("{method} {path}"))?;
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    /// Deletes the object at a path; its finalizers may keep it.
    ///
    /// # Errors
    /// It is refused.
    pub fn delete(&self, path: &str) -> Result<()> {
        self.request("DELETE", path, None).map(drop)
    }

    /// Waits until the object at a path is as wanted, and gives it.
    ///
    /// # Errors
    /// It does not come to be so, with what it is.
    pub fn wait_for(
        &self,
        path: &str,
        wanted: &str,
        is_so: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let found = self.wait(path, |object| object.filter(|it| is_so(it)).cloned());
        found.with_context(|| format!("Waited for {path} to be {wanted}"))
    }

    /// Waits until there is no object at a path.
    ///
    /// # Errors
    /// There still is one, with what it is.
    pub fn wait_until_gone(&self, path: &str) -> Result<()> {
        let gone = self.wait(path, |object| object.is_none().then_some(()));
        gone.with_context(|| format!("Waited for {path} to be gone"))
    }

    fn wait<T>(&self, path: &str, ready: impl Fn(Option<&Value>) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let object = self.get(path)?;
            if let Some(value) = ready(object.as_ref()) {
                return Ok(value);
            }
            ensure!(
                Instant::now() < deadline,
                "It is still {}",
                serde_json::to_string_pretty(&object)?
            );
            thread::sleep(GLANCE);
        }
    }

    fn request(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> Result<Value> {
        let mut request = http::Request::builder().method(method).uri(path);
        let mut bytes = Vec::new();
        if let Some((kind, value)) = body {
            request = request.header("content-type", kind);
            bytes = serde_json::to_vec(value)?;
        }
        let request = request.body(bytes)?;
        let answer = self.runtime.block_on(self.client.request(request));
        answer.with_context(|| format!("{method} {path}"))
    }

    /// Lets the API server find a server on this machine as a service, whatever its port.
    ///
    /// # Errors
    /// It is refused.
    pub fn route(&self, namespace: &str, service: &str) -> Result<()> {
        self.apply(&format!(
            "apiVersion: v1\nkind: Service\n\
             metadata: {{name: {service}, namespace: {namespace}}}\n\
             spec: {{type: ExternalName, externalName: 127.0.0.1}}\n"
        ))
    }

    /// Starts a node without containers.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start_kubelet(&self) -> Result<FakeKubelet> {
        FakeKubelet::start(self.kubeconfig().as_ref())
    }

    /// Says that a pod ended, its containers with an exit code.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn end_pod(&self, namespace: &str, name: &str, code: i32) -> Result<()> {
        let end = kubelet::end(&self.client, namespace, name, code);
        self.runtime.block_on(end)
    }

    /// Starts the operator against this server, which ends with it.
    ///
    /// # Errors
    /// It does not build or start.
    pub fn start_operator(&mut self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(binary::operator()?);
        command.args(arguments).env("KUBECONFIG", self.kubeconfig());
        self.spawn(operator::PROGRAM, &command)
    }

    fn start_etcd(&mut self, port: u16, peers: u16) -> Result<()> {
        let (client, peer) = (local("http", port), local("http", peers));
        let options = [
            ("data-dir", self.path("etcd")),
            ("listen-client-urls", client.clone()),
            ("advertise-client-urls", client),
            ("listen-peer-urls", peer.clone()),
            ("initial-advertise-peer-urls", peer.clone()),
            ("initial-cluster", format!("default={peer}")),
        ];
        self.spawn_part("etcd", &options)
    }

    /// Starts the API server, again after [`ApiServer::stop_server`], and waits until it is ready.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_server(&mut self) -> Result<()> {
        let options = [
            ("etcd-servers", local("http", self.etcd)),
            ("bind-address", "127.0.0.1".to_owned()),
            ("advertise-address", "127.0.0.1".to_owned()),
            ("secure-port", self.port.to_string()),
            ("audit-policy-file", self.path("audit.yaml")),
            ("audit-log-path", self.path("audit.log")),
            ("cert-dir", self.path("server")),
            ("tls-cert-file", self.path("server.crt")),
            ("tls-private-key-file", self.path("server.key")),
            ("token-auth-file", self.path("tokens")),
            ("anonymous-auth", "false".to_owned()),
            ("authorization-mode", "RBAC".to_owned()),
            // Nobody makes the accounts of namespaces.
            ("disable-admission-plugins", "ServiceAccount".to_owned()),
            ("service-cluster-ip-range", "10.96.0.0/24".to_owned()),
            ("service-account-issuer", "https://localhost".to_owned()),
            (
                "service-account-signing-key-file",
                self.path("accounts.key"),
            ),
            ("service-account-key-file", self.path("accounts.pub")),
            ("endpoint-reconciler-type", "none".to_owned()),
        ];
        let proxy = certificates::proxy_options(|name| self.path(name));
        let options: Vec<_> = options.into_iter().chain(proxy).collect();
        self.spawn_part(SERVER, &options)?;
        self.wait_until_ready()
    }

    /// Ends the API server at once; etcd keeps what it had.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop_server(&mut self) -> Result<()> {
        self.stop(SERVER)
    }

    fn stop(&mut self, program: &str) -> Result<()> {
        let place = self.processes.iter().position(|(name, _)| name == program);
        let place = place.with_context(|| format!("There is no {program}"))?;
        let (_, running) = self.processes.remove(place);
        running.signal(nix::libc::SIGKILL)?;
        running.wait(PATIENCE)?;
        Ok(())
    }

    fn spawn_part(&mut self, program: &str, options: &[(&str, String)]) -> Result<()> {
        let options = options
            .iter()
            .map(|(name, value)| format!("--{name}={value}"));
        let mut command = Command::new(self.programs.join(program));
        command.args(options);
        self.spawn(program, &command)
    }

    /// Starts a program whose messages go to a file.
    fn spawn(&mut self, name: &str, command: &Command) -> Result<()> {
        // It also ends when the test is killed, and so drops nothing.
        let script = r#"exec setpriv --pdeathsig KILL "$@" > "$0.log" 2>&1"#;
        let mut shell = Command::new("bash");
        shell.args(["-c", script, name]).arg(command.get_program());
        shell.args(command.get_args()).current_dir(self.dir.path());
        for (name, value) in command.get_envs() {
            shell.env(name, value.unwrap_or_default());
        }
        let running = Running::spawn(&mut shell, false)?;
        running.close_stdin();
        self.processes.push((name.to_owned(), running));
        Ok(())
    }

    fn wait_until_ready(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.runtime.block_on(ready(&self.client)) {
            for (name, running) in &self.processes {
                ensure!(running.is_running(), "{name} ended: {error:#}");
            }
            if Instant::now() > deadline {
                return Err(error.context("The API server does not get ready"));
            }
            thread::sleep(GLANCE);
        }
        Ok(())
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        while let Some((name, running)) = self.processes.pop() {
            let log = fs::read_to_string(self.dir.path().join(format!("{name}.log")));
            let log = log.unwrap_or_default();
            eprintln!("--- the end of what {name} wrote:\n{}", last_words(&log));
            let _ = running.signal(nix::libc::SIGKILL);
            let _ = running.wait(Duration::from_secs(10));
        }
    }
}

fn runtime() -> std::io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

fn local(scheme: &str, port: u16) -> String {
    format!("{scheme}://127.0.0.1:{port}")
}

/// The end of a log; or of a Go program that died, the beginning of what it says of that.
fn last_words(log: &str) -> &str {
    let death = ["\npanic: ", "\nfatal error: ", "\nSIGSEGV"];
    let death = death.iter().filter_map(|words| log.find(words)).min();
    let end = death.map_or(log.len(), |start| log.len().min(start.saturating_add(3000)));
    tail(log.get(..end).unwrap_or(log), 3000)
}

fn write_config(dir: &Path, user: &str, port: u16) -> Result<()> {
    let server = local("https", port);
    let authority = dir.join("ca.crt");
    let config = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: x\n\
         clusters: [{{name: c, cluster: {{server: \"{server}\", certificate-authority: {}}}}}]\n\
         users: [{{name: u, user: {{token: {user}}}}}]\n\
         contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n",
        authority.display()
    );
    Ok(fs::write(dir.join(format!("{user}.conf")), config)?)
}

async fn connect(config: &Path) -> Result<Client> {
    let config = Kubeconfig::read_from(config)?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

async fn ready(client: &Client) -> Result<()> {
    let request = http::Request::get("/readyz").body(Body::empty())?;
    let status = client.send(request).await?.status();
    ensure!(status.is_success(), "Not ready: {status}");
    Ok(())
}

fn is_not_found(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<kube::Error>();
    matches!(error, Some(kube::Error::Api(status)) if status.code == 404)
}
