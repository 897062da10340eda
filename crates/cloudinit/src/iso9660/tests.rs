//! Images are read back by a reader that shares no code with the writer.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

type Files = BTreeMap<String, Vec<u8>>;

/// Directories by first sector.
type Directories = Vec<(u32, String)>;

/// An image as a reader of one of its two hierarchies sees it.
struct Reader<'a> {
    image: &'a [u8],
    joliet: bool,
    descriptor: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(image: &'a [u8], joliet: bool) -> Self {
        assert_eq!(image.len() % 2048, 0);
        assert!(image[..16 * 2048].iter().all(|&byte| byte == 0));
        for (sector, kind) in [(16, 1), (17, 2), (18, 255)] {
            assert_eq!(
                &image[sector * 2048..][..7],
                &[kind, b'C', b'D', b'0', b'0', b'1', 1]
            );
        }
        let descriptor = &image[if joliet { 17 } else { 16 } * 2048..][..2048];
        assert_eq!(&descriptor[88..91], if joliet { b"%/E" } else { &[0; 3] });
        assert_eq!(both32(&descriptor[80..]) as usize * 2048, image.len());
        assert_eq!(descriptor[881], 1);
        Self {
            image,
            joliet,
            descriptor,
        }
    }

    fn text(&self, bytes: &[u8]) -> String {
        if !self.joliet {
            return String::from_utf8(bytes.to_vec()).unwrap();
        }
        let units: Vec<u16> = bytes
            .chunks_exact(2)
            .map(|pair| u16::from_be_bytes([pair[0], pair[1]]))
            .collect();
        String::from_utf16(&units).unwrap()
    }

    fn label(&self) -> String {
        self.text(&self.descriptor[40..72]).trim_end().to_owned()
    }

    /// All files by path and the directories by the order of their first sectors.
    fn walk(&self) -> (Files, Directories) {
        let root = &self.descriptor[156..190];
        let mut files = BTreeMap::new();
        let mut directories = vec![(both32(&root[2..]), String::new())];
        self.walk_directory(root, root, "", &mut files, &mut directories);
        (files, directories)
    }

    fn walk_directory(
        &self,
        record: &[u8],
        parent: &[u8],
        path: &str,
        files: &mut Files,
        directories: &mut Directories,
    ) {
        let extent = self.extent(record);
        assert!(!extent.is_empty() && extent.len().is_multiple_of(2048));
        let mut entries = Vec::new();
        for sector in extent.chunks(2048) {
            let mut rest = sector;
            while rest.first().is_some_and(|&length| length != 0) {
                let (entry, tail) = rest.split_at(rest[0].into());
                entries.push(entry);
                rest = tail;
            }
            assert!(rest.iter().all(|&byte| byte == 0));
        }
        assert_eq!(
            (identifier(entries[0]), identifier(entries[1])),
            (&[0][..], &[1][..])
        );
        assert_eq!(entries[0][2..18], record[2..18]);
        assert_eq!(entries[1][2..18], parent[2..18]);
        let mut names = Vec::new();
        for entry in &entries[2..] {
            let name = self.text(identifier(entry));
            let bare = name.trim_end_matches(";1");
            let child = format!("{path}/{bare}");
            names.push(bare.encode_utf16().collect::<Vec<_>>());
            if entry[25] == 2 {
                directories.push((both32(&entry[2..]), child.clone()));
                self.walk_directory(entry, record, &child, files, directories);
            } else {
                assert!(name.ends_with(";1"));
                let data = self.extent(entry).to_vec();
                assert!(files.insert(child, data).is_none());
            }
        }
        assert!(names.is_sorted_by(|a, b| a < b), "{names:?}");
    }

    fn extent(&self, record: &[u8]) -> &'a [u8] {
        let start = both32(&record[2..]) as usize * 2048;
        &self.image[start..][..both32(&record[10..]) as usize]
    }

    /// The directories of the path table of the given byte order: first sector and path.
    fn path_table(&self, little: bool) -> Directories {
        let size = both32(&self.descriptor[132..]) as usize;
        let get32 = if little { le32 } else { be32 };
        let start = get32(&self.descriptor[if little { 140 } else { 148 }..]) as usize * 2048;
        let mut rest = &self.image[start..][..size];
        let mut rows: Directories = Vec::new();
        while !rest.is_empty() {
            let length = usize::from(rest[0]);
            let parent = [rest[6], rest[7]];
            let parent = if little {
                u16::from_le_bytes(parent)
            } else {
                u16::from_be_bytes(parent)
            };
            let path = match rows.get(usize::from(parent) - 1) {
                Some((_, parent)) => format!("{parent}/{}", self.text(&rest[8..8 + length])),
                None => String::new(),
            };
            rows.push((get32(&rest[2..]), path));
            rest = &rest[(8 + length).next_multiple_of(2)..];
        }
        rows
    }
}

fn identifier(record: &[u8]) -> &[u8] {
    &record[33..][..record[32].into()]
}

fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().unwrap())
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes[..4].try_into().unwrap())
}

fn both32(bytes: &[u8]) -> u32 {
    assert_eq!(le32(bytes), be32(&bytes[4..]));
    le32(bytes)
}

