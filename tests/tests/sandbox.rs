//! A machine whose VMM is in its sandbox: what the process has and sees, and that all of it works.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Limit, SMALL, on_host};
use serde_json::Value;

/// Prints what is wrong with any thread of a VMM in a sandbox, and what is in its root.
const LOOK: &str = r#"
cd /proc/$1
for status in task/*/status; do
    awk -v status="$status" '
        /^Uid:/ && ($2 == 0 || $3 == 0) {print status, $0}
        /^NoNewPrivs:/ && $2 != 1 {print status, $0}
        /^Seccomp:/ && $2 != 2 {print status, $0}
        /^Cap(Prm|Eff|Bnd|Amb):/ && $2 !~ /^0+$/ {print status, $0}
    ' "$status"
done
ls root/
"#;

fn inspect(host: &Host, name: &str) -> Result<Value> {
    let command = host.edgevmm(["inspect", "--json", name]);
    Ok(serde_json::from_str(&host.ok(&command)?)?)
}

#[test]
fn a_machine_in_its_sandbox_does_all_it_does_outside() -> Result<()> {
    on_host(|host| {
        let (disk, disc) = (
            host.path("disk.raw"),
            host.write("disc.iso", &"x".repeat(4096))?,
        );
        host.ok(&Command::new("truncate").args(["-s", "8M", &disk]))?;
        let mut arguments = Guest::shell_arguments(host, "")?;
        let more = ["--sandbox", "--detach", "--name", "g", "--cdrom", "none"];
        arguments.extend(SMALL.iter().chain(&more).map(ToString::to_string));
        arguments.extend(["--disk".to_owned(), disk.clone()]);
        host.ok(&host.edgevmm(arguments))?;

        let mut guest = Guest::start(host, ["console", "g"])?;
        guest.expect_shell()?;
        let pid = inspect(host, "g")?["pid"]
            .as_u64()
            .context("There is no pid")?;
        let look = Command::new("bash").args(["-ec", LOOK, "look", &pid.to_string()]);
        let found = host.ok(&look)?;
        ensure!(found.is_empty(), "The sandbox is not closed: {found}");

        ensure!(
            host.run(&host.edgevmm(["media", "g", "cdrom0", &disc]))?
                .code
                == 0
        );
        ensure!(
            host.run(&host.edgevmm(["media", "g", "cdrom0", "--eject"]))?
                .code
                == 0
        );
        ensure!(host.run(&host.edgevmm(["reset", "g"]))?.code == 0);
        guest.expect_shell()?;
        guest.sh("true")?;
        ensure!(
            host.run(&host.edgevmm(["stop", "--timeout", "1", "g"]))?
                .code
                == 4
        );
        guest.end(Limit::Command)?.expect_code(0)?;
        ensure!(inspect(host, "g")?["exit"]["reason"] == "stop-timeout");
        Ok(())
    })
}
