//! The machines that run the kernels. The only rooms with FFI.

pub(crate) mod cpu;
pub(crate) mod cuda;
mod engine;
#[cfg(target_os = "linux")]
mod lease;
pub(crate) mod limits;
mod memory;
mod region;
#[cfg(target_os = "linux")]
mod shared;

pub(crate) use engine::{Engine, Unstarted};
#[cfg(target_os = "linux")]
pub(crate) use lease::Lease;
#[cfg(target_os = "linux")]
pub(crate) use memory::Offer;
pub(crate) use memory::{Memory, Site};
pub(crate) use region::Region;
#[cfg(target_os = "linux")]
pub(crate) use shared::{Mapping, Shared, Unopened};
