//! Where and as whom to serve.

use std::net::SocketAddr;

use clap::Args;

/// The operator's Service, and its ServiceAccount.
const NAME: &str = "edgevmm-operator";

/// As the command line says it.
#[derive(Debug, Args)]
pub struct ServerArgs {
    /// Address to serve subresources and webhooks at.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "0.0.0.0:8443")]
    listen: SocketAddr,
    /// The operator's namespace.
    #[arg(long, default_value = "edgevmm")]
    namespace: String,
    /// The user that the operator is to the cluster [default: its ServiceAccount].
    #[arg(long)]
    user: Option<String>,
}

impl ServerArgs {
    /// As the server takes it.
    pub fn settings(self) -> Settings {
        let account = || format!("system:serviceaccount:{}:{NAME}", self.namespace);
        Settings {
            listen: self.listen,
            user: self.user.unwrap_or_else(account),
            namespace: self.namespace,
            service: NAME.to_owned(),
        }
    }
}

/// Where and as whom to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Address to listen at.
    pub listen: SocketAddr,
    /// The operator's namespace.
    pub namespace: String,
    /// The operator's Service.
    pub service: String,
    /// The user that the operator itself is, which may change what others may not.
    pub user: String,
}

impl Settings {
    /// What the API server calls us.
    pub fn names(&self) -> Vec<String> {
        let name = format!("{}.{}.svc", self.service, self.namespace);
        vec![format!("{name}.cluster.local"), name]
    }

    /// Those of the manifests.
    #[cfg(test)]
    pub fn example() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8443)),
            namespace: "edgevmm".to_owned(),
            service: NAME.to_owned(),
            user: format!("system:serviceaccount:edgevmm:{NAME}"),
        }
    }
}
