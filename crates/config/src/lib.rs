//! The description of a virtual machine: one set of types behind flags, files and the API.
