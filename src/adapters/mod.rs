//! Adapters for tensors of other crates.

#[cfg(feature = "cudarc")]
pub mod cudarc;
