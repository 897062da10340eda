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

/// Starts the watchdog, says so, and then does nothing for as good as ever.
fn payload() -> Result<Vec<u8>> {
    let boot = Boot::Kernel;
    let mut script = Script::new(boot.scripts(), Voice::Serial);
    script.write32(CONFIG_SPACE + 0x10, BAR);
    script.write16(CONFIG_SPACE + 0x04, 2);
    for register in [0, 4] {
        for word in [0x80, 0x86] {
            script.write16(BAR + 0x0c, word);
        }
        script.write32(BAR + register, STAGE);
    }
    script.write8(CONFIG_SPACE + 0x68, 2);
    script.say("the watchdog runs");
    let here = script.here();
    script.push(Kind::Jump, here, 0, 0);
    image::build(boot, [&script, &Script::new(0, Voice::Serial)])
}

fn start<'h>(host: &'h Host, action: &str) -> Result<Guest<'h>> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("payload");
    std::fs::write(&file, payload()?)?;
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
        let mut guest = start(host, "end")?;
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
        let mut guest = start(host, "reset")?;
        for _ in 0..3 {
            guest.expect("the watchdog runs", Limit::Command)?;
        }
        host.ok(&host.edgevmm(["kill", "dog"]))?;
        guest.end(Limit::Command)?.expect_code(4)?;
        Ok(())
    })
}
