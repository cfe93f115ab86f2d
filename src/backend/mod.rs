//! The machines that run the kernels. The only rooms with FFI.

pub(crate) mod cpu;
pub(crate) mod cuda;
mod engine;
mod memory;
mod region;

pub(crate) use engine::{Engine, Unstarted};
pub(crate) use memory::{Memory, Site};
pub(crate) use region::Region;
