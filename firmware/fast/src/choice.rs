//! What a disk would boot: finds the boot loader's configuration and what its default starts.
//!
//! A disk has either GRUB's configuration on one of its file systems, or entries of the Boot Loader
//! Specification on its EFI system partition or extended boot loader partition. One with both, or
//! with two of GRUB, is left to whoever knows which of them its firmware would have started.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use crate::bls;
use crate::decline::{Decline, Reason, config};
use crate::disk::Disk;
use crate::grub::{self, By, Kind, Place};
use crate::partitions::{self, Partition, Role, Table};
use crate::pe::{Piece, Uki};
use crate::volume::{File, Node, UNKNOWN, Volume};

/// Where GRUB's configuration is on the file system that it is on.
const GRUB_FILES: [&str; 4] = [
    "/boot/grub/grub.cfg",
    "/grub/grub.cfg",
    "/boot/grub2/grub.cfg",
    "/grub2/grub.cfg",
];
const LOADER_CONFIG: &str = "/loader/loader.conf";
const LOADER_ENTRIES: &str = "/loader/entries";
const UNIFIED_IMAGES: &str = "/EFI/Linux";

/// A file, or a part of one.
#[derive(Debug)]
pub struct Blob {
    /// The file.
    pub file: File,
    /// The part of it.
    pub piece: Piece,
}

/// What to start.
#[derive(Debug)]
pub struct Choice {
    /// What to call it: the kernel's path.
    pub name: String,
    /// A bzImage.
    pub kernel: Blob,
    /// The initial RAM disks, one after the other.
    pub initrds: Vec<Blob>,
    /// The kernel's command line.
    pub command_line: String,
}

/// A file system with its place.
#[derive(Debug)]
struct Mounted {
    device: String,
    role: Role,
    volume: Volume,
}

/// The file systems of all disks.
#[derive(Debug)]
pub struct Volumes {
    places: Vec<Mounted>,
    /// Why one could not be opened on the disk to boot from: the first that says what it is.
    trouble: Option<Decline>,
    /// Index of the disk to boot from.
    boot: usize,
}

impl Volumes {
    /// Finds the file systems of these disks. The first disk that has anything is booted from.
    ///
    /// # Errors
    /// There is no disk with anything, its table is damaged, or it can't be read.
    pub fn find(disks: &[Disk]) -> Result<Self, Decline> {
        let mut volumes = Self {
            places: Vec::new(),
            trouble: None,
            boot: usize::MAX,
        };
        for (index, disk) in disks.iter().enumerate() {
            let table = match partitions::read(disk) {
                Ok(table) => table,
                // A disk with nothing to boot may be as it likes.
                Err(_) if volumes.boot != usize::MAX => continue,
                Err(error) => return Err(error),
            };
            match table {
                Some(partitions) => volumes.add_partitions(index, partitions),
                None => volumes.add(index, &format!("hd{index}"), Role::Other, disk),
            }
        }
        if volumes.boot == usize::MAX {
            let nothing = || Decline::new(Reason::Disk, "there is no disk to boot from");
            return Err(volumes.trouble.unwrap_or_else(nothing));
        }
        Ok(volumes)
    }

    fn add_partitions(&mut self, index: usize, partitions: Vec<Partition>) {
        self.boot = self.boot.min(index);
        for partition in partitions {
            let table = match partition.table {
                Table::Gpt => "gpt",
                Table::Mbr => "msdos",
            };
            let device = format!("hd{index},{table}{}", partition.number);
            self.add(index, &device, partition.role, &partition.disk);
        }
    }

    fn add(&mut self, index: usize, device: &str, role: Role, disk: &Disk) {
        match Volume::open(disk) {
            Ok(volume) => {
                self.boot = self.boot.min(index);
                self.places.push(Mounted {
                    device: device.to_string(),
                    role,
                    volume,
                });
            }
            Err(error) if self.boot == usize::MAX || self.boot == index => {
                let known = |known: &&Decline| known.text != UNKNOWN;
                if self.trouble.as_ref().filter(known).is_none() {
                    self.trouble = Some(error);
                }
            }
            Err(_) => {}
        }
    }

