//! Adapters for tensors of other crates.

#[cfg(feature = "cuda")]
pub mod cudarc;
