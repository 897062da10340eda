//! `edgevmm image` as a user sees it: what it prints, how it ends, and what it leaves when it is
//! ended.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::unistd::Pid;
use serde_json::Value;

const MIB: usize = 1 << 20;

fn edgevmm(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edgevmm"));
    command
        .arg("image")
        .args(args)
        .current_dir(folder)
        .env_remove("EDGEVMM_LOG")
        .stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Expects an exit code and gives what was printed.
fn expect(folder: &Path, code: i32, args: &[&str]) -> String {
    let output = edgevmm(folder, args).output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    text(&output.stdout)
}

fn succeed(folder: &Path, args: &[&str]) -> String {
    expect(folder, 0, args)
}

/// Expects a refusal: a line of reason with `part`, at most one of hint, nothing on stdout.
fn refuse(folder: &Path, code: i32, args: &[&str], part: &str) {
    let output = edgevmm(folder, args).output().unwrap();
    expect_refusal(&output, code, part);
}

fn expect_refusal(output: &Output, code: i32, part: &str) {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(message.contains(part), "{message}");
    assert!(message.starts_with("edgevmm: "), "{message}");
    assert!(message.lines().count() <= 2, "{message}");
    assert_eq!(text(&output.stdout), "");
}

fn tool(folder: &Path, program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .current_dir(folder)
        .output()
        .unwrap();
    let said = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {said}");
    said
}

fn qemu_img(folder: &Path, args: &[&str]) -> String {
    tool(folder, "qemu-img", args)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// `len` bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut bytes)
        .unwrap();
    bytes
}

/// A folder with a raw image, `disk.raw`, of so many MiB of noise.
fn folder(mib: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("disk.raw"), noise(mib * MIB)).unwrap();
    folder
}

#[test]
fn help_teaches_each_verb() {
    let folder = folder(1);
    let help = succeed(folder.path(), &["--help"]);
    for verb in [
        "info",
        "create",
        "convert",
        "check",
        "resize",
        "overlay",
        "commit",
        "rebase",
        "map",
        "compact",
        "compare",
        "snapshots",
    ] {
        assert!(help.contains(&format!("  {verb} ")), "{verb}: {help}");
        let help = succeed(folder.path(), &[verb, "--help"]);
        assert!(help.contains("Example"), "{verb}: {help}");
        assert!(
            help.contains(&format!("edgevmm image {verb}")),
            "{verb}: {help}"
        );
    }
    refuse(folder.path(), 2, &["inof", "x"], "'info'");
}

#[test]
fn a_life_of_an_image() {
    let folder = folder(4);
    let path = folder.path();
    succeed(path, &["convert", "disk.raw", "base.qcow2"]);
    qemu_img(path, &["compare", "disk.raw", "base.qcow2"]);
    let said = succeed(path, &["info", "base.qcow2"]);
    assert!(
        said.contains("qcow2, version 3") && said.contains("4 MiB (4194304 bytes)"),
        "{said}"
    );
    let json: Value =
        serde_json::from_str(&succeed(path, &["info", "--json", "base.qcow2"])).unwrap();
    assert_eq!(
        (&json["format"], json["virtual_size"].as_u64()),
        (&"qcow2".into(), Some(4 << 20))
    );

    succeed(
        path,
        &["overlay", "--size", "8M", "base.qcow2", "web.qcow2"],
    );
    tool(
        path,
        "qemu-io",
        &[
            "-c",
            "write -P 7 5M 1M",
            "-c",
            "write -P 8 0 64k",
            "web.qcow2",
        ],
    );
    let pair = "web.qcow2,backing=base.qcow2";
    let said = succeed(path, &["info", pair]);
    assert!(said.contains("recorded; checked"), "{said}");
    let said = expect(path, 5, &["compare", pair, "base.qcow2"]);
    assert_eq!(said, "The images differ from byte 0 on\n");
    let json: Value =
        serde_json::from_str(&expect(path, 5, &["compare", "--json", pair, "disk.raw"])).unwrap();
    assert_eq!(json["first_difference"], 0);
    let map = succeed(path, &["map", pair]);
    assert!(
        map.starts_with("START ") && map.contains("unallocated"),
        "{map}"
    );
    let map: Value = serde_json::from_str(&succeed(path, &["map", "--json", pair])).unwrap();
    assert!(
        map.as_array()
            .unwrap()
            .iter()
            .any(|range| range["depth"] == 1),
        "{map}"
    );

    succeed(path, &["convert", "-c", pair, "whole.qcow2"]);
    succeed(path, &["compare", pair, "whole.qcow2"]);
    succeed(
        path,
        &[
            "rebase",
            "web.qcow2",
            "--from",
            "base.qcow2",
            "--onto",
            "disk.raw",
        ],
    );
    succeed(
        path,
        &["compare", "web.qcow2,backing=disk.raw", "whole.qcow2"],
    );
    succeed(path, &["commit", "web.qcow2", "disk.raw"]);
    succeed(path, &["compare", "disk.raw", "whole.qcow2"]);
    assert!(succeed(path, &["resize", "disk.raw", "+1M"]).contains("9 MiB"));
    refuse(path, 2, &["resize", "disk.raw", "1M"], "--shrink");
    succeed(path, &["resize", "--shrink", "disk.raw", "1M"]);
    assert!(succeed(path, &["compact", "whole.qcow2"]).contains("takes up"));
    assert!(succeed(path, &["check", "whole.qcow2"]).contains("is sound"));
    assert_eq!(
        succeed(path, &["snapshots", "--json", "whole.qcow2"]),
        "[]\n"
    );
    succeed(path, &["create", "empty.qcow2", "20G"]);
    assert!(qemu_img(path, &["info", "empty.qcow2"]).contains("20 GiB"));
}

