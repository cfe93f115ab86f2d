//! Memory that ranks share, wherever it is.

#[cfg(target_os = "linux")]
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

#[cfg(target_os = "linux")]
use serde::{Deserialize, Serialize};

#[cfg(target_os = "linux")]
use super::cuda::{Borrowed, Registered};
use super::cuda::{Context, DeviceMemory, Pinned};
use super::Region;
#[cfg(target_os = "linux")]
use super::{Shared, Unopened};

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
    /// The same, which devices of this process and of others map.
    #[cfg(target_os = "linux")]
    Registered(Registered),
    /// A device's, of another process.
    #[cfg(target_os = "linux")]
    Borrowed(Borrowed),
}

/// What another process opens memory by, besides a file.
#[cfg(target_os = "linux")]
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) bytes: usize,
    /// Of memory of a device. The host's is the file itself.
    handle: Option<Vec<u8>>,
}

impl Memory {
    /// Zeroed.
    pub(crate) fn new(site: &Site, bytes: usize) -> Result<Memory, String> {
        Ok(match site {
            Site::Host => Memory::Host(Region::new(bytes)?),
            Site::Cuda(context) => Memory::Cuda(DeviceMemory::new(context, bytes)?),
        })
    }

    /// Zeroed, in memory of the host that the devices of this process address, whichever of them asks for it.
    pub(crate) fn of_the_host(site: &Site, bytes: usize) -> Result<Memory, String> {
        Ok(match site {
            Site::Host => Memory::Host(Region::new(bytes)?),
            Site::Cuda(context) => Memory::Mapped(Pinned::new(context, bytes)?),
        })
    }

    /// Zeroed, in memory of the host that other processes can be given, and that the device of this one addresses.
    #[cfg(target_os = "linux")]
    pub(crate) fn between_processes(site: &Site, bytes: usize) -> Result<Memory, String> {
        Memory::of_shared(site, Shared::new(bytes)?)
    }

    /// Zeroed, in memory of a device that other processes can be given.
    #[cfg(target_os = "linux")]
    pub(crate) fn to_lend(context: &Arc<Context>, bytes: usize) -> Result<Memory, String> {
        DeviceMemory::to_lend(context, bytes).map(Memory::Cuda)
    }

    #[cfg(target_os = "linux")]
    fn of_shared(site: &Site, shared: Shared) -> Result<Memory, String> {
        Ok(match site {
            Site::Host => Memory::Shared(shared),
            Site::Cuda(context) => Memory::Registered(Registered::new(context, shared)?),
        })
    }

    /// What other processes can be given.
    #[cfg(target_os = "linux")]
    pub(crate) fn offer(&self) -> Option<(Offer, BorrowedFd<'_>)> {
        let (handle, file) = match self {
            Memory::Shared(shared) => (None, shared.file()),
            Memory::Registered(registered) => (None, registered.shared().file()),
            Memory::Cuda(memory) => memory.offer().map(|(handle, file)| (Some(handle), file))?,
            _ => return None,
        };
        Some((Offer { bytes: self.bytes(), handle }, file))
    }

    /// What another process offers, for the kernels that run here.
    #[cfg(target_os = "linux")]
    pub(crate) fn open(site: &Site, offer: &Offer, file: OwnedFd) -> Result<Memory, Unopened> {
        match (&offer.handle, site) {
            (None, _) => Ok(Memory::of_shared(site, Shared::open(file, offer.bytes)?)?),
            // This rank's device has its part in what fails.
            (Some(handle), Site::Cuda(context)) => {
                Ok(Memory::Borrowed(Borrowed::open(context, handle, file, offer.bytes)?))
            }
            (Some(_), Site::Host) => Err(Unopened::Wrong("it is a device's, and this rank has none".into())),
        }
    }

    /// Where the host finds it, unless only a device does. Who accesses what in it, and when, is the protocol's business.
    pub(crate) fn host_pointer(&self) -> Option<*mut u8> {
        match self {
            Memory::Cuda(_) => None,
            #[cfg(target_os = "linux")]
            Memory::Borrowed(_) => None,
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
            Memory::Shared(shared) => shared.address(),
            #[cfg(target_os = "linux")]
            Memory::Registered(registered) => registered.address(),
            #[cfg(target_os = "linux")]
            Memory::Borrowed(borrowed) => borrowed.address(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        match self {
            Memory::Host(region) => region.bytes(),
            Memory::Cuda(memory) => memory.bytes(),
            Memory::Mapped(pinned) => pinned.size(),
            #[cfg(target_os = "linux")]
            Memory::Shared(shared) => shared.bytes(),
            #[cfg(target_os = "linux")]
            Memory::Registered(registered) => registered.shared().bytes(),
            #[cfg(target_os = "linux")]
            Memory::Borrowed(borrowed) => borrowed.bytes(),
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

    /// Of memory of the host, while nobody else has it.
    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Memory::Host(region) => region.bytes_mut(),
            Memory::Mapped(pinned) => pinned.bytes_mut(),
            #[cfg(target_os = "linux")]
            Memory::Shared(shared) => shared.bytes_mut(),
            #[cfg(target_os = "linux")]
            Memory::Registered(registered) => registered.shared_mut().bytes_mut(),
            Memory::Cuda(_) => unreachable!("the host does not find it"),
            #[cfg(target_os = "linux")]
            Memory::Borrowed(_) => unreachable!("somebody else has it"),
        }
    }
}
