//! Memory that processes of one host share: a memfd, which goes when the last of them does, however it ends.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{null_mut, NonNull};

use rustix::fs::{fallocate, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};

/// Mapped memory of a memfd whose size is sealed: nobody who has it can make an access to it fault.
#[derive(Debug)]
pub(crate) struct Shared {
    mapping: Mapping,
    file: OwnedFd,
}

/// The memory alone, which stays without its file.
#[derive(Debug)]
pub(crate) struct Mapping {
    pointer: NonNull<u8>,
    bytes: usize,
}

// SAFETY: an address and a size; all accesses are the kernels' or atomic.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

impl Shared {
    /// Zeroed, and allocated here and now: a file system that is full, or a file descriptor that can't be had, is an error and
    /// no fault later.
    pub(crate) fn new(bytes: usize) -> Result<Shared, String> {
        let why = |what, error: rustix::io::Errno| {
            let error = io::Error::from(error);
            format!("{what} of {bytes} bytes: {error}; raise ulimit -n, or free memory")
        };
        let file = memfd_create("param-averager", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|error| why("memfd_create", error))?;
        rustix::io::retry_on_intr(|| fallocate(&file, FallocateFlags::empty(), 0, bytes.max(1) as u64))
            .map_err(|error| why("fallocate", error))?;
        fcntl_add_seals(&file, SEALS | SealFlags::SEAL).map_err(|error| why("F_ADD_SEALS", error))?;
        Shared::map(file, bytes).map_err(|error| why("mmap", error))
    }

    /// What another process made with `new`, of at least so many bytes.
    pub(crate) fn open(file: OwnedFd, bytes: usize) -> Result<Shared, String> {
        let failed = |error: rustix::io::Errno| format!("opening a peer's: {}", io::Error::from(error));
        let found = fstat(&file).map_err(failed)?.st_size;
        let sealed = fcntl_get_seals(&file).map_err(failed)?.contains(SEALS);
        if !sealed || u64::try_from(found).is_ok_and(|found| found < bytes as u64) {
            return Err(format!("a peer's has {found} bytes, sealed: {sealed}; wanted {bytes}, sealed"));
        }
        Shared::map(file, bytes).map_err(failed)
    }

    fn map(file: OwnedFd, bytes: usize) -> rustix::io::Result<Shared> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE; // no average pays for page faults
                                                           // SAFETY: a new mapping, wherever the system puts it.
        let pointer =
            unsafe { mmap(null_mut(), bytes.max(1), ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0) }?;
        let mapping = Mapping { pointer: NonNull::new(pointer.cast()).expect("not at 0"), bytes };
        Ok(Shared { mapping, file })
    }

    pub(crate) fn address(&self) -> u64 {
        self.mapping.address()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.mapping.bytes
    }

    /// What another process opens it by.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What it holds, while no other process has it.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped with this size, initialised by the system, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.pointer.as_ptr(), self.mapping.bytes) }
    }

    /// Closes the file.
    pub(crate) fn into_mapping(self) -> Mapping {
        self.mapping
    }
}

impl Mapping {
    pub(crate) fn address(&self) -> u64 {
        self.pointer.as_ptr() as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this size, and used by nobody any more. An error leaves nothing to do.
        let _ = unsafe { munmap(self.pointer.as_ptr().cast(), self.bytes.max(1)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_are_one_memory_and_keep_their_size() {
        let mut one = Shared::new(5000).unwrap();
        let other = Shared::open(one.file().try_clone_to_owned().unwrap(), 5000).unwrap();
        one.bytes_mut()[4999] = 7;
        // SAFETY: in bounds; nobody writes.
        assert_eq!(unsafe { *(other.address() as *const u8).add(4999) }, 7);
        assert!(rustix::fs::ftruncate(one.file(), 1).is_err());
        let error = Shared::open(one.file().try_clone_to_owned().unwrap(), 5001).unwrap_err();
        assert!(error.contains("5001"), "{error}");
        let unsealed = memfd_create("unsealed", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&unsealed, 5000).unwrap();
        assert!(Shared::open(unsealed, 5000).unwrap_err().contains("sealed: false"));
    }
}