#[test]
fn slips_are_told_and_change_nothing() {
    let folder = folder(1);
    let path = folder.path();
    qemu_img(
        path,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "disk.raw",
            "-F",
            "raw",
            "over.qcow2",
        ],
    );
    fs::write(path.join("taken"), "taken").unwrap();
    let before = names(path);
    refuse(path, 2, &["info", "none"], "does not exist");
    refuse(path, 2, &["convert", "over.qcow2", "x"], "backing=");
    refuse(path, 2, &["convert", "disk.raw", "taken"], "--force");
    refuse(path, 2, &["convert", "disk.raw", "no/x"], "no/x");
    refuse(
        path,
        2,
        &["convert", "disk.raw,ro", "x"],
        "unknown key `ro`",
    );
    refuse(
        path,
        2,
        &["convert", "--to", "raw", "-c", "disk.raw", "x"],
        "--compress is for qcow2",
    );
    refuse(path, 2, &["create", "x", "1000"], "1024");
    refuse(
        path,
        2,
        &["create", "x", "1G", "--cluster-size", "3000"],
        "cluster",
    );
    refuse(path, 2, &["commit", "disk.raw", "disk.raw"], "disk.raw");
    refuse(
        path,
        2,
        &["rebase", "over.qcow2", "--onto", "disk.raw"],
        "--from",
    );
    refuse(
        path,
        2,
        &["check", "--repair", "disk.raw"],
        "can't be mended",
    );
    assert_eq!(names(path), before);
    assert_eq!(fs::read(path.join("taken")).unwrap(), b"taken");
    succeed(path, &["convert", "--force", "disk.raw", "taken"]);
    succeed(path, &["compare", "disk.raw", "taken"]);
}

