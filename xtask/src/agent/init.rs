//! L1's process 1: sets up what any Linux has after boot, then starts the agent and reaps orphans.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::wait;

/// Modules that tests inside L1 expect to find loaded.
const MODULES: &[&str] = &[
    "tun",
    "vhost_net",
    "vhost_vsock",
    "virtio_net",
    "bridge",
    "veth",
    "macvtap",
    "loop",
    "crc32c_generic",
    "nf_tables",
    "9p",
    "9pnet_virtio",
];

/// Brings L1 up and stays as its process 1.
///
/// # Errors
/// The agent cannot be started. Anything less is left to the first command that misses it.
pub fn run() -> Result<()> {
    for (source, target, kind, options) in [
        ("proc", "/proc", "proc", ""),
        ("sysfs", "/sys", "sysfs", ""),
        ("tmpfs", "/run", "tmpfs", "mode=0755"),
        ("tmpfs", "/tmp", "tmpfs", "mode=1777,size=90%"),
        ("devpts", "/dev/pts", "devpts", "ptmxmode=0666,mode=0620"),
        ("tmpfs", "/dev/shm", "tmpfs", "mode=1777"),
        ("cgroup2", "/sys/fs/cgroup", "cgroup2", ""),
        ("debugfs", "/sys/kernel/debug", "debugfs", ""),
        ("tracefs", "/sys/kernel/tracing", "tracefs", ""),
    ] {
        report(target, mount_at(source, target, kind, options));
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        report(link, symlink(target, link).map_err(Into::into));
    }
    for (path, text) in [
        ("/proc/sys/kernel/hostname", "lab"),
        ("/proc/sys/net/ipv4/ip_forward", "1"),
        (
            "/sys/fs/cgroup/cgroup.subtree_control",
            "+cpu +memory +pids +io +cpuset",
        ),
        ("/etc/resolv.conf", "nameserver 10.0.2.3\n"),
    ] {
        report(path, fs::write(path, text).map_err(Into::into));
    }
    // Shadow page tables never finish under emulated SVM: nested paging is asked for by name.
    report("kvm-amd", call("modprobe", &["kvm-amd", "npt=1"]));
    for module in MODULES {
        report(module, call("modprobe", &["-q", module]));
    }
    for arguments in [
        ["link", "set", "lo", "up"].as_slice(),
        &["link", "set", "eth0", "up"],
        &["address", "add", "10.0.2.15/24", "dev", "eth0"],
        &["route", "add", "default", "via", "10.0.2.2"],
    ] {
        report("network", call("ip", arguments));
    }
    // Far above the kernel's default, as a service manager would set it.
    report(
        "open files",
        setrlimit(Resource::RLIMIT_NOFILE, 1024, 1 << 20).map_err(Into::into),
    );
    let itself = std::env::current_exe().context("Cannot find the agent's program")?;
    loop {
        let mut agent = Command::new(&itself)
            .args(["agent", "serve"])
            .spawn()
            .context("Cannot start the agent")?;
        let pid = agent.id();
        loop {
            match wait() {
                Ok(status)
                    if status
                        .pid()
                        .is_some_and(|ended| ended.as_raw().unsigned_abs() == pid) =>
                {
                    break;
                }
                Err(Errno::ECHILD) => break,
                _ => {}
            }
        }
        eprintln!("lab: the agent ended, starting another");
        let _ = agent.try_wait();
    }
}

/// Mounts a file system, making its mount point.
pub(super) fn mount_at(source: &str, target: &str, kind: &str, options: &str) -> Result<()> {
    if !Path::new(target).exists() {
        fs::create_dir_all(target)?;
    }
    mount(
        Some(source),
        target,
        Some(kind),
        MsFlags::empty(),
        Some(options),
    )?;
    Ok(())
}

fn call(program: &str, arguments: &[&str]) -> Result<()> {
    let status = Command::new(program).args(arguments).status()?;
    anyhow::ensure!(status.success(), "{program} {} failed", arguments.join(" "));
    Ok(())
}

fn report(what: &str, result: Result<()>) {
    if let Err(error) = result {
        eprintln!("lab: {what}: {error:#}");
    }
}
