//! The program as a user sees it, as far as it goes without KVM.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Runs the program in `folder`, which holds its runtime folder too.
fn edgevmm(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_edgevmm"))
        .args(args)
        .current_dir(folder)
        .env("EDGEVMM_RUNTIME_DIR", folder.join("run"))
        .env_remove("EDGEVMM_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Expects success and returns what was printed.
fn succeed(folder: &Path, args: &[&str]) -> String {
    let output = edgevmm(folder, args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

/// Expects a refusal: the code, one line of reason, at most one of hint, and nothing else.
fn refuse(folder: &Path, args: &[&str], code: i32, expected: &[&str]) {
    let output = edgevmm(folder, args);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
    assert_eq!(stdout(&output), "", "{args:?}");
    for part in expected {
        assert!(message.contains(part), "{args:?}: {message}");
    }
    let lines: Vec<_> = message.lines().collect();
    assert!(lines[0].starts_with("edgevmm: "), "{message}");
    assert!(
        lines[1..].iter().all(|line| line.starts_with("hint: ")),
        "{message}"
    );
    assert!(lines.len() <= 2, "{message}");
    assert!(!folder.join("run").exists(), "{args:?} left something");
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("disk.qcow2"), "not looked into").unwrap();
    folder
}

#[test]
fn help_teaches() {
    let folder = folder();
    let help = succeed(folder.path(), &["--help"]);
    for part in ["Run a machine", "Exit codes:", "doctor", "guest crashed"] {
        assert!(help.contains(part), "{part}");
    }
    assert!(!help.contains("__vmm"));
    let help = succeed(folder.path(), &["run", "--help"]);
    for part in [
        "Examples:",
        "edgevmm run debian-12.qcow2",
        "--snapshot",
        "-p 2222:22",
        "Ctrl-A x",
    ] {
        assert!(help.contains(part), "{part}");
    }
    assert!(succeed(folder.path(), &["console", "--help"]).contains("Ctrl-A x detaches"));
}

#[test]
fn versions_and_completions() {
    let folder = folder();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        succeed(folder.path(), &["version"]),
        format!("edgevmm {version}\n")
    );
    let json = succeed(folder.path(), &["version", "--json"]);
    assert_eq!(json.trim(), format!(r#"{{"version":"{version}"}}"#));
    assert!(succeed(folder.path(), &["completions", "bash"]).contains("--snapshot"));
}

#[test]
fn a_dry_run_prints_what_config_reads() {
    let folder = folder();
    let path = folder.path();
    let yaml = succeed(
        path,
        &[
            "run",
            "--dry-run",
            "disk.qcow2",
            "-m",
            "512M",
            "-p",
            "2222:22",
        ],
    );
    assert!(
        yaml.contains("size: 512M") && yaml.contains("2222:22"),
        "{yaml}"
    );
    fs::write(path.join("vm.yaml"), &yaml).unwrap();
    assert_eq!(
        succeed(path, &["run", "--dry-run", "--config", "vm.yaml"]),
        yaml
    );
    let json = succeed(path, &["run", "--dry-run", "--json", "--config", "vm.yaml"]);
    fs::write(path.join("vm.json"), &json).unwrap();
    assert_eq!(
        succeed(path, &["run", "--dry-run", "--config", "vm.json"]),
        yaml
    );
    assert!(!path.join("run").exists());
}

#[test]
fn slips_are_told_in_a_line_and_leave_nothing() {
    let folder = folder();
    let path = folder.path();
    fs::write(
        path.join("bad.yaml"),
        "disks:\n- path: disk.qcow2\n  read_only: true\n",
    )
    .unwrap();
    fs::write(path.join("slip.yaml"), "memory:\n  sise: 1G\n").unwrap();
    let run = |args: &[&str], expected: &[&str]| {
        refuse(path, &[&["run"], args].concat(), 2, expected);
    };
    run(
        &["nowhere.qcow2"],
        &["Can't read disk image", "nowhere.qcow2", "No such file"],
    );
    run(&["."], &["is a directory"]);
    run(
        &["--disk", "disk.qcow2,backing=base.qcow2"],
        &["backing file", "base.qcow2"],
    );
    run(
        &["disk.qcow2", "--user-data", "none.yaml"],
        &["user-data", "none.yaml"],
    );
    run(&["--config", "none.yaml"], &["none.yaml", "No such file"]);
    run(
        &["--config", "bad.yaml"],
        &["bad.yaml", "line 3", "unknown key `read_only`"],
    );
    run(
        &["--config", "slip.yaml"],
        &["line 2", "`sise`", "did you mean `size`?"],
    );
    run(
        &["disk.qcow2", "-m", "900T"],
        &["900T of memory is more than this host's", "--memory"],
    );
    run(&["disk.qcow2", "--name", "../x"], &["can't name a machine"]);
    run(
        &["disk.qcow2", "--cpus", "4,cores=3"],
        &["4 vCPUs can't form 3 cores"],
    );
    run(
        &["disk.qcow2", "--initrd", "disk.qcow2"],
        &["needs a kernel"],
    );
    run(
        &["disk.qcow2", "--net", "none", "-p", "1:1"],
        &["there is none", "--net user"],
    );
    run(&["disk.qcow2", "disk.qcow2"], &["is there twice"]);
    run(&[], &["nothing to boot"]);
}

#[test]
fn broken_flags_name_the_flag() {
    let folder = folder();
    for (args, expected) in [
        (["--disk", "a,r0"], "unknown key `r0`: did you mean `ro`?"),
        (["--memory", "1GB"], "is ambiguous"),
        (["--cpus", "many"], "write a whole number from 0 to 255"),
        (["-p", "22"], "is not a port forward"),
        (["--net", "tap"], "write tap=NAME"),
        (["--console", "tty"], "`tty`"),
        (["--uuid", "x"], "--uuid"),
    ] {
        let flag = args[0].trim_start_matches('-');
        let args = [&["run", "disk.qcow2"][..], &args].concat();
        refuse(
            folder.path(),
            &args,
            2,
            &[expected, flag, "`edgevmm run --help`"],
        );
    }
    refuse(
        folder.path(),
        &["run", "--memroy", "1G"],
        2,
        &["--memroy", "'--memory'"],
    );
    refuse(
        folder.path(),
        &["stop"],
        2,
        &["<NAME>...", "`edgevmm stop --help`"],
    );
    refuse(folder.path(), &["inspct"], 2, &["'inspct'", "'inspect'"]);
    refuse(
        folder.path(),
        &["--log", "a=b=c", "ps"],
        2,
        &["`a=b=c` is no log filter", "level"],
    );
}

#[test]
fn machines_that_are_not_there() {
    let folder = folder();
    let path = folder.path();
    for command in [
        "console", "stop", "kill", "pause", "resume", "reset", "inspect", "rm", "wait", "logs",
    ] {
        refuse(
            path,
            &[command, "nobody"],
            2,
            &["There is no machine named nobody", "ps -a"],
        );
        refuse(path, &[command, "../run"], 2, &["can't name a machine"]);
    }
    assert_eq!(
        succeed(path, &["ps"]),
        "NAME   STATE   PID   UPTIME   CPUS   MEMORY\n"
    );
    assert_eq!(succeed(path, &["ps", "-a", "--json"]), "[]\n");
}

#[test]
fn what_a_dead_vmm_left_is_listed_and_removed() {
    let folder = folder();
    let path = folder.path();
    let runtime = edgevmm_api::RuntimeDir::new(path.join("run"));
    let claim = runtime.claim("ended").unwrap();
    let record = edgevmm_api::ExitRecord::now(edgevmm_api::ExitReason::GuestCrash, "triple fault");
    claim.open_exit().unwrap().write(&record).unwrap();
    drop(claim);
    drop(runtime.claim("lost").unwrap());
    let living = runtime.claim("living").unwrap();

    let list = succeed(path, &["ps", "-a"]);
    let state = |name: &str| {
        let line = list.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(
        (state("ended"), state("lost"), state("living")),
        ("crashed".into(), "lost".into(), "starting".into())
    );
    assert!(!succeed(path, &["ps"]).contains("ended"));
    assert!(succeed(path, &["inspect", "ended"]).contains("triple fault"));
    assert_eq!(edgevmm(path, &["wait", "ended"]).status.code(), Some(3));
    assert_eq!(edgevmm(path, &["wait", "lost"]).status.code(), Some(1));
    let busy = edgevmm(path, &["rm", "living"]);
    assert!(stderr(&busy).contains("is running"), "{}", stderr(&busy));
    assert_eq!(succeed(path, &["rm", "ended", "lost"]), "ended\nlost\n");
    let taken = edgevmm(path, &["run", "--name", "living", "disk.qcow2"]);
    assert_eq!(taken.status.code(), Some(2));
    assert!(
        stderr(&taken).contains("A machine named living is running"),
        "{}",
        stderr(&taken)
    );
    drop(living);
}

#[test]
fn doctor_looks_at_everything() {
    let folder = folder();
    let output = edgevmm(folder.path(), &["doctor", "--json"]);
    let checks: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let checks = checks.as_array().unwrap();
    let failed = checks.iter().any(|check| check["status"] == "fail");
    assert_eq!(output.status.code(), Some(i32::from(failed)));
    for name in [
        "kvm device",
        "kvm backend",
        "firmware",
        "user network",
        "tap devices",
        "cgroups",
    ] {
        assert!(checks.iter().any(|check| check["name"] == name), "{name}");
    }
    assert!(
        checks
            .iter()
            .all(|check| check["status"] == "ok" || check["fix"].is_string())
    );
}

#[test]
fn a_vmm_without_its_parent_refuses() {
    let folder = folder();
    let args = [
        "__vmm",
        "--dir",
        "/tmp",
        "--lock-fd",
        "77",
        "--ready-fd",
        "78",
    ];
    refuse(
        folder.path(),
        &args,
        1,
        &["The file descriptor 77 is not open"],
    );
    let args = [
        "__vmm",
        "--dir",
        "/tmp",
        "--lock-fd",
        "0",
        "--ready-fd",
        "1",
    ];
    refuse(folder.path(), &args, 1, &["standard stream"]);
}

#[test]
fn a_run_ends_though_nobody_reads_its_messages() {
    let folder = folder();
    fs::write(folder.path().join("kernel"), "none").unwrap();
    let (unread, mut full) = std::io::pipe().unwrap();
    full.write_all(&[0; 64 << 10]).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_edgevmm"))
        .args(["run", "--net", "none", "--kernel", "kernel", "-v"])
        .current_dir(folder.path())
        .env("EDGEVMM_RUNTIME_DIR", folder.path().join("run"))
        .stdin(Stdio::null())
        .stderr(full)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        match child.try_wait().unwrap() {
            None if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            status => break status,
        }
    };
    child.kill().unwrap();
    assert!(!status.unwrap().success());
    drop(unread);
}
