//! Starts a guest where a kernel can run: here, or in a lab of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{Boot, Cell, Firmware, Guests, Trial, Vmm};
use crate::bench::guest::Launch;
use crate::bench::probe::Job;
use crate::bench::{self, LAB_XTASK};
use crate::images::{GUEST_ROOT, GuestFiles, Images, RootFs};
use crate::lab::Lab;
use crate::packages::Tools;

/// RAM of each guest.
const RAM_MIB: u64 = 512;

/// The directory of a trial in the lab, which is in RAM: nothing there waits for this host.
const LAB_DIR: &str = "/tmp/guest";
/// Where edgevmm looks for UEFI by itself: naming one is choosing UEFI.
const LAB_UEFI: &str = "/usr/share/cloudhv-efi-x86-64/CLOUDHV.fd";
/// The lab's QEMU.
const QEMU: &str = "qemu-system-x86_64";

/// Where a trial is made, with its files.
struct Place {
    place: bench::Place,
    /// A directory with the files, under the names that the commands here have them.
    dir: PathBuf,
    /// This system's root there.
    root: PathBuf,
    _made: Option<TempDir>,
}

impl Place {
    /// A place with copies of `files`, each of which gets the name beside it.
    fn with(guests: &Guests, files: &[(PathBuf, &str)]) -> Result<Self> {
        if guests.in_lab {
            let lab = Lab::start()?;
            lab.put(&guests.xtask, LAB_XTASK)?;
            for (from, name) in files {
                lab.put(from, &format!("{LAB_DIR}/{name}"))?;
            }
            return Ok(Self {
                place: bench::Place::Lab(Box::new(lab)),
                dir: PathBuf::from(LAB_DIR),
                root: PathBuf::from("/host"),
                _made: None,
            });
        }
        let made = tempfile::tempdir()?;
        for (from, name) in files {
            fs::copy(from, made.path().join(name))
                .with_context(|| format!("Cannot copy {}", from.display()))?;
        }
        Ok(Self {
            place: bench::Place::Here,
            dir: made.path().to_owned(),
            root: PathBuf::from("/"),
            _made: Some(made),
        })
    }

    fn file(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }
}

/// Starts the guest of a cell and looks at its disk afterwards.
pub(super) fn boot(guests: &Guests, cell: &Cell) -> Result<Boot> {
    let files = Images::of_this_user().ensure_guest(cell.shape)?;
    let place = Place::with(guests, &needed(guests, cell, &files))?;
    if let (Firmware::Auto, bench::Place::Lab(lab)) = (cell.firmware, &place.place) {
        lab.put(&Images::of_this_user().cloudhv(), LAB_UEFI)?;
    }
    let launch = match cell.vmm {
        Vmm::Edgevmm => edgevmm(cell, &files, &place),
        Vmm::Qemu => qemu(cell, &files, &place),
    };
    place.place.measure(&Job::Trial(Trial {
        launch,
        ram_kib: RAM_MIB << 10,
        checks: checks(cell.shape.root, &files, &place)?,
        messages: place.dir.join("messages"),
    }))
}

/// The machine that guests run on, and its QEMU.
pub(super) fn describe(guests: &Guests) -> Result<(bench::probe::Machine, String)> {
    let place = Place::with(guests, &[])?;
    let version = Launch {
        program: QEMU.to_owned(),
        arguments: vec!["--version".to_owned()],
    };
    Ok((
        place.place.measure(&Job::Machine)?,
        place.place.measure(&Job::FirstLine(version))?,
    ))
}

/// The files that the start of a cell takes.
fn needed(guests: &Guests, cell: &Cell, files: &GuestFiles) -> Vec<(PathBuf, &'static str)> {
    let images = Images::of_this_user();
    let mut needed = vec![(files.disk.clone(), "disk.qcow2")];
    if cell.vmm == Vmm::Edgevmm {
        needed.push((guests.edgevmm.clone(), "edgevmm"));
    }
    match cell.firmware {
        // edgevmm looks for it beside itself.
        Firmware::Fast => needed.push((
            guests.edgevmm.with_file_name("edgevmm-fast"),
            "edgevmm-fast",
        )),
        Firmware::Uefi => needed.push((images.cloudhv(), "CLOUDHV.fd")),
        Firmware::Ovmf => {
            let [code, variables] = images.ovmf();
            needed.extend([(code, "OVMF_CODE_4M.fd"), (variables, "OVMF_VARS_4M.fd")]);
        }
        Firmware::Direct => {
            let [kernel, initrd] = [&files.kernel, &files.initrd].map(PathBuf::clone);
            needed.extend([(kernel, "vmlinuz"), (initrd, "initrd")]);
        }
        Firmware::Bios | Firmware::Auto => {}
    }
    needed
}

