//! The guest agent of a distribution, every verb of it; and named channels, with a guest that floods
//! them.

use anyhow::{Context, Result, ensure};
use edgevmm_e2e::{Command, Guest, Host, Image, Limit, Output, SMALL, image, on_host};
use serde_json::Value;

/// Time that the agent gets where the machine may be a busy lab.
const PATIENCE: &str = "600";

/// A machine whose agent is asked.
struct Machine<'h> {
    host: &'h Host,
    name: &'h str,
}

impl Machine<'_> {
    fn command(&self, seconds: &str, arguments: &[&str]) -> Command {
        let agent = ["agent", "--timeout", seconds, self.name];
        self.host
            .edgevmm(agent.iter().chain(arguments).map(ToString::to_string))
    }

    fn run_within(&self, seconds: &str, arguments: &[&str]) -> Result<Output> {
        let command = self.command(seconds, arguments);
        self.host.run_for(&command, Limit::Distribution)
    }

    fn run(&self, arguments: &[&str]) -> Result<Output> {
        self.run_within(PATIENCE, arguments)
    }

    fn wait_for_agent(&self) -> Result<()> {
        let output = self.run_within("1200", &["ping", "--wait"])?;
        output.expect_code(0).map(drop)
    }

    fn ok(&self, arguments: &[&str]) -> Result<String> {
        Ok(self.run(arguments)?.expect_code(0)?.to_owned())
    }

    fn json(&self, verb: &str) -> Result<Value> {
        Ok(serde_json::from_str(&self.ok(&["--json", verb])?)?)
    }

    /// Has a shell of the host use the agent: `agent VERB` stands for the command.
    fn script(&self, script: &str) -> Result<Output> {
        let wrapped = "agent() { \"$edgevmm\" agent --timeout \"$patience\" \"$name\" \"$@\"; }";
        let argv = self.command(PATIENCE, &[]);
        let command = Command::script(format!("edgevmm=$0; {wrapped}; {script}"))
            .wrapping(&argv)
            .env("patience", PATIENCE)
            .env("name", self.name);
        self.host.run_for(&command, Limit::Distribution)
    }
}

fn describes_the_guest(agent: &Machine<'_>) -> Result<()> {
    let info = agent.json("info")?;
    let commands = info["commands"].as_array().context("No commands")?;
    ensure!(commands.iter().any(|name| name == "guest-ping"), "{info}");
    let os = agent.json("osinfo")?;
    ensure!(os["id"] == "debian" && os["version_id"] == "12", "{os}");
    ensure!(os["host_name"] == "legacy12", "{os}");
    let network = agent.ok(&["network"])?;
    let user_net = network.lines().find(|line| line.starts_with("eth0"));
    ensure!(
        user_net.is_some_and(|line| line.contains("10.0.2.15/24")),
        "{network}"
    );
    ensure!(agent.json("users")?.is_array());
    let mounted = agent.json("filesystems")?;
    let mut mounted_list = mounted.as_array().into_iter().flatten();
    let root = mounted_list.find(|fs| fs["mountpoint"] == "/");
    let root = root.context("No root")?;
    ensure!(
        root["type"] == "ext4" && root["total"].as_u64() > Some(1 << 30),
        "{root}"
    );
    Ok(())
}

fn runs_programs(agent: &Machine<'_>) -> Result<()> {
    let output =
        agent.script("echo to-the-guest | agent exec -- sh -c 'cat; echo said >&2; exit 7'")?;
    ensure!(
        output.code == 7 && output.stdout == "to-the-guest\n",
        "{output:?}"
    );
    ensure!(output.stderr == "said\n", "{output:?}");
    ensure!(agent.ok(&["exec", "-n", "-e", "A=b c", "--", "/usr/bin/env"])? == "A=b c");
    ensure!(
        agent
            .run(&["exec", "-n", "--", "sh", "-c", "kill -9 $$"])?
            .code
            == 137
    );
    let missing = agent.run(&["exec", "-n", "--", "/no/such/program"])?;
    ensure!(
        missing.code == 125 && missing.stderr.contains("No such file"),
        "{missing:?}"
    );
    let much = agent.run(&["exec", "-n", "--", "head", "-c", "4M", "/dev/zero"])?;
    ensure!(
        much.code == 125 && much.stderr.contains("write to a file"),
        "{much:?}"
    );
    // What is left of that answer is skipped.
    let megabyte = "head -c 1M /dev/zero | tr '\\0' x";
    ensure!(agent.ok(&["exec", "-n", "--", "sh", "-c", megabyte])?.len() == 1 << 20);
    let late = agent.run_within("1", &["exec", "-n", "--", "sleep", "1000"])?;
    ensure!(
        late.code == 124 && late.stderr.contains("as process"),
        "{late:?}"
    );
    Ok(())
}

