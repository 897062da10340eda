//! End-to-end tests: real kernels and disks under the real binary.
