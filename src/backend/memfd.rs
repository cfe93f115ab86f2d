//! Memory that processes of one host share: a memfd, which goes when the last of them does, however
//! it ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{null_mut, NonNull};

use rustix::fs::{fallocate, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};

use super::limits::{check_file_size, spare, why, Wanted};

/// Mapped memory of a memfd whose size is sealed: nobody who has it can make an access to it fault.
#[derive(Debug)]
pub(crate) struct Memfd {
    mapping: Mapping,
    file: OwnedFd,
}

/// The memory alone, which stays without its file.
#[derive(Debug)]
pub(crate) struct Mapping {
    pointer: NonNull<u8>,
    bytes: usize,
}

/// Why memory of a peer's was not opened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Unopened {
    /// The memory is not what it has to be: its owner's fault.
    Wrong(String),
    /// The process that opens it is short of something.
    Short(String),
}

impl From<String> for Unopened {
    fn from(reason: String) -> Self {
        Unopened::Short(reason)
    }
}

impl From<Unopened> for String {
    fn from(unopened: Unopened) -> Self {
        match unopened {
            Unopened::Wrong(reason) | Unopened::Short(reason) => reason,
        }
    }
}

// SAFETY: an address and a size; all accesses are the kernels' or atomic.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

impl Memfd {
    /// Zeroed, and allocated here and now: a file system that is full, or a file descriptor that
    /// can't be had, is an error and no fault later. The error names the limit that was met.
    pub(crate) fn new(bytes: usize) -> Result<Memfd, String> {
        check_file_size(bytes.max(1))?; // before fallocate, which would be answered by SIGXFSZ
        let file = memfd_create("param-averager", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|error| why("memfd_create", Wanted::Memfd, error))?;
        rustix::io::retry_on_intr(|| {
            fallocate(&file, FallocateFlags::empty(), 0, bytes.max(1) as u64)
        })
        .map_err(|error| why("fallocate", Wanted::File(bytes), error))?;
        fcntl_add_seals(&file, SEALS | SealFlags::SEAL)
            .map_err(|error| why("F_ADD_SEALS", Wanted::Memfd, error))?;
        Memfd::map(file, bytes)
    }

    /// What another process made with `new`, of at least so many bytes.
    pub(crate) fn open(file: OwnedFd, bytes: usize) -> Result<Memfd, Unopened> {
        // A file that can't be asked for its size or its seals is no memfd.
        let (found, seals) = (fstat(&file).map_or(0, |stat| stat.st_size), fcntl_get_seals(&file));
        let sealed = seals.is_ok_and(|seals| seals.contains(SEALS));
        if !sealed || u64::try_from(found).is_ok_and(|found| found < bytes as u64) {
            let reason =
                format!("a peer's has {found} bytes, sealed: {sealed}; wanted {bytes}, sealed");
            return Err(Unopened::Wrong(reason));
        }
        Memfd::map(file, bytes).map_err(Unopened::Short)
    }

    fn map(file: OwnedFd, bytes: usize) -> Result<Memfd, String> {
        // Populated: no average pays for page faults.
        let (flags, access) =
            (MapFlags::SHARED | MapFlags::POPULATE, ProtFlags::READ | ProtFlags::WRITE);
        // SAFETY: a new mapping, wherever the system puts it.
        let pointer = unsafe { mmap(null_mut(), bytes.max(1), access, flags, &file, 0) }
            .map_err(|error| why("mmap", Wanted::Memory(bytes), error))?;
        let mapping = Mapping { pointer: NonNull::new(pointer.cast()).expect("not at 0"), bytes };
        spare(0)?;
        Ok(Memfd { mapping, file })
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
        // SAFETY: mapped by `map` with this size, and used by nobody any more. An error leaves
        // nothing to do.
        let _ = unsafe { munmap(self.pointer.as_ptr().cast(), self.bytes.max(1)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_are_one_memory_and_keep_their_size() {
        let mut one = Memfd::new(5000).unwrap();
        let other = Memfd::open(one.file().try_clone_to_owned().unwrap(), 5000).unwrap();
        one.bytes_mut()[4999] = 7;
        // SAFETY: in bounds; nobody writes.
        assert_eq!(unsafe { *(other.address() as *const u8).add(4999) }, 7);
        assert!(rustix::fs::ftruncate(one.file(), 1).is_err());
        let error = Memfd::open(one.file().try_clone_to_owned().unwrap(), 5001).unwrap_err();
        assert!(matches!(&error, Unopened::Wrong(reason) if reason.contains("5001")), "{error:?}");
        let unsealed = memfd_create("unsealed", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&unsealed, 5000).unwrap();
        let error = Memfd::open(unsealed, 5000).unwrap_err();
        assert!(
            matches!(&error, Unopened::Wrong(reason) if reason.contains("sealed: false")),
            "{error:?}"
        );
    }
}
