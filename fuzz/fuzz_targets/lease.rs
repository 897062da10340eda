#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| edgevmm_fuzz::lease::lease(input));
