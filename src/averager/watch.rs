//! Notices of averages that take long. Ranks on CPUs wait for one another within the kernels, and
//! ranks on devices within the driver, so a thread of its own looks every few seconds whether a
//! caller still waits. An average pays a few stores for that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use crate::backend::limits::thread;
use crate::notice::{self, patience};
use crate::sync::{lock, wait, wait_timeout};
use crate::world::{Agreement, Communicator};

/// Stack of the thread in bytes. A subscriber of the user's runs on it.
const STACK: usize = 1 << 20;

/// The waits of one averager's caller.
#[derive(Debug)]
pub(super) struct Watch {
    /// Weak: an averager frees its memory when it is dropped.
    agreement: Weak<Agreement>,
    rank: usize,
    /// Ranks by ring position.
    order: Vec<usize>,
    timeout: Duration,
    /// Begin of the current wait, in nanoseconds since `made`, plus one. 0: nothing waits.
    since: AtomicU64,
    made: Instant,
    /// True if that wait is for another host.
    is_for_hosts: AtomicBool,
    /// Shortest wait, in nanoseconds, that is told of. It doubles with each notice: ranks of
    /// unequal speed wait at every average.
    least: AtomicU64,
}

/// A caller's wait, until it is dropped.
pub(super) struct Waiting(Arc<Watch>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.since.store(0, Ordering::Relaxed);
    }
}

impl Watch {
    /// Watches the averages of an averager, while the result lives.
    pub(super) fn new(
        communicator: &Communicator,
        agreement: &Arc<Agreement>,
        timeout: Duration,
        has_hosts: bool,
    ) -> Arc<Watch> {
        let watch = Arc::new(Watch {
            agreement: Arc::downgrade(agreement),
            rank: communicator.rank(),
            order: communicator.placement().order().to_vec(),
            timeout,
            since: AtomicU64::new(0),
            made: Instant::now(),
            is_for_hosts: AtomicBool::new(false),
            least: AtomicU64::new(nanoseconds(patience())),
        });
        if communicator.world_size() > 1 || has_hosts {
            Watcher::add(&watch);
        }
        watch
    }

    /// Marks a wait of an average that began at `start`.
    pub(super) fn waits(self: &Arc<Self>, start: Instant) -> Waiting {
        let since = nanoseconds(start.saturating_duration_since(self.made));
        self.since.store(since + 1, Ordering::Relaxed);
        Waiting(self.clone())
    }

    /// Runs what is no wait, in the course of one that begins again after it.
    pub(super) fn pause<T>(&self, run: impl FnOnce() -> T) -> T {
        self.since.store(0, Ordering::Relaxed);
        let result = run();
        self.since.store(nanoseconds(self.made.elapsed()) + 1, Ordering::Relaxed);
        result
    }

    /// Runs the waits for other hosts, in the course of one for the ranks of this host.
    pub(super) fn for_hosts<T>(&self, run: impl FnOnce() -> T) -> T {
        self.is_for_hosts.store(true, Ordering::Relaxed);
        let result = self.pause(|| {
            self.since.store(nanoseconds(self.made.elapsed()) + 1, Ordering::Relaxed);
            run()
        });
        self.is_for_hosts.store(false, Ordering::Relaxed);
        result
    }

    /// Text of a notice, if one is due.
    fn look(&self) -> Option<String> {
        let since = self.since.load(Ordering::Relaxed).checked_sub(1)?;
        let waited = nanoseconds(self.made.elapsed()).saturating_sub(since);
        let least = self.least.load(Ordering::Relaxed);
        if waited < least {
            return None;
        }
        self.least.store(2 * waited.max(least), Ordering::Relaxed);
        if self.is_for_hosts.load(Ordering::Relaxed) {
            return Some(format!(
                "rank {} has waited for {:.1?} in an average of all hosts for another host: see \
                 what that does; the wait ends after {:?}, three quarters of Builder::timeout",
                self.rank,
                Duration::from_nanos(waited),
                self.timeout / 4 * 3
            ));
        }
        let named = |positions: Vec<usize>| {
            let mut ranks: Vec<usize> = positions.iter().map(|&at| self.order[at]).collect();
            ranks.sort_unstable();
            let all: Vec<String> = ranks.iter().map(usize::to_string).collect();
            format!("rank{} {}", if all.len() > 1 { "s" } else { "" }, all.join(", "))
        };
        let position = self.order.iter().position(|&rank| rank == self.rank)?;
        let agreement = self.agreement.upgrade()?;
        let peers = match agreement.control.awaited(position, self.order.len()) {
            Some((missing, true)) => format!("{} to call it, too", named(missing)),
            Some((awaited, false)) => format!("{}, which has called it", named(awaited)),
            None => "its peers".to_owned(),
        };
        Some(format!(
            "rank {} has waited for {:.1?} in an average for {peers}: see what a rank that is late \
                does; the wait ends after {:?} (Builder::timeout)",
            self.rank,
            Duration::from_nanos(waited),
            self.timeout
        ))
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4)
}

/// The thread that looks. It stays for the life of the process, and sleeps while there is no
/// averager.
struct Watcher {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    watched: Vec<Weak<Watch>>,
    is_started: bool,
}

static WATCHER: Watcher = Watcher {
    state: Mutex::new(State { watched: vec![], is_started: false }),
    changed: Condvar::new(),
};

impl Watcher {
    fn add(watch: &Arc<Watch>) {
        let mut state = lock(&WATCHER.state);
        state.watched.push(Arc::downgrade(watch));
        if !state.is_started {
            // Without the thread, averages are the same and long ones go unsaid.
            state.is_started = thread("watch".into(), STACK, Watcher::run).is_ok();
        }
        WATCHER.changed.notify_all();
    }

    fn run() {
        let mut state = lock(&WATCHER.state);
        loop {
            state.watched.retain(|watch| watch.strong_count() > 0);
            let due: Vec<(usize, String)> = (state.watched.iter())
                .filter_map(Weak::upgrade)
                .filter_map(|watch| Some((watch.rank, watch.look()?)))
                .collect();
            // A subscriber may do anything, drop an averager or build one included.
            drop(state);
            due.iter().for_each(|(rank, text)| notice::tell_wait(Some(*rank), text));
            state = lock(&WATCHER.state);
            state = match state.watched.is_empty() {
                true => wait(&WATCHER.changed, state),
                false => wait_timeout(&WATCHER.changed, state, patience() / 4),
            };
        }
    }
}
