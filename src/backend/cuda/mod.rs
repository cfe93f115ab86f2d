//! CUDA devices: the kernels that `build.rs` compiled and embedded, and access to the driver that
//! runs them.
//!
//! cudarc loads `libcuda` at its first call and panics if the library or a function is missing. So
//! no function of cudarc is called before [`driver::get`] has succeeded.

#[cfg(processes)]
mod arrivals;
mod context;
mod driver;
mod facts;
#[cfg(feature = "__testing")]
mod former;
#[cfg(processes)]
mod ipc;
#[cfg(processes)]
mod ipc_probe;
mod launch;
mod memory;
pub(crate) mod peer;
mod probe;
#[cfg(processes)]
mod probe_child;
mod rank;
mod reach;
#[cfg(feature = "nccl")]
mod staging;
mod streams;
mod tables;
mod topology;
mod topology_display;
mod trial;

pub(crate) use context::Context;
pub(crate) use driver::is_of_capture;
pub(crate) use driver::Failed;
pub(crate) use facts::connection;
#[cfg(processes)]
pub(crate) use facts::identity;
pub use facts::CudaDevice;
#[cfg(processes)]
pub(crate) use ipc::{IpcImport, Registered};
#[cfg(processes)]
pub(crate) use ipc_probe::{IpcPeer, IpcProbe, Round};
pub(crate) use launch::{Launched, Part, THREADS};
pub(crate) use memory::{DeviceMemory, Pinned};
pub(crate) use rank::{Rank, StageStream};
#[cfg(feature = "nccl")]
pub(crate) use staging::Staging;
pub use topology::Topology;

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// The embedded fatbin, or the reason why the build has none.
pub(crate) fn fatbin() -> Result<&'static [u8], &'static str> {
    FATBIN
}
