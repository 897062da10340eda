//! Machines in the background: listed, paused, reset, stopped, killed, removed; and how they end.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Limit, SMALL, as_root, on_host};
use serde_json::Value;

/// How long a machine is paused, in seconds.
const PAUSE: u64 = 8;

/// SIGTERM.
const TERMINATE: i32 = 15;

fn shell_arguments(host: &Host, words: &str, more: &[&str]) -> Result<Vec<String>> {
    let mut arguments = Guest::shell_arguments(host, words)?;
    arguments.extend(SMALL.iter().chain(more).map(ToString::to_string));
    Ok(arguments)
}

/// The exit code of a command of `edgevmm`.
fn call(host: &Host, arguments: &[&str]) -> Result<i32> {
    Ok(host.run(&host.edgevmm(arguments.iter().copied()))?.code)
}

/// The machines that `ps --json` lists, as `name:state`.
fn listed(host: &Host, all: &[&str]) -> Result<Vec<String>> {
    let ps = host.edgevmm(["ps", "--json"]).args(all.iter().copied());
    let machines: Value = serde_json::from_str(&host.ok(&ps)?)?;
    let machines = machines.as_array().context("ps prints no list")?;
    let text = |machine: &Value, key: &str| machine[key].as_str().unwrap_or("?").to_owned();
    Ok(machines
        .iter()
        .map(|machine| format!("{}:{}", text(machine, "name"), text(machine, "state")))
        .collect())
}

fn inspect(host: &Host, name: &str) -> Result<Value> {
    Ok(serde_json::from_str(
        &host.ok(&host.edgevmm(["inspect", "--json", name]))?,
    )?)
}

#[test]
fn two_machines_in_the_background() -> Result<()> {
    on_host(|host| {
        for name in ["one", "two"] {
            let arguments = shell_arguments(host, "", &["--detach", "--name", name])?;
            ensure!(host.ok(&host.edgevmm(arguments))? == name);
        }
        ensure!(listed(host, &[])? == ["one:running", "two:running"]);
        let taken = shell_arguments(host, "", &["--detach", "--name", "one"])?;
        ensure!(
            host.run(&host.edgevmm(taken))?.code == 2,
            "A name was taken twice"
        );

        let mut one = Guest::start(host, ["console", "one"])?;
        let mut two = Guest::start(host, ["console", "two"])?;
        one.expect_shell()?;
        two.expect_shell()?;

        pause_and_resume(host, &mut one, &mut two)?;

        ensure!(call(host, &["reset", "one"])? == 0);
        one.expect_shell()?;
        ensure!(inspect(host, "one")?["resets"] == 1);
        ensure!(inspect(host, "two")?["resets"] == 0);
        two.sh("true")?;

        ensure!(
            call(host, &["rm", "two"])? == 2,
            "A running machine was removed"
        );
        kill_and_remove(host)?;
        two.end(Limit::Command)?.expect_code(0)?;
        one.sh("true")?;

        // This guest has no driver for the power button.
        ensure!(call(host, &["stop", "--timeout", "2", "one"])? == 4);
        ensure!(inspect(host, "one")?["exit"]["reason"] == "stop-timeout");
        ensure!(listed(host, &[])?.is_empty());
        Ok(())
    })
}

/// Seconds since 1970 that a guest shows more than the host, and since its boot.
fn clocks(host: &Host, guest: &mut Guest<'_>) -> Result<(i64, i64)> {
    let times = guest.sh("date +%s; cut -d. -f1 /proc/uptime")?;
    let host: i64 = host.ok(&Command::new("date").args(["+%s"]))?.parse()?;
    let (wall, uptime) = times.split_once('\n').context("Two times")?;
    Ok((wall.trim().parse::<i64>()? - host, uptime.trim().parse()?))
}

/// A paused guest gets no further, and another one does not notice. Its clocks go on, and it takes
/// the gap for no hang.
fn pause_and_resume(host: &Host, one: &mut Guest<'_>, two: &mut Guest<'_>) -> Result<()> {
    // The kernel tells of a vCPU that had better things to do than its watchdog for twice as long.
    one.sh("echo 3 > /proc/sys/kernel/watchdog_thresh")?;
    one.sh("while :; do :; done & busy=$!")?;
    let before = clocks(host, one)?;
    one.type_in("while usleep 100000; do echo TICK; done & ticks=$!\n")?;
    one.expect("TICK\r\nTICK", Limit::Command)?;
    ensure!(call(host, &["pause", "one"])? == 0);
    ensure!(
        call(host, &["pause", "one"])? == 0,
        "Pausing twice is no error"
    );
    ensure!(listed(host, &[])? == ["one:paused", "two:running"]);
    two.sh("true")?;
    // What was printed before the pause has long arrived.
    ensure!(
        one.is_silent("TICK", Duration::from_secs(PAUSE)),
        "A paused guest goes on"
    );
    one.skip();
    ensure!(call(host, &["resume", "one"])? == 0);
    one.expect("TICK", Limit::Command)?;
    ensure!(
        call(host, &["resume", "one"])? == 1,
        "A running machine was resumed"
    );
    one.sh("kill $busy $ticks")?;
    let after = clocks(host, one)?;
    // Between looks at both clocks a busy host may need seconds.
    let pause = i64::try_from(PAUSE)?;
    ensure!(
        (after.0 - before.0).abs() < pause / 2 && after.1 - before.1 >= pause,
        "{before:?} became {after:?}"
    );
    let said = one.sh("dmesg | grep -cE 'lockup|stall|unstable' || true")?;
    ensure!(said == "0", "{}", one.sh("dmesg | tail -n 40")?);
    Ok(())
}