#[test]
fn damage_has_its_exit_codes() {
    let folder = folder(1);
    let path = folder.path();
    qemu_img(path, &["convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]);
    let file = File::options()
        .read(true)
        .write(true)
        .open(path.join("disk.qcow2"))
        .unwrap();
    let number = |at| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = number(number(48));
    let clusters = file.metadata().unwrap().len() / 65536;
    file.write_all_at(&[0, 1], block + 2 * clusters).unwrap();
    file.set_len((clusters + 1) * 65536).unwrap();
    let said = expect(path, 6, &["check", "disk.qcow2"]);
    assert!(said.contains("--repair=leaks"), "{said}");
    succeed(path, &["check", "--repair=leaks", "disk.qcow2"]);
    file.write_all_at(&[0, 0], block + 2 * 5).unwrap();
    let said = expect(path, 5, &["check", "disk.qcow2"]);
    assert!(said.contains("is damaged"), "{said}");
    let json: Value =
        serde_json::from_str(&expect(path, 5, &["check", "--json", "disk.qcow2"])).unwrap();
    assert!(json["corruptions"].as_u64() > Some(0), "{json}");
    succeed(path, &["check", "--repair", "disk.qcow2"]);
    qemu_img(path, &["check", "disk.qcow2"]);
    qemu_img(path, &["compare", "disk.raw", "disk.qcow2"]);
}

/// Starts work on an image and ends it by a signal after so long, unless it has ended.
fn end_after(mut child: Child, delay: Duration, signal: Signal) -> Output {
    thread::sleep(delay);
    if child.try_wait().unwrap().is_none() {
        let pid = i32::try_from(child.id()).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }
    child.wait_with_output().unwrap()
}

fn start(folder: &Path, args: &[&str]) -> Child {
    edgevmm(folder, args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// When to end some work: at moments all over the time that it takes, on a host that may be faster
/// or slower by now than it was.
struct Moments {
    whole: Duration,
    round: u32,
    wanted: u32,
}

impl Moments {
    /// Does the work once. So often is it then to be ended before its end.
    fn of(folder: &Path, args: &[&str], wanted: u32) -> Self {
        let start = Instant::now();
        succeed(folder, args);
        Self {
            whole: start.elapsed(),
            round: 0,
            wanted,
        }
    }

    fn next(&mut self) -> Option<Duration> {
        self.round += 1;
        assert!(self.round < 200, "The work is always done too early");
        (self.wanted > 0).then(|| self.whole * (self.round % 10) / 10)
    }

    /// Notes whether it was ended before its end.
    fn note(&mut self, ended: bool) {
        if ended {
            self.wanted -= 1;
        } else {
            self.whole = self.whole * 8 / 10;
        }
    }
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let folder = folder(32);
    let path = folder.path();
    let args = ["convert", "disk.raw", "new.qcow2"];
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let mut moments = Moments::of(path, &args, 6);
        fs::remove_file(path.join("new.qcow2")).unwrap();
        while let Some(delay) = moments.next() {
            let output = end_after(start(path, &args), delay, signal);
            if output.status.success() {
                qemu_img(path, &["compare", "disk.raw", "new.qcow2"]);
                fs::remove_file(path.join("new.qcow2")).unwrap();
            } else if output.status.signal().is_none() {
                expect_refusal(
                    &output,
                    128 + signal as i32,
                    "Interrupted; nothing was made",
                );
            }
            moments.note(!output.status.success());
            if output.status.signal().is_some() && path.join("new.qcow2").exists() {
                // Ended between the last step and the exit: then all of it is there.
                qemu_img(path, &["compare", "disk.raw", "new.qcow2"]);
                fs::remove_file(path.join("new.qcow2")).unwrap();
            }
            let mut left = names(path);
            if signal == Signal::SIGKILL {
                // Where files can't be without a name.
                left.retain(|name| !name.ends_with(".partial"));
            }
            assert_eq!(left, ["disk.raw"]);
        }
    }
}

#[test]
fn a_killed_compaction_leaves_the_image() {
    let folder = folder(32);
    let path = folder.path();
    qemu_img(path, &["convert", "-O", "qcow2", "disk.raw", "image"]);
    let mut moments = Moments::of(path, &["compact", "image"], 8);
    while let Some(delay) = moments.next() {
        let output = end_after(start(path, &["compact", "image"]), delay, Signal::SIGKILL);
        moments.note(!output.status.success());
        qemu_img(path, &["check", "image"]);
        qemu_img(path, &["compare", "-f", "raw", "disk.raw", "image"]);
    }
}

/// Whenever a commit is killed, both together have the content that they had, and doing it once
/// more brings it all into the base.
#[test]
fn a_killed_commit_is_done_once_more() {
    for format in ["raw", "qcow2"] {
        let folder = folder(24);
        let path = folder.path();
        let prepare = || {
            for name in ["base", "over.qcow2"] {
                let _ = fs::remove_file(path.join(name));
            }
            qemu_img(path, &["create", "-q", "-f", format, "base", "24M"]);
            succeed(path, &["overlay", "base", "over.qcow2"]);
            let args = [
                "convert",
                "-n",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "disk.raw",
                "over.qcow2",
            ];
            qemu_img(path, &args);
        };
        prepare();
        let mut moments = Moments::of(path, &["commit", "over.qcow2", "base"], 8);
        while let Some(delay) = moments.next() {
            prepare();
            let child = start(path, &["commit", "over.qcow2", "base"]);
            let output = end_after(child, delay, Signal::SIGKILL);
            // QEMU reads both, whether the commit had begun or not.
            qemu_img(path, &["compare", "-f", "raw", "disk.raw", "over.qcow2"]);
            qemu_img(path, &["check", "over.qcow2"]);
            if format == "qcow2" {
                // A base that was being written may have lost clusters, but is not damaged.
                let mut check = Command::new("qemu-img");
                check.args(["check", "-q", "base"]).current_dir(path);
                assert!([0, 3].contains(&check.status().unwrap().code().unwrap()));
            }
            let pair = ["compare", "disk.raw", "over.qcow2,backing=base"];
            let compared = edgevmm(path, &pair).output().unwrap();
            let halfway = !compared.status.success();
            if halfway {
                expect_refusal(&compared, 2, "do it once more by `edgevmm image commit`");
            }
            moments.note(halfway);
            assert!(halfway || output.status.success() || output.status.signal().is_some());
            succeed(path, &["commit", "over.qcow2", "base"]);
            qemu_img(
                path,
                &["compare", "-f", "raw", "-F", format, "disk.raw", "base"],
            );
            succeed(path, &pair);
        }
    }
}

/// Has files of the program grow no longer than so many bytes: writes past that fail, as they do on
/// a full disk.
fn with_file_size(mut command: Command, bytes: u64) -> Output {
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || {
            signal(Signal::SIGXFSZ, SigHandler::SigIgn)?;
            setrlimit(Resource::RLIMIT_FSIZE, bytes, bytes)?;
            Ok(())
        });
    }
    command.output().unwrap()
}

#[test]
fn a_write_that_fails_leaves_source_and_target_right() {
    let folder = folder(8);
    let path = folder.path();
    let limit = 3 * 1024 * 1024 + 4096;
    for args in [
        &["convert", "disk.raw", "new.qcow2"][..],
        &["convert", "--to", "qcow2", "-c", "disk.raw", "new.qcow2"],
    ] {
        let output = with_file_size(edgevmm(path, args), limit);
        expect_refusal(&output, 1, "new.qcow2");
        assert_eq!(names(path), ["disk.raw"]);
    }
    let output = with_file_size(
        edgevmm(path, &["convert", "--to", "raw", "disk.raw", "x"]),
        limit,
    );
    assert!(!output.status.success());
    assert_eq!(names(path), ["disk.raw"]);

    qemu_img(path, &["convert", "-O", "qcow2", "disk.raw", "image"]);
    let before = fs::read(path.join("image")).unwrap();
    let output = with_file_size(edgevmm(path, &["compact", "image"]), limit);
    expect_refusal(&output, 1, "image");
    assert!(fs::read(path.join("image")).unwrap() == before);
    assert_eq!(names(path), ["disk.raw", "image"]);

    qemu_img(path, &["create", "-q", "-f", "qcow2", "base", "8M"]);
    succeed(path, &["overlay", "base", "over.qcow2"]);
    let args = [
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "disk.raw",
        "over.qcow2",
    ];
    qemu_img(path, &args);
    let output = with_file_size(edgevmm(path, &["commit", "over.qcow2", "base"]), limit);
    expect_refusal(&output, 1, "base");
    qemu_img(path, &["compare", "-f", "raw", "disk.raw", "over.qcow2"]);
    qemu_img(path, &["check", "over.qcow2"]);
    succeed(path, &["commit", "over.qcow2", "base"]);
    qemu_img(path, &["compare", "disk.raw", "base"]);
    qemu_img(path, &["check", "base"]);
}

/// A reader that has enough of a map is no failure.
#[test]
fn a_map_may_be_cut_short() {
    let folder = folder(1);
    let path = folder.path();
    let file = File::create(path.join("striped")).unwrap();
    for at in 0..10_000 {
        file.write_all_at(b"x", at * 8192).unwrap();
    }
    let mut child = start(path, &["map", "striped"]);
    let mut some = [0; 100];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), text(&output.stderr)),
        (Some(0), String::new())
    );
}

#[test]
fn images_in_use_are_left_alone() {
    let folder = folder(1);
    let path = folder.path();
    qemu_img(path, &["convert", "-O", "qcow2", "disk.raw", "image"]);
    // Reads commands from a pipe that stays open, with the image locked.
    let mut user = Command::new("qemu-io")
        .args(["-f", "qcow2", "image"])
        .current_dir(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = [0; 8];
    user.stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut prompt)
        .unwrap();
    for args in [
        &["compact", "image"][..],
        &["resize", "image", "2M"],
        &["check", "--repair", "image"],
        &["convert", "--force", "disk.raw", "image"],
        &["convert", "image", "new"],
    ] {
        refuse(path, 2, args, "is in use by process");
    }
    succeed(path, &["info", "image"]);
    user.kill().unwrap();
    user.wait().unwrap();
    succeed(path, &["resize", "image", "2M"]);
}
