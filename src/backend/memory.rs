//! Memory that ranks share, on any machine.

#[cfg(processes)]
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

#[cfg(processes)]
use serde::{Deserialize, Serialize};

use super::cuda::{Context, DeviceMemory, Pinned};
#[cfg(processes)]
use super::cuda::{IpcImport, Registered};
use super::HostBuffer;
#[cfg(processes)]
use super::{Memfd, Unopened};

/// Memory space of a rank's tensors.
#[derive(Clone, Debug)]
pub(crate) enum MemorySpace {
    Host,
    Cuda(Arc<Context>),
}

/// Memory that the kernels of every rank that uses it can address.
#[derive(Debug)]
pub(crate) enum Memory {
    Host(HostBuffer),
    Cuda(DeviceMemory),
    /// Page-locked host memory, mapped for every device of this process.
    Mapped(Pinned),
    /// Host memory, mapped by several processes.
    #[cfg(processes)]
    Memfd(Memfd),
    /// Host memory, mapped by several processes and for their devices.
    #[cfg(processes)]
    Registered(Registered),
    /// Device memory that another process has exported.
    #[cfg(processes)]
    IpcImport(IpcImport),
}

/// Handle by which another process opens memory, together with a file.
#[cfg(processes)]
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MemoryHandle {
    pub(crate) bytes: usize,
    /// CUDA IPC handle. `None` for host memory, whose file is the memory.
    handle: Option<Vec<u8>>,
}

impl Memory {
    /// Allocates zeroed memory in a memory space.
    pub(crate) fn new(space: &MemorySpace, bytes: usize) -> Result<Memory, String> {
        Ok(match space {
            MemorySpace::Host => Memory::Host(HostBuffer::new(bytes)?),
            MemorySpace::Cuda(context) => Memory::Cuda(DeviceMemory::new(context, bytes)?),
        })
    }

    /// Allocates zeroed host memory that every device of this process can address.
    pub(crate) fn of_the_host(space: &MemorySpace, bytes: usize) -> Result<Memory, String> {
        Ok(match space {
            MemorySpace::Host => Memory::Host(HostBuffer::new(bytes)?),
            MemorySpace::Cuda(context) => Memory::Mapped(Pinned::new(context, bytes)?),
        })
    }

    /// Allocates zeroed host memory that other processes can open, and that the device of this
    /// process can address.
    #[cfg(processes)]
    pub(crate) fn between_processes(space: &MemorySpace, bytes: usize) -> Result<Memory, String> {
        Memory::of_memfd(space, Memfd::new(bytes)?)
    }

    /// Allocates zeroed device memory that other processes can open.
    #[cfg(processes)]
    pub(crate) fn exportable(context: &Arc<Context>, bytes: usize) -> Result<Memory, String> {
        DeviceMemory::exportable(context, bytes).map(Memory::Cuda)
    }

    #[cfg(processes)]
    fn of_memfd(space: &MemorySpace, memfd: Memfd) -> Result<Memory, String> {
        Ok(match space {
            MemorySpace::Host => Memory::Memfd(memfd),
            MemorySpace::Cuda(context) => Memory::Registered(Registered::new(context, memfd)?),
        })
    }

    /// Handle and file for other processes. `None` for memory that can't be exported.
    #[cfg(processes)]
    pub(crate) fn export(&self) -> Option<(MemoryHandle, BorrowedFd<'_>)> {
        let (handle, file) = match self {
            Memory::Memfd(memfd) => (None, memfd.file()),
            Memory::Registered(registered) => (None, registered.memfd().file()),
            Memory::Cuda(memory) => {
                memory.export_handle().map(|(handle, file)| (Some(handle), file))?
            }
            _ => return None,
        };
        Some((MemoryHandle { bytes: self.bytes(), handle }, file))
    }

    /// Opens memory of another process, for the kernels of this one.
    #[cfg(processes)]
    pub(crate) fn open(
        space: &MemorySpace,
        handle: &MemoryHandle,
        file: OwnedFd,
    ) -> Result<Memory, Unopened> {
        match (&handle.handle, space) {
            (None, _) => Ok(Memory::of_memfd(space, Memfd::open(file, handle.bytes)?)?),
            // An error may be the fault of either side; it is attributed to this process.
            (Some(ipc), MemorySpace::Cuda(context)) => {
                Ok(Memory::IpcImport(IpcImport::open(context, ipc, file, handle.bytes)?))
            }
            (Some(_), MemorySpace::Host) => Err(Unopened::Wrong(
                "the memory belongs to a CUDA device, and this rank is on a CPU".into(),
            )),
        }
    }

