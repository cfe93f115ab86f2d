//! Bytes and files that one process says to another, to what reads them. See `../README.md`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| param_averager::__fuzz::frames(data));
