//! A guest that attacks its machine: bare-metal code that does to every device what no driver
//! would. The machine must stay alive, small and answerable, and touch nothing it was not given.
//!
//! What the guest does comes from a seed that is printed; `EDGEVMM_HOSTILE_SEED` repeats it and
//! `EDGEVMM_HOSTILE_ROUNDS` sets how many attacks there are.

#![allow(clippy::cast_possible_truncation)]

mod bus;
mod image;
mod memory;
mod random;
mod script;
mod virtio;
mod watchdog;

use std::fs::File;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use edgevmm_e2e::{Command, Guest, Host, Limit, on_host, on_this_machine};

use crate::image::Boot;
use crate::random::Random;
use crate::script::{Kind, Script, Voice};
use crate::virtio::{Device, Type};

/// Attacks in a test where none are asked for.
const ROUNDS: u32 = 60;

/// What the disks are full of.
const DISK_PATTERN: u32 = 0x6b73_6964;
const DISK_LEN: usize = 1 << 20;

/// Anonymous memory of the VMM beyond which something grows, in KiB: the guest's, and its own.
const MAX_PRIVATE_KIB: u64 = (memory::RAM as u64 >> 10) + (24 << 10);

/// Words in the payload's memory: round begun, round ended by the second processor, starts.
const GO: u32 = 0x3d_0000;
const DONE: u32 = 0x3d_0040;
const STARTS: u32 = 0x3d_0080;

/// Which of its two consoles the machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Console {
    Serial,
    Virtio,
}

/// A machine to attack.
#[derive(Debug, Clone, Copy)]
struct Target {
    boot: Boot,
    console: Console,
}

impl Target {
    const fn voice(self) -> Voice {
        match self.console {
            Console::Serial => Voice::Serial,
            Console::Virtio => Voice::Debug,
        }
    }

    /// Rounds in one payload.
    const fn rounds(self) -> u32 {
        match self.boot {
            Boot::Kernel => 30,
            // What surely fits into a ROM.
            Boot::Bios => 6,
        }
    }

    /// Its virtio devices in the order of their slots.
    fn devices(self) -> Vec<Device> {
        let mut kinds = vec![
            (
                Type::Block,
                2,
                1 << 6 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 14,
            ),
            (Type::Block, 2, 1 << 5 | 1 << 9),
            (Type::Net, 2, 1 << 5 | 1 << 15 | 1 << 16),
            (Type::Rng, 1, 0),
        ];
        if self.console == Console::Virtio {
            kinds.push((Type::Console, 2, 1));
        }
        // Those of the guest agent.
        kinds.push((Type::Ports, 6, 1 << 1));
        let device = |(slot, (kind, queues, features))| Device {
            kind,
            slot,
            queues,
            features,
            pristine: slot == 2,
        };
        (1..).zip(kinds).map(device).collect()
    }
}

/// Two processors' scripts as they grow together.
struct Scripts {
    target: Target,
    devices: Vec<Device>,
    first: Script,
    second: Script,
}

impl Scripts {
    fn new(target: Target) -> Self {
        let devices = target.devices();
        let mut first = Script::new(target.boot.scripts(), target.voice());
        // The second processor: its code, INIT to all but self, and twice SIPI.
        first.push(
            Kind::Copy,
            image::TRAMPOLINE,
            target.boot.trampoline_copy(),
            0x10,
        );
        first.write32(GO, 0);
        first.write32(DONE, 0);
        for command in [0xc_4500, 0xc_4600 | image::TRAMPOLINE >> 12] {
            first.write32(0xfee0_0300, command);
            first.push(Kind::Spin, 2000, 0, 0);
        }
        for device in &devices {
            device.recover(&mut first);
        }
        Self {
            target,
            devices,
            first,
            // Its jumps are relative to where it will be: it makes none.
            second: Script::new(0, target.voice()),
        }
    }

    /// Both processors attack at once, then the first one finds everything in order again.
    fn round(&mut self, number: u32, random: &Random) {
        self.first.write32(GO, number);
        self.second.push(Kind::Until32, GO, number, 0);
        for _ in 0..1 + random.below(3) {
            attack(&mut self.first, random, self.target, &self.devices);
            if random.one_in(2) {
                attack(&mut self.second, random, self.target, &self.devices);
            }
        }
        self.second.push(Kind::Add32, DONE, 1, 0);
        self.first.push(Kind::Until32, DONE, number, 0);
        for device in &self.devices {
            device.recover(&mut self.first);
        }
        for device in &self.devices {
            device.use_properly(&mut self.first);
        }
        for device in &self.devices {
            device.recover(&mut self.first);
        }
        self.first.say(&format!("round {number} survived"));
    }

