//! Disk images as block devices: formats, overlays and their safety rules.
