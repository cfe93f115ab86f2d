//! The meeting of ranks that are threads of one process, before an average: on the host, so that no
//! kernel waits for a rank that has not come. A rank waits here for its peers' calls with the
//! averager's deadline, for aborts and departures. Then each device gets one launch with the blocks
//! of all its ranks.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::abi::{PA_DEPARTED, PA_TIMEOUT};
use crate::sync::{lock, wait_timeout};

/// A failure that ended a world: the contents of `PaHost.abort` or `PaControl.failed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// A `PaKind`.
    pub(crate) kind: u32,
    /// Ring position of the rank at fault.
    pub(crate) position: usize,
}

/// State of a world, as a rank that waits sees it. All positions are ring positions.
pub(crate) trait World {
    /// Counts a call of an average on a device, for notices.
    fn count_call(&self, position: usize);

    /// The failure that ended the world.
    fn failure(&self) -> Option<Failure>;

    /// True if this rank has departed.
    fn has_left(&self, position: usize) -> bool;

    /// Ends the world, unless it has ended.
    fn poison(&self, failure: Failure);

    /// Records that a rank has departed: its kernels have ended.
    fn depart(&self, position: usize);
}

/// Words in memory that all processes of a world map, one for each rank: the number of the latest
/// meeting that the rank has come to. Numbers are compared wrap-safe.
pub(crate) trait Arrivals: World + Send + Sync + fmt::Debug {
    /// The word of a rank.
    fn arrived(&self, position: usize) -> &AtomicU32;

    /// Address of a rank's word for the device of this process.
    fn arrived_address(&self, position: usize) -> u64;
}

/// One meeting of processes.
#[derive(Clone, Debug)]
pub(crate) struct Attendance {
    pub(crate) arrivals: Arc<dyn Arrivals>,
    /// Number of ranks.
    pub(crate) ranks: usize,
    /// Position of this rank.
    pub(crate) position: usize,
    pub(crate) number: u32,
    pub(crate) timeout: Duration,
    /// Time at which this rank was first seen to have come: peers are waited for from then on, not
    /// while this rank's stream has earlier work to do.
    pub(crate) since: Option<Instant>,
}

impl Attendance {
    /// True if both are the same meeting of the same averager.
    pub(crate) fn is(&self, other: &Attendance) -> bool {
        self.number == other.number && Arc::ptr_eq(&self.arrivals, &other.arrivals)
    }

    /// Positions of the ranks that have not come.
    fn missing(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.ranks).filter(|&at| {
            // Acquire: what the rank wrote before it came is visible.
            let come = self.arrivals.arrived(at).load(Ordering::Acquire);
            (come.wrapping_sub(self.number) as i32) < 0
        })
    }

    /// Looks once: `None` while ranks are missing, and the failure that ends the meeting if there
    /// is one. A failure that this look finds poisons the world.
    pub(crate) fn look(&mut self) -> Option<Result<(), Failure>> {
        let Some(first) = self.missing().next() else { return Some(Ok(())) };
        if self.since.is_none() && self.missing().all(|at| at != self.position) {
            self.since = Some(Instant::now());
        }
        let is_late = self.since.is_some_and(|since| since.elapsed() >= self.timeout);
        let ended = match self.missing().find(|&at| self.arrivals.has_left(at)) {
            Some(position) => Some(Failure { kind: PA_DEPARTED, position }),
            None if !is_late => None,
            None => Some(Failure { kind: PA_TIMEOUT, position: first }),
        };
        ended.into_iter().for_each(|failure| self.arrivals.poison(failure));
        self.arrivals.failure().map(Err)
    }

    /// Ends a meeting that has failed for all streams that wait for it, as if every rank had come.
    /// The kernels behind them see why, since the world is poisoned.
    pub(crate) fn release(&self) {
        let is_before = |come: u32| (come.wrapping_sub(self.number) as i32) < 0;
        for at in 0..self.ranks {
            // A peer may have come to the next meeting meanwhile: its word does not go back.
            let _ = self.arrivals.arrived(at).fetch_update(
                Ordering::Release,
                Ordering::Acquire,
                |come| is_before(come).then_some(self.number),
            );
        }
    }

    /// Comes to the meeting and waits on the host for all others.
    pub(crate) fn meet(&mut self) -> Result<(), Failure> {
        /// Looks before the wait sleeps: about as long as a hand-off takes.
        const SPINS: u32 = 2000;
        self.arrivals.arrived(self.position).store(self.number, Ordering::Release);
        let mut looks = 0;
        loop {
            if let Some(ended) = self.look() {
                return ended;
            }
            looks += 1;
            match looks {
                ..SPINS => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(100)),
            }
        }
    }
}

/// Longest time between two looks at the world: aborts and departures ring no bell here.
const LOOK: Duration = Duration::from_millis(5);

/// Meetings of the ranks of one averager, one after the other. `T` is what a rank brings along.
pub(crate) struct Meeting<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    /// Meetings that are complete.
    completed: u64,
    /// Contributions to the next meeting, by position.
    brought: Vec<Option<T>>,
    /// Contributions to the last meeting. The next one is not complete before every rank has taken
    /// them and has come again.
    results: Arc<[T]>,
}

