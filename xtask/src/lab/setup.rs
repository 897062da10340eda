//! Makes the lab: packages, L1's kernel and root, and a snapshot of the booted L1.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::client::Client;
use super::protocol::Spawn;
use super::qemu::{self, Machine, Start, Vm};
use super::{RAM, STATE, boot, patch, root};
use crate::cache::{self, DirLock};
use crate::kernel::Kernel;
use crate::packages::{self, Apt, Mirror, Tools};
use crate::progress::{note, step};
use crate::{agent, process};

/// Where the lab's parts lie.
#[derive(Debug, Clone)]
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// The lab of this user, or of `$EDGEVMM_LAB`.
    #[must_use]
    pub fn of_this_user() -> Self {
        Self {
            dir: cache::lab_dir(),
        }
    }

    /// The lab's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The unpacked packages.
    #[must_use]
    pub fn tools(&self) -> Tools {
        Tools::new(&self.dir.join("packages"))
    }

    /// The unpacked package that L1's kernel is from, with all its modules.
    #[must_use]
    pub fn kernel_tree(&self) -> PathBuf {
        self.dir.join("kernel")
    }

    pub(super) fn kernel(&self) -> PathBuf {
        self.dir.join("l1/vmlinux")
    }

    pub(super) fn initrd(&self) -> PathBuf {
        self.dir.join("l1/initrd")
    }

    pub(super) fn root_image(&self) -> PathBuf {
        self.dir.join("l1/root.squashfs")
    }

    pub(super) fn snapshot(&self) -> PathBuf {
        self.dir.join("snapshot")
    }

    /// The directory that L1 sees at `/share` unless told otherwise.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.dir.join("share")
    }

    /// Stands for all that a machine of this lab has, for who makes snapshots of such machines.
    #[must_use]
    pub fn stamp(&self) -> Option<String> {
        cache::stamp(&self.snapshot())
    }

    /// The lab's QEMU with its data files.
    pub(super) fn qemu(&self) -> Command {
        let tools = self.tools();
        let mut command = tools.command_at(&self.dir.join("l1/qemu-system-x86_64"));
        command.env(
            "QEMU_MODULE_DIR",
            tools.path("usr/lib/x86_64-linux-gnu/qemu"),
        );
        for data in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(tools.path(data));
        }
        command
    }

    /// Whether [`setup`] has nothing to do.
    ///
    /// # Errors
    /// This system's release or mirror cannot be told.
    pub fn is_ready(&self) -> Result<bool> {
        let recipes = Recipes::new(&Mirror::of_this_system()?);
        Ok(
            cache::is_fresh(&self.dir.join("packages"), recipes.packages)
                && cache::is_fresh(&self.dir.join("l1"), recipes.l1)
                && cache::is_fresh(&self.snapshot(), recipes.snapshot),
        )
    }
}

/// What each stage is made from; each contains the one before.
struct Recipes {
    packages: u64,
    kernel: u64,
    l1: u64,
    snapshot: u64,
}

impl Recipes {
    fn new(mirror: &Mirror) -> Self {
        let packages = cache::recipe((mirror, root::PACKAGES));
        let kernel = cache::recipe((packages, mirror.generic_kernel()));
        let sources = (
            root::INITRD_INIT,
            include_str!("root.rs"),
            include_str!("patch.rs"),
        );
        let l1 = cache::recipe((kernel, sources, agent::SOURCES));
        let snapshot = cache::recipe((l1, include_str!("qemu.rs")));
        Self {
            packages,
            kernel,
            l1,
            snapshot,
        }
    }
}

