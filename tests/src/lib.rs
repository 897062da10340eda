//! What the end-to-end tests are made of: a [`Host`] that runs `edgevmm` (this machine where its
//! KVM boots stock kernels, else a machine of the nested-KVM lab), and [`Guest`], the other end of
//! a machine's console.
//!
//! A test is a function of a host, run by [`on_host`] or one of its sisters. It waits for events,
//! never for time to pass; limits of patience are those of the host, as a lab on a busy machine is
//! some ten times slower than hardware.

mod api_server;
mod binary;
mod cluster;
mod command;
mod containerd;
mod daemon;
mod guest;
mod host;
mod native;
mod prepare;
mod process;
mod slots;

use anyhow::{Context, Result};
use xtask::lab::Machine;

pub use api_server::{ApiServer, FakeKubelet, Request};
pub use binary::{example, operator};
pub use cluster::Cluster;
pub use command::{Command, Output};
pub use containerd::Node;
pub use guest::{Guest, SMALL};
pub use host::{Host, Limit};
pub use prepare::{image, net_rom};
pub use process::Process;
pub use xtask::images::{Image, Images};
pub use xtask::lab::WindowSize;
pub use xtask::pods::Containerd;

/// Runs a test where guests boot.
///
/// # Errors
/// Whatever the test returns, after what all its commands said was printed.
pub fn on_host(test: impl Fn(&Host) -> Result<()>) -> Result<()> {
    retried(Host::start, test)
}

/// As [`on_host`], for a test that makes network interfaces or takes rights away, which takes root:
/// without it, the lab is the place.
///
/// # Errors
/// As [`on_host`].
pub fn as_root(test: impl Fn(&Host) -> Result<()>) -> Result<()> {
    retried(Host::start_as_root, test)
}

/// As [`on_host`], on a host with at least so many MiB of RAM.
///
/// # Errors
/// As [`on_host`].
pub fn on_big_host(memory_mib: u32, test: impl Fn(&Host) -> Result<()>) -> Result<()> {
    let machine = Machine {
        memory_mib,
        ..Machine::default()
    };
    retried(|| Host::start_with(&machine), test)
}

/// Runs a test of a Kubernetes of its own, in a lab; none where there are no programs for it.
///
/// # Errors
/// As [`on_host`].
pub fn in_cluster(test: impl Fn(&Cluster<'_>) -> Result<()>) -> Result<()> {
    let Some(saved) = cluster::saved()? else {
        eprintln!("Skipped: this distribution has no sources of Kubernetes");
        return Ok(());
    };
    retried(
        || Host::resumed(&cluster::MACHINE, &saved.snapshot),
        |host| {
            let cluster = Cluster::on(host);
            test(&cluster).inspect_err(|_| cluster.report())
        },
    )
}

/// Runs a test on this machine, whatever its KVM can do; for tests that start no guest.
///
/// # Errors
/// As [`on_host`].
pub fn on_this_machine(test: impl Fn(&Host) -> Result<()>) -> Result<()> {
    retried(Host::this_machine, test)
}

/// Runs a test; a second time when it was the lab that broke, which is no failure of what is tested.
fn retried(start: impl Fn() -> Result<Host>, test: impl Fn(&Host) -> Result<()>) -> Result<()> {
    let host = start()?;
    let Err(error) = attempt(&host, &test) else {
        return Ok(());
    };
    if !host.is_broken() {
        return Err(error);
    }
    eprintln!("The lab's machine ended by itself, so once more on another one: {error:#}");
    drop(host);
    attempt(&start()?, &test)
}

fn attempt(host: &Host, test: impl Fn(&Host) -> Result<()>) -> Result<()> {
    test(host).with_context(|| {
        host.print_machines();
        format!("Failed on {host}; what its commands said is above")
    })
}
