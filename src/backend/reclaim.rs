//! Deferred release of memory. Freeing, unregistering and closing memory waits for every kernel on
//! the device, and one of them may be an average that waits for the calling thread. So memory is
//! released when no rank of this process averages, or when none exists.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::sync::lock;

/// Memory that this process no longer uses.
pub(crate) trait Reclaim: Send + Debug {
    /// Releases the memory. May wait for kernels. False if the memory is still in use elsewhere, so
    /// that it must be tried again later.
    fn try_reclaim(&self) -> bool;
}

/// Ranks of this process, in all worlds, and memory to be released.
#[derive(Debug)]
struct Pending {
    /// Number of ranks.
    all: usize,
    /// Number of ranks whose kernels may be waiting for peers.
    busy: usize,
    /// Memory to be released as soon as no rank is busy.
    deferred: Vec<Box<dyn Reclaim>>,
    /// Lists of spare memory of devices, which ranks use again as long as one exists.
    spare: Vec<Arc<dyn Reclaim + Sync>>,
}

impl Pending {
    const fn new() -> Pending {
        Pending { all: 0, busy: 0, deferred: vec![], spare: vec![] }
    }

    /// Releases what can be released. Memory that is still in use elsewhere is tried again when the
    /// next average ends.
    fn release_deferred(&mut self) {
        if self.busy == 0 {
            self.deferred.retain(|this| !this.try_reclaim());
        }
    }

    fn release_spare(&self) {
        if self.all == 0 {
            self.spare.iter().for_each(|spare| _ = spare.try_reclaim());
        }
    }
}

/// A rank of this process. While one exists, spare memory is kept for reuse and not released.
#[derive(Debug)]
pub(super) struct Running(());

impl Running {
    /// Counts a rank. Blocks while memory is being released.
    pub(super) fn new() -> Running {
        pending().all += 1;
        Running(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        pending().all -= 1;
        reclaim_spare();
    }
}

/// A rank whose kernels may be waiting for peers. While one exists, no deferred memory is released.
#[derive(Debug)]
pub(super) struct Busy(());

impl Busy {
    /// Counts a busy rank. Blocks while memory is being released.
    pub(super) fn new() -> Busy {
        pending().busy += 1;
        Busy(())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut pending = pending();
        pending.busy -= 1;
        pending.release_deferred();
    }
}

/// Releases memory as soon as no rank is busy.
pub(super) fn defer(this: impl Reclaim + 'static) {
    let mut pending = pending();
    pending.deferred.push(Box::new(this));
    pending.release_deferred();
}

/// Registers a device's list of spare memory, for the life of the process.
pub(super) fn register_spare(list: Arc<dyn Reclaim + Sync>) {
    pending().spare.push(list);
}

/// Releases spare memory of all devices, unless a rank exists.
pub(super) fn reclaim_spare() {
    pending().release_spare();
}

fn pending() -> MutexGuard<'static, Pending> {
    static PENDING: Mutex<Pending> = Mutex::new(Pending::new());
    lock(&PENDING)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// Memory that others use for some attempts.
    #[derive(Debug)]
    struct Fake(Arc<AtomicU32>);

    impl Reclaim for Fake {
        fn try_reclaim(&self) -> bool {
            self.0.fetch_sub(1, Ordering::Relaxed) == 1
        }
    }

    #[test]
    fn deferred_memory_is_tried_until_released_and_never_beside_a_busy_rank() {
        let attempts = Arc::new(AtomicU32::new(2));
        let mut pending = Pending { busy: 1, ..Pending::new() };
        pending.deferred.push(Box::new(Fake(attempts.clone())));
        pending.release_deferred();
        assert_eq!(attempts.load(Ordering::Relaxed), 2);
        pending.busy = 0;
        for left in [1, 0, 0] {
            pending.release_deferred();
            assert_eq!(attempts.load(Ordering::Relaxed), left);
        }
        assert!(pending.deferred.is_empty());
    }

    #[test]
    fn spare_memory_is_released_when_no_rank_exists() {
        let attempts = Arc::new(AtomicU32::new(9));
        let mut pending = Pending { all: 1, ..Pending::new() };
        pending.spare.push(Arc::new(Fake(attempts.clone())));
        pending.release_spare();
        assert_eq!(attempts.load(Ordering::Relaxed), 9);
        pending.all = 0;
        pending.release_spare();
        pending.release_spare(); // the list lives on
        assert_eq!(attempts.load(Ordering::Relaxed), 7);
    }
}