/// Makes what is missing or made by an older recipe. `agent` is this program, which becomes the
/// agent inside L1.
///
/// # Errors
/// No apt, no network, not enough disk, or L1 does not boot.
pub fn setup(layout: &Layout, agent: &Path) -> Result<()> {
    let mirror = Mirror::of_this_system()?;
    let recipes = Recipes::new(&mirror);
    let _lock = DirLock::exclusive(&layout.dir)?;
    if layout.is_ready()? {
        return Ok(());
    }
    note(&format!(
        "making the nested-KVM lab in {}: a Linux with a real /dev/kvm inside an emulated machine, \
         from packages of {} {}. Nothing is installed on this system; needs 1.2 GB.",
        layout.dir.display(),
        mirror.uri,
        mirror.lab_suite()
    ));
    ensure_packages(layout, &mirror, recipes.packages)?;
    let tools = layout.tools();
    let kernel_dir = layout.kernel_tree();
    cache::ensure(&kernel_dir, recipes.kernel, |dir| {
        step("Downloading and unpacking L1's kernel", || {
            let apt = Apt::open(&layout.dir.join("apt"), &mirror, mirror.lab_suite())?;
            Kernel::fetch(&apt, mirror.generic_kernel(), dir, &tools).map(drop)
        })
    })?;
    cache::ensure(&layout.dir.join("l1"), recipes.l1, |dir| {
        step("Making L1's root disk", || {
            make_l1(&tools, &kernel_dir, agent, dir)
        })
    })?;
    cache::ensure(&layout.snapshot(), recipes.snapshot, |dir| {
        step("Booting L1 and saving it", || save_snapshot(layout, dir))
    })?;
    Ok(())
}

/// Makes only the unpacked packages, for who needs the tools but no L1.
///
/// # Errors
/// No apt, no network, or not enough disk.
pub fn setup_tools(layout: &Layout) -> Result<Tools> {
    let mirror = Mirror::of_this_system()?;
    let _lock = DirLock::exclusive(&layout.dir)?;
    ensure_packages(layout, &mirror, Recipes::new(&mirror).packages)?;
    Ok(layout.tools())
}

fn ensure_packages(layout: &Layout, mirror: &Mirror, recipe: u64) -> Result<()> {
    cache::ensure(&layout.dir.join("packages"), recipe, |dir| {
        step("Downloading and unpacking packages", || {
            let apt = Apt::open(&layout.dir.join("apt"), mirror, mirror.lab_suite())?;
            let archives = apt.download(root::PACKAGES, |_| true)?;
            packages::unpack(&archives, dir)?;
            root::complete(dir)
        })
    })
    .map(drop)
}

fn make_l1(tools: &Tools, kernel_dir: &Path, agent: &Path, dir: &Path) -> Result<()> {
    let kernel = Kernel::open(kernel_dir)?;
    kernel.write_vmlinux(&dir.join("vmlinux"))?;
    root::write_initrd(tools, &kernel, &dir.join("initrd"))?;
    root::write_image(tools, &kernel, agent, &dir.join("root.squashfs"))?;
    let stock = tools.path("usr/bin/qemu-system-x86_64");
    let qemu = dir.join("qemu-system-x86_64");
    fs::copy(&stock, &qemu).with_context(|| format!("Cannot copy {}", stock.display()))?;
    match patch::without_lock_check(fs::read(&stock)?) {
        Ok(patched) => fs::write(&qemu, patched)?,
        Err(error) => note(&format!(
            "QEMU stays as it is, UEFI guests may end it in the lab: {error:#}"
        )),
    }
    process::output(tools.command_at(&qemu).arg("--version")).map(drop)
}

/// Boots L1 with its RAM in a file of `dir` and saves its device state there once its agent answers.
fn save_snapshot(layout: &Layout, dir: &Path) -> Result<()> {
    let ram = dir.join(RAM);
    let (vm, client) = boot(|timeout| {
        let machine = Machine::default();
        let vm = Vm::spawn(layout, &machine, Start::Recorded(&ram), &layout.share())?;
        let client = Client::connect(vm.connect("agent")?, false, timeout, || !vm.has_ended());
        Ok((vm, client))
    })?;
    let settle = Spawn {
        argv: [
            "sh",
            "-c",
            "test -c /dev/kvm && sync && echo 3 > /proc/sys/vm/drop_caches",
        ]
        .map(str::to_owned)
        .to_vec(),
        env: Vec::new(),
        cwd: "/".to_owned(),
        terminal: None,
    };
    let output = client
        .spawn(&settle, false)?
        .wait(Some(Duration::from_secs(60)))?;
    anyhow::ensure!(output.success(), "{}", vm.explain("L1 has no /dev/kvm"));
    std::thread::sleep(Duration::from_millis(500));
    qemu::save(&mut vm.qmp()?, &dir.join(STATE))?;
    drop(client);
    Ok(())
}