    /// Address for the host. `None` for device memory. The mailbox protocol orders all access.
    pub(crate) fn host_pointer(&self) -> Option<*mut u8> {
        match self {
            Memory::Cuda(_) => None,
            #[cfg(processes)]
            Memory::IpcImport(_) => None,
            #[cfg(processes)]
            Memory::Registered(registered) => Some(registered.memfd().address() as *mut u8),
            memory => Some(memory.address() as *mut u8),
        }
    }

    pub(crate) fn address(&self) -> u64 {
        match self {
            Memory::Host(buffer) => buffer.address(),
            Memory::Cuda(memory) => memory.address(),
            Memory::Mapped(pinned) => pinned.address(),
            #[cfg(processes)]
            Memory::Memfd(memfd) => memfd.address(),
            #[cfg(processes)]
            Memory::Registered(registered) => registered.address(),
            #[cfg(processes)]
            Memory::IpcImport(import) => import.address(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Memory::Host(buffer) => buffer.bytes(),
            Memory::Cuda(memory) => memory.bytes(),
            Memory::Mapped(pinned) => pinned.size(),
            #[cfg(processes)]
            Memory::Memfd(memfd) => memfd.bytes(),
            #[cfg(processes)]
            Memory::Registered(registered) => registered.memfd().bytes(),
            #[cfg(processes)]
            Memory::IpcImport(import) => import.bytes(),
        }
    }

    /// Sets initial contents, before any other rank has the memory.
    pub(crate) fn set(&mut self, offset: usize, from: &[u8]) -> Result<(), String> {
        match self {
            Memory::Cuda(memory) => memory.write(offset, from)?,
            memory => memory.bytes_mut()[offset..offset + from.len()].copy_from_slice(from),
        }
        Ok(())
    }

    /// Fills the memory from `offset` to its end, before any other rank has it.
    pub(crate) fn fill_from(&mut self, offset: usize, value: u8) -> Result<(), String> {
        match self {
            Memory::Cuda(memory) => memory.fill(offset, memory.bytes() - offset, value)?,
            memory => memory.bytes_mut()[offset..].fill(value),
        }
        Ok(())
    }

    /// Copies the contents, `to.len()` bytes from the begin, behind all work on the device.
    ///
    /// # Safety
    /// Nothing else writes the memory meanwhile.
    pub(crate) unsafe fn read(&self, to: &mut [u8]) -> Result<(), String> {
        assert!(to.len() <= self.bytes());
        #[cfg(processes)]
        if let Memory::Registered(registered) = self {
            registered.wait_for_device()?;
        }
        match (self, self.host_pointer()) {
            (_, Some(from)) => {
                // SAFETY: inside of this memory; the caller's promise.
                unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
                Ok(())
            }
            (Memory::Cuda(memory), None) => Ok(memory.read(to)?),
            _ => unreachable!("a peer uses imported memory"),
        }
    }

    /// Replaces the contents, from the begin.
    ///
    /// # Safety
    /// Nothing else uses the memory meanwhile.
    pub(crate) unsafe fn overwrite(&self, from: &[u8]) -> Result<(), String> {
        assert!(from.len() <= self.bytes());
        match (self, self.host_pointer()) {
            (_, Some(to)) => {
                // SAFETY: inside of this memory; the caller's promise.
                unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
                Ok(())
            }
            (Memory::Cuda(memory), None) => Ok(memory.write(0, from)?),
            _ => unreachable!("a peer uses imported memory"),
        }
    }

    /// The contents of host memory. No other code may use it at the same time.
    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Host(buffer) => buffer.bytes_mut(),
            Memory::Mapped(pinned) => pinned.bytes_mut(),
            #[cfg(processes)]
            Memory::Memfd(memfd) => memfd.bytes_mut(),
            #[cfg(processes)]
            Memory::Registered(registered) => registered.memfd_mut().bytes_mut(),
            Memory::Cuda(_) => unreachable!("the host has no address for device memory"),
            #[cfg(processes)]
            Memory::IpcImport(_) => unreachable!("a peer uses imported memory"),
        }
    }
}
