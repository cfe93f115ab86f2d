//! The machines that run the kernels, CPU threads and CUDA devices, and the memory that ranks share
//! on them.

pub(crate) mod cpu;
pub(crate) mod cuda;
mod engine;
mod host_buffer;
#[cfg(target_os = "linux")]
mod import_lock;
pub(crate) mod limits;
#[cfg(target_os = "linux")]
mod memfd;
mod memory;

pub(crate) use engine::{Engine, Unstarted};
pub(crate) use host_buffer::HostBuffer;
#[cfg(target_os = "linux")]
pub(crate) use import_lock::ImportLock;
#[cfg(target_os = "linux")]
pub(crate) use memfd::{Mapping, Memfd, Unopened};
#[cfg(target_os = "linux")]
pub(crate) use memory::MemoryHandle;
pub(crate) use memory::{Memory, MemorySpace};
