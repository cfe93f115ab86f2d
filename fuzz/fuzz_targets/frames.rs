//! Receives arbitrary bytes and files as messages. See `../README.md`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| param_averager_fuzz::frames(data));
