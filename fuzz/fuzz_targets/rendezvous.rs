//! Runs a rendezvous beside arbitrary unknown processes. See `../README.md`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| param_averager_fuzz::rendezvous(data));