    fn of_boot_disk(&self) -> impl Iterator<Item = &Mounted> {
        let (disk, partition) = (format!("hd{}", self.boot), format!("hd{},", self.boot));
        let places = self.places.iter();
        places.filter(move |p| p.device == disk || p.device.starts_with(&partition))
    }

    /// What the disk's boot loader would start.
    ///
    /// # Errors
    /// Nothing is found, or something on the way is not understood.
    pub fn choose(&self) -> Result<Choice, Decline> {
        let mut configurations = Vec::new();
        for place in self.of_boot_disk() {
            for path in GRUB_FILES {
                if matches!(place.volume.find(path)?, Some(Node::File(_))) {
                    configurations.push((place, path));
                    break;
                }
            }
        }
        let entries = self.entries()?;
        let nothing = |text: &str| Decline::new(Reason::Nothing, text);
        match (configurations.as_slice(), entries.is_empty()) {
            ([(place, path)], true) => self.choose_by_grub(&place.device, path),
            ([], false) => choose_by_entries(entries),
            ([], true) => Err(self
                .trouble
                .clone()
                .unwrap_or_else(|| nothing("no configuration of a boot loader was found"))),
            ([_], false) => Err(nothing("there are configurations of two boot loaders")),
            _ => Err(nothing("there are several configurations of GRUB")),
        }
    }

    fn choose_by_grub(&self, device: &str, path: &str) -> Result<Choice, Decline> {
        let linux = grub::run(self, device, path)?;
        let open = |place: &Place| {
            let volume = self.volume(&place.device);
            let file = volume
                .map(|volume| volume.open_file(&place.path))
                .transpose()?;
            whole(file.flatten(), &place.path)
        };
        Ok(Choice {
            kernel: open(&linux.kernel)?,
            initrds: linux.initrds.iter().map(open).collect::<Result<_, _>>()?,
            name: linux.kernel.path,
            command_line: linux.command_line,
        })
    }

    /// Entries of the boot disk's system partitions.
    fn entries(&self) -> Result<Vec<Found<'_>>, Decline> {
        let mut found = Vec::new();
        for place in self
            .of_boot_disk()
            .filter(|place| place.role != Role::Other)
        {
            let volume = &place.volume;
            for name in volume.names(LOADER_ENTRIES)? {
                let path = format!("{LOADER_ENTRIES}/{name}");
                if let Some(id) = name.strip_suffix(".conf")
                    && let Some(text) = volume.read(&path, bls::FILE_MAX)?
                {
                    let entry = bls::Entry::parse(id, &String::from_utf8_lossy(&text))?;
                    found.push(Found { entry, volume });
                }
            }
            for name in volume.names(UNIFIED_IMAGES)? {
                let path = format!("{UNIFIED_IMAGES}/{name}");
                if name.to_ascii_lowercase().ends_with(".efi")
                    && let Some(mut file) = volume.open_file(&path)?
                {
                    let entry = Uki::read(&mut file)?.entry(&mut file, &name, &path)?;
                    found.push(Found { entry, volume });
                }
            }
        }
        if let Some(default) = self.loader_default()?.filter(|_| !found.is_empty()) {
            let fits = |found: &Found| {
                let id = found.entry.id.as_str();
                let names = [id.to_string(), format!("{id}.conf")];
                names
                    .iter()
                    .any(|name| bls::matches(&default, name) == Some(true))
            };
            if bls::matches(&default, "").is_none() {
                return Err(config("loader.conf has a default that is not understood"));
            }
            found.sort_by(|a, b| {
                let order = fits(b).cmp(&fits(a));
                order.then_with(|| bls::compare(&a.entry, &b.entry))
            });
        } else {
            found.sort_by(|a, b| bls::compare(&a.entry, &b.entry));
        }
        Ok(found)
    }

    /// The default that loader.conf on the EFI system partition names.
    fn loader_default(&self) -> Result<Option<String>, Decline> {
        let Some(place) = self.of_boot_disk().find(|place| place.role == Role::Esp) else {
            return Ok(None);
        };
        let Some(text) = place.volume.read(LOADER_CONFIG, bls::FILE_MAX)? else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(&text);
        let mut default = None;
        for (key, value) in bls::lines(&text) {
            match (key, value) {
                // Kept in a UEFI variable, which there is none of.
                ("default", "@saved") => default = None,
                ("default", value) => default = Some(value.to_string()),
                ("timeout", "menu-force") => {
                    return Err(config("loader.conf wants a choice from the menu"));
                }
                _ => {}
            }
        }
        Ok(default)
    }

    fn volume(&self, device: &str) -> Option<&Volume> {
        let place = self.places.iter().find(|place| place.device == device);
        place.map(|place| &place.volume)
    }
}

