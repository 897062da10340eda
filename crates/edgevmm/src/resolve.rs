//! From flags and a file to a complete, checked configuration.

use std::collections::HashSet;
use std::path::Path;

use anyhow::Context;
use edgevmm_config::{DiskConfig, NetBackendConfig, PortForward, VmConfig, name_from};

use crate::cli::{NetArg, NetworkArgs, RunArgs};
use crate::exit::Failure;

/// Makes the configuration that `run` was asked for. All paths in it are absolute.
///
/// # Errors
///
/// When the file or the whole is wrong. Nothing on the host is looked at.
pub fn resolve(args: RunArgs) -> Result<VmConfig, Failure> {
    let RunArgs {
        images,
        config,
        name,
        machine,
        boot,
        storage,
        network,
        seed,
        ..
    } = args;
    let mut vm = match config {
        Some(path) => VmConfig::load(&path).map_err(Failure::usage)?,
        None => VmConfig::default(),
    };
    set(&mut vm.cpus, machine.cpus);
    set(&mut vm.memory, machine.memory);
    vm.memory.hugepages |= machine.hugepages;
    vm.memory.balloon &= !machine.no_balloon;
    set(&mut vm.on_panic, machine.on_panic.map(Into::into));
    set_some(&mut vm.watchdog, machine.watchdog.map(Into::into));
    set(&mut vm.console, machine.console);
    vm.agent &= !machine.no_agent;
    vm.channels.extend(machine.channels);
    set(&mut vm.stop_timeout, machine.stop_timeout);
    set_some(&mut vm.identity.uuid, machine.uuid);

    set(&mut vm.boot.firmware, boot.firmware.map(Into::into));
    set_some(&mut vm.boot.kernel, boot.kernel);
    set_some(&mut vm.boot.initrd, boot.initrd);
    set_some(&mut vm.boot.cmdline, boot.cmdline);
    set_some(&mut vm.boot.bios, boot.bios);
    set_some(&mut vm.boot.uefi, boot.uefi);
    set_some(&mut vm.boot.uefi_vars, boot.uefi_vars);
    set_some(&mut vm.boot.net_rom, boot.net_rom);
    vm.boot.menu |= boot.boot_menu;
    set_some(&mut vm.debugcon, boot.debugcon);

    let disks: Vec<_> = images
        .into_iter()
        .map(DiskConfig::new)
        .chain(storage.disks)
        .chain(storage.cdroms.into_iter().map(|cdrom| cdrom.0))
        .collect();
    if !disks.is_empty() {
        vm.disks = disks;
    }
    // What is in a CD-ROM drive stays as it is anyway.
    for disk in vm.disks.iter_mut().filter(|disk| !disk.is_cdrom()) {
        disk.snapshot |= storage.snapshot;
    }
    let mut disks = vm.disks.iter_mut().filter(|disk| !disk.is_cdrom());
    if let Some(disk) = disks.next() {
        set_some(&mut disk.overlay_size, storage.overlay_size);
    }
    apply_network(&mut vm, network)?;

    let mut cloud_init = vm.cloud_init.take().unwrap_or_default();
    let given = [&seed.user_data, &seed.ssh_key, &seed.network_config]
        .into_iter()
        .any(Option::is_some)
        || seed.hostname.is_some()
        || seed.datasource.is_some();
    set_some(&mut cloud_init.user_data, seed.user_data);
    set_some(&mut cloud_init.ssh_key, seed.ssh_key);
    set_some(&mut cloud_init.hostname, seed.hostname);
    set_some(&mut cloud_init.network_config, seed.network_config);
    set(&mut cloud_init.datasource, seed.datasource.map(Into::into));
    vm.cloud_init = (given || cloud_init != Default::default()).then_some(cloud_init);

    set_some(&mut vm.name, name);
    if let Some(folder) = storage.overlay {
        let machine = vm.name.clone().unwrap_or_else(|| default_name(&vm));
        give_overlays(&mut vm, &folder.join(machine));
    }
    vm.validate().map_err(Failure::usage)?;
    let here = std::env::current_dir().context("Can't tell the current folder")?;
    vm.resolve_paths(&here);
    Ok(vm)
}

