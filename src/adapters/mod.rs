//! Adapters: tensors of other crates as parameters.

#[cfg(feature = "cuda")]
pub mod cudarc;