fn kill_and_remove(host: &Host) -> Result<()> {
    let wait = host.spawn(&host.edgevmm(["wait", "two"]))?;
    ensure!(call(host, &["kill", "two"])? == 0);
    wait.wait(host.limit(Limit::Command))?.expect_code(4)?;
    ensure!(listed(host, &[])? == ["one:running"]);
    ensure!(listed(host, &["--all"])? == ["one:running", "two:killed"]);
    ensure!(inspect(host, "two")?["exit"]["reason"] == "killed");
    ensure!(call(host, &["wait", "two"])? == 4);
    ensure!(
        call(host, &["kill", "two"])? == 2,
        "An ended machine was killed"
    );
    ensure!(call(host, &["rm", "two"])? == 0);
    ensure!(call(host, &["inspect", "two"])? == 2);
    ensure!(listed(host, &["--all"])? == ["one:running"]);
    Ok(())
}

#[test]
fn a_triple_fault_is_a_crash_with_registers() -> Result<()> {
    on_host(|host| {
        let mut guest = Guest::start(host, shell_arguments(host, "reboot=triple", &[])?)?;
        guest.expect_shell()?;
        guest.type_in("reboot -f\n")?;
        let output = guest.end(Limit::Boot)?;
        output.expect_code(3)?;
        let stderr = output.stderr.to_lowercase();
        for word in ["triple fault", "rip", "rsp", "cr3"] {
            ensure!(stderr.contains(word), "No {word} in: {}", output.stderr);
        }
        // AMD processors keep no registers over it, and nobody shall look for the fault there.
        ensure!(
            stderr.contains("rip=000000000000fff0") == stderr.contains("those of a reset"),
            "{}",
            output.stderr
        );
        Ok(())
    })
}

/// Storage that can be made to hang: a file system in a file, frozen and thawed.
struct Storage<'h>(&'h Host);

impl<'h> Storage<'h> {
    fn new(host: &'h Host) -> Result<Self> {
        host.ok(&Command::script(
            "truncate -s 64M storage; mkfs.ext4 -q storage; mkdir mounted; \
             mount -o loop storage mounted; truncate -s 16M mounted/disk.raw",
        ))?;
        Ok(Self(host))
    }

    fn set_frozen(&self, frozen: bool) -> Result<()> {
        let how = if frozen { "--freeze" } else { "--unfreeze" };
        self.0
            .ok(&Command::new("fsfreeze").args([how, "mounted"]))
            .map(drop)
    }
}

impl Drop for Storage<'_> {
    fn drop(&mut self) {
        let script = "fsfreeze --unfreeze mounted; umount --lazy mounted";
        let _ = self.0.run(&Command::script(format!("set +e; {script}")));
    }
}

/// While storage hangs, a machine that was told to end can't, but says so.
#[test]
fn an_ending_machine_answers_while_it_waits_for_storage() -> Result<()> {
    as_root(|host| {
        let storage = Storage::new(host)?;
        let disk = host.path("mounted/disk.raw");
        let arguments = shell_arguments(host, "", &["--detach", "--name", "vm", &disk])?;
        host.ok(&host.edgevmm(arguments))?;
        let mut guest = Guest::start(host, ["console", "vm"])?;
        guest.expect_shell()?;
        guest.type_in(
            "while :; do dd if=/dev/zero of=/dev/vda bs=64k count=4 oflag=direct; done\n",
        )?;
        guest.expect("records out", Limit::Boot)?;
        storage.set_frozen(true)?;
        while !guest.is_silent("records out", Duration::from_secs(3)) {}

        let kill = host.spawn(&host.edgevmm(["kill", "vm"]))?;
        let stopping = "until \"$@\" | grep stopping; do sleep 0.1; done";
        let ps = Command::script(stopping).args(["sh"]);
        host.ok(&ps.wrapping(&host.edgevmm(["ps"])))?;
        let reset = host.run(&host.edgevmm(["reset", "vm"]))?;
        ensure!(
            reset.code == 1 && reset.stderr.contains("is stopping"),
            "{reset:?}"
        );
        storage.set_frozen(false)?;
        kill.wait(host.limit(Limit::Command))?.expect_code(0)?;
        ensure!(inspect(host, "vm")?["exit"]["reason"] == "killed");
        Ok(())
    })
}

/// In the foreground, SIGTERM presses the power button, and its deadline ends the guest; nothing of
/// the machine is left.
#[test]
fn sigterm_ends_a_guest_that_does_not_care() -> Result<()> {
    on_host(|host| {
        let arguments = shell_arguments(host, "", &["--name", "front", "--stop-timeout", "3"])?;
        let mut guest = Guest::start(host, arguments)?;
        guest.expect_shell()?;
        ensure!(listed(host, &[])? == ["front:running"]);
        guest.signal(TERMINATE)?;
        let output = guest.end(Limit::Boot)?;
        output.expect_code(4)?;
        ensure!(
            output.stderr.contains("did not power off in time"),
            "{}",
            output.stderr
        );
        ensure!(host.ok(&Command::new("ls").args(["-A", "run"]))?.is_empty());
        Ok(())
    })
}
