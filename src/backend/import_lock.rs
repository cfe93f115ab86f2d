//! Whether other processes use memory that they were lent: memory of a device, which the driver
//! frees under their hands.
//!
//! A lease is a memfd that goes to them with whatever the memory is opened by. Who opens the memory
//! holds a lock on that file until it has closed it again; the system takes the lock from a process
//! that ends, however it ends. A lender that gets the lock for itself says in the file that it is
//! over, so that who comes later does not open what is gone.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{fcntl_lock, FlockOperation};

use super::Memfd;

/// A lender's, or that of one borrower: for each a file of its own, since a process that closes one
/// loses its locks.
#[derive(Debug)]
pub(crate) struct ImportLock(Memfd);

impl ImportLock {
    /// Of a lender.
    pub(crate) fn new() -> Result<ImportLock, String> {
        Memfd::new(size_of::<u32>()).map(ImportLock)
    }

    /// What borrowers get.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.0.file()
    }

    /// A borrower's, before it opens the memory; dropped when that is closed.
    pub(crate) fn take(file: OwnedFd) -> Result<ImportLock, String> {
        let lease = ImportLock(Memfd::open(file, size_of::<u32>())?);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::fd::AsRawFd;
    use std::process::{Child, Command, Stdio};

    const FILE: &str = "PA_TEST_LEASE";
    const THIS_TEST: &str =
        "backend::import_lock::tests::memory_is_lent_until_it_is_closed_or_the_borrower_ends";

    /// Another process: takes a lease, says whether it has it, and keeps it until it is told.
    fn borrow(path: String) {
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let lease = ImportLock::take(file.into());
        println!("\n@{}", lease.is_ok());
        let _ = std::io::stdin().read_line(&mut String::new());
        drop(lease);
        println!("\n@closed");
        let _ = std::io::stdin().read_line(&mut String::new());
    }

    fn start(lease: &ImportLock) -> (Child, impl FnMut() -> String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([THIS_TEST, "--exact", "--nocapture"]);
        command.env(FILE, format!("/proc/{}/fd/{}", std::process::id(), lease.file().as_raw_fd()));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let hear =
            move || lines.find_map(|line| line.strip_prefix('@').map(str::to_owned)).unwrap();
        (child, hear)
    }

    #[test]
    fn memory_is_lent_until_it_is_closed_or_the_borrower_ends() {
        if let Ok(path) = std::env::var(FILE) {
            return borrow(path); // this process is one that the test has started
        }
        for killed in [true, false] {
            let lease = ImportLock::new().unwrap();
            let (mut one, mut first) = start(&lease);
            let (mut other, mut second) = start(&lease);
            assert_eq!((first(), second()), ("true".to_owned(), "true".to_owned()));
            assert!(!lease.end());
            other.kill().unwrap();
            other.wait().unwrap();
            assert!(!lease.end(), "one has it still");
            if killed {
                one.kill().unwrap();
                one.wait().unwrap();
            } else {
                writeln!(one.stdin.as_ref().unwrap()).unwrap();
                assert_eq!(first(), "closed");
            }
            assert!(lease.end());
            let (mut late, mut third) = start(&lease);
            assert_eq!(third(), "false");
            for child in [&mut one, &mut late] {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
