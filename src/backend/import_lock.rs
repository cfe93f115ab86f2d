//! Reference tracking for exported device memory. The driver frees an IPC allocation even while a
//! peer has it mapped, so each importer holds a shared `fcntl` lock until it has closed its
//! mapping.
//!
//! The lock is on a memfd that is sent with the IPC handle. The system releases the locks of a
//! process when it ends. An exporter that gets the exclusive lock marks the file as closed, so that
//! a late importer does not open memory that is freed.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{fcntl_lock, FlockOperation};

use super::Memfd;

/// The lock file of an exporter or of one importer. Each importer has a file of its own, since a
/// process that closes a file loses its locks on it.
#[derive(Debug)]
pub(crate) struct ImportLock(Memfd);

impl ImportLock {
    /// Lock file of an exporter.
    pub(crate) fn new() -> Result<ImportLock, String> {
        Memfd::new(size_of::<u32>()).map(ImportLock)
    }

    /// File for importers.
    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.0.file()
    }

    /// Takes a shared lock, before the importer opens the memory. Dropped after the memory is
    /// closed.
    pub(crate) fn take(file: OwnedFd) -> Result<ImportLock, String> {
        let lock = ImportLock(Memfd::open(file, size_of::<u32>())?);
        let taken = fcntl_lock(lock.file(), FlockOperation::NonBlockingLockShared).is_ok();
        if taken && lock.closed().load(Ordering::Acquire) == 0 {
            return Ok(lock);
        }
        Err("its owner has freed it".into())
    }

    /// True if no process has the memory open. None can open it afterwards.
    pub(crate) fn end(&self) -> bool {
        let ended = fcntl_lock(self.file(), FlockOperation::NonBlockingLockExclusive).is_ok();
        if ended {
            self.closed().store(1, Ordering::Release);
        }
        ended
    }

    fn closed(&self) -> &AtomicU32 {
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

    const FILE: &str = "PA_TEST_IMPORT_LOCK";

    /// Helper process of the test below: takes a lock, prints whether it has it, and keeps it until
    /// a line arrives.
    #[test]
    fn importer() {
        let Ok(path) = std::env::var(FILE) else { return };
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        let lock = ImportLock::take(file.into());
        println!("\n@{}", lock.is_ok());
        let _ = std::io::stdin().read_line(&mut String::new());
        drop(lock);
        println!("\n@closed");
        let _ = std::io::stdin().read_line(&mut String::new());
    }

    fn start(lock: &ImportLock) -> (Child, impl FnMut() -> String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["backend::import_lock::tests::importer", "--exact", "--nocapture"]);
        command.env(FILE, format!("/proc/{}/fd/{}", std::process::id(), lock.file().as_raw_fd()));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let next_line =
            move || lines.find_map(|line| line.strip_prefix('@').map(str::to_owned)).unwrap();
        (child, next_line)
    }

    #[test]
    fn memory_is_in_use_until_its_importers_close_it_or_end() {
        for killed in [true, false] {
            let lock = ImportLock::new().unwrap();
            let (mut one, mut first) = start(&lock);
            let (mut other, mut second) = start(&lock);
            assert_eq!((first(), second()), ("true".to_owned(), "true".to_owned()));
            assert!(!lock.end());
            other.kill().unwrap();
            other.wait().unwrap();
            assert!(!lock.end(), "one importer still has it");
            if killed {
                one.kill().unwrap();
                one.wait().unwrap();
            } else {
                writeln!(one.stdin.as_ref().unwrap()).unwrap();
                assert_eq!(first(), "closed");
            }
            assert!(lock.end());
            let (mut late, mut third) = start(&lock);
            assert_eq!(third(), "false");
            for child in [&mut one, &mut late] {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}