fn sets_clock_and_keys(agent: &Machine<'_>) -> Result<()> {
    let year = |agent: &Machine<'_>| -> Result<i32> {
        let time = agent.ok(&["get-time"])?;
        Ok(time.get(..4).context("No year")?.parse()?)
    };
    let now = year(agent)?;
    agent.ok(&["set-time", "1000000000"])?;
    ensure!(year(agent)? == 2001);
    agent.ok(&["set-time"])?;
    ensure!((now..=now + 1).contains(&year(agent)?));

    let key = |name: &str| {
        format!(
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{} {name}",
            "A".repeat(43)
        )
    };
    let (one, other) = (key("one"), key("other"));
    agent.ok(&["ssh-keys", "add", "root", &one, &other])?;
    ensure!(agent.ok(&["ssh-keys", "list", "root"])?.contains(&other));
    agent.ok(&["ssh-keys", "remove", "root", &other])?;
    let left = agent.ok(&["ssh-keys", "list", "root"])?;
    ensure!(left.contains(&one) && !left.contains(&other), "{left}");
    let nobody = agent.run(&["ssh-keys", "list", "nosuchuser"])?;
    ensure!(
        nobody.code == 1 && nobody.stderr.contains("refused"),
        "{nobody:?}"
    );
    Ok(())
}

/// Has the guest write to its disk without end, or until there is a file that says so.
const WRITER: &str = "(until test -e /root/enough; do date >> /root/log; \
    cp /root/written /root/again; mv /root/again /root/moved; sync; sleep 0.2; done) \
    > /dev/null 2>&1 &";

/// What was written before a freeze is in a copy of the disk, whose file system is clean though the
/// guest goes on writing.
fn freezes(agent: &Machine<'_>) -> Result<()> {
    let host = agent.host;
    agent.ok(&["exec", "-n", "--", "sh", "-c", "seq 200000 > /root/written"])?;
    agent.ok(&["exec", "-n", "--", "sh", "-c", WRITER])?;
    agent.script("until agent exec -n -- test -s /root/log; do sleep 1; done")?;
    agent.ok(&["freeze", "--thaw-after", "3600"])?;
    ensure!(agent.ok(&["freeze-status"])? == "frozen");
    let inspected = host.ok(&host.edgevmm(["inspect", agent.name]))?;
    ensure!(inspected.contains("agent: frozen"), "{inspected}");
    let refused = agent.run(&["exec", "-n", "--", "true"])?;
    ensure!(refused.code == 125, "{refused:?}");
    let again = agent.run(&["freeze"])?;
    ensure!(
        again.code == 1 && again.stderr.contains("thaw them first"),
        "{again:?}"
    );
    let copy = "cp --sparse=always disk.qcow2 copy.qcow2; sleep 1; cmp disk.qcow2 copy.qcow2";
    host.ok(&Command::script(copy))?;
    agent.ok(&["thaw"])?;
    ensure!(agent.ok(&["freeze-status"])? == "thawed");
    agent.script("until agent exec -n -- sh -c 'mv /root/log /root/old'; do sleep 1; done")?;
    agent.script("until agent exec -n -- test -s /root/log; do sleep 1; done")?;
    agent.ok(&["exec", "-n", "--", "touch", "/root/enough"])?;

    agent.ok(&["freeze", "--thaw-after", "1"])?;
    let thawed = agent.script("until agent freeze-status | grep -q thawed; do sleep 1; done")?;
    thawed.expect_code(0)?;

    let run = |script: &str| -> Result<String> {
        let output = host.run_for(&Command::script(script), Limit::Distribution)?;
        Ok(output.expect_code(0)?.to_owned())
    };
    run("qemu-img check copy.qcow2 && qemu-img convert -O raw copy.qcow2 raw")?;
    let table: Value = serde_json::from_str(&run("sfdisk --json raw")?)?;
    let partitions = table["partitiontable"]["partitions"].as_array();
    let mut partitions = partitions.context("No partitions")?.iter();
    let root = partitions.find(|partition| partition["name"] == "root");
    let sector = root.and_then(|root| root["start"].as_u64());
    let root = format!("raw?offset={}", sector.context("No root partition")? * 512);
    run(&format!("e2fsck -fn '{root}'"))?;
    run(&format!("debugfs -R 'cat /root/log' '{root}' | grep :"))?;
    run(&format!(
        "debugfs -R 'cat /root/written' '{root}' | cmp - <(seq 200000)"
    ))?;
    Ok(())
}

