//! Host memory that processes share: a memfd, which the system frees when the last of them ends.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{null_mut, NonNull};

use rustix::fs::{fallocate, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{mmap, munmap, MapFlags, ProtFlags};

use super::limits::{check_file_size, spare, why, Wanted};

/// Mapped memory of a memfd. Its size is sealed, so that no process with the file can make an
/// access fault.
#[derive(Debug)]
pub(crate) struct Memfd {
    mapping: Mapping,
    file: OwnedFd,
}

/// The mapping alone, which stays valid after its file is closed.
#[derive(Debug)]
pub(crate) struct Mapping {
    pointer: NonNull<u8>,
    bytes: usize,
}

/// The reason why memory of a peer was not opened.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Unopened {
    /// The memory is invalid: a fault of its owner.
    Wrong(String),
    /// The process that opens it lacks a resource.
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

// SAFETY: an address and a size; the kernels and atomics make all accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

impl Memfd {
    /// Creates zeroed memory whose pages are allocated: a full file system is an error here and not
    /// a fault later. An error names the limit that was met.
    pub(crate) fn new(bytes: usize) -> Result<Memfd, String> {
        check_file_size(bytes.max(1))?; // checked first, since fallocate would raise SIGXFSZ
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

    /// Opens memory that another process has created with `new`, of at least `bytes` bytes.
    pub(crate) fn open(file: OwnedFd, bytes: usize) -> Result<Memfd, Unopened> {
        // A file without a size or seals is not a memfd.
        let (found, seals) = (fstat(&file).map_or(0, |stat| stat.st_size), fcntl_get_seals(&file));
        let sealed = seals.is_ok_and(|seals| seals.contains(SEALS));
        if !sealed || u64::try_from(found).is_ok_and(|found| found < bytes as u64) {
            let reason = format!(
                "the memfd of a peer has {found} bytes (sealed: {sealed}), but {bytes} \
                    sealed bytes are needed"
            );
            return Err(Unopened::Wrong(reason));
        }
        Memfd::map(file, bytes).map_err(Unopened::Short)
    }

    fn map(file: OwnedFd, bytes: usize) -> Result<Memfd, String> {
        // Populated, so that no average pays for page faults.
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

    /// File by which another process opens the memory.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The contents. No other process may have the memory.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped with this size, initialised by the system, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.pointer.as_ptr(), self.mapping.bytes) }
    }

    /// Closes the file and keeps the mapping.
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
        // SAFETY: mapped by `map` with this size, and no longer used. An error leaves nothing to
        // do.
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
        // SAFETY: in bounds; no thread writes.
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
