//! Memory that a guest does not need goes back to the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Guest, Host, on_host};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// What the guest fills and frees again.
const FILLED: u64 = 192 * MIB;

fn memory(host: &Host) -> Result<Value> {
    let output = host.run(&host.edgevmm(["memory", "vm", "--json"]))?;
    Ok(serde_json::from_str(output.expect_code(0)?)?)
}

fn figure(memory: &Value, path: &str) -> Result<u64> {
    let value = memory.pointer(path).and_then(Value::as_u64);
    value.with_context(|| format!("No {path} in {memory}"))
}

/// Waits until the figures are as wanted, and gives them.
fn wait(host: &Host, what: &str, wanted: impl Fn(&Value) -> Result<bool>) -> Result<Value> {
    let end = Instant::now() + Duration::from_secs(180);
    loop {
        let memory = memory(host)?;
        if wanted(&memory)? {
            return Ok(memory);
        }
        ensure!(Instant::now() < end, "{what} does not come: {memory}");
        std::thread::sleep(Duration::from_secs(1));
    }
}

#[test]
fn what_the_guest_frees_goes_back() -> Result<()> {
    on_host(|host| {
        let arguments = Guest::shell_arguments(host, "")?;
        let machine = ["--cpus", "1", "--memory", "512M", "--net", "none"];
        let name = ["--detach", "--name", "vm"];
        let run = host.edgevmm(arguments).args(machine).args(name);
        host.ok(&run)?;
        let mut guest = Guest::start(host, ["console", "vm"])?;
        guest.expect_shell()?;

        let before = figure(&memory(host)?, "/resident")?;
        guest.sh("mkdir -p /fill; mount -t tmpfs fill /fill")?;
        let fill = format!(
            "dd if=/dev/zero of=/fill/a bs=1M count={} 2>/dev/null",
            FILLED / MIB
        );
        guest.sh(&fill)?;
        let full = memory(host)?;
        let taken = figure(&full, "/resident")?.saturating_sub(before);
        ensure!(
            taken > FILLED * 9 / 10,
            "The guest took up {taken} bytes: {full}"
        );
        let free = figure(&full, "/guest/free")?;
        ensure!(free < 512 * MIB - FILLED, "{full}");

        guest.sh("rm /fill/a")?;
        let peak = before + taken;
        wait(host, "Freed memory", |now| {
            Ok(peak.saturating_sub(figure(now, "/resident")?) >= FILLED * 8 / 10)
        })?;
        let now = memory(host)?;
        ensure!(
            figure(&now, "/balloon/reported")? >= FILLED * 8 / 10,
            "{now}"
        );
        ensure!(
            figure(&now, "/guest/free")? >= free + FILLED * 9 / 10,
            "{now}"
        );

        // The balloon takes what is asked for, gives it back when the guest shall have it again.
        host.ok(&host.edgevmm(["memory", "vm", "--target", "256M"]))?;
        let held = |bytes| move |now: &Value| Ok(figure(now, "/balloon/held")? == bytes);
        let small = wait(host, "A full balloon", held(256 * MIB))?;
        ensure!(figure(&small, "/target")? == 256 * MIB, "{small}");
        ensure!(figure(&small, "/guest/free")? < 256 * MIB, "{small}");
        host.ok(&host.edgevmm(["memory", "vm", "--target", "512M"]))?;
        wait(host, "An empty balloon", held(0))?;

        // The guest still has all of its memory.
        guest.sh(&fill)?;
        let hash = guest.sh("sha256sum /fill/a")?;
        let zeroes = host.run(&edgevmm_e2e::Command::script(format!(
            "head -c {FILLED} /dev/zero | sha256sum"
        )))?;
        let zeroes = zeroes.expect_code(0)?.to_owned();
        ensure!(
            hash.get(..64) == zeroes.get(..64),
            "{hash} in place of {zeroes}"
        );
        host.ok(&host.edgevmm(["kill", "vm"]))?;
        Ok(())
    })
}