#[test]
fn every_verb_against_the_real_agent() -> Result<()> {
    let images = image(Image::Debian12)?;
    on_host(|host| {
        let disk = host.copy(&images.debian12(), "disk.qcow2")?;
        let options = [
            "run", "--detach", "--name", "d12", "--memory", "768M", &disk,
        ];
        host.ok(&host.edgevmm(options))?;
        let agent = Machine { host, name: "d12" };
        let early = host.run(&host.edgevmm(["agent", "d12", "ping"]))?;
        ensure!(
            early.code == 1 && early.stderr.contains("qemu-guest-agent"),
            "{early:?}"
        );
        agent.wait_for_agent()?;
        describes_the_guest(&agent)?;
        runs_programs(&agent)?;
        sets_clock_and_keys(&agent)?;
        freezes(&agent)?;

        agent.ok(&["reboot"])?;
        let gone = "until \"$0\" inspect d12 | grep -q 'agent: disconnected'; do sleep 1; done";
        let gone = Command::script(gone).wrapping(&host.edgevmm::<String>([]));
        host.run_for(&gone, Limit::Distribution)?.expect_code(0)?;
        agent.wait_for_agent()?;
        agent.ok(&["shutdown"])?;
        let wait = host.edgevmm(["wait", "d12"]);
        host.run_for(&wait, Limit::Distribution)?.expect_code(0)?;
        Ok(())
    })
}

/// A socket of the host is a file of the guest. A guest that floods the agent's port is told from an
/// agent, and holds up nothing.
#[test]
fn channels_and_a_flood() -> Result<()> {
    on_host(|host| {
        let socket = host.path("channel");
        let channel = format!("com.example.0,socket={socket}");
        let mut arguments = Guest::shell_arguments(host, "")?;
        arguments.extend(SMALL.map(String::from));
        arguments.extend(["--detach", "--name", "g", "--channel", &channel].map(String::from));
        host.ok(&host.edgevmm(arguments))?;
        let mut guest = Guest::start(host, ["console", "g"])?;
        guest.expect_shell()?;
        let names = guest.sh("cat /sys/class/virtio-ports/*/name")?;
        ensure!(
            names
                .lines()
                .eq(["org.qemu.guest_agent.0", "com.example.0"]),
            "{names}"
        );

        // Which device of the driver's carries the ports is the guest's to number.
        guest.sh("port() { echo /dev/$(basename $(dirname $(grep -lx $1 /sys/class/virtio-ports/*/name))); }")?;
        guest.sh("test -c $(port com.example.0)")?;
        let client =
            host.spawn(&Command::new("socat").args(["-", &format!("UNIX-CONNECT:{socket}")]))?;
        client.write("from the host\n")?;
        guest.sh("read line < $(port com.example.0) && test \"$line\" = 'from the host'")?;
        guest.sh("echo from the guest > $(port com.example.0)")?;
        client.wait_for_stdout("from the guest\n", 0, host.limit(Limit::Command))?;

        guest.sh("cat /dev/zero > $(port org.qemu.guest_agent.0) & sleep 1")?;
        let flooded = host.run(&host.edgevmm(["agent", "g", "ping"]))?;
        ensure!(flooded.code == 1, "{flooded:?}");
        let answer = flooded.stderr.contains("does not speak") || flooded.stderr.contains("answer");
        ensure!(answer, "{flooded:?}");
        let state = host.ok(&host.edgevmm(["inspect", "g"]))?;
        ensure!(state.contains("state: running"), "{state}");
        guest.sh("echo alive")?;
        host.ok(&host.edgevmm(["kill", "g"]))?;
        let left = host.run(&Command::new("test").args(["-e", &socket]))?;
        ensure!(left.code == 1, "The socket is still there");
        Ok(())
    })
}