    /// Attacks, resets the machine by `port` and does what no machine should see after it: asks for
    /// more resets and crashes. All of that happens at start number `start` only.
    fn reset(&mut self, start: u32, (port, value): (u16, u8), random: &Random) {
        let (target, devices) = (self.target, self.devices.clone());
        self.first
            .unless(Kind::JumpUnless, STARTS, start, |script| {
                for device in &devices {
                    device.use_properly(script);
                }
                // Left in service, with requests under way.
                for device in &devices {
                    virtio::attack(script, random, device);
                }
                attack(script, random, target, &devices);
                for device in &devices {
                    device.recover(script);
                }
                devices[0].write_cache(script, true);
                devices[0].use_properly(script);
                script.say(&format!("start {start} survived"));
                script.out8(port, value);
                for (port, value) in RESETS {
                    script.out8(port, value);
                }
                script.push(Kind::Crash, 0, 0, 0);
            });
    }

    /// Waits for the power button and powers off.
    fn finish(mut self) -> Result<Vec<u8>> {
        const BUTTON: u32 = 0x601;
        self.first.say("ready to power off");
        self.first.push(Kind::UntilPort, BUTTON, 1, 0);
        self.first.power_off();
        self.second.push(Kind::Until32, GO, u32::MAX, 0);
        image::build(self.target.boot, [&self.first, &self.second])
    }
}

/// Ports and values that reset the machine.
const RESETS: [(u16, u8); 3] = [(0xcf9, 6), (0x64, 0xfe), (0x92, 1)];

fn attack(script: &mut Script, random: &Random, target: Target, devices: &[Device]) {
    match random.below(10) {
        0 | 1 => bus::ports(script, random),
        2 | 3 => bus::pci(script, random, devices.len() as u32 + 1),
        4 if target.boot == Boot::Bios => bus::fw_cfg(script, random),
        _ => virtio::attack(script, random, &random.pick(devices)),
    }
}

/// A number from the environment.
fn setting(name: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(name) else {
        return Ok(None);
    };
    Ok(Some(
        text.parse().with_context(|| format!("{name}={text}"))?,
    ))
}

fn seed() -> Result<u64> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let seed = setting("EDGEVMM_HOSTILE_SEED")?.unwrap_or(now.as_nanos() as u64);
    eprintln!("EDGEVMM_HOSTILE_SEED={seed}");
    Ok(seed)
}

/// Runs a test on this machine if that has any KVM: even one that only emulates runs the payload.
fn on_any_host(test: impl Fn(&Host) -> Result<()>) -> Result<()> {
    if File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok()
    {
        on_this_machine(test)
    } else {
        on_host(test)
    }
}

/// A machine that runs a payload.
struct Machine<'h> {
    host: &'h Host,
    guest: Guest<'h>,
    disks: Vec<(String, String)>,
}

