//! Deferred release of memory. Freeing, unregistering and closing memory waits for every kernel on
//! the device, and one of them may be an average that waits for the calling thread.

use std::sync::{Mutex, MutexGuard};

use super::context::opened;
#[cfg(target_os = "linux")]
use super::ipc::DeferredFree;
use crate::sync::lock;

/// Counts over all ranks of this process, in all worlds.
#[derive(Debug)]
struct Count {
    /// Number of ranks.
    all: usize,
    /// Number of ranks whose kernels may be waiting for peers.
    busy: usize,
    /// Memory that this process no longer uses but that is shared with other processes.
    #[cfg(target_os = "linux")]
    deferred: Vec<DeferredFree>,
}

/// A rank of this process. While one exists, unused memory is kept for reuse and not freed.
#[derive(Debug)]
pub(super) struct Running(());

impl Running {
    /// Counts a rank. Blocks while memory is being freed.
    pub(super) fn new() -> Running {
        count().all += 1;
        Running(())
    }

    /// Frees unused memory of all devices, unless a rank exists.
    pub(super) fn free_if_none() {
        let count = count();
        if count.all == 0 {
            opened().values().for_each(|context| context.free_spare());
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        count().all -= 1;
        Running::free_if_none();
    }
}

/// A rank whose kernels may be waiting for peers. While one exists, no shared memory is released.
#[derive(Debug)]
pub(super) struct Busy(());

impl Busy {
    /// Counts a busy rank. Blocks while memory is being released.
    pub(super) fn new() -> Busy {
        count().busy += 1;
        Busy(())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut count = count();
        count.busy -= 1;
        #[cfg(target_os = "linux")]
        release(&mut count);
    }
}

/// Releases memory as soon as no rank is busy.
#[cfg(target_os = "linux")]
pub(super) fn defer(this: DeferredFree) {
    let mut count = count();
    count.deferred.push(this);
    release(&mut count);
}

/// Releases what can be released. Memory that another process still has open is checked again when
/// the next average ends.
#[cfg(target_os = "linux")]
fn release(count: &mut Count) {
    if count.busy == 0 {
        count.deferred.retain(|this| !this.try_release());
    }
}

fn count() -> MutexGuard<'static, Count> {
    static COUNT: Mutex<Count> = Mutex::new(Count {
        all: 0,
        busy: 0,
        #[cfg(target_os = "linux")]
        deferred: vec![],
    });
    lock(&COUNT)
}
