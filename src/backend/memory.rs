//! Memory that ranks share, wherever it is.

use std::sync::Arc;

use super::cuda::{Context, DeviceMemory, Pinned};
use super::Region;
#[cfg(target_os = "linux")]
use super::Shared;

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
    /// The host's, which every device maps.
    Mapped(Pinned),
    /// The host's, which other processes map.
    #[cfg(target_os = "linux")]
    Shared(Shared),
}

impl Memory {
    /// Zeroed.
    pub(crate) fn new(site: &Site, bytes: usize) -> Result<Memory, String> {
        Ok(match site {
            Site::Host => Memory::Host(Region::new(bytes)),
            Site::Cuda(context) => Memory::Cuda(DeviceMemory::new(context, bytes)?),
        })
    }

    /// Zeroed, in memory of the host that the devices of this process address, whichever of them asks for it.
    pub(crate) fn of_the_host(site: &Site, bytes: usize) -> Result<Memory, String> {
        Ok(match site {
            Site::Host => Memory::Host(Region::new(bytes)),
            Site::Cuda(context) => Memory::Mapped(Pinned::new(context, bytes)?),
        })
    }

    /// Zeroed, in memory of the host that other processes can be given.
    #[cfg(target_os = "linux")]
    pub(crate) fn between_processes(bytes: usize) -> Result<Memory, String> {
        Shared::new(bytes).map(Memory::Shared)
    }

    /// What other processes can be given.
    #[cfg(target_os = "linux")]
    pub(crate) fn shared(&self) -> Option<&Shared> {
        match self {
            Memory::Shared(shared) => Some(shared),
            _ => None,
        }
    }

    /// Where the host finds it, unless only a device does. Who accesses what in it, and when, is the protocol's business.
    pub(crate) fn host_pointer(&self) -> Option<*mut u8> {
        match self {
            Memory::Cuda(_) => None,
            memory => Some(memory.address() as *mut u8),
        }
    }

    pub(crate) fn address(&self) -> u64 {
        match self {
            Memory::Host(region) => region.address(),
            Memory::Cuda(memory) => memory.address(),
            Memory::Mapped(pinned) => pinned.address(),
            #[cfg(target_os = "linux")]
            Memory::Shared(shared) => shared.address(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Memory::Host(region) => region.bytes(),
            Memory::Cuda(memory) => memory.bytes(),
            Memory::Mapped(pinned) => pinned.size(),
            #[cfg(target_os = "linux")]
            Memory::Shared(shared) => shared.bytes(),
        }
    }

    /// Sets what it holds at first: nobody else may have it yet.
    pub(crate) fn set(&mut self, offset: usize, from: &[u8]) -> Result<(), String> {
        match self {
            Memory::Host(region) => region.bytes_mut()[offset..offset + from.len()].copy_from_slice(from),
            Memory::Cuda(memory) => memory.write(offset, from)?,
            Memory::Mapped(pinned) => pinned.bytes_mut()[offset..offset + from.len()].copy_from_slice(from),
            #[cfg(target_os = "linux")]
            Memory::Shared(shared) => shared.bytes_mut()[offset..offset + from.len()].copy_from_slice(from),
        }
        Ok(())
    }

    /// As `set`, from `offset` to the end.
    pub(crate) fn fill_from(&mut self, offset: usize, value: u8) -> Result<(), String> {
        match self {
            Memory::Host(region) => region.bytes_mut()[offset..].fill(value),
            Memory::Cuda(memory) => memory.fill(offset, memory.bytes() - offset, value)?,
            Memory::Mapped(pinned) => pinned.bytes_mut()[offset..].fill(value),
            #[cfg(target_os = "linux")]
            Memory::Shared(shared) => shared.bytes_mut()[offset..].fill(value),
        }
        Ok(())
    }
}