impl<'h> Machine<'h> {
    fn start(host: &'h Host, target: Target, payload: &[u8]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let copy = |name: &str, content: &[u8]| {
            let file = dir.path().join(name);
            std::fs::write(&file, content)?;
            host.copy(&file, name)
        };
        let payload = copy("payload", payload)?;
        let pattern = DISK_PATTERN.to_le_bytes().repeat(DISK_LEN / 4);
        let mut disks = Vec::new();
        for name in ["first.raw", "second.raw"] {
            let disk = copy(name, &pattern)?;
            disks.push((host.sha256(&disk)?, disk));
        }
        let boot = match target.boot {
            Boot::Kernel => "--kernel",
            Boot::Bios => "--bios",
        };
        let mut run = host
            .edgevmm(["run", "--name", "hostile", boot, &payload])
            .args([
                "--cpus",
                "2",
                "--memory",
                "64M",
                "--net",
                "user",
                "--snapshot",
            ])
            .args(["--disk", &disks[0].1, "--disk"])
            .args([format!("{},ro", disks[1].1)]);
        if target.console == Console::Virtio {
            let run_with = run.args(["--console", "stdio,device=virtio", "--debugcon", "-"]);
            // What the debug port says must come where a console is looked at.
            let script = Command::new("bash").args(["-c", "exec \"$@\" 2>&1", "bash"]);
            run = script.wrapping(&run_with);
        }
        let guest = Guest::of(host, &run)?;
        Ok(Self { host, guest, disks })
    }

    /// Waits until the guest prints `marker`.
    fn expect(mut self, marker: &str, seed: u64) -> Result<Self> {
        if let Err(error) = self.guest.expect(marker, Limit::Command) {
            let end = self.guest.end(Limit::Command);
            bail!("Seed {seed}: {error:#}\n{end:?}");
        }
        Ok(self)
    }

    fn inspect(&self) -> Result<serde_json::Value> {
        let inspect = self.host.edgevmm(["inspect", "--json", "hostile"]);
        let said = self.host.run(&inspect)?;
        Ok(serde_json::from_str(said.expect_code(0)?)?)
    }

    /// KiB of anonymous memory, threads and descriptors of the VMM.
    fn usage(&self) -> Result<[u64; 3]> {
        let pid = self.inspect()?["pid"].as_u64().context("No pid")?;
        let script = format!(
            "cd /proc/{pid}; awk '/^(RssAnon|Threads):/ {{print $2}}' status; ls fd | wc -l"
        );
        let said = self.host.ok(&Command::script(script))?;
        let numbers: Vec<u64> = said
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        numbers.try_into().ok().context("No usage")
    }

    /// Presses the power button, and looks that all ended well.
    fn end(self) -> Result<()> {
        let [memory, threads, files] = self.usage()?;
        eprintln!("{memory} KiB of anonymous memory, {threads} threads, {files} files");
        ensure!(memory < MAX_PRIVATE_KIB, "{memory} KiB of anonymous memory");
        ensure!(threads < 20, "{threads} threads");
        ensure!(files < 100, "{files} files");
        const SIGTERM: i32 = 15;
        self.guest.signal(SIGTERM)?;
        let output = self.guest.end(Limit::Command)?;
        output.expect_code(0)?;
        ensure!(
            output.stderr.len() < 4096,
            "The log grows: {}",
            output.stderr
        );
        for (hash, disk) in &self.disks {
            ensure!(self.host.sha256(disk)? == *hash, "{disk} changed");
        }
        Ok(())
    }
}

/// Attacks a kind of machine for as many rounds as were asked for.
fn besiege(target: Target) -> Result<()> {
    let seed = seed()?;
    let rounds = setting("EDGEVMM_HOSTILE_ROUNDS")?.unwrap_or_else(|| ROUNDS.into());
    let machines = rounds.div_ceil(target.rounds().into());
    on_any_host(|host| {
        for seed in (seed..).take(machines as usize) {
            eprintln!("{target:?}, seed {seed}");
            let random = Random::new(seed);
            let mut scripts = Scripts::new(target);
            for number in 1..=target.rounds() {
                scripts.round(number, &random);
            }
            let payload = scripts.finish()?;
            let mut machine = Machine::start(host, target, &payload)?;
            for number in 1..=target.rounds() {
                machine = machine.expect(&format!("round {number} survived"), seed)?;
            }
            machine = machine.expect("ready to power off", seed)?;
            machine.end().with_context(|| format!("Seed {seed}"))?;
        }
        Ok(())
    })
}

/// A reset ends whatever went on, however it was asked for, and nothing after it counts.
#[test]
fn resets_amid_attacks() -> Result<()> {
    const COUNT: u32 = 12;
    let seed = seed()?;
    let target = Target {
        boot: Boot::Kernel,
        console: Console::Serial,
    };
    on_any_host(|host| {
        let random = Random::new(seed);
        let mut scripts = Scripts::new(target);
        scripts.first.push(Kind::Add32, STARTS, 1, 0);
        let disk = scripts.devices[0];
        disk.write_cache(&mut scripts.first, false);
        for start in 1..=COUNT {
            scripts.reset(start, random.pick(&RESETS), &random);
        }
        let mut machine = Machine::start(host, target, &scripts.finish()?)?;
        for start in 1..=COUNT {
            machine = machine.expect(&format!("start {start} survived"), seed)?;
        }
        machine = machine.expect("ready to power off", seed)?;
        let resets = machine.inspect()?["resets"].as_u64();
        ensure!(resets == Some(COUNT.into()), "{resets:?} resets");
        machine.end()
    })
}

#[test]
fn a_hostile_kernel() -> Result<()> {
    besiege(Target {
        boot: Boot::Kernel,
        console: Console::Serial,
    })
}

#[test]
fn a_hostile_kernel_with_a_virtio_console() -> Result<()> {
    besiege(Target {
        boot: Boot::Kernel,
        console: Console::Virtio,
    })
}

#[test]
fn a_hostile_bios() -> Result<()> {
    besiege(Target {
        boot: Boot::Bios,
        console: Console::Serial,
    })
}
