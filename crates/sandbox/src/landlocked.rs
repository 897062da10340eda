//! Landlock: no path at all may be opened by a thread, and no TCP port bound or connected to.
//!
//! What is open stays usable. Signals are not scoped: before Linux 6.15 that kept threads from
//! each other as well. They are left to the process namespace and seccomp.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr,
    RulesetCreated, Scope,
};

use crate::report::{Layer, Layers};

/// The newest interface that is known; older ones do as much as they can.
const NEWEST: ABI = ABI::V6;

/// A rule set without rules.
#[derive(Debug)]
pub(crate) struct Rules(RulesetCreated);

impl Rules {
    pub(crate) fn new(layers: &mut Layers) -> Option<Rules> {
        let abi = match abi() {
            Ok(abi) => abi,
            Err(error) => {
                layers.lacks(Layer::Landlock, format!("this kernel has none: {error}"));
                return None;
            }
        };
        match create() {
            Ok(rules) => {
                layers.has(Layer::Landlock, format!("version {abi}"));
                Some(Rules(rules))
            }
            Err(error) => {
                layers.lacks(Layer::Landlock, error.to_string());
                None
            }
        }
    }

    /// Puts them on the calling thread and those that it starts.
    pub(crate) fn apply(&self) -> io::Result<()> {
        let rules = self.0.try_clone()?;
        rules.restrict_self().map(drop).map_err(io::Error::other)
    }
}

fn create() -> Result<RulesetCreated, landlock::RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::AbstractUnixSocket)?
        .create()
}

/// The version of the kernel's interface.
fn abi() -> io::Result<i64> {
    const VERSION: u32 = 1;
    let none = std::ptr::null::<u8>();
    // SAFETY: asked for its version, the call reads nothing.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    if abi < 1 {
        return Err(io::Error::last_os_error());
    }
    Ok(abi)
}
