//! CUDA devices: the kernels that `build.rs` compiled and embedded, and the driver that runs them.
//!
//! cudarc loads `libcuda` when it is first called, and panics if it is not there or lacks a function. So nothing here is
//! called before [`driver::get`] has looked.

mod context;
mod driver;
mod memory;
mod rank;

pub(crate) use context::Context;
pub(crate) use memory::DeviceMemory;
pub(crate) use rank::{Rank, THREADS};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The fatbin, or why there is none.
pub(crate) fn fatbin() -> Result<&'static [u8], &'static str> {
    FATBIN
}
