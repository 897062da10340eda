//! UEFI as edk2 builds it for QEMU (OvmfPkg): a flash below 4 GiB of variables and code.
//!
//! With a file for its variables they are kept from run to run. Without one the flash is a ROM,
//! by which OVMF knows that it has to keep them in memory.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use edgevmm_block::{BlockError, Existing, NewFile, lock_file};
use edgevmm_devices::legacy::pflash::FlashStore;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::{BootError, Source};
use crate::layout::FIRMWARE_END;

/// Where Debian and Ubuntu put OVMF's code (package ovmf).
pub const DEFAULT_CODE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
/// Where they put the variables that a machine begins with.
pub const DEFAULT_VARS: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";
/// The package of both.
pub const PACKAGE: &str = "ovmf";

const WHAT: &str = "UEFI firmware";
const VARS: &str = "file of UEFI variables";
/// The pages of the flash, and the blocks that are erased.
const PAGE: u64 = 4096;
/// Sizes of code and variables together.
const SIZES: [u64; 2] = [2 << 20, 4 << 20];
/// A firmware volume begins with its header, which has this (UEFI PI 1.8, volume 3, section 3.2.1).
const VOLUME_MAGIC: (usize, &[u8; 4]) = (40, b"_FVH");
const VOLUME_HEAD: usize = 44;

/// OVMF, with or without variables that last.
#[derive(Debug)]
pub struct Ovmf {
    code: Arc<MmapRegion>,
    vars: Vars,
}

#[derive(Debug)]
enum Vars {
    Rom(Arc<MmapRegion>),
    File(Arc<VarsFile>),
}

impl Ovmf {
    /// Opens the code at `code`, or Debian's, and the variables: those in the file `vars`, which is
    /// made when it is missing.
    ///
    /// # Errors
    /// Fails when a file can't be had, is something else or in use.
    pub fn open(code: Option<&Path>, vars: Option<&Path>) -> Result<Ovmf, BootError> {
        let template = template(code);
        let code = Source::open_firmware(
            WHAT,
            code.unwrap_or_else(|| Path::new(DEFAULT_CODE)),
            PACKAGE,
        )?;
        let code_len = volume_len(&code, WHAT)?;
        let Some(vars) = vars else {
            let template = Source::open_firmware(WHAT, &template, PACKAGE)?;
            let len = volume_len(&template, WHAT)?;
            if !SIZES.contains(&(code_len + len)) {
                return Err(not_firmware(template));
            }
            return Ok(Ovmf {
                code: map(code, code_len)?,
                vars: Vars::Rom(map(template, len)?),
            });
        };
        let fits = |len: u64| SIZES.contains(&(code_len.saturating_add(len)));
        let vars = VarsFile::open(vars, &template, fits)?;
        Ok(Ovmf {
            code: map(code, code_len)?,
            vars: Vars::File(Arc::new(vars)),
        })
    }

    /// Its ROMs with their guest-physical addresses.
    pub fn roms(&self) -> Vec<(u64, Arc<MmapRegion>)> {
        let code = FIRMWARE_END - self.code.size() as u64;
        let mut roms = vec![(code, Arc::clone(&self.code))];
        if let Vars::Rom(vars) = &self.vars {
            roms.push((code - vars.size() as u64, Arc::clone(vars)));
        }
        roms
    }

    /// Its variables with their guest-physical address, if they last.
    pub fn flash(&self) -> Option<(u64, Arc<VarsFile>)> {
        match &self.vars {
            Vars::Rom(_) => None,
            Vars::File(vars) => {
                let flash = self.code.size() + vars.array.size();
                Some((FIRMWARE_END - flash as u64, Arc::clone(vars)))
            }
        }
    }
}

/// The template of variables that belongs to `code`: beside it, as packages have them.
fn template(code: Option<&Path>) -> PathBuf {
    let beside = code.and_then(|code| {
        let name = code.file_name()?.to_str()?;
        let beside = code.with_file_name(name.replacen("CODE", "VARS", 1));
        (beside != code && beside.exists()).then_some(beside)
    });
    beside.unwrap_or_else(|| DEFAULT_VARS.into())
}

