//! Adapters: tensors of other crates as parameters.

#[cfg(feature = "cudarc")]
pub mod cudarc;
