//! What the annotation `edgevmm.io/disks` says of a machine's disks: in which order the guest has them
//! and how it sees each.
//!
//! Each line is what `edgevmm run --disk` takes, with the disk's name in place of a path. Keys about
//! files are left out: a pod's disks are those of its image, volumes and devices.

use edgevmm_config::{ConfigError, DiskBus, DiskConfig, DiskFormat, DiskKind, VmConfig};

/// What the disk in the container image is called. A pod's volumes have no capital letters.
pub const OF_IMAGE: &str = "containerDisk";
/// What paths of further disks in the container image begin with.
pub const IN_IMAGE: &str = "/disk/";
/// More disks than a machine has places for.
const MAX_ENTRIES: usize = 256;
/// Letters of an entry that messages show.
const MAX_SHOWN: usize = 100;

/// Why disks can't be as they are wished for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DisksError {
    /// An entry is wrong.
    #[error("The annotation edgevmm.io/disks can't have `{entry}`: {reason}")]
    Entry {
        /// The entry.
        entry: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Entries don't go together.
    #[error("The entries of the annotation edgevmm.io/disks don't go together")]
    Together(#[source] ConfigError),
    /// There are too many.
    #[error("The annotation edgevmm.io/disks has more than {MAX_ENTRIES} entries")]
    Many,
    /// There is no such disk.
    #[error(
        "The annotation edgevmm.io/disks names `{name}`, which is no disk of the machine: it has \
         {there}"
    )]
    Unknown {
        /// The name.
        name: String,
        /// Names of the disks that there are.
        there: String,
    },
}

/// A disk that a machine has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// What it is called.
    pub name: String,
    /// Where the container has it, by which it may be called, too.
    pub place: String,
    /// What it is made of, and how the guest sees it when nothing is said.
    pub config: DiskConfig,
}

impl Disk {
    fn is_called(&self, name: &str) -> bool {
        self.name == name || self.place == name
    }
}

/// How a machine's disks are to be. Each is told by the path, which is the disk's name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes(Vec<DiskConfig>);

impl Wishes {
    /// Reads the annotation: an entry on each line.
    ///
    /// # Errors
    ///
    /// Names the entry that is wrong, and the key.
    pub fn parse(text: &str) -> Result<Self, DisksError> {
        let entries = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let mut wishes = Self::default();
        for entry in entries {
            if wishes.0.len() == MAX_ENTRIES {
                return Err(DisksError::Many);
            }
            let wrong = |reason: String| DisksError::Entry {
                entry: entry.chars().take(MAX_SHOWN).collect(),
                reason,
            };
            let wish = read(entry).map_err(wrong)?;
            if wishes.0.iter().any(|other| other.path == wish.path) {
                return Err(wrong("the disk has an entry already".to_owned()));
            }
            wishes.0.push(wish);
        }
        if wishes.0.is_empty() {
            return Ok(wishes);
        }
        // What is wrong with one of them has been told by its entry.
        check(wishes.0.clone()).map_err(DisksError::Together)?;
        Ok(wishes)
    }

    /// What is wished for the disk with these two names.
    pub fn of(&self, name: &str, place: &str) -> Option<&DiskConfig> {
        self.0.iter().find(|wish| {
            let called = name_of(wish);
            called == name || called == place
        })
    }

    /// Names of the files in the image's folder of disks that have an entry of their own.
    pub fn files_of_image(&self) -> Vec<&str> {
        let names = self.0.iter().map(name_of);
        names
            .filter_map(|name| name.strip_prefix(IN_IMAGE))
            .collect()
    }

    /// Makes of the disks that there are those that are wished for, which come first, and leaves the
    /// others as they are; `bus` is that of disks for which none is said.
    ///
    /// # Errors
    ///
    /// When there is no such disk, or it can't be so.
    pub fn arrange(
        &self,
        mut there: Vec<Disk>,
        bus: Option<DiskBus>,
    ) -> Result<Vec<DiskConfig>, DisksError> {
        let names: Vec<_> = there.iter().map(|disk| disk.name.clone()).collect();
        let mut disks = Vec::new();
        for wish in &self.0 {
            let name = name_of(wish);
            let Some(index) = there.iter().position(|disk| disk.is_called(name)) else {
                return Err(DisksError::Unknown {
                    name: name.to_owned(),
                    there: match names.as_slice() {
                        [] => "none".to_owned(),
                        names => names.join(", "),
                    },
                });
            };
            disks.push(merge(wish, there.remove(index))?);
        }
        disks.extend(there.into_iter().map(|disk| disk.config));
        for disk in disks.iter_mut().filter(|disk| !disk.is_cdrom()) {
            disk.bus = disk.bus.or(bus);
        }
        Ok(disks)
    }
}

