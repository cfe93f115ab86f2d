//! Memory that ranks share, wherever it is.

#[cfg(target_os = "linux")]
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

#[cfg(target_os = "linux")]
use serde::{Deserialize, Serialize};

use super::cuda::{Context, DeviceMemory, Pinned};
#[cfg(target_os = "linux")]
use super::cuda::{IpcImport, Registered};
use super::HostBuffer;
#[cfg(target_os = "linux")]
use super::{Memfd, Unopened};

/// Where memory is to be.
#[derive(Clone, Debug)]
pub(crate) enum MemorySpace {
    Host,
    Cuda(Arc<Context>),
}

/// Memory that the kernels of every rank can address.
#[derive(Debug)]
pub(crate) enum Memory {
    Host(HostBuffer),
    Cuda(DeviceMemory),
    /// The host's, which every device maps.
    Mapped(Pinned),
    /// The host's, which other processes map.
    #[cfg(target_os = "linux")]
    Memfd(Memfd),
    /// The same, which devices of this process and of others map.
    #[cfg(target_os = "linux")]
    Registered(Registered),
    /// A device's, of another process.
    #[cfg(target_os = "linux")]
    IpcImport(IpcImport),
}

/// What another process opens memory by, besides a file.
#[cfg(target_os = "linux")]
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MemoryHandle {
    pub(crate) bytes: usize,
    /// Of memory of a device. The host's is the file itself.
    handle: Option<Vec<u8>>,
}

impl Memory {
    /// Zeroed.
    pub(crate) fn new(space: &MemorySpace, bytes: usize) -> Result<Memory, String> {
        Ok(match space {
            MemorySpace::Host => Memory::Host(HostBuffer::new(bytes)?),
            MemorySpace::Cuda(context) => Memory::Cuda(DeviceMemory::new(context, bytes)?),
        })
    }

    /// Zeroed, in memory of the host that the devices of this process address, whichever of them
    /// asks for it.
    pub(crate) fn of_the_host(space: &MemorySpace, bytes: usize) -> Result<Memory, String> {
        Ok(match space {
            MemorySpace::Host => Memory::Host(HostBuffer::new(bytes)?),
            MemorySpace::Cuda(context) => Memory::Mapped(Pinned::new(context, bytes)?),
        })
    }

    /// Zeroed, in memory of the host that other processes can be given, and that the device of this
    /// one addresses.
    #[cfg(target_os = "linux")]
    pub(crate) fn between_processes(space: &MemorySpace, bytes: usize) -> Result<Memory, String> {
        Memory::of_shared(space, Memfd::new(bytes)?)
    }

    /// Zeroed, in memory of a device that other processes can be given.
    #[cfg(target_os = "linux")]
    pub(crate) fn to_lend(context: &Arc<Context>, bytes: usize) -> Result<Memory, String> {
        DeviceMemory::to_lend(context, bytes).map(Memory::Cuda)
    }

    #[cfg(target_os = "linux")]
    fn of_shared(space: &MemorySpace, shared: Memfd) -> Result<Memory, String> {
        Ok(match space {
            MemorySpace::Host => Memory::Memfd(shared),
            MemorySpace::Cuda(context) => Memory::Registered(Registered::new(context, shared)?),
        })
    }

    /// What other processes can be given.
    #[cfg(target_os = "linux")]
    pub(crate) fn offer(&self) -> Option<(MemoryHandle, BorrowedFd<'_>)> {
        let (handle, file) = match self {
            Memory::Memfd(shared) => (None, shared.file()),
            Memory::Registered(registered) => (None, registered.shared().file()),
            Memory::Cuda(memory) => memory.offer().map(|(handle, file)| (Some(handle), file))?,
            _ => return None,
        };
        Some((MemoryHandle { bytes: self.bytes(), handle }, file))
    }

    /// What another process offers, for the kernels that run here.
    #[cfg(target_os = "linux")]
    pub(crate) fn open(
        space: &MemorySpace,
        offer: &MemoryHandle,
        file: OwnedFd,
    ) -> Result<Memory, Unopened> {
        match (&offer.handle, space) {
            (None, _) => Ok(Memory::of_shared(space, Memfd::open(file, offer.bytes)?)?),
            // This rank's device has its part in what fails.
            (Some(handle), MemorySpace::Cuda(context)) => {
                Ok(Memory::IpcImport(IpcImport::open(context, handle, file, offer.bytes)?))
            }
            (Some(_), MemorySpace::Host) => {
                Err(Unopened::Wrong("it is a device's, and this rank has none".into()))
            }
        }
    }

    /// Where the host finds it, unless only a device does. Who accesses what in it, and when, is
    /// the protocol's business.
    pub(crate) fn host_pointer(&self) -> Option<*mut u8> {
        match self {
            Memory::Cuda(_) => None,
            #[cfg(target_os = "linux")]
            Memory::IpcImport(_) => None,
            #[cfg(target_os = "linux")]
            Memory::Registered(registered) => Some(registered.shared().address() as *mut u8),
            memory => Some(memory.address() as *mut u8),
        }
    }

    pub(crate) fn address(&self) -> u64 {
        match self {
            Memory::Host(region) => region.address(),
            Memory::Cuda(memory) => memory.address(),
            Memory::Mapped(pinned) => pinned.address(),
            #[cfg(target_os = "linux")]
            Memory::Memfd(shared) => shared.address(),
            #[cfg(target_os = "linux")]
            Memory::Registered(registered) => registered.address(),
            #[cfg(target_os = "linux")]
            Memory::IpcImport(borrowed) => borrowed.address(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Memory::Host(region) => region.bytes(),
            Memory::Cuda(memory) => memory.bytes(),
            Memory::Mapped(pinned) => pinned.size(),
            #[cfg(target_os = "linux")]
            Memory::Memfd(shared) => shared.bytes(),
            #[cfg(target_os = "linux")]
            Memory::Registered(registered) => registered.shared().bytes(),
            #[cfg(target_os = "linux")]
            Memory::IpcImport(borrowed) => borrowed.bytes(),
        }
    }

    /// Sets what it holds at first: nobody else may have it yet.
    pub(crate) fn set(&mut self, offset: usize, from: &[u8]) -> Result<(), String> {
        match self {
            Memory::Cuda(memory) => memory.write(offset, from)?,
            memory => memory.bytes_mut()[offset..offset + from.len()].copy_from_slice(from),
        }
        Ok(())
    }

    /// As `set`, from `offset` to the end.
    pub(crate) fn fill_from(&mut self, offset: usize, value: u8) -> Result<(), String> {
        match self {
            Memory::Cuda(memory) => memory.fill(offset, memory.bytes() - offset, value)?,
            memory => memory.bytes_mut()[offset..].fill(value),
        }
        Ok(())
    }

    /// The contents of host memory, while nothing else uses it.
    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Host(region) => region.bytes_mut(),
            Memory::Mapped(pinned) => pinned.bytes_mut(),
            #[cfg(target_os = "linux")]
            Memory::Memfd(shared) => shared.bytes_mut(),
            #[cfg(target_os = "linux")]
            Memory::Registered(registered) => registered.shared_mut().bytes_mut(),
            Memory::Cuda(_) => unreachable!("the host does not find it"),
            #[cfg(target_os = "linux")]
            Memory::IpcImport(_) => unreachable!("a peer has it"),
        }
    }
}
