//! Memory that ranks share, wherever it is.

use std::sync::Arc;

use super::cuda::{Context, DeviceMemory};
use super::Region;

/// Where memory is to be.
#[derive(Clone, Debug)]
pub(crate) enum Site {
    Host,
    Cuda(Arc<Context>),
}

/// Memory that the kernels of every rank can address.
#[derive(Debug)]
pub(crate) enum Memory {
    Host(Region),
    Cuda(DeviceMemory),
}

impl Memory {
    /// Zeroed.
    pub(crate) fn new(site: &Site, bytes: usize) -> Result<Memory, String> {
        Ok(match site {
            Site::Host => Memory::Host(Region::new(bytes)),
            Site::Cuda(context) => Memory::Cuda(DeviceMemory::new(context, bytes)?),
        })
    }

    pub(crate) fn address(&self) -> u64 {
        match self {
            Memory::Host(region) => region.address(),
            Memory::Cuda(memory) => memory.address(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Memory::Host(region) => region.bytes(),
            Memory::Cuda(memory) => memory.bytes(),
        }
    }

    /// Sets what it holds at first: nobody else may have it yet.
    pub(crate) fn set(&mut self, offset: usize, from: &[u8]) -> Result<(), String> {
        match self {
            Memory::Host(region) => region.bytes_mut()[offset..offset + from.len()].copy_from_slice(from),
            Memory::Cuda(memory) => memory.write(offset, from)?,
        }
        Ok(())
    }

    /// As `set`, from `offset` to the end.
    pub(crate) fn fill_from(&mut self, offset: usize, value: u8) -> Result<(), String> {
        match self {
            Memory::Host(region) => region.bytes_mut()[offset..].fill(value),
            Memory::Cuda(memory) => memory.fill(offset, memory.bytes() - offset, value)?,
        }
        Ok(())
    }
}