impl<T> Meeting<T> {
    /// Meetings of this many ranks.
    pub(crate) fn new(world: usize) -> Self {
        let brought = (0..world).map(|_| None).collect();
        let state = State { completed: 0, brought, results: Arc::new([]) };
        Meeting { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Brings `own` and waits until every rank has brought something. Returns all, by position.
    ///
    /// # Errors
    /// The failure that ended the world. It may be this wait's: `timeout` is over, or a rank that
    /// has not come has departed.
    pub(crate) fn all_gather(
        &self,
        position: usize,
        own: T,
        world: &dyn World,
        timeout: Duration,
    ) -> Result<Arc<[T]>, Failure> {
        let start = Instant::now();
        let mut state = lock(&self.state);
        if let Some(failure) = world.failure() {
            return Err(failure);
        }
        let number = state.completed;
        state.brought[position] = Some(own);
        if state.brought.iter().all(Option::is_some) {
            state.results = state.brought.iter_mut().filter_map(Option::take).collect();
            state.completed += 1;
            self.changed.notify_all();
        }
        loop {
            if state.completed != number {
                return Ok(state.results.clone());
            }
            let waited = start.elapsed();
            let mut missing = (0..state.brought.len()).filter(|&at| state.brought[at].is_none());
            let first = missing.clone().next().expect("or the meeting would be complete");
            let ended = match missing.find(|&at| world.has_left(at)) {
                Some(position) => Some(Failure { kind: PA_DEPARTED, position }),
                None if waited < timeout => None,
                None => Some(Failure { kind: PA_TIMEOUT, position: first }),
            };
            ended.into_iter().for_each(|failure| world.poison(failure));
            // Under the lock: whoever comes later sees the failure, and completes no meeting that
            // this rank has given up.
            if let Some(failure) = world.failure() {
                state.brought[position] = None;
                self.changed.notify_all();
                return Err(failure);
            }
            state = wait_timeout(&self.changed, state, LOOK.min(timeout - waited));
        }
    }
}

impl<T> Meeting<T> {
    /// As `all_gather`, for ranks that have all promised to come soon: nothing ends the wait.
    pub(crate) fn all_gather_of_all(&self, position: usize, own: T) -> Arc<[T]> {
        struct Lasting;
        impl World for Lasting {
            fn count_call(&self, _: usize) {}
            fn failure(&self) -> Option<Failure> {
                None
            }
            fn has_left(&self, _: usize) -> bool {
                false
            }
            fn poison(&self, _: Failure) {}
            fn depart(&self, _: usize) {}
        }
        let all = self.all_gather(position, own, &Lasting, Duration::MAX);
        all.unwrap_or_else(|_| unreachable!("a world that does not fail"))
    }
}

impl<T> fmt::Debug for Meeting<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meeting").field("completed", &lock(&self.state).completed).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::PA_ABORTED;

    #[derive(Default)]
    struct Ended(Mutex<(Option<Failure>, Vec<usize>)>);

    impl World for Ended {
        fn count_call(&self, _: usize) {}
        fn failure(&self) -> Option<Failure> {
            lock(&self.0).0
        }
        fn has_left(&self, position: usize) -> bool {
            lock(&self.0).1.contains(&position)
        }
        fn poison(&self, failure: Failure) {
            lock(&self.0).0.get_or_insert(failure);
        }
        fn depart(&self, position: usize) {
            lock(&self.0).1.push(position);
        }
    }

    #[test]
    fn every_rank_gets_what_all_have_brought() {
        let (meeting, world) = (Meeting::new(3), Ended::default());
        std::thread::scope(|scope| {
            for position in 0..3 {
                let (meeting, world) = (&meeting, &world);
                scope.spawn(move || {
                    for round in 0..2000 {
                        let own = 10 * round + position;
                        let all = meeting.all_gather(position, own, world, Duration::MAX).unwrap();
                        assert_eq!(*all, [10 * round, 10 * round + 1, 10 * round + 2]);
                    }
                });
            }
        });
    }

    #[test]
    fn all_ranks_get_the_same_failure() {
        let short = Duration::from_millis(30);
        for (failure, timeout) in [
            (Failure { kind: PA_TIMEOUT, position: 1 }, short),
            (Failure { kind: PA_DEPARTED, position: 2 }, Duration::MAX),
            (Failure { kind: PA_ABORTED, position: 0 }, Duration::MAX),
        ] {
            let (meeting, world) = (Meeting::new(4), Ended::default());
            std::thread::scope(|scope| {
                let (meeting, world) = (&meeting, &world);
                let early = |position| {
                    scope.spawn(move || meeting.all_gather(position, (), world, timeout))
                };
                let early = [early(0), early(3)];
                std::thread::sleep(short / 2);
                match failure.kind {
                    PA_DEPARTED => lock(&world.0).1.push(failure.position),
                    PA_ABORTED => world.poison(failure),
                    _ => {}
                }
                for rank in early {
                    assert_eq!(rank.join().unwrap().unwrap_err(), failure);
                }
                // Ranks that come later complete nothing.
                for position in [1, 2] {
                    let late = meeting.all_gather(position, (), world, timeout);
                    assert_eq!(late.unwrap_err(), failure);
                }
            });
        }
    }
}
