//! The machines that run the kernels. The only rooms with FFI.

pub(crate) mod cpu;
pub(crate) mod cuda;
