//! A pod's VMM that its guest took over: each of its threads tries to reach the host, another pod's
//! machine and the cluster's credentials.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::libc;

use crate::puppet::Argument::{self, Number, Text};
use crate::puppet::{Outcome, Puppet, threads};
use crate::shim::{Shim, eventually};

/// A thread of KVM's own that counts as one of the VMM's; it runs no code of the VMM's.
const OF_THE_KERNEL: &str = "kvm-";

type Attempt<'a> = (&'static str, libc::c_long, Vec<Argument<'a>>);

/// Calls that lead out, which each come through where there is no sandbox. The last one makes another
/// program of the process.
fn attempts<'a>(secret: &'a str, other: u32) -> Vec<Attempt<'a>> {
    const SEIZE: i64 = 0x4206;
    let other = Number(i64::from(other));
    let none = Number(0);
    let here = Number(i64::from(libc::AT_FDCWD));
    let folder = Text("/tmp/edgevmm-taken-over");
    let socket = |family: i32, kind: i32| vec![Number(family.into()), Number(kind.into()), none];
    let anonymous = Number((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).into());
    let code = Number((libc::PROT_READ | libc::PROT_EXEC).into());
    vec![
        ("a credential", libc::SYS_openat, vec![here, Text(secret)]),
        ("the same", libc::SYS_open, vec![Text(secret)]),
        (
            "the host",
            libc::SYS_openat,
            vec![here, Text("/etc/passwd")],
        ),
        ("KVM", libc::SYS_openat, vec![here, Text("/dev/kvm")]),
        ("a process", libc::SYS_open, vec![Text("/proc/1/status")]),
        ("a folder", libc::SYS_mkdir, vec![folder, Number(0o700)]),
        ("its end", libc::SYS_rmdir, vec![folder]),
        ("a signal", libc::SYS_kill, vec![other, none]),
        ("a thread", libc::SYS_tgkill, vec![other, other, none]),
        ("a handle", libc::SYS_pidfd_open, vec![other, none]),
        ("tracing", libc::SYS_ptrace, vec![Number(SEIZE), other]),
        (
            "TCP",
            libc::SYS_socket,
            socket(libc::AF_INET, libc::SOCK_STREAM),
        ),
        (
            "UDP",
            libc::SYS_socket,
            socket(libc::AF_INET6, libc::SOCK_DGRAM),
        ),
        (
            "Unix",
            libc::SYS_socket,
            socket(libc::AF_UNIX, libc::SOCK_STREAM),
        ),
        (
            "netlink",
            libc::SYS_socket,
            socket(libc::AF_NETLINK, libc::SOCK_RAW),
        ),
        (
            "mounts",
            libc::SYS_unshare,
            vec![Number(libc::CLONE_NEWNS.into())],
        ),
        ("root", libc::SYS_setresuid, vec![none, none, none]),
        ("a file", libc::SYS_memfd_create, vec![Text("x"), none]),
        (
            "code",
            libc::SYS_mmap,
            vec![none, Number(4096), code, anonymous, Number(-1)],
        ),
        (
            "a program",
            libc::SYS_execve,
            vec![Text("/bin/true"), none, none],
        ),
    ]
}

