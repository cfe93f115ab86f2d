//! The threads that run one method, each for as long as the method is measured, and how an
//! iteration is timed.
//!
//! Between orders they sleep, and a scheduler may wake two of them on one core and take some
//! milliseconds to see that another is free: they settle first. Then they meet at the start line
//! before every iteration: an iteration lasts from the moment the last has come and all are
//! released to the moment the last has finished.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::memory::cores;

/// What one member does in an iteration. It may say how long that took by a clock of its own, such
/// as a device's.
pub type Work = Box<dyn FnMut() -> Result<Option<Duration>, Failure>>;

/// What a member does first, on its thread, while the others do theirs.
pub type Make = Box<dyn FnOnce() -> Result<Work, Failure> + Send>;

/// The members of one method.
pub struct Crew {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Members and whoever gives orders: passed when an order is there, and when it was carried
    /// out.
    gate: Barrier,
    /// Iterations to do; `None`: go home.
    order: Mutex<Option<u32>>,
    line: StartLine,
    /// When each member finished each iteration.
    finishes: Vec<Mutex<Vec<Finish>>>,
    /// The first.
    failure: Mutex<Option<Failure>>,
}

/// How an iteration of one member ended.
struct Finish {
    at: Instant,
    /// By a clock of its own.
    took: Option<Duration>,
}

impl Crew {
    /// Starts a thread for each member.
    pub fn new(members: Vec<Make>) -> Result<Self, Failure> {
        let shared = Arc::new(Shared {
            gate: Barrier::new(members.len() + 1),
            order: Mutex::new(None),
            line: StartLine::new(members.len()),
            finishes: members.iter().map(|_| Mutex::new(vec![])).collect(),
            failure: Mutex::new(None),
        });
        let start = |(index, make): (usize, Make)| {
            let shared = shared.clone();
            let name = format!("member-{index}");
            std::thread::Builder::new().name(name).spawn(move || member(index, make, &shared))
        };
        // If one does not start, the others wait at the gate until the process ends, which is soon.
        let threads: Result<_, _> = members.into_iter().enumerate().map(start).collect();
        let threads = threads.map_err(|e| {
            Failure::Failed(format!("cannot start a thread for each rank: {e}; use fewer ranks"))
        })?;
        let crew = Crew { shared, threads };
        crew.shared.gate.wait();
        crew.failure().map_or(Ok(crew), Err)
    }

    /// Has the work done so many times and returns how long each took. While it lasts the arenas
    /// are the members'.
    pub fn run(&self, iterations: u32) -> Result<Vec<Duration>, Failure> {
        *lock(&self.shared.order) = Some(iterations);
        self.shared.gate.wait();
        self.shared.gate.wait();
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        let starts = std::mem::take(&mut *lock(&self.shared.line.starts));
        let finishes: Vec<_> =
            self.shared.finishes.iter().map(|each| std::mem::take(&mut *lock(each))).collect();
        let slowest = |(iteration, &start): (usize, &Instant)| {
            let time = |finish: &Finish| finish.took.unwrap_or(finish.at.duration_since(start));
            finishes.iter().map(|each| time(&each[iteration])).max()
        };
        Ok(starts.iter().enumerate().filter_map(slowest).collect())
    }

    fn failure(&self) -> Option<Failure> {
        lock(&self.shared.failure).take()
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        *lock(&self.shared.order) = None;
        self.shared.gate.wait();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn member(index: usize, make: Make, shared: &Shared) {
    // After a failure, which is the same for all members, this one comes to the gates and does
    // nothing else. What has failed or panicked is not used again.
    let mut work = attempt(shared, make);
    shared.gate.wait();
    loop {
        shared.gate.wait();
        let Some(iterations) = *lock(&shared.order) else { return };
        let mut finishes = Vec::with_capacity(iterations as usize);
        if shared.line.members as usize <= cores() {
            shared.line.settle(index == 0);
        }
        for _ in 0..iterations {
            shared.line.meet();
            let took = match &mut work {
                Some(run) => attempt(shared, run),
                None => Some(None),
            };
            finishes.push(Finish { at: Instant::now(), took: took.flatten() });
            if took.is_none() {
                work = None;
            }
        }
        *lock(&shared.finishes[index]) = finishes;
        shared.gate.wait();
    }
}

/// Does it and keeps what went wrong. A panic must not leave the others at a gate.
fn attempt<R>(shared: &Shared, work: impl FnOnce() -> Result<R, Failure>) -> Option<R> {
    let failure = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(result)) => return Some(result),
        Ok(Err(failure)) => failure,
        Err(_) => Failure::Failed("a rank panicked, see above".into()),
    };
    lock(&shared.failure).get_or_insert(failure);
    None
}

