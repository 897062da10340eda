//! The console: attached to and left again, and never in the guest's way.

use anyhow::{Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Limit, SMALL, WindowSize, on_host};

fn detached(host: &Host, name: &str) -> Result<Vec<String>> {
    let mut arguments = Guest::shell_arguments(host, "")?;
    arguments.extend(SMALL.map(String::from));
    arguments.extend(["--detach", "--name", name].map(String::from));
    Ok(arguments)
}

#[test]
fn attaching_shows_history_and_detaching_leaves_the_guest() -> Result<()> {
    on_host(|host| {
        host.ok(&host.edgevmm(detached(host, "vm")?))?;
        let mut watcher = Guest::start(host, ["console", "--read-only", "vm"])?;
        watcher.expect_shell()?;

        let console = host.edgevmm(["console", "vm"]).on_terminal();
        let mut first = Guest::of(host, &console)?;
        // From before anybody was attached.
        first.expect("INIT-FIRST-LINE", Limit::Command)?;
        first.expect("# ", Limit::Command)?;
        let mark = first.sh("echo from-'the-first'")?;
        ensure!(mark == "from-the-first", "{mark}");
        watcher.expect("from-the-first", Limit::Command)?;
        watcher.type_in("poweroff -f\n")?;
        first.type_in("\x01h")?;
        first.expect("Ctrl-A x: detach", Limit::Command)?;
        first.type_in("\x01x")?;
        first.end(Limit::Command)?.expect_code(0)?;

        let mut second = Guest::start(host, ["console", "--history", "0", "vm"])?;
        second.sh("true")?;
        ensure!(
            !second.output().contains("from-the-first"),
            "History that was not asked for"
        );

        let mut owner = Guest::start(host, ["console", "--exclusive", "vm"])?;
        owner.expect("from-the-first", Limit::Command)?;
        second.end(Limit::Command)?.expect_code(1)?;
        let refused = host.run(&host.edgevmm(["console", "vm"]))?;
        ensure!(
            refused.code == 1 && refused.stderr.contains("--read-only"),
            "{refused:?}"
        );
        owner.sh("true")?;

        // The end of the machine is the end of all that watch.
        owner.type_in("poweroff -f\n")?;
        for guest in [owner, watcher] {
            let output = guest.end(Limit::Boot)?;
            output.expect_code(0)?;
            ensure!(output.stderr.contains("powered off"), "{}", output.stderr);
        }
        host.ok(&host.edgevmm(["wait", "vm"]))?;
        Ok(())
    })
}

/// A virtio console tells the guest the size of the terminal, of an attached one and of the one that
/// `edgevmm run` is on, also when it was there before the guest's driver.
#[test]
fn the_guest_sees_the_size_of_the_terminal() -> Result<()> {
    on_host(|host| {
        let mut arguments = Guest::shell_arguments(host, "console=hvc0")?;
        arguments.extend(SMALL.map(String::from));
        let console = ["--console", "stdio,device=virtio"].map(String::from);
        let run = host.edgevmm(arguments.iter().chain(&console)).on_terminal();
        let mut front = Guest::of(host, &run)?;
        check_sizes(&mut front)?;
        front.type_in("poweroff -f\n")?;
        front.end(Limit::Boot)?.expect_code(0)?;

        let detached = [
            "--console",
            "none,device=virtio",
            "--detach",
            "--name",
            "vm",
        ];
        arguments.extend(detached.map(String::from));
        host.ok(&host.edgevmm(arguments))?;
        let console = host.edgevmm(["console", "vm"]).on_terminal();
        let mut attached = Guest::of(host, &console)?;
        check_sizes(&mut attached)?;
        host.ok(&host.edgevmm(["kill", "vm"]))?;
        Ok(())
    })
}

fn check_sizes(guest: &mut Guest<'_>) -> Result<()> {
    guest.expect_shell()?;
    ensure!(guest.sh("stty size")? == "24 80");
    guest.resize(WindowSize {
        rows: 33,
        columns: 101,
    })?;
    guest.sh("until test \"$(stty size)\" = '33 101'; do usleep 50000; done")?;
    Ok(())
}

/// stdin is at its end from the begin, and stdout a pipe that is full: neither stops the guest.
#[test]
fn a_guest_waits_for_nobody() -> Result<()> {
    on_host(|host| {
        let mut arguments = Guest::shell_arguments(host, "")?;
        arguments.extend(SMALL.map(String::from));
        arguments.extend(["--name".to_owned(), "vm".to_owned()]);
        // The shell holds the reading end and does not read; of its 64 KiB, few are left.
        let script = "mkfifo pipe; exec 3<>pipe; head -c 65000 /dev/zero >pipe; \
                      \"$@\" 3<&- </dev/null >pipe";
        let run = host.edgevmm(arguments);
        let unread = Command::script(script).args(["sh"]);
        let process = host.spawn(&unread.wrapping(&run))?;
        let appears = "until test -S run/vm/api.sock; do sleep 0.05; done";
        host.ok(&Command::script(appears))?;

        let mut console = Guest::start(host, ["console", "vm"])?;
        console.expect_shell()?;
        console.sh("seq 2000")?;
        console.type_in("poweroff -f\n")?;
        console.end(Limit::Boot)?.expect_code(0)?;
        process.wait(host.limit(Limit::Command))?.expect_code(0)?;
        Ok(())
    })
}

#[test]
fn a_file_takes_the_console() -> Result<()> {
    on_host(|host| {
        let mut arguments = Guest::shell_arguments(host, "")?;
        arguments.retain(|argument| !argument.contains("edgevmm.shell"));
        arguments.push("console=ttyS0 quiet".to_owned());
        arguments.extend(SMALL.map(String::from));
        arguments.extend(["--console".to_owned(), format!("file={}", host.path("log"))]);
        let output = host.run(&host.edgevmm(arguments))?;
        ensure!(!output.expect_code(0)?.contains("INIT"), "{output:?}");
        let log = host.ok(&Command::new("cat").args(["log"]))?;
        ensure!(log.contains("INIT-FIRST-LINE"), "{log}");
        Ok(())
    })
}