/// Makes all attempts in a thread, and tells which came through.
fn made(puppet: &Puppet, attempts: &[Attempt<'_>]) -> Vec<&'static str> {
    let made = attempts.iter().filter(|(_, number, arguments)| {
        matches!(puppet.call(*number, arguments), Outcome::Made(_))
    });
    made.map(|(what, ..)| *what).collect()
}

/// What is wrong with the state of a thread.
fn wrong(status: &str) -> Vec<&str> {
    let right = |line: &&str| {
        let (name, value) = line.split_once(':').unwrap_or_default();
        let mut values = value.split_whitespace();
        match name {
            "Uid" | "Gid" => values.all(|id| id != "0"),
            "Groups" => values.next().is_none(),
            "NoNewPrivs" => values.eq(["1"]),
            "Seccomp" => values.eq(["2"]),
            "CapInh" | "CapPrm" | "CapEff" | "CapBnd" | "CapAmb" => {
                values.all(|set| set.bytes().all(|digit| digit == b'0'))
            }
            _ => true,
        }
    };
    status.lines().filter(|line| !right(line)).collect()
}

/// Which file it is, whatever it is called.
fn identity(path: &Path) -> (u64, u64) {
    let file = fs::metadata(path).unwrap();
    (file.dev(), file.ino())
}

/// Files in a folder, as [`identity`] has them.
fn files_in(folder: &Path) -> Vec<(u64, u64)> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    entries
        .flat_map(|entry| match entry.file_type().unwrap() {
            kind if kind.is_dir() => files_in(&entry.path()),
            kind if kind.is_file() => vec![identity(&entry.path())],
            _ => Vec::new(),
        })
        .collect()
}

/// What a process has open on the host beside its `own` files.
fn strange(process: u32, own: &[(u64, u64)]) -> Vec<PathBuf> {
    let descriptors = fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let descriptors = descriptors.map(|entry| entry.unwrap().path());
    let strange = descriptors.filter_map(|descriptor| {
        let target = fs::read_link(&descriptor).unwrap();
        let text = target.to_str().unwrap();
        // Pipes, sockets and events; memory; and what the kernel tells of the process itself.
        let nameless = !text.starts_with('/') || text.starts_with("/memfd:");
        let status = text == format!("/{process}/status");
        (!nameless && !status && !own.contains(&identity(&descriptor))).then_some(target)
    });
    strange.collect()
}

/// A machine of one pod tries to reach another's.
pub async fn reaches_nothing(shim: &Shim, other: &Shim) {
    for shim in [shim, other] {
        shim.run("a").await;
    }
    let ((daemon, vmm), (_, neighbour)) = (shim.pids("a").await, other.pids("a").await);
    let secret = other.bundle_path("a").join("token");
    fs::write(&secret, "secret").unwrap();
    let attempts = attempts(secret.to_str().unwrap(), neighbour);

    // All of them are attempts: a process of root's own gets through with each.
    let mut plain = Command::new("sleep").arg("600").spawn().unwrap();
    let plain_id = i32::try_from(plain.id()).unwrap();
    let asleep = || fs::read_to_string(format!("/proc/{plain_id}/syscall")).unwrap();
    eventually("no sleep", || asleep().starts_with("230 ")).await;
    let all: Vec<_> = attempts.iter().map(|(what, ..)| *what).collect();
    assert_eq!(made(&Puppet::hold(plain_id), &attempts), all);
    plain.kill().unwrap();
    plain.wait().unwrap();

    let folder = Path::new("/run/edgevmm").join(shim.machine("a").unwrap());
    let bundle = shim.bundle_path("a");
    let folders = [folder, bundle, shim.image()];
    let mut own: Vec<_> = folders.iter().flat_map(|it| files_in(it)).collect();
    own.push(identity(Path::new("/dev/null")));
    assert_eq!(strange(vmm, &own), Vec::<PathBuf>::new());
    let root = fs::read_dir(format!("/proc/{vmm}/root")).unwrap();
    assert_eq!(root.count(), 0);
    for namespace in ["pid", "mnt"] {
        let of = |process| fs::read_link(format!("/proc/{process}/ns/{namespace}")).unwrap();
        assert_ne!(of(vmm), of(daemon));
    }
    let mut names = Vec::new();
    for (name, id) in threads(vmm) {
        if name.starts_with(OF_THE_KERNEL) {
            continue;
        }
        let status = fs::read_to_string(format!("/proc/{vmm}/task/{id}/status")).unwrap();
        assert_eq!(wrong(&status), Vec::<&str>::new(), "{name}");
        assert_eq!(
            made(&Puppet::hold(id), &attempts),
            Vec::<&str>::new(),
            "{name}"
        );
        names.push(name);
    }
    for name in ["vcpu0", "devices", "starter"] {
        assert!(names.iter().any(|it| it == name), "{name} in {names:?}");
    }
    other.kill("a", 9).await.unwrap();
    assert_eq!(other.wait("a", "").await, Ok(137));
}