/// Gives each disk that may be written an overlay in `folder`, named after its image. Of images
/// with the same name, all but the first get a number.
fn give_overlays(vm: &mut VmConfig, folder: &Path) {
    let mut taken = HashSet::new();
    for disk in &mut vm.disks {
        if disk.is_cdrom() || disk.ro || disk.overlay.is_some() {
            continue;
        }
        let image = disk.path.file_name().unwrap_or_default().to_owned();
        let mut number = 1;
        disk.overlay = loop {
            let mut name = image.clone();
            if number > 1 {
                name.push(format!("-{number}"));
            }
            name.push(".overlay.qcow2");
            if taken.insert(name.clone()) {
                break Some(folder.join(name));
            }
            number += 1;
        };
    }
}

fn set<T>(field: &mut T, given: Option<T>) {
    if let Some(value) = given {
        *field = value;
    }
}

fn set_some<T>(field: &mut Option<T>, given: Option<T>) {
    if given.is_some() {
        *field = given;
    }
}

/// Applies `--net` and `-p`.
fn apply_network(vm: &mut VmConfig, network: NetworkArgs) -> Result<(), Failure> {
    let NetworkArgs { nets, publish } = network;
    if !nets.is_empty() {
        let count = nets.len();
        let interfaces = nets.into_iter().filter_map(|net| match net {
            NetArg::Interface(net) => Some(net),
            NetArg::None => None,
        });
        vm.nets = interfaces.collect();
        if vm.nets.len() != count && count > 1 {
            let error = anyhow::anyhow!("--net none excludes other networks");
            return Err(Failure::usage(error).hint("leave it out"));
        }
    }
    if publish.is_empty() {
        return Ok(());
    }
    match vm
        .nets
        .iter_mut()
        .find_map(|net| user_forwards(&mut net.backend))
    {
        Some(forwards) => forwards.extend(publish),
        None => {
            let error = anyhow::anyhow!("-p forwards ports to a user network, and there is none");
            return Err(Failure::usage(error).hint("add --net user, or leave -p out"));
        }
    }
    Ok(())
}

fn user_forwards(backend: &mut NetBackendConfig) -> Option<&mut Vec<PortForward>> {
    match backend {
        NetBackendConfig::User { forwards, .. } => Some(forwards),
        NetBackendConfig::Tap { .. } => None,
    }
}

