//! The files that a VMDK descriptor names, and which of them are opened unasked.
//!
//! A descriptor is a file that anybody may have written, so it must not be able to name any file of
//! the host. Opened unasked are only plain files beside it whose names follow from its own, as
//! every tool names them: `NAME-flat.vmdk`, `NAME-s001.vmdk` and `NAME-f001.vmdk` for `NAME.vmdk`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};

use super::read_descriptor;
use crate::formats::range::FileRange;
use crate::formats::refusal::refusal;
use crate::host::{HostFile, check_kind};
use crate::open::{DataFile, open_error};
use crate::{BlockError, ImageFormat};

/// Opens the files that the VMDK descriptor at `path`, opened as `descriptor`, asks for, if they
/// are such as it may have: beside it and named after it. They are in the order that
/// [`DiskOptions::data_files`](crate::DiskOptions::data_files) wants; none for an image that is no
/// such descriptor.
///
/// # Errors
///
/// [`BlockError::DataFileNotGiven`] for a file that only the user may name;
/// [`BlockError::Missing`], [`BlockError::NotADisk`] and others for one that can't be opened;
/// [`BlockError::BadImage`] for a descriptor that is refused.
pub fn vmdk_data_files(path: &Path, descriptor: &File) -> Result<Vec<DataFile>, BlockError> {
    let name = path.display().to_string();
    let failed = |source| BlockError::File {
        op: "examine",
        path: name.clone(),
        source,
    };
    let file = HostFile::new(descriptor.try_clone().map_err(failed)?, &name, false)?;
    let range = FileRange::whole(file.into()).map_err(failed)?;
    let refuse = refusal(ImageFormat::Vmdk, &name);
    let Some(descriptor) = read_descriptor(&range).map_err(refuse)? else {
        return Ok(Vec::new());
    };
    // A link's target is what the other files are named after.
    let path = std::fs::canonicalize(path).map_err(failed)?;
    let mut files = Vec::new();
    for wanted in descriptor.files() {
        if !belongs(wanted, &path) {
            return Err(BlockError::DataFileNotGiven {
                path: name,
                wanted: wanted.to_owned(),
            });
        }
        files.push(open_beside(&path, wanted)?);
    }
    Ok(files)
}

/// Whether a descriptor at `path` may have the file `name` opened.
fn belongs(name: &str, path: &Path) -> bool {
    let own = path.file_name().and_then(|own| own.to_str());
    let Some(stem) = own.and_then(without_ending) else {
        return false;
    };
    let Some(rest) = without_ending(name)
        .and_then(|name| name.strip_prefix(stem))
        .and_then(|rest| rest.strip_prefix('-'))
    else {
        return false;
    };
    let digits = rest
        .strip_prefix(['s', 'f'])
        .filter(|digits| (3..=6).contains(&digits.len()));
    rest == "flat" || digits.is_some_and(|digits| digits.bytes().all(|it| it.is_ascii_digit()))
}

fn without_ending(name: &str) -> Option<&str> {
    let at = name.len().checked_sub(".vmdk".len())?;
    let (stem, ending) = name.split_at_checked(at)?;
    (ending.eq_ignore_ascii_case(".vmdk") && !stem.is_empty()).then_some(stem)
}

/// Opens for reading the file at `path`, which has been freed of links and is not to have any: others
/// may have made one of a folder since. Kernels before 5.6 can look at the last part of the path only.
fn open_without_links(path: &Path) -> io::Result<File> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    match openat2(AT_FDCWD, path, how) {
        Err(Errno::ENOSYS) => OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path),
        result => Ok(result?.into()),
    }
}

/// Opens the regular file `name` in the directory of `path`, which is canonical, following no link.
fn open_beside(path: &Path, name: &str) -> Result<DataFile, BlockError> {
    let path = path.with_file_name(name);
    let path_hint = path.display().to_string();
    let not_a_disk = |path, kind| BlockError::NotADisk { path, kind };
    let file = match open_without_links(&path) {
        Ok(file) => file,
        Err(err) if err.raw_os_error() == Some(libc::ELOOP) => {
            return Err(not_a_disk(
                path_hint,
                "a symbolic link, which a descriptor may not use",
            ));
        }
        Err(err) => return Err(open_error(&path, path_hint, false, err)),
    };
    let metadata = file.metadata().map_err(|source| BlockError::File {
        op: "examine",
        path: path_hint.clone(),
        source,
    })?;
    check_kind(&metadata, &path_hint)?;
    if !metadata.is_file() {
        return Err(not_a_disk(
            path_hint,
            "a device, which a descriptor may not use",
        ));
    }
    Ok(DataFile { file, path_hint })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn no_link_leads_to_another_file() {
        let root = tempfile::tempdir().unwrap();
        // The temporary folder may be reached by a link itself.
        let root = root.path().canonicalize().unwrap();
        std::fs::create_dir(root.join("real")).unwrap();
        std::fs::write(root.join("real/a-flat.vmdk"), "data").unwrap();
        std::os::unix::fs::symlink("real", root.join("link")).unwrap();
        std::os::unix::fs::symlink("a-flat.vmdk", root.join("real/b-flat.vmdk")).unwrap();
        let open = |path: &str, name| open_beside(&root.join(path), name);
        open("real/a.vmdk", "a-flat.vmdk").unwrap();
        for (path, name) in [
            ("link/a.vmdk", "a-flat.vmdk"),
            ("real/b.vmdk", "b-flat.vmdk"),
        ] {
            let error = open(path, name).unwrap_err();
            assert!(matches!(error, BlockError::NotADisk { .. }), "{error}");
        }
    }

    #[test]
    fn only_names_that_follow_from_the_own_belong() {
        let path = Path::new("/vms/old disk.vmdk");
        for name in [
            "old disk-flat.vmdk",
            "old disk-s001.vmdk",
            "old disk-f012.vmdk",
            "old disk-s1234.VMDK",
        ] {
            assert!(belongs(name, path), "{name}");
        }
        for name in [
            "old disk.vmdk",
            "old disk-s1.vmdk",
            "old disk-s0x1.vmdk",
            "old disk-flat.img",
            "old disk-flat-flat.vmdk",
            "old disk-rdm.vmdk",
            "other-flat.vmdk",
            "-flat.vmdk",
            "",
            ".vmdk",
            "id_rsa",
            "../old disk-flat.vmdk",
            "/vms/old disk-flat.vmdk",
        ] {
            assert!(!belongs(name, path), "{name}");
        }
        assert!(!belongs("a-flat.vmdk", Path::new("/vms/a.img")));
        assert!(!belongs("-flat.vmdk", Path::new("/vms/.vmdk")));
    }
}