/// An entry with the file system that its paths are on.
struct Found<'a> {
    entry: bls::Entry,
    volume: &'a Volume,
}

fn choose_by_entries(found: Vec<Found<'_>>) -> Result<Choice, Decline> {
    let Some(Found { entry, volume }) = found.into_iter().next() else {
        return Err(config("there is no boot loader entry"));
    };
    if entry.tries.is_some() {
        return Err(config("the default entry counts the tries to boot it"));
    }
    if entry.unsupported {
        return Err(config("the default entry has something that is left out"));
    }
    if let Some(path) = &entry.efi {
        return choose_unified(volume, path, entry.options.clone());
    }
    let Some(path) = entry.linux else {
        return Err(config("the default entry starts no Linux"));
    };
    let open = |path: &String| whole(volume.open_file(path)?, path);
    Ok(Choice {
        kernel: open(&path)?,
        initrds: entry.initrds.iter().map(open).collect::<Result<_, _>>()?,
        name: path,
        command_line: entry.options,
    })
}

fn choose_unified(volume: &Volume, path: &str, options: String) -> Result<Choice, Decline> {
    let open = || whole(volume.open_file(path)?, path);
    let part = |piece| {
        open().map(|blob| Blob {
            file: blob.file,
            piece,
        })
    };
    let uki = Uki::read(&mut open()?.file)?;
    let kernel = uki.linux.ok_or_else(|| {
        Decline::new(
            Reason::Kernel,
            "the default entry's EFI program is no Linux",
        )
    })?;
    let initrds = [uki.microcode, uki.initrd].into_iter().flatten();
    Ok(Choice {
        name: path.to_string(),
        kernel: part(kernel)?,
        initrds: initrds.map(part).collect::<Result<_, _>>()?,
        command_line: options,
    })
}

/// All of a file that must be there.
fn whole(file: Option<File>, path: &str) -> Result<Blob, Decline> {
    let missing = || Decline::new(Reason::Kernel, format!("{path} is missing"));
    let file = file.ok_or_else(missing)?;
    let piece = Piece {
        offset: 0,
        len: file.len(),
    };
    Ok(Blob { file, piece })
}

impl grub::Devices for Volumes {
    fn read(&self, device: &str, path: &str) -> Result<Option<Vec<u8>>, Decline> {
        match self.volume(device) {
            Some(volume) => volume.read(path, grub::FILE_MAX),
            None => Ok(None),
        }
    }

    fn kind(&self, device: &str, path: &str) -> Result<Option<Kind>, Decline> {
        let Some(volume) = self.volume(device) else {
            return Ok(None);
        };
        Ok(volume.find(path)?.map(|node| match node {
            Node::File(file) => Kind::File(file.len()),
            Node::Directory => Kind::Directory,
        }))
    }

    fn names(&self, device: &str, path: &str) -> Result<Vec<String>, Decline> {
        match self.volume(device) {
            Some(volume) => volume.names(path),
            None => Ok(Vec::new()),
        }
    }

    fn search(&self, by: By, value: &str) -> Result<Option<String>, Decline> {
        for Mounted { device, volume, .. } in &self.places {
            let fits = match by {
                By::Label => volume.label() == value,
                By::Uuid => volume.uuid().eq_ignore_ascii_case(value),
                By::File => volume.find(value)?.is_some(),
            };
            if fits {
                return Ok(Some(device.clone()));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