/// Whether a disk is only read, by what is wished for it.
pub fn is_read_only(wish: Option<&DiskConfig>) -> bool {
    wish.is_some_and(|wish| wish.ro || wish.is_cdrom())
}

fn name_of(wish: &DiskConfig) -> &str {
    wish.path.to_str().unwrap_or_default()
}

fn read(entry: &str) -> Result<DiskConfig, String> {
    if entry
        .split(',')
        .next()
        .is_some_and(|name| name.contains('='))
    {
        return Err("begin with the disk's name, as in data,bus=sata".to_owned());
    }
    let wish: DiskConfig = entry.parse().map_err(|error| format!("{error}"))?;
    let of_files = [
        ("format", wish.format.is_some()),
        ("backing", !wish.backing.is_empty()),
        ("data_file", !wish.data_file.is_empty()),
        ("member", wish.member.is_some()),
        ("internal_snapshot", wish.internal_snapshot.is_some()),
        ("overlay", wish.overlay.is_some()),
        ("overlay_size", wish.overlay_size.is_some()),
        ("snapshot", wish.snapshot),
    ];
    if let Some((key, _)) = of_files.into_iter().find(|(_, given)| *given) {
        return Err(format!(
            "`{key}` says what a disk is made of, which the pod's image and volumes do: leave it out"
        ));
    }
    check(vec![wish.clone()]).map_err(|error| error.to_string())?;
    Ok(wish)
}

/// Checks disks as those of a machine.
fn check(disks: Vec<DiskConfig>) -> Result<(), ConfigError> {
    let vm = VmConfig {
        disks,
        ..VmConfig::default()
    };
    vm.validate()
}