fn not_firmware(source: Source) -> BootError {
    BootError::NotFirmware {
        what: source.what,
        path: source.path,
    }
}

/// The length of a file that is a firmware volume.
fn volume_len(source: &Source, what: &'static str) -> Result<u64, BootError> {
    let mut head = [0; VOLUME_HEAD];
    let len = source.len()?;
    let whole = source.file.read_exact_at(&mut head, 0).is_ok();
    let (at, magic) = VOLUME_MAGIC;
    let volume = head.get(at..) == Some(magic);
    if whole && volume && len.is_multiple_of(PAGE) && SIZES.iter().any(|size| len < *size) {
        Ok(len)
    } else {
        Err(BootError::NotFirmware {
            what,
            path: source.path.clone(),
        })
    }
}

fn map(source: Source, len: u64) -> Result<Arc<MmapRegion>, BootError> {
    let size = usize::try_from(len).unwrap_or(usize::MAX);
    let rom = MmapRegionBuilder::new(size)
        .with_file_offset(FileOffset::new(source.file, 0))
        .with_mmap_prot(libc::PROT_READ)
        .with_mmap_flags(libc::MAP_PRIVATE)
        .build()
        .map_err(BootError::MapFirmware)?;
    Ok(Arc::new(rom))
}

/// A machine's UEFI variables.
#[derive(Debug)]
pub struct VarsFile {
    file: File,
    array: Arc<MmapRegion>,
}

impl VarsFile {
    /// Opens and locks the file at `path`; makes it of `template` when it is missing.
    fn open(
        path: &Path,
        template: &Path,
        fits: impl Fn(u64) -> bool,
    ) -> Result<VarsFile, BootError> {
        let failed = |source| BootError::Vars {
            path: path.to_path_buf(),
            source,
        };
        if std::fs::symlink_metadata(path)
            .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
        {
            let template = Source::open_firmware(VARS, template, PACKAGE)?;
            volume_len(&template, VARS)?;
            make(path, &template, failed)?;
        }
        let read = |source| BootError::Read {
            what: VARS,
            path: path.to_path_buf(),
            source,
        };
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(read)?;
        if !file.metadata().map_err(read)?.is_file() {
            return Err(BootError::NotVars(path.to_path_buf()));
        }
        lock_file(&file, path).map_err(failed)?;
        let source = Source {
            what: VARS,
            path: path.to_path_buf(),
            file,
        };
        let len = volume_len(&source, VARS)
            .ok()
            .filter(|len| fits(*len))
            .ok_or_else(|| BootError::NotVars(path.to_path_buf()))?;
        let mut bytes = Vec::new();
        (&source.file)
            .take(len)
            .read_to_end(&mut bytes)
            .map_err(read)?;
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        let array = MmapRegion::new(size).map_err(BootError::MapFirmware)?;
        array
            .get_slice(0, bytes.len())
            .and_then(|slice| slice.write_slice(&bytes, 0).map(|()| slice))
            .map_err(|_| BootError::NotVars(path.to_path_buf()))?;
        Ok(VarsFile {
            file: source.file,
            array: Arc::new(array),
        })
    }

    /// The variables in memory.
    pub fn array(&self) -> &Arc<MmapRegion> {
        &self.array
    }
}

/// Makes a file of `template`; it has its name once it is whole.
fn make(
    path: &Path,
    template: &Source,
    failed: impl Fn(BlockError) -> BootError,
) -> Result<(), BootError> {
    let new = NewFile::create(path, Existing::Keep).map_err(&failed)?;
    let copied = std::io::copy(&mut &template.file, &mut new.file());
    copied.map_err(|source| BootError::MakeVars {
        path: path.to_path_buf(),
        source,
    })?;
    new.finish().map_err(failed)
}