/// Where members wait for one another, awake: waking from a sleep takes longer than a small
/// average.
struct StartLine {
    members: u32,
    arrived: AtomicU32,
    /// Times that all were released.
    released: AtomicU32,
    /// When, where it counts.
    starts: Mutex<Vec<Instant>>,
    /// Each member has a core.
    settled: AtomicBool,
}

impl StartLine {
    fn new(members: usize) -> Self {
        StartLine {
            members: members as u32,
            arrived: AtomicU32::new(0),
            released: AtomicU32::new(0),
            starts: Mutex::new(vec![]),
            settled: AtomicBool::new(false),
        }
    }

    /// The start of an iteration. With more members than cores they give way to one another.
    fn meet(&self) {
        let start = || lock(&self.starts).push(Instant::now());
        self.pass(start, |spins| {
            if spins < 200 {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
        });
    }

    /// Meets until that is quick, which it is not where two members share a core: nobody gives way,
    /// so that the scheduler sees what is wrong. Not for long, since there may be no core free.
    fn settle(&self, first: bool) {
        let meet = || self.pass(|| (), |_| std::hint::spin_loop());
        let begin = Instant::now();
        loop {
            let round = Instant::now();
            (0..32).for_each(|_| meet());
            if first {
                let settled = round.elapsed() < Duration::from_millis(2)
                    || begin.elapsed() > Duration::from_millis(40);
                self.settled.store(settled, Ordering::Relaxed);
            }
            meet(); // and with it everybody sees the store
            if self.settled.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// Returns when all members are here. The last one runs `last` before it releases the others,
    /// who run `wait`.
    fn pass(&self, last: impl FnOnce(), wait: impl Fn(u32)) {
        let released = self.released.load(Ordering::Acquire);
        // Acquire and release: whoever comes last has seen what all others did before they came.
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.members {
            self.arrived.store(0, Ordering::Relaxed);
            last();
            self.released.store(released.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while self.released.load(Ordering::Acquire) == released {
            wait(spins);
            spins += 1;
        }
    }
}

// Nobody panics with a lock in hand.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn an_iteration_lasts_until_the_slowest_is_done() {
        let member = |index: u64| -> Make {
            Box::new(move || {
                Ok(Box::new(move || {
                    std::thread::sleep(Duration::from_millis(4 * index));
                    Ok(None)
                }))
            })
        };
        let crew = Crew::new((0..4).map(member).collect()).unwrap();
        for iterations in [1, 3] {
            let times = crew.run(iterations).unwrap();
            assert_eq!(times.len(), iterations as usize);
            assert!(times.iter().all(|time| *time >= Duration::from_millis(12)), "{times:?}");
        }
    }

    #[test]
    fn a_clock_of_the_members_own_counts_and_the_slowest_of_them() {
        let member = |index: u64| -> Make {
            Box::new(move || Ok(Box::new(move || Ok(Some(Duration::from_secs(index))))))
        };
        let crew = Crew::new((1..4).map(member).collect()).unwrap();
        assert_eq!(crew.run(2).unwrap(), [Duration::from_secs(3); 2]);
    }

    #[test]
    fn a_failure_ends_the_run_for_all_and_hangs_nobody() {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let member = |fails: bool| -> Make {
            Box::new(move || {
                Ok(Box::new(move || {
                    RUNS.fetch_add(1, Ordering::Relaxed);
                    if fails {
                        Err(param_averager::Error::AllWeightsZero.into())
                    } else {
                        Ok(None)
                    }
                }))
            })
        };
        let crew = Crew::new(vec![member(false), member(true)]).unwrap();
        assert!(matches!(
            crew.run(5),
            Err(Failure::Library(param_averager::Error::AllWeightsZero))
        ));
        assert_eq!(RUNS.load(Ordering::Relaxed), 6, "one that failed is not run again");
        let failing = || -> Make { Box::new(|| Err(param_averager::Error::AllWeightsZero.into())) };
        assert!(Crew::new(vec![failing(), failing()]).is_err());
    }
}
