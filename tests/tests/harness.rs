//! The harness itself, on this machine: what it says of commands is true.

use std::time::Duration;

use anyhow::{Result, ensure};
use edgevmm_e2e::{Command, Guest, Limit, on_this_machine};

#[test]
fn a_shell_on_a_terminal_is_driven_like_a_guest() -> Result<()> {
    on_this_machine(|host| {
        let mut shell = Guest::of(host, &Command::new("sh").args(["-i"]).on_terminal())?;
        ensure!(shell.sh("echo one; echo two")? == "one\ntwo");
        ensure!(shell.run("false")? == (1, String::new()));
        ensure!(shell.sh("test -t 0 && pwd")? == host.path("").trim_end_matches('/'));
        shell.type_in("echo la'ter'\n")?;
        shell.expect("later", Limit::Command)?;
        ensure!(shell.is_silent("later", Duration::from_millis(50)));
        shell.type_in("exit 7\n")?;
        shell.end(Limit::Command)?.expect_code(7)?;
        Ok(())
    })
}

#[test]
fn ends_and_their_reasons_are_told() -> Result<()> {
    on_this_machine(|host| {
        let output = host.run(&Command::script("echo out; echo err >&2; exit 3"))?;
        ensure!(output.expect_code(3)? == "out" && output.stderr == "err\n");
        ensure!(output.expect_code(0).is_err());

        let sleeper = host.spawn(&Command::script("echo ready; sleep 1000 & wait"))?;
        let after = sleeper.wait_for_stdout("ready\n", 0, host.limit(Limit::Command))?;
        ensure!(after == 6, "{after}");
        let none = Duration::from_millis(50);
        ensure!(sleeper.wait_for_stdout("ready\n", after, none).is_err());
        ensure!(sleeper.wait(none).is_err());
        sleeper.signal(15)?;
        sleeper.wait(host.limit(Limit::Command))?.expect_code(143)?;
        Ok(())
    })
}
