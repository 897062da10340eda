//! Making, converting, checking and mending disk images: what `edgevmm image` does.
