//! Writing the header of an image.

use super::create::{Compression, Extension};
use super::flush::HEAD_LEN;
use super::header::{
    EXT_BACKING_FORMAT, EXT_DATA_FILE, EXT_END, EXT_FEATURE_NAMES, FEATURE_NAME_LEN, FULL_LEN,
    Header, MAGIC, MAX_BACKING_NAME,
};

/// The names of the features that this crate may set: kind, bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

impl Header {
    /// Names all features, for those who do not know them, if there is room for that in the first
    /// sector. A header that goes no further is changed as a whole or not at all.
    pub fn name_features(&mut self) {
        self.extensions.retain(|it| it.magic != EXT_FEATURE_NAMES);
        let mut data = Vec::with_capacity(FEATURE_NAMES.len() * FEATURE_NAME_LEN);
        for (kind, bit, name) in FEATURE_NAMES {
            let mut entry = [0; FEATURE_NAME_LEN];
            entry[0] = kind;
            entry[1] = bit;
            for (to, from) in entry[2..].iter_mut().zip(name.bytes()) {
                *to = from;
            }
            data.extend(entry);
        }
        let magic = EXT_FEATURE_NAMES;
        self.extensions.push(Extension { magic, data });
        let fits = self.encode().is_ok_and(|head| head.len() <= HEAD_LEN);
        if self.version < 3 || !fits {
            self.extensions.pop();
        }
    }

    fn encode_fields(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FULL_LEN);
        out.extend(MAGIC);
        out.extend(self.version.to_be_bytes());
        // The place of the backing file's name; see `encode`.
        out.extend([0; 12]);
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(self.crypt_method.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.refcount_offset.to_be_bytes());
        out.extend(self.refcount_clusters.to_be_bytes());
        out.extend(self.snapshots.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        if self.version > 2 {
            out.extend(self.incompatible.to_be_bytes());
            out.extend(self.compatible.to_be_bytes());
            out.extend(self.autoclear.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            let len = FULL_LEN + self.more_fields.len();
            out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
            out.push(u8::from(self.compression == Compression::Zstd));
            out.resize(FULL_LEN, 0);
        }
        out
    }

    /// The whole header, with its extensions and the name of the backing file.
    ///
    /// # Errors
    /// It does not fit into a cluster.
    pub fn encode(&self) -> Result<Vec<u8>, String> {
        let mut out = self.encode_fields();
        out.extend(&self.more_fields);
        let backing_format = self.backing.as_ref().and_then(|it| it.format.as_ref());
        if let Some(format) = backing_format {
            push_extension(&mut out, EXT_BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            push_extension(&mut out, EXT_DATA_FILE, name.as_bytes());
        }
        for extension in &self.extensions {
            push_extension(&mut out, extension.magic, &extension.data);
        }
        push_extension(&mut out, EXT_END, &[]);
        if let Some(backing) = &self.backing {
            let name = backing.name.as_bytes();
            if name.is_empty() || name.len() > MAX_BACKING_NAME {
                return Err(format!(
                    "the name of a backing file can have 1 to {MAX_BACKING_NAME} bytes, not {}",
                    name.len()
                ));
            }
            let (at, len) = (out.len() as u64, name.len() as u64);
            out.extend(name);
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&len.to_be_bytes()[4..]);
        }
        if out.len() > self.layout().cluster_len() {
            return Err(format!(
                "its header would be {} bytes long, but has to fit into a cluster of {} bytes",
                out.len(),
                self.layout().cluster_size()
            ));
        }
        Ok(out)
    }
}

fn push_extension(out: &mut Vec<u8>, magic: u32, data: &[u8]) {
    out.extend(magic.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}
