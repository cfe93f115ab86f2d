//! The machines that run the kernels, CPU threads and CUDA devices, and the memory that ranks share
//! on them.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "no_cuda.rs"]
pub(crate) mod cuda;
mod engine;
mod gathering;
mod host_buffer;
#[cfg(processes)]
mod import_lock;
pub(crate) mod limits;
mod meeting;
#[cfg(processes)]
mod memfd;
mod memory;
pub(crate) mod proximity;
mod reclaim;

pub(crate) use engine::{Copied, Engine, Order, Refuses, Unstarted};
pub(crate) use gathering::{Gathering, ProcessWay, Way};
pub(crate) use host_buffer::HostBuffer;
#[cfg(processes)]
pub(crate) use import_lock::ImportLock;
pub(crate) use meeting::{Arrivals, Attendance, Failure, Meeting, World};
#[cfg(processes)]
pub(crate) use memfd::{Mapping, Memfd, Unopened};
#[cfg(processes)]
pub(crate) use memory::MemoryHandle;
pub(crate) use memory::{Memory, MemorySpace};
