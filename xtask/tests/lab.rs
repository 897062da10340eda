//! The lab as the end-to-end tests use it. Skipped where it was not set up
//! (`cargo xtask lab setup`): this test must not download a distribution by surprise.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, SystemTime};

use xtask::lab::{Command, Lab, Layout, MachineEnded, TimedOut};

fn ready() -> bool {
    let ready = Layout::of_this_user().is_ready().unwrap_or(false);
    if !ready {
        eprintln!("skipped: the lab is not set up");
    }
    ready
}

#[test]
fn one_lab_runs_many_commands_at_once() {
    if !ready() {
        return;
    }
    let lab = Lab::start().unwrap();
    let kvm = lab
        .run(&Command::new("test").args(["-c", "/dev/kvm"]))
        .unwrap();
    assert!(kvm.success(), "{kvm:?}");

    let echo = lab
        .spawn(&Command::script(
            "while read -r line; do echo \"<$line>\"; done",
        ))
        .unwrap();
    echo.write(b"one\n").unwrap();
    let seen = echo
        .wait_for_stdout("<one>", 0, Duration::from_secs(30))
        .unwrap();
    // Meanwhile, another one fails, takes input and leaves a process behind.
    let script = "sleep 1000 & cat; echo bad >&2; exit 3";
    let output = lab.run(&Command::script(script).stdin("text")).unwrap();
    assert_eq!(
        (output.code, &*output.stdout, &*output.stderr),
        (3, "text", "bad\n")
    );
    echo.write(b"two\n").unwrap();
    echo.wait_for_stdout("<two>", seen, Duration::from_secs(30))
        .unwrap();
    echo.close_stdin().unwrap();
    let output = lab.wait(&echo, Some(Duration::from_secs(30))).unwrap();
    assert_eq!((output.code, &*output.stdout), (0, "<one>\n<two>\n"));

    let slow = Command::new("sleep")
        .arg("1000")
        .timeout(Duration::from_millis(300));
    assert!(lab.run(&slow).unwrap_err().is::<TimedOut>());
}

#[test]
fn files_go_in_and_out_unchanged() {
    if !ready() {
        return;
    }
    let lab = Lab::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..2_000_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(dir.path().join("here"), &bytes).unwrap();
    lab.put(&dir.path().join("here"), "/tmp/deep/there")
        .unwrap();
    lab.get("/tmp/deep/there", &dir.path().join("back"))
        .unwrap();
    assert!(std::fs::read(dir.path().join("back")).unwrap() == bytes);
    assert!(lab.get("/no/such/file", &dir.path().join("none")).is_err());
}

#[test]
fn clones_have_this_time_and_random_numbers_of_their_own() {
    if !ready() {
        return;
    }
    let command = Command::script("date +%s; head -c 16 /dev/urandom | od -An -tx1");
    let labs = [Lab::start().unwrap(), Lab::start().unwrap()];
    let output = labs.each_ref().map(|lab| lab.run(&command).unwrap().stdout);
    let lines = output.each_ref().map(|text| text.split_once('\n').unwrap());
    assert_ne!(lines[0].1, lines[1].1);
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    for (time, _) in lines {
        assert!(
            now.abs_diff(time.parse().unwrap()) < 30,
            "{time} is not about {now}"
        );
    }
}

#[test]
fn a_machine_that_ends_is_told_from_a_command_that_fails() {
    if !ready() {
        return;
    }
    let lab = Lab::start().unwrap();
    let error = lab
        .run(&Command::script("echo b > /proc/sysrq-trigger; sleep 100"))
        .unwrap_err();
    assert!(error.is::<MachineEnded>(), "{error:#}");
}
