//! Whether other processes use memory that they were lent: memory of a device, which the driver frees under their hands.
//!
//! A lease is a memfd that goes to them with whatever the memory is opened by. Who opens the memory holds a lock on that file
//! until it has closed it again; the system takes the lock from a process that ends, however it ends. A lender that gets the
//! lock for itself says in the file that it is over, so that who comes later does not open what is gone.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{fcntl_lock, FlockOperation};

use super::Shared;

/// A lender's, or that of one borrower: for each a file of its own, since a process that closes one loses its locks.
#[derive(Debug)]
pub(crate) struct Lease(Shared);

impl Lease {
    /// Of a lender.
    pub(crate) fn new() -> Result<Lease, String> {
        Shared::new(size_of::<u32>()).map(Lease)
    }

    /// What borrowers get.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.0.file()
    }

    /// A borrower's, before it opens the memory; dropped when that is closed.
    pub(crate) fn take(file: OwnedFd) -> Result<Lease, String> {
        let lease = Lease(Shared::open(file, size_of::<u32>())?);
        let taken = fcntl_lock(lease.file(), FlockOperation::NonBlockingLockShared).is_ok();
        if taken && lease.over().load(Ordering::Acquire) == 0 {
            return Ok(lease);
        }
        Err("its owner has taken it back".into())
    }

    /// Whether nobody has the memory open: then nobody will.
    pub(crate) fn end(&self) -> bool {
        let ended = fcntl_lock(self.file(), FlockOperation::NonBlockingLockExclusive).is_ok();
        if ended {
            self.over().store(1, Ordering::Release);
        }
        ended
    }

    fn over(&self) -> &AtomicU32 {
        // SAFETY: in bounds and aligned, borrowed with the memory, and accessed by atomics only.
        unsafe { AtomicU32::from_ptr(self.0.address() as *mut u32) }
    }
}
