//! What a sandbox consists of, and what is missing on a host.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{caps, filter, landlocked, namespaces};

/// A layer of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// Another user than root; there are no capabilities in any case.
    User,
    /// A mount namespace with an empty root.
    Mounts,
    /// A process namespace, for a VMM that was started as one of its own.
    Processes,
    /// Landlock.
    Landlock,
    /// System call filters.
    Seccomp,
}

impl Layer {
    /// Its name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Layer::User => "user",
            Layer::Mounts => "mounts",
            Layer::Processes => "processes",
            Layer::Landlock => "landlock",
            Layer::Seccomp => "seccomp",
        }
    }
}

/// The layers of a process, and why some are missing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers {
    active: Vec<(Layer, String)>,
    missing: Vec<(Layer, String)>,
}

impl Layers {
    pub(crate) fn has(&mut self, layer: Layer, what: impl Into<String>) {
        self.active.push((layer, what.into()));
    }

    /// Says what is missing.
    pub(crate) fn lacks(&mut self, layer: Layer, why: impl Into<String>) {
        self.missing.push((layer, why.into()));
    }

    /// Those that are active, with a word on each.
    #[must_use]
    pub fn active(&self) -> &[(Layer, String)] {
        &self.active
    }

    /// Those that this host does not allow, and why.
    #[must_use]
    pub fn missing(&self) -> &[(Layer, String)] {
        &self.missing
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        let active = self.active.iter().map(|(layer, what)| ("", layer, what));
        let missing = self.missing.iter().map(|(layer, why)| ("no ", layer, why));
        for (no, layer, text) in active.chain(missing) {
            let comma = if first { "" } else { ", " };
            first = false;
            write!(f, "{comma}{no}{} ({text})", layer.name())?;
        }
        Ok(())
    }
}

/// Which layers this host allows a VMM that this user starts, as far as can be tried without
/// changing this process, which has one thread.
#[must_use]
pub fn host_layers() -> Layers {
    let mut layers = Layers::default();
    namespaces::try_mounts(&mut layers);
    caps::choose(None, &mut layers);
    landlocked::Rules::new(&mut layers);
    filter::Filters::new(|_| &[], &mut layers);
    layers
}
