//! CUDA devices: the kernels that `build.rs` compiled and embedded, and the driver that runs them.
//!
//! cudarc loads `libcuda` when it is first called, and panics if it is not there or lacks a
//! function. So nothing here is called before [`driver::get`] has looked.

mod context;
mod driver;
#[cfg(target_os = "linux")]
mod ipc;
#[cfg(target_os = "linux")]
mod ipc_probe;
mod memory;
pub(crate) mod peer;
mod rank;
mod running;
mod topology;
mod topology_display;

pub(crate) use context::Context;
#[cfg(feature = "cudarc")]
pub(crate) use driver::is_of_capture;
pub(crate) use driver::Failed;
#[cfg(target_os = "linux")]
pub(crate) use ipc::{IpcImport, Registered};
#[cfg(target_os = "linux")]
pub(crate) use ipc_probe::IpcProbe;
pub(crate) use memory::{DeviceMemory, Pinned};
pub use peer::PeerAccess;
pub(crate) use rank::{Rank, THREADS};
#[cfg(target_os = "linux")]
pub(crate) use topology::Identity;
pub(crate) use topology::{all_pairs, connection};
pub use topology::{Connection, CudaDevice, Topology};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The fatbin, or why there is none.
pub(crate) fn fatbin() -> Result<&'static [u8], &'static str> {
    FATBIN
}
