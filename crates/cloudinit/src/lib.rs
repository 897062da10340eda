//! NoCloud seeds for cloud-init, written as ISO 9660 images in memory.