/// The name of a machine that was given none: that of its first disk or its kernel.
pub fn default_name(vm: &VmConfig) -> String {
    let mut disks = vm.disks.iter().filter(|disk| !disk.is_empty());
    let first = disks.next().map(|disk| disk.path.as_path());
    let stem = first
        .or(vm.boot.kernel.as_deref())
        .and_then(Path::file_stem);
    name_from(&stem.unwrap_or_default().to_string_lossy())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser;
    use edgevmm_config::{ByteSize, ConsoleOutput};

    use super::*;
    use crate::cli::{Cli, Command};

    fn run(args: &[&str]) -> Result<VmConfig, String> {
        let cli = Cli::try_parse_from(["edgevmm", "run"].iter().chain(args)).unwrap();
        let Command::Run(args) = cli.command else {
            panic!()
        };
        resolve(*args).map_err(|failure| failure.to_string())
    }

    #[test]
    fn drives_come_after_disks_and_keep_what_is_in_them() {
        let vm = run(&[
            "--cdrom",
            "/x.iso,bootindex=0",
            "/a.raw",
            "--cdrom",
            "none",
            "--snapshot",
            "--overlay-size",
            "2G",
        ])
        .unwrap();
        let paths: Vec<_> = vm
            .disks
            .iter()
            .map(|disk| disk.path.to_str().unwrap())
            .collect();
        assert_eq!(paths, ["/a.raw", "/x.iso", ""]);
        let snapshots: Vec<_> = vm.disks.iter().map(|disk| disk.snapshot).collect();
        assert_eq!(snapshots, [true, false, false]);
        assert_eq!(
            (vm.disks[1].bootindex, vm.disks[1].is_cdrom()),
            (Some(0), true)
        );
        assert!(vm.disks[0].overlay_size.is_some() && vm.disks[2].is_empty());
        assert_eq!(default_name(&vm), "a");
        let vm = run(&[
            "--cdrom",
            "none",
            "--cdrom",
            "/d/deb.iso",
            "--overlay",
            "/o",
        ])
        .unwrap();
        assert_eq!(
            (default_name(&vm).as_str(), &vm.disks[1].overlay),
            ("deb", &None)
        );
    }

    #[test]
    fn flags_make_a_machine() {
        let vm = run(&[
            "/a.qcow2",
            "--disk",
            "/b,ro",
            "-m",
            "512M",
            "--cpus",
            "4,threads=2",
            "-p",
            "2222:22",
            "--hostname",
            "web",
            "--console",
            "none",
            "--snapshot",
            "--stop-timeout",
            "5",
        ])
        .unwrap();
        assert_eq!(
            vm.disks
                .iter()
                .map(|disk| disk.path.to_str().unwrap())
                .collect::<Vec<_>>(),
            ["/a.qcow2", "/b"]
        );
        assert!(vm.disks.iter().all(|disk| disk.snapshot));
        assert_eq!((vm.memory.size, vm.cpus.count), (ByteSize::mib(512), 4));
        let NetBackendConfig::User { forwards, .. } = &vm.nets[0].backend else {
            panic!()
        };
        assert_eq!(forwards.len(), 1);
        assert_eq!(
            vm.cloud_init.as_ref().unwrap().hostname.as_deref(),
            Some("web")
        );
        assert_eq!(vm.console.output, ConsoleOutput::None);
        assert_eq!((vm.stop_timeout, default_name(&vm).as_str()), (5, "a"));
        let vm = run(&["/a"]).unwrap();
        assert_eq!(vm.cloud_init, None);
    }

    #[test]
    fn flags_go_before_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vm.yaml");
        let text = "name: file\nmemory: {size: 2G, hugepages: true}\ndisks: [{path: a}]\n\
                    nets: [{tap: t}]\ncloud_init: {hostname: h, user_data: u}\n";
        std::fs::write(&path, text).unwrap();
        let file = path.to_str().unwrap();
        let vm = run(&["--config", file]).unwrap();
        assert_eq!(
            (vm.name.as_deref(), vm.memory.size),
            (Some("file"), ByteSize::mib(2048))
        );
        assert_eq!(vm.disks[0].path, folder.path().join("a"));

        let vm = run(&[
            "--config",
            file,
            "--name",
            "flag",
            "-m",
            "1G",
            "/b",
            "--hostname",
            "i",
            "--net",
            "none",
        ])
        .unwrap();
        assert_eq!(
            (vm.name.as_deref(), vm.memory.size),
            (Some("flag"), ByteSize::mib(1024))
        );
        assert_eq!((vm.disks.len(), vm.nets.len()), (1, 0));
        let seed = vm.cloud_init.unwrap();
        assert_eq!(
            (seed.hostname.as_deref(), seed.user_data),
            (Some("i"), Some(folder.path().join("u")))
        );
        let refused = run(&["--config", file, "-p", "80:80"]).unwrap_err();
        assert!(refused.contains("add --net user"), "{refused}");
    }

    #[test]
    fn each_disk_has_an_overlay_of_its_own() {
        let overlays = |args: &[&str]| -> Vec<String> {
            let disks = run(args).unwrap().disks.into_iter();
            let path = |disk: DiskConfig| disk.overlay.unwrap_or_default().display().to_string();
            disks.map(path).collect()
        };
        assert_eq!(
            overlays(&["--overlay", "/o", "/a/x.raw", "/b/x.raw", "--disk", "/c,ro"]),
            ["/o/x/x.raw.overlay.qcow2", "/o/x/x.raw-2.overlay.qcow2", ""]
        );
        let args = [
            "--overlay",
            "/o",
            "--name",
            "vm",
            "--disk",
            "/a,overlay=/p",
            "/b",
        ];
        assert_eq!(overlays(&args), ["/o/vm/b.overlay.qcow2", "/p"]);
        let vm = run(&["--overlay", "/o", "--overlay-size", "20G", "/a", "/b"]).unwrap();
        let sizes = vm.disks.iter().map(|disk| disk.overlay_size);
        assert!(sizes.eq([Some(ByteSize(20 << 30)), None]));
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(
            run(&["/a", "--net", "none", "--net", "user"])
                .unwrap_err()
                .contains("excludes")
        );
        assert!(
            run(&["/a", "--net", "none", "-p", "1:1"])
                .unwrap_err()
                .contains("there is none")
        );
        assert!(run(&[]).unwrap_err().contains("nothing to boot"));
    }
}
