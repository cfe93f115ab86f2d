//! When memory is given back. To free, to unregister and to close is to wait for every kernel on
//! the device, and one of them may be an average that waits for this very thread.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::context::opened;
#[cfg(target_os = "linux")]
use super::ipc::DeferredFree;

/// Ranks of this process, of all worlds.
#[derive(Debug)]
struct Count {
    /// Those that live.
    all: usize,
    /// Those whose kernels may be waiting for others'.
    busy: usize,
    /// Memory that other processes have a part in, and that this one does not use any more.
    #[cfg(target_os = "linux")]
    returns: Vec<DeferredFree>,
}

/// A rank that lives. While one does, nothing is freed that another may use instead.
#[derive(Debug)]
pub(super) struct Running(());

impl Running {
    /// One more rank. Waits while memory is being freed.
    pub(super) fn new() -> Running {
        count().all += 1;
        Running(())
    }

    /// Frees what nobody uses, on all devices, unless a rank lives.
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

/// A rank whose kernels may be waiting for others'. While there is one, nothing is given back.
#[derive(Debug)]
pub(super) struct Busy(());

impl Busy {
    /// One more. Waits while something is being given back.
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
        give_back(&mut count);
    }
}

/// Gives this back as soon as may be.
#[cfg(target_os = "linux")]
pub(super) fn defer(this: DeferredFree) {
    let mut count = count();
    count.returns.push(this);
    give_back(&mut count);
}

/// All that can be: what another process still has open is asked after again when the next average
/// ends.
#[cfg(target_os = "linux")]
fn give_back(count: &mut Count) {
    if count.busy == 0 {
        count.returns.retain(|this| !this.give_back());
    }
}

fn count() -> MutexGuard<'static, Count> {
    static COUNT: Mutex<Count> = Mutex::new(Count {
        all: 0,
        busy: 0,
        #[cfg(target_os = "linux")]
        returns: vec![],
    });
    COUNT.lock().unwrap_or_else(PoisonError::into_inner) // numbers and a list, whole at any time
}
