//! Sizes that follow from an image's header.

/// Binary logarithm of the largest piece of a table that is read, kept and written at a time.
const MAX_SLICE_BITS: u32 = 12;
/// Cluster sizes from 512 bytes to 2 MiB, as in QEMU.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Smallest clusters that can have subclusters, which then are of one sector.
pub const MIN_EXTENDED_CLUSTER_BITS: u32 = 14;
/// Longest L1 table in bytes, as in QEMU.
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Longest refcount table in bytes, as in QEMU.
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// How an image is laid out. Constant while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// 2 or 3.
    pub version: u32,
    /// Binary logarithm of the cluster size.
    pub cluster_bits: u32,
    /// Binary logarithm of the bits in a refcount; at most 6.
    pub refcount_order: u32,
    /// Clusters have subclusters.
    pub extended: bool,
    /// The data is in another file, each cluster at its guest offset.
    pub external: bool,
}

impl Layout {
    /// Bytes in a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// [`Self::cluster_size`], as the length of a buffer.
    pub fn cluster_len(self) -> usize {
        1 << self.cluster_bits
    }

    /// Index of the cluster that `offset` is in.
    pub fn cluster_of(self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// Bytes of `offset` into its cluster.
    pub fn within_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Clusters that `bytes` take up.
    pub fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Subclusters in a cluster; 1 if there is no such thing.
    pub fn subclusters(self) -> u32 {
        if self.extended { 32 } else { 1 }
    }

    /// The mask that stands for all subclusters of a cluster.
    pub fn all_subclusters(self) -> u32 {
        if self.extended { u32::MAX } else { 1 }
    }

    /// Bytes in a subcluster.
    pub fn subcluster_size(self) -> u64 {
        self.cluster_size() / u64::from(self.subclusters())
    }

    /// Bytes in a slice of a table.
    pub fn slice_len(self) -> usize {
        1 << self.cluster_bits.min(MAX_SLICE_BITS)
    }

    /// Slices in an L2 table or a refcount block.
    pub fn slices_in_cluster(self) -> u64 {
        self.cluster_size() / self.slice_len() as u64
    }

    /// Bytes in an entry of an L2 table.
    pub fn entry_len(self) -> usize {
        if self.extended { 16 } else { 8 }
    }

    /// Entries in a slice of an L2 table.
    pub fn slice_entries(self) -> u64 {
        (self.slice_len() / self.entry_len()) as u64
    }

    /// Entries in an L2 table.
    pub fn table_entries(self) -> u64 {
        self.slice_entries() * self.slices_in_cluster()
    }

    /// Bytes of the disk that an L2 table describes.
    pub fn table_reach(self) -> u64 {
        self.table_entries() << self.cluster_bits
    }

    /// Refcounts in a slice of a refcount block.
    pub fn slice_refcounts(self) -> u64 {
        (self.slice_len() as u64 * 8) >> self.refcount_order
    }

    /// Refcounts in a refcount block.
    pub fn block_refcounts(self) -> u64 {
        self.slice_refcounts() * self.slices_in_cluster()
    }

    /// The highest refcount there can be.
    pub fn max_refcount(self) -> u64 {
        u64::MAX >> (64 - (1 << self.refcount_order))
    }

    /// Entries of the L1 table that a disk of `size` bytes needs.
    pub fn l1_entries(self, size: u64) -> u64 {
        self.clusters(size).div_ceil(self.table_entries())
    }
}