fn edgevmm(cell: &Cell, files: &GuestFiles, place: &Place) -> Launch {
    let machine = format!("run --net none --cpus {} --memory {RAM_MIB}M", cell.cpus);
    let mut arguments: Vec<String> = machine.split(' ').map(str::to_owned).collect();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    match cell.firmware {
        Firmware::Direct => {
            add("--kernel", place.file("vmlinuz"));
            add("--initrd", place.file("initrd"));
            add("--cmdline", files.cmdline.to_owned());
        }
        Firmware::Uefi => {
            add("--firmware", "uefi".to_owned());
            add("--uefi", place.file("CLOUDHV.fd"));
        }
        Firmware::Ovmf => {
            add("--firmware", "uefi".to_owned());
            add("--uefi", place.file("OVMF_CODE_4M.fd"));
        }
        Firmware::Bios | Firmware::Fast | Firmware::Auto => {
            add("--firmware", cell.firmware.name().to_owned());
        }
    }
    arguments.push(place.file("disk.qcow2"));
    Launch {
        program: place.file("edgevmm"),
        arguments,
    }
}

fn qemu(cell: &Cell, files: &GuestFiles, place: &Place) -> Launch {
    let machine = format!(
        "-M q35,accel=kvm -cpu host -m {RAM_MIB} -smp {} -nodefaults -no-user-config \
         -display none -serial stdio -drive if=virtio,format=qcow2,file={}",
        cell.cpus,
        place.file("disk.qcow2")
    );
    let mut arguments: Vec<String> = machine.split(' ').map(str::to_owned).collect();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    match cell.firmware {
        Firmware::Direct => {
            add("-kernel", place.file("vmlinuz"));
            add("-initrd", place.file("initrd"));
            add("-append", files.cmdline.to_owned());
        }
        Firmware::Ovmf => {
            let flash = "if=pflash,format=raw";
            let [code, variables] =
                ["CODE", "VARS"].map(|part| place.file(&format!("OVMF_{part}_4M.fd")));
            add("-drive", format!("{flash},readonly=on,file={code}"));
            add("-drive", format!("{flash},file={variables}"));
        }
        Firmware::Bios | Firmware::Uefi | Firmware::Fast | Firmware::Auto => {}
    }
    Launch {
        program: QEMU.to_owned(),
        arguments,
    }
}

/// Takes the root out of the disk and has its file system's own program look at it.
fn checks(root: RootFs, files: &GuestFiles, place: &Place) -> Result<Vec<Launch>> {
    let part = place.file("root.raw");
    let options = format!(
        "driver=raw,offset={},size={},file.driver=qcow2,file.file.driver=file,\
         file.file.filename={}",
        GUEST_ROOT.start,
        GUEST_ROOT.end - GUEST_ROOT.start,
        place.file("disk.qcow2")
    );
    let extract = Launch {
        program: "qemu-img".to_owned(),
        arguments: ["convert", "-O", "raw", "--image-opts", &options, &part]
            .map(str::to_owned)
            .to_vec(),
    };
    let tools = files.tools.path("");
    let tools = Tools::new(&place.root.join(tools.strip_prefix("/").unwrap_or(&tools)));
    let (program, arguments): (_, &[&str]) = match root {
        RootFs::Ext4 => ("usr/sbin/e2fsck", &["-fn"]),
        RootFs::Xfs => ("usr/sbin/xfs_repair", &["-f", "-n"]),
        RootFs::Btrfs => ("usr/bin/btrfs", &["check", "--readonly"]),
    };
    let mut check = tools.command(program);
    check.args(arguments).arg(Path::new(&part));
    Ok(vec![extract, launch(&check)?])
}

fn launch(command: &Command) -> Result<Launch> {
    let text = |word: &std::ffi::OsStr| {
        let word = word.to_str().context("A path that is not UTF-8")?;
        anyhow::Ok(word.to_owned())
    };
    Ok(Launch {
        program: text(command.get_program())?,
        arguments: command.get_args().map(text).collect::<Result<_>>()?,
    })
}
