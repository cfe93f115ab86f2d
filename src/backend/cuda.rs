//! The kernels for CUDA devices: compiled by `build.rs` and embedded.

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The fatbin, or why there is none.
pub(crate) fn fatbin() -> Result<&'static [u8], &'static str> {
    FATBIN
}

/// Why a CUDA device can't be used.
pub(crate) fn unavailable() -> String {
    match fatbin() {
        Ok(_) => format!(
            "param-averager {} averages on CPUs only; its CUDA kernels are compiled and tested, their driver is the next release's",
            env!("CARGO_PKG_VERSION")
        ),
        Err(reason) => reason.to_string(),
    }
}
