//! The command line, as containerd writes it: flags with one dash as Go has them, then a verb.

use std::ffi::OsString;
use std::path::PathBuf;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start a daemon for a pod, or find the one that is there, and print its address.
    Start,
    /// Be that daemon; the listening socket is standard input.
    Daemon,
    /// Clear up what a dead daemon left of a container.
    Delete,
    /// Hold a container's namespaces, and become its VMM when told to.
    Hold,
    /// Describe this runtime.
    Info,
    /// Print the version.
    Version,
}

/// A command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Cli {
    /// The verb.
    pub action: Action,
    /// ID of the container; empty where it needs none.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's socket.
    pub address: String,
    /// Folder of the container; the current one when absent.
    pub bundle: Option<PathBuf>,
    /// The daemon's socket.
    pub socket: Option<PathBuf>,
}

/// Why a command line makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CliError {
    /// A flag is unknown.
    #[error("containerd-shim-edgevmm-v1 has no flag `{0}`; it is meant to be run by containerd")]
    Flag(String),
    /// A flag lacks its value.
    #[error("The flag `-{0}` needs a value")]
    Value(String),
    /// The verb is missing or unknown.
    #[error(
        "`{0}` is not start or delete; containerd-shim-edgevmm-v1 is meant to be run by containerd"
    )]
    Verb(String),
    /// The ID or the namespace can't be one.
    #[error("`{0}` is not an identifier as containerd has them")]
    Identifier(String),
    /// An argument is not UTF-8.
    #[error("The argument {0:?} is not UTF-8")]
    Text(OsString),
}

impl Cli {
    /// Reads a command line without the program's name.
    ///
    /// # Errors
    ///
    /// Says which argument makes no sense.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, CliError> {
        let mut cli = Self {
            action: Action::Start,
            id: String::new(),
            namespace: String::new(),
            address: String::new(),
            bundle: None,
            socket: None,
        };
        let mut action = None;
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let argument = argument.into_string().map_err(CliError::Text)?;
            let Some(flag) = argument.strip_prefix('-') else {
                action = Some(verb(&argument)?);
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, mut value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => continue,
                "info" => {
                    action = Some(Action::Info);
                    continue;
                }
                "v" | "version" => {
                    action = Some(Action::Version);
                    continue;
                }
                _ => {}
            }
            if value.is_none() {
                let next = arguments.next().map(OsString::into_string).transpose();
                value = next.map_err(CliError::Text)?;
            }
            let value = value.ok_or_else(|| CliError::Value(name.to_owned()));
            match name {
                "id" => cli.id = value?,
                "namespace" => cli.namespace = value?,
                "address" => cli.address = value?,
                "bundle" => {
                    cli.bundle =
                        Some(value?.into()).filter(|path: &PathBuf| *path != PathBuf::new());
                }
                "socket" => cli.socket = Some(value?.into()),
                // The events' way is ttrpc, so containerd's program is not needed.
                "publish-binary" => drop(value?),
                _ => return Err(CliError::Flag(argument)),
            }
        }
        cli.action = action.ok_or_else(|| CliError::Verb(String::new()))?;
        if matches!(cli.action, Action::Start | Action::Daemon | Action::Delete) {
            check_identifier(&cli.id)?;
            check_identifier(&cli.namespace)?;
        }
        Ok(cli)
    }
}

fn verb(text: &str) -> Result<Action, CliError> {
    match text {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        "daemon" => Ok(Action::Daemon),
        "hold" => Ok(Action::Hold),
        _ => Err(CliError::Verb(text.to_owned())),
    }
}

/// Checks an identifier by containerd's rule: letters and digits, with single `-`, `_` or `.`
/// between them, at most 76 bytes. So it can be part of a path.
///
/// # Errors
///
/// When it is none.
pub fn check_identifier(text: &str) -> Result<(), CliError> {
    let separator = |byte: u8| b"-_.".contains(&byte);
    let bytes = text.as_bytes();
    let allowed = bytes
        .iter()
        .all(|byte| byte.is_ascii_alphanumeric() || separator(*byte));
    let ends = bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric);
    if allowed && ends && bytes.len() <= 76 {
        Ok(())
    } else {
        Err(CliError::Identifier(text.escape_debug().to_string()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Cli, CliError> {
        Cli::parse(text.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_lines_of_containerd_are_read() {
        let cli = parse(
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id ab-1 \
             -debug -bundle /b delete",
        );
        let expected = Cli {
            action: Action::Delete,
            id: "ab-1".to_owned(),
            namespace: "k8s.io".to_owned(),
            address: "/run/c.sock".to_owned(),
            bundle: Some("/b".into()),
            socket: None,
        };
        assert_eq!(cli, Ok(expected));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("--id=a --namespace=b start").unwrap().id, "a");
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(parse("-x y start"), Err(CliError::Flag("-x".into())));
        assert_eq!(parse("-id"), Err(CliError::Value("id".into())));
        assert_eq!(parse("-id a"), Err(CliError::Verb(String::new())));
        for id in ["", "..", "a/b", "-a", "a-", &"a".repeat(77)] {
            assert!(check_identifier(id).is_err(), "{id}");
        }
        check_identifier(&"a".repeat(76)).unwrap();
    }

    proptest! {
        #[test]
        fn no_line_panics(line: Vec<String>) {
            let _ = Cli::parse(line.into_iter().map(OsString::from));
        }
    }
}
