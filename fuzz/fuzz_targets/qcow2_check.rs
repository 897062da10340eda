#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| edgevmm_fuzz::images::qcow2_check(input));