fn merge(wish: &DiskConfig, disk: Disk) -> Result<DiskConfig, DisksError> {
    let found = disk.config;
    let raw = found.format.is_none_or(|format| format == DiskFormat::Raw);
    if wish.is_cdrom() && !raw {
        return Err(DisksError::Entry {
            entry: name_of(wish).to_owned(),
            reason: "`kind=cdrom` needs a raw image, like disk.img or *.iso".to_owned(),
        });
    }
    let kind = match wish.kind {
        DiskKind::Cdrom => DiskKind::Cdrom,
        DiskKind::Disk => found.kind,
    };
    Ok(DiskConfig {
        path: found.path,
        kind,
        format: found.format,
        ro: found.ro || wish.ro,
        serial: wish.serial.clone().or(found.serial),
        overlay: found.overlay,
        ..wish.clone()
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use edgevmm_config::{DiskAio, DiskErrorPolicy};
    use proptest::prelude::*;

    use super::*;

    fn disk(name: &str, place: &str) -> Disk {
        let mut config = DiskConfig::new(format!("/bundle/{name}"));
        config.serial = Some(name.to_owned());
        Disk {
            name: name.to_owned(),
            place: place.to_owned(),
            config,
        }
    }

    fn refused(text: &str) -> String {
        let error = Wishes::parse(text).unwrap_err();
        let text = crate::chain(&error);
        assert!(text.contains("edgevmm.io/disks"), "{text}");
        text
    }

    #[test]
    fn disks_are_as_they_are_wished_for_and_in_that_order() {
        let wishes = Wishes::parse(
            "/srv/iso,kind=cdrom,bootindex=2\n\n  containerDisk,serial=R-1,bootindex=1,ro,direct\n\
             data,bus=sata,error_policy=report,aio=threads,iops=100",
        );
        let there = vec![
            disk(OF_IMAGE, "/disk/a.img"),
            disk("more", "/more"),
            disk("data", "/data"),
            disk("srv-iso", "/srv/iso"),
        ];
        let disks = wishes
            .unwrap()
            .arrange(there, Some(DiskBus::Virtio))
            .unwrap();
        let [iso, root, data, more] = disks.as_slice() else {
            panic!("{disks:?}");
        };
        assert!(iso.is_cdrom() && iso.bus() == DiskBus::Sata);
        assert_eq!(
            (iso.bootindex, iso.serial.as_deref()),
            (Some(2), Some("srv-iso"))
        );
        assert_eq!(root.path.to_str(), Some("/bundle/containerDisk"));
        assert_eq!(
            (root.bus(), root.serial.as_deref()),
            (DiskBus::Virtio, Some("R-1"))
        );
        assert!(root.ro && root.direct && root.bootindex == Some(1));
        assert_eq!((data.bus(), data.aio), (DiskBus::Sata, DiskAio::Threads));
        assert_eq!(data.error_policy, DiskErrorPolicy::Report);
        assert_eq!((data.iops, data.ro), (Some(100), false));
        assert_eq!(
            (more.bus(), more.serial.as_deref()),
            (DiskBus::Virtio, Some("more"))
        );
    }

    #[test]
    fn what_the_operator_writes_is_read() {
        let text = "a,bus=virtio,ro,serial=A-1,error_policy=report,aio=threads\n\
                    b,kind=cdrom,bootindex=2,error_policy=stop\ncontainerDisk,bus=sata,bootindex=1,direct";
        let wishes = Wishes::parse(text).unwrap();
        assert!(is_read_only(wishes.of("a", "/a")) && is_read_only(wishes.of("", "b")));
        assert!(!is_read_only(wishes.of(OF_IMAGE, "")) && wishes.files_of_image().is_empty());
    }

    #[test]
    fn what_is_wrong_is_told_by_entry_and_key() {
        for (text, entry, reason) in [
            ("a\nb,buss=sata", "`b,buss=sata`", "did you mean `bus`"),
            ("a,bus=scsi", "`a,bus=scsi`", "scsi"),
            ("bus=sata", "`bus=sata`", "begin with the disk's name"),
            ("a,bootindex=-1", "`a,bootindex=-1`", "`bootindex`"),
            (
                "a,serial=123456789012345678901",
                "`a,serial=",
                "20 printable",
            ),
            (
                "a,kind=cdrom,bus=virtio",
                "`a,kind=cdrom",
                "can't have `bus`",
            ),
            (
                "a,kind=cdrom,error_policy=ignore",
                "`a,",
                "can't have `error_policy`",
            ),
            ("a,bus=sata,queues=2", "`a,", "can't have `queues`"),
            (
                "a,overlay=/etc/passwd",
                "`a,",
                "`overlay` says what a disk is made of",
            ),
            ("a,format=raw", "`a,", "`format` says"),
            ("a,snapshot", "`a,", "`snapshot` says"),
            ("a,backing=/etc/shadow", "`a,", "`backing` says"),
            ("a,bus=sata\na,ro", "`a,ro`", "has an entry already"),
        ] {
            let error = refused(text);
            assert!(error.contains(entry) && error.contains(reason), "{error}");
        }
        let error = refused("a,bootindex=1\nb,bootindex=1");
        assert!(error.contains("boot index 1 is there twice"), "{error}");
        assert!(refused("a,serial=s\nb,serial=s").contains("serial number s"));
        let many: String = (0..=MAX_ENTRIES).map(|n| format!("d{n}\n")).collect();
        assert_eq!(Wishes::parse(&many), Err(DisksError::Many));
        assert_eq!(Wishes::parse(" \n"), Ok(Wishes::default()));
    }

    #[test]
    fn disks_that_are_not_there_or_not_raw_are_named() {
        let arrange = |text: &str, there| {
            let error = Wishes::parse(text).unwrap().arrange(there, None);
            error.unwrap_err().to_string()
        };
        let error = arrange("date", vec![disk(OF_IMAGE, "/disk/a"), disk("data", "/d")]);
        assert!(
            error.contains("`date`") && error.contains("containerDisk, data"),
            "{error}"
        );
        // One disk by both of its names.
        let error = arrange("data\n/d", vec![disk("data", "/d")]);
        assert!(error.contains("`/d`"), "{error}");
        let mut qcow2 = disk("data", "/d");
        qcow2.config.format = Some(DiskFormat::Qcow2);
        let error = arrange("data,kind=cdrom", vec![qcow2]);
        assert!(
            error.contains("`data`") && error.contains("`kind=cdrom`"),
            "{error}"
        );
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String) {
            if let Ok(wishes) = Wishes::parse(&text) {
                let _ = wishes.arrange(vec![disk("a", "/a")], None);
                let _ = wishes.files_of_image();
            }
        }
    }
}
