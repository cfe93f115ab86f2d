//! Meetings in streams: a rank's stream writes the rank's word and waits for its peers' in its
//! front end. Nothing spins on the device, and no lock is held. A host ends the wait when it has
//! lasted too long or the world has ended, by writing the words itself; the kernels behind it then
//! find the world poisoned and end with its failure.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use cudarc::driver::sys;

use super::driver::{call, Failed};
use crate::backend::limits::thread;
use crate::backend::Attendance;
use crate::sync::{lock, wait, wait_timeout};

/// Enqueues a meeting on a stream. `watch` must be called as well.
///
/// # Safety
/// `stream` belongs to the context, which is bound.
pub(super) unsafe fn enqueue(meeting: &Attendance, stream: sys::CUstream) -> Result<(), Failed> {
    let (number, at) = (meeting.number, |rank| meeting.arrivals.arrived_address(rank));
    let reached = sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ as u32;
    // SAFETY: the words are in memory that is mapped for the device until the averager is dropped,
    // which waits for the stream. Flags 0 of the write: earlier writes are visible before it.
    unsafe {
        call!(cuStreamWriteValue32_v2(stream, at(meeting.position), number, 0))?;
        for other in (0..meeting.ranks).filter(|&other| other != meeting.position) {
            call!(cuStreamWaitValue32_v2(stream, at(other), number, reached))?;
        }
    }
    Ok(())
}

/// The thread that ends meetings. It stays for the life of the process, and sleeps while no stream
/// waits.
struct Watcher {
    /// Meetings, and true once the thread runs.
    state: Mutex<(Vec<Attendance>, bool)>,
    changed: Condvar,
}

static WATCHER: Watcher = Watcher { state: Mutex::new((vec![], false)), changed: Condvar::new() };

/// Stack of the thread in bytes.
const STACK: usize = 256 << 10;

/// Time between two looks at meetings that last.
const LOOK: Duration = Duration::from_millis(2);

/// Starts the thread that watches meetings.
pub(super) fn start_watcher() -> Result<(), String> {
    let mut state = lock(&WATCHER.state);
    if !state.1 {
        thread("meetings".into(), STACK, run)?;
        state.1 = true;
    }
    Ok(())
}

/// Ends a meeting at its deadline, or when the world ends. The watcher has been started.
pub(super) fn watch(meeting: Attendance) {
    lock(&WATCHER.state).0.push(meeting);
    WATCHER.changed.notify_all();
}

/// Ends the watch of a meeting that is over, and its hold on the words.
pub(super) fn forget(meeting: &Attendance) {
    lock(&WATCHER.state).0.retain(|other| !other.is(meeting));
}

fn run() {
    let mut state = lock(&WATCHER.state);
    loop {
        state.0.retain_mut(|meeting| {
            let ended = meeting.look();
            // In a world that has failed it is released until it is forgotten: a stream that comes
            // late to an earlier meeting sets its rank's word back.
            let has_failed = meeting.arrivals.failure().is_some();
            if has_failed {
                meeting.release();
            }
            has_failed || ended.is_none()
        });
        state = match state.0.is_empty() {
            true => wait(&WATCHER.changed, state),
            false => wait_timeout(&WATCHER.changed, state, LOOK),
        };
    }
}
