//! Guests that can't go on, and what is done about it.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use edgevmm_e2e::{Guest, Host, Limit, SMALL, on_host};
use serde_json::Value;

/// The kernel's own panic, by the key that is there for it.
const PANIC: &str = "echo c > /proc/sysrq-trigger\n";

fn arguments(host: &Host, more: &[&str]) -> Result<Vec<String>> {
    let mut arguments = Guest::shell_arguments(host, "panic=0")?;
    arguments.extend(SMALL.iter().chain(more).map(ToString::to_string));
    Ok(arguments)
}

/// Waits until `inspect` tells this of a machine.
fn wait(host: &Host, name: &str, state: &str, reason: &str) -> Result<()> {
    let mut last = Value::Null;
    for _ in 0..600 {
        let output = host.run(&host.edgevmm(["inspect", name, "--json"]))?;
        last = serde_json::from_str(output.expect_code(0)?)?;
        if last["state"] == state && last["reason"] == reason {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    bail!("{name} is not {state} for {reason:?}: {last}")
}

#[test]
fn a_panic_ends_the_machine_as_crashed() -> Result<()> {
    on_host(|host| {
        let mut guest = Guest::start(host, arguments(host, &["--on-panic", "end"])?)?;
        guest.expect_shell()?;
        guest.type_in(PANIC)?;
        let output = guest.end(Limit::Boot)?;
        output.expect_code(3)?;
        ensure!(
            output.stderr.contains("The guest's kernel has panicked"),
            "{}",
            output.stderr
        );
        Ok(())
    })
}

#[test]
fn a_panic_is_told_or_pauses_the_machine() -> Result<()> {
    on_host(|host| {
        for (action, state) in [("report", "running"), ("pause", "paused")] {
            let detached = ["--detach", "--name", action, "--on-panic", action];
            host.ok(&host.edgevmm(arguments(host, &detached)?))?;
            let mut guest = Guest::start(host, ["console", action])?;
            guest.expect_shell()?;
            guest.type_in(PANIC)?;
            wait(host, action, state, "The guest's kernel has panicked")?;
            host.ok(&host.edgevmm(["kill", action]))?;
        }
        Ok(())
    })
}
