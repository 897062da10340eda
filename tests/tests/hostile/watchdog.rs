//! A guest that starts its watchdog and then hangs.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Guest, Host, Limit};

use crate::image::{self, Boot};
use crate::memory::{ECAM, WINDOW};
use crate::on_any_host;
use crate::script::{Kind, Script, Voice};

/// The only other function of the machine is its source of random numbers.
const CONFIG_SPACE: u32 = ECAM + (2 << 15);
const BAR: u32 = WINDOW + 0x100_0000;
/// Each of the two stages takes so many milliseconds.
const STAGE: u32 = 250;

/// Has the next write to a register count.
fn unlock(script: &mut Script) {
    for word in [0x80, 0x86] {
        script.write16(BAR + 0x0c, word);
    }
}

/// Starts the watchdog and then again and again, says so, and does nothing for as good as ever.
fn payload(stage: u32, again: u32) -> Result<Vec<u8>> {
    let boot = Boot::Kernel;
    let mut script = Script::new(boot.scripts(), Voice::Serial);
    script.write32(CONFIG_SPACE + 0x10, BAR);
    script.write16(CONFIG_SPACE + 0x04, 2);
    for register in [0, 4] {
        unlock(&mut script);
        script.write32(BAR + register, stage);
    }
    script.write8(CONFIG_SPACE + 0x68, 2);
    for _ in 0..again {
        script.push(Kind::Spin, 2000, 0, 0);
        unlock(&mut script);
        script.write16(BAR + 0x0c, 1 << 8);
    }
    script.say("the watchdog runs");
    let here = script.here();
    script.push(Kind::Jump, here, 0, 0);
    image::build(boot, [&script, &Script::new(0, Voice::Serial)])
}

fn start<'h>(host: &'h Host, action: &str, payload: &[u8]) -> Result<Guest<'h>> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("payload");
    std::fs::write(&file, payload)?;
    let kernel = host.copy(&file, "payload")?;
    let machine = ["run", "--name", "dog", "--cpus", "1", "--memory", "64M"];
    let devices = [
        "--net",
        "none",
        "--no-balloon",
        "--no-agent",
        "--watchdog",
        action,
    ];
    let run = host
        .edgevmm(machine)
        .args(devices)
        .args(["--kernel", &kernel]);
    Guest::of(host, &run)
}

#[test]
fn a_watchdog_ends_a_guest_that_hangs() -> Result<()> {
    on_any_host(|host| {
        let mut guest = start(host, "end", &payload(STAGE, 0)?)?;
        guest.expect("the watchdog runs", Limit::Command)?;
        let output = guest.end(Limit::Command)?;
        output.expect_code(3)?;
        ensure!(
            output.stderr.contains("The guest's watchdog has run out"),
            "{}",
            output.stderr
        );
        Ok(())
    })
}

#[test]
fn a_watchdog_resets_a_guest_that_hangs() -> Result<()> {
    on_any_host(|host| {
        let mut guest = start(host, "reset", &payload(STAGE, 0)?)?;
        for _ in 0..3 {
            guest.expect("the watchdog runs", Limit::Command)?;
        }
        host.ok(&host.edgevmm(["kill", "dog"]))?;
        guest.end(Limit::Command)?.expect_code(4)?;
        Ok(())
    })
}

/// A guest can't fill the log by it.
#[test]
fn a_watchdog_that_always_runs_out_is_told_of_once() -> Result<()> {
    on_any_host(|host| {
        let mut guest = start(host, "report", &payload(0, 100)?)?;
        guest.expect("the watchdog runs", Limit::Command)?;
        host.ok(&host.edgevmm(["kill", "dog"]))?;
        let output = guest.end(Limit::Command)?;
        let count = output.stderr.matches("watchdog has run out").count();
        ensure!(count == 1, "{}", output.stderr);
        Ok(())
    })
}
