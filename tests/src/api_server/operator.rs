//! The operator in a cluster without nodes: a process on this machine, with the rights that its
//! manifests give it.

use std::net::TcpListener;
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::audit::{self, Request};
use super::{ApiServer, GLANCE, PATIENCE};
use crate::binary;

/// The program, and its service.
pub(super) const PROGRAM: &str = "edgevmm-operator";
/// Who it is to the cluster.
pub(super) const USER: &str = "system:serviceaccount:edgevmm:edgevmm-operator";
/// Where its manifests put it.
const NAMESPACE: &str = "edgevmm";

impl ApiServer {
    /// Puts the operator into the cluster as its manifests say, but for where it runs: it is a process
    /// here, with the rights that the manifests give it. Waits until it serves.
    ///
    /// # Errors
    /// It does not build, start, or come to serve.
    pub fn install_operator(&mut self) -> Result<()> {
        let image = ["--image", "local.test/edgevmm-operator:1"];
        let manifests = Command::new(binary::operator()?)
            .args(["manifests", "--namespace", NAMESPACE])
            .args(image)
            .output()?;
        ensure!(manifests.status.success(), "{manifests:?}");
        let listener = TcpListener::bind("127.0.0.1:0")?;
        self.operator = listener.local_addr()?.port();
        drop(listener);
        let manifests = String::from_utf8(manifests.stdout)?;
        let parts = manifests.split("---\n");
        let elsewhere = ["kind: Service\n", "kind: Deployment\n"];
        let parts = parts.filter(|part| !elsewhere.iter().any(|kind| part.contains(kind)));
        let parts: Vec<_> = parts.collect();
        let manifests = parts.join("---\n");
        let port = format!("port: {}}}", self.operator);
        self.apply(&manifests.replace("port: 443}", &port))?;
        self.kubectl(["wait", "--for=condition=established", "crd", "--all"])?
            .expect_code(0)?;
        self.route(NAMESPACE, PROGRAM)?;
        self.resume_operator()
    }

    /// Starts the operator that was installed, and waits until it serves.
    ///
    /// # Errors
    /// It does not start, or come to serve.
    pub fn resume_operator(&mut self) -> Result<()> {
        let listen = format!("--listen=127.0.0.1:{}", self.operator);
        let namespace = format!("--namespace={NAMESPACE}");
        let mut command = Command::new(binary::operator()?);
        command.args(["run", &listen, &namespace]);
        command.env("KUBECONFIG", self.path("operator.conf"));
        self.spawn(PROGRAM, &command)?;
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.get("/apis/subresources.kubevirt.io/v1/version") {
            if Instant::now() > deadline {
                return Err(error.context("The operator does not come to serve"));
            }
            thread::sleep(GLANCE);
        }
        Ok(())
    }

    /// Where the operator listens that was installed.
    #[must_use]
    pub fn operator_address(&self) -> (&'static str, u16) {
        ("127.0.0.1", self.operator)
    }

    /// Ends the operator at once.
    ///
    /// # Errors
    /// It does not run, or end.
    pub fn stop_operator(&mut self) -> Result<()> {
        self.stop(PROGRAM)
    }

    /// What the operator has asked so far, when it was installed. A watch is there once it has ended.
    ///
    /// # Errors
    /// The audit log can't be read.
    pub fn operator_requests(&self) -> Result<Vec<Request>> {
        audit::read(&self.dir.path().join("audit.log"))
    }

    /// The operator's process.
    ///
    /// # Errors
    /// There is none.
    pub fn operator_pid(&self) -> Result<i32> {
        let operator = self.processes.iter().find(|(name, _)| name == PROGRAM);
        let (_, running) = operator.context("There is no operator")?;
        Ok(running.pid())
    }
}