/// Writes the files and asserts that both hierarchies hold them; returns the primary's names.
fn round_trip(files: &Files) -> Vec<String> {
    let mut iso = Iso::new("cidata", 1_700_000_000).unwrap();
    for (path, data) in files {
        iso.add(path, data.clone()).unwrap();
    }
    let image = iso.build().unwrap();
    assert_eq!(image, iso.build().unwrap());
    let expected: Files = files
        .iter()
        .map(|(path, data)| (format!("/{path}"), data.clone()))
        .collect();

    for joliet in [false, true] {
        let reader = Reader::new(&image, joliet);
        assert_eq!(reader.label(), "cidata");
        let (found, mut directories) = reader.walk();
        let mut table = reader.path_table(true);
        assert_eq!(table, reader.path_table(false));
        assert!(table.is_sorted_by_key(|(_, path)| path.matches('/').count()));
        table.sort();
        directories.sort();
        assert_eq!(table, directories);
        if joliet {
            assert_eq!(found, expected);
        } else {
            let mut contents: Vec<_> = found.values().collect();
            let mut wanted: Vec<_> = expected.values().collect();
            contents.sort();
            wanted.sort();
            assert_eq!(contents, wanted);
        }
    }
    Reader::new(&image, false).walk().0.into_keys().collect()
}

fn tree(paths: &[&str]) -> Files {
    paths
        .iter()
        .map(|path| ((*path).to_owned(), path.as_bytes().to_vec()))
        .collect()
}

#[test]
fn config_drive_tree() {
    let names = round_trip(&tree(&[
        "openstack/latest/meta_data.json",
        "openstack/latest/user_data",
        "openstack/2012-08-10/meta_data.json",
        "ec2/latest/meta-data.json",
        "a.b.c",
    ]));
    assert_eq!(
        names,
        [
            "/A_B.C",
            "/EC2/LATEST/META_DATA.JSON",
            "/OPENSTACK/2012_08_10/META_DATA.JSON",
            "/OPENSTACK/LATEST/META_DATA.JSON",
            "/OPENSTACK/LATEST/USER_DATA.",
        ]
    );
}

#[test]
fn names_that_clash_in_the_primary_hierarchy() {
    let long = "n".repeat(60);
    let names = round_trip(&tree(&[
        "a-b",
        "a_b",
        "A_B",
        "A_B_1",
        &format!("{long}1"),
        &long,
    ]));
    assert_eq!(names.len(), 6);
    assert!(names.iter().all(|name| name.len() <= 32), "{names:?}");
}

#[test]
fn empty_image_and_sizes_around_a_sector() {
    assert_eq!(round_trip(&BTreeMap::new()), [""; 0]);
    round_trip(
        &[0, 1, 2047, 2048, 2049]
            .map(|size| (format!("f{size}"), vec![7; size]))
            .into(),
    );
}

#[test]
fn directory_of_many_sectors() {
    let paths: Vec<String> = (0..500)
        .map(|i| format!("d/{i:0width$}", width = i % 60))
        .collect();
    round_trip(&paths.iter().map(|path| (path.clone(), vec![1])).collect());
}

#[test]
fn refused_names_labels_and_trees() {
    let long = "x".repeat(65);
    for path in [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "../x",
        "a\0",
        "a\n",
        "a:b",
        "a;1",
        "a\\b",
        "\u{1f980}",
    ]
    .into_iter()
    .chain([long.as_str()])
    {
        let mut iso = Iso::new("cidata", 0).unwrap();
        assert!(
            matches!(iso.add(path, Vec::new()), Err(IsoError::Name { .. })),
            "{path:?}"
        );
        assert_eq!(iso.build(), Iso::new("cidata", 0).unwrap().build());
    }
    for label in ["", "a b", "\u{e9}", "seventeen-letters"] {
        assert!(
            matches!(Iso::new(label, 0), Err(IsoError::Label { .. })),
            "{label:?}"
        );
    }
    let mut iso = Iso::new("CONFIG-2", 0).unwrap();
    iso.add("a/b/c/d/e/f/g/h", Vec::new()).unwrap();
    assert!(matches!(
        iso.add("1/2/3/4/5/6/7/8/9", Vec::new()),
        Err(IsoError::Depth { .. })
    ));
    for path in ["a", "a/b", "a/b/c/d/e/f/g/h"] {
        assert_eq!(
            iso.add(path, Vec::new()),
            Err(IsoError::Exists {
                path: path.to_owned()
            })
        );
    }
    iso.add("file", Vec::new()).unwrap();
    assert!(matches!(
        iso.add("file/x", Vec::new()),
        Err(IsoError::Exists { .. })
    ));
}

#[test]
fn bounds_on_entries_and_size() {
    let mut iso = Iso::new("cidata", 0).unwrap();
    let added = (0..=MAX_ENTRIES).find_map(|i| iso.add(&i.to_string(), Vec::new()).err());
    assert_eq!(added, Some(IsoError::Entries));
    iso.build().unwrap();

    let mut iso = Iso::new("cidata", 0).unwrap();
    let sectors_before_files = 16 + 3 + 2 * 3;
    let room = MAX_IMAGE as usize - sectors_before_files * 2048;
    iso.add("big", vec![0; room + 1]).unwrap();
    assert_eq!(
        iso.build(),
        Err(IsoError::Size {
            bytes: MAX_IMAGE + 2048
        })
    );
}

proptest! {
    #[test]
    fn any_tree_is_read_back(
        files in prop::collection::btree_map(
            "d[0-3]{1,2}(/e[ .\\-_a-zA-Z0-9\u{e9}\u{4e2d}]{0,40}){0,3}/f[ -)+-.0-9<->@-\\[\\]-~]{0,60}",
            prop::collection::vec(any::<u8>(), 0..5000),
            0..30,
        )
    ) {
        round_trip(&files);
    }

    #[test]
    fn hostile_paths_never_panic(paths in prop::collection::vec(any::<String>(), 0..20)) {
        let mut iso = Iso::new("cidata", u64::MAX).unwrap();
        for path in paths {
            let _ = iso.add(&path, path.clone().into_bytes());
        }
        let image = iso.build().unwrap();
        Reader::new(&image, true).walk();
        Reader::new(&image, false).walk();
    }
}
