//! Device models: buses, PCI, virtio and the legacy PC.