impl FlashStore for VarsFile {
    fn write(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tempfile::TempDir;

    use super::*;

    const CODE_LEN: usize = 3_653_632;
    const VARS_LEN: usize = 540_672;

    /// A folder with firmware of its own in it.
    fn installed() -> TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, len) in [("CODE.fd", CODE_LEN), ("VARS.fd", VARS_LEN)] {
            let mut volume = vec![name.as_bytes()[0]; len];
            volume[40..44].copy_from_slice(b"_FVH");
            std::fs::write(folder.path().join(name), volume).unwrap();
        }
        folder
    }

    fn open(folder: &TempDir, vars: Option<&str>) -> Result<Ovmf, BootError> {
        let vars = vars.map(|name| folder.path().join(name));
        Ovmf::open(Some(&folder.path().join("CODE.fd")), vars.as_deref())
    }

    #[test]
    fn without_a_file_all_of_it_is_a_rom() {
        let folder = installed();
        let ovmf = open(&folder, None).unwrap();
        let roms = ovmf.roms().into_iter();
        let roms: Vec<_> = roms.map(|(at, rom)| (at, rom.size())).collect();
        assert_eq!(roms, [(0xffc8_4000, CODE_LEN), (0xffc0_0000, VARS_LEN)]);
        assert!(ovmf.flash().is_none());
    }

    #[test]
    fn variables_are_made_of_the_template_and_kept() {
        let folder = installed();
        let ovmf = open(&folder, Some("vm.vars")).unwrap();
        assert_eq!(ovmf.roms().len(), 1);
        let (address, vars) = ovmf.flash().unwrap();
        assert_eq!(address, 0xffc0_0000);
        vars.write(9, b"kept").unwrap();
        vars.sync().unwrap();
        drop((ovmf, vars));
        let again = open(&folder, Some("vm.vars")).unwrap();
        let (_, vars) = again.flash().unwrap();
        let mut bytes = [0; 5];
        let all = vars.array().as_volatile_slice();
        all.read_slice(&mut bytes, 8).unwrap();
        assert_eq!(&bytes, b"Vkept");
    }

    #[test]
    fn variables_in_use_are_refused() {
        let folder = installed();
        let _first = open(&folder, Some("vm.vars")).unwrap();
        let error = open(&folder, Some("vm.vars")).unwrap_err();
        assert!(matches!(error, BootError::Vars { .. }), "{error}");
    }

    #[test]
    fn other_files_are_refused() {
        let folder = installed();
        let path = |name: &str| folder.path().join(name);
        let vars = std::fs::read(path("VARS.fd")).unwrap();
        for (name, content) in [
            ("empty", &[][..]),
            ("short", &vars[..VARS_LEN - 4096]),
            ("odd", &vars[..VARS_LEN - 1]),
            ("long", &[&vars[..], &[0; 4096]].concat()),
            ("else", &vec![7; VARS_LEN]),
        ] {
            std::fs::write(path(name), content).unwrap();
            let error = open(&folder, Some(name)).unwrap_err();
            assert!(
                error.to_string().contains("holds no UEFI variables"),
                "{error}"
            );
            assert_eq!(std::fs::read(path(name)).unwrap(), content, "unchanged");
        }
        std::fs::create_dir(path("folder")).unwrap();
        open(&folder, Some("folder")).unwrap_err();
        for content in [&[][..], &vec![7; CODE_LEN], &vars[..100]] {
            std::fs::write(path("CODE.fd"), content).unwrap();
            let error = open(&folder, None).unwrap_err();
            assert!(error.to_string().contains("is no UEFI firmware"), "{error}");
        }
    }

    #[test]
    fn a_missing_file_names_its_package() {
        let folder = installed();
        std::fs::remove_file(folder.path().join("CODE.fd")).unwrap();
        let error = open(&folder, Some("vm.vars")).unwrap_err();
        assert!(error.to_string().contains("apt install ovmf"), "{error}");
        assert!(!folder.path().join("vm.vars").exists());
    }
}
