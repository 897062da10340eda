//! What containerd tells a shim that it starts, and what it wants to hear.
//!
//! containerd 2.3 and newer write `BootstrapParams` to standard input and read a `BootstrapResult`.
//! Older ones write the runtime's options, or nothing, and take a bare address, which means ttrpc and
//! version 2 of the task API in all of them.

use std::io::{self, Read};
use std::path::PathBuf;

use prost::Message;

use crate::cli::Cli;
use crate::proto::bootstrap::{Params, Result as BootstrapResult, RuntimeInfo, RuntimeVersion};

/// Longest input that is read, in bytes; options and extensions are a few hundred.
const MAX_INPUT: u64 = 1 << 20;
/// Folder of shims' sockets of a containerd that tells none.
const SOCKET_DIR: &str = "/run/containerd/s";
/// Longest folder of sockets, in bytes: what containerd allows, so that all paths fit a socket's.
const MAX_SOCKET_DIR: usize = 42;

/// How containerd wants to be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bootstrap {
    /// By the address alone.
    Address,
    /// By a message, with sockets in the folder given.
    Message(Option<PathBuf>),
}

impl Bootstrap {
    /// Tells by what containerd wrote to standard input.
    ///
    /// # Errors
    ///
    /// When it can't be read.
    pub fn read(input: impl Read, cli: &Cli) -> io::Result<Self> {
        let mut bytes = Vec::new();
        input.take(MAX_INPUT).read_to_end(&mut bytes)?;
        Ok(Self::parse(&bytes, cli))
    }

    /// Options of older containerds can be read as parameters too, so these must fit the flags.
    fn parse(bytes: &[u8], cli: &Cli) -> Self {
        match Params::decode(bytes) {
            Ok(params) if params.instance_id == cli.id && params.namespace == cli.namespace => {
                let folder = params.socket_dir.map(PathBuf::from);
                let usable =
                    |path: &PathBuf| path.is_absolute() && path.as_os_str().len() <= MAX_SOCKET_DIR;
                Self::Message(folder.filter(usable))
            }
            _ => Self::Address,
        }
    }

    /// Folder of shims' sockets.
    pub fn socket_dir(&self) -> PathBuf {
        match self {
            Self::Message(Some(folder)) => folder.clone(),
            _ => SOCKET_DIR.into(),
        }
    }

    /// What to print for a daemon that serves at `address`.
    pub fn reply(&self, address: &str) -> Vec<u8> {
        match self {
            Self::Address => address.as_bytes().to_vec(),
            Self::Message(_) => BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
            }
            .encode_to_vec(),
        }
    }
}

/// Answer to `-info`.
pub fn info() -> Vec<u8> {
    RuntimeInfo {
        name: crate::NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: String::new(),
        }),
    }
    .encode_to_vec()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::ffi::OsString;
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    fn cli() -> Cli {
        let line = "-id c1 -namespace k8s.io start".split(' ');
        Cli::parse(line.map(OsString::from)).unwrap()
    }

    fn params(id: &str, folder: Option<&str>) -> Vec<u8> {
        Params {
            instance_id: id.to_owned(),
            namespace: "k8s.io".to_owned(),
            containerd_version: "2.3.4".to_owned(),
            socket_dir: folder.map(ToOwned::to_owned),
            ..Params::default()
        }
        .encode_to_vec()
    }

    #[test]
    fn newer_containerds_get_a_message() {
        let bootstrap = Bootstrap::parse(&params("c1", Some("/run/k3s/s")), &cli());
        assert_eq!(bootstrap.socket_dir(), Path::new("/run/k3s/s"));
        let reply = bootstrap.reply("unix:///run/k3s/s/x");
        let reply = BootstrapResult::decode(reply.as_slice()).unwrap();
        assert_eq!((reply.version, reply.protocol.as_str()), (3, "ttrpc"));
        assert_eq!(reply.address, "unix:///run/k3s/s/x");
    }

    #[test]
    fn older_containerds_get_the_address() {
        let options = prost_types::Any {
            type_url: "runtimeoptions.v1.Options".to_owned(),
            value: b"k8s.io".to_vec(),
        };
        for input in [Vec::new(), options.encode_to_vec(), params("other", None)] {
            let bootstrap = Bootstrap::parse(&input, &cli());
            assert_eq!(bootstrap, Bootstrap::Address);
            assert_eq!(bootstrap.reply("unix:///a"), b"unix:///a");
        }
    }

    #[test]
    fn folders_that_fit_no_socket_are_not_used() {
        for folder in ["relative", &format!("/{}", "x".repeat(42))] {
            let bootstrap = Bootstrap::parse(&params("c1", Some(folder)), &cli());
            assert_eq!(bootstrap.socket_dir(), Path::new(SOCKET_DIR));
        }
    }

    proptest! {
        #[test]
        fn no_input_breaks_the_start(bytes: Vec<u8>) {
            let _ = Bootstrap::read(bytes.as_slice(), &cli()).unwrap();
        }
    }
}
