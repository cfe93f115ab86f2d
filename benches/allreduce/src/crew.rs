//! The threads that run one row, each for as long as the row is measured, and how an iteration is
//! timed.
//!
//! Between orders they sleep, and a scheduler may wake two of them on one core and take some
//! milliseconds to see that another is free: they settle first. Then they meet at the start line
//! before every iteration: an iteration lasts from the moment the last has come and all are
//! released to the moment the last has finished.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::memory::cores;

/// Work of one member in an iteration. It returns how long that took if it has a clock of its
/// own, such as a device's.
pub type Work = Box<dyn FnMut() -> Result<Option<Duration>, Failure>>;

/// First work of a member, on its own thread, beside that of the others.
pub type Make = Box<dyn FnOnce() -> Result<Work, Failure> + Send>;

/// End of an iteration of one member, and how long it took by a clock of its own.
type Finish = (Instant, Option<Duration>);

/// For the ends of a row's threads.
const PATIENCE: Duration = Duration::from_secs(60);

/// The members of one row.
pub struct Crew {
    /// Iterations to do, one sender for each member.
    orders: Vec<Sender<u32>>,
    /// One answer for each member and order, and one when it is ready.
    done: Receiver<Result<Vec<Finish>, Failure>>,
    line: Arc<StartLine>,
    threads: Vec<JoinHandle<()>>,
    limit: Option<Duration>,
}

impl Crew {
    /// Starts a thread for each member and waits until all are ready. `limit`: how long that may
    /// take, and half of a run (a second for each iteration aside); then it is `Failure::Late`, and
    /// threads are left behind, which may never return.
    pub fn new(members: Vec<Make>, limit: Option<Duration>) -> Result<Self, Failure> {
        let line = Arc::new(StartLine { members: members.len() as u32, ..Default::default() });
        let (answer, done) = channel();
        let mut crew = Crew { orders: vec![], done, line, threads: vec![], limit };
        for (index, make) in members.into_iter().enumerate() {
            let (order, orders) = channel();
            let (line, answer) = (crew.line.clone(), answer.clone());
            let thread = std::thread::Builder::new().name(format!("member-{index}"));
            let thread = thread.spawn(move || member(index, make, &line, &orders, &answer));
            crew.threads.push(thread.map_err(|e| {
                let text = format!("cannot start a thread for each rank: {e}; use fewer ranks");
                Failure::Failed(text)
            })?);
            crew.orders.push(order);
        }
        drop(answer); // only the members have senders now
        crew.answers(limit)?;
        Ok(crew)
    }

    /// Runs the work so many times and returns how long each took. Meanwhile the members use the
    /// ranks' memory.
    pub fn run(&mut self, iterations: u32) -> Result<Vec<Duration>, Failure> {
        for order in &self.orders {
            let _ = order.send(iterations); // a thread that is gone is missed below
        }
        let limit = self.limit.map(|limit| 2 * limit + Duration::from_secs(1) * iterations);
        let finishes = self.answers(limit)?;
        let starts = std::mem::take(&mut *self.line.starts());
        let slowest = |(iteration, &start): (usize, &Instant)| {
            let time = |&(end, took): &Finish| took.unwrap_or(end.duration_since(start));
            finishes.iter().map(|each| time(&each[iteration])).max()
        };
        Ok(starts.iter().enumerate().filter_map(slowest).collect())
    }

    /// One answer of each member, or the first failure.
    fn answers(&mut self, limit: Option<Duration>) -> Result<Vec<Vec<Finish>>, Failure> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        let mut answers = vec![];
        for _ in &self.orders {
            let answer = match deadline {
                None => self.done.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => self.done.recv_timeout(left(deadline)),
            };
            answers.push(answer.map_err(|error| match error {
                RecvTimeoutError::Disconnected => Failure::Failed("a rank's thread ended".into()),
                RecvTimeoutError::Timeout => {
                    self.threads.clear();
                    Failure::Late
                }
            })?);
        }
        answers.into_iter().collect()
    }
}

impl Drop for Crew {
    /// Ends the threads. One that does not return in time, from a library's call, is left behind.
    fn drop(&mut self) {
        self.orders.clear();
        if self.threads.is_empty() {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        let left = || deadline.saturating_duration_since(Instant::now());
        // Until all senders are gone, and so all threads' work.
        while self.done.recv_timeout(left()).is_ok() {}
        if left().is_zero() {
            return;
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn member(
    index: usize,
    make: Make,
    line: &StartLine,
    orders: &Receiver<u32>,
    answer: &Sender<Result<Vec<Finish>, Failure>>,
) {
    // After a failure this member meets the others and does nothing else: what has failed or
    // panicked is not used again.
    let (mut work, made) = match attempt(make) {
        Ok(work) => (Some(work), Ok(vec![])),
        Err(failure) => (None, Err(failure)),
    };
    let _ = answer.send(made); // a crew that was dropped needs no answer
    for iterations in orders {
        let (mut finishes, mut failed) = (Vec::with_capacity(iterations as usize), None);
        if line.members as usize <= cores() {
            line.settle(index == 0);
        }
        for _ in 0..iterations {
            line.meet();
            let took = work.as_mut().map_or(Ok(None), attempt);
            finishes.push((Instant::now(), *took.as_ref().unwrap_or(&None)));
            if let Err(failure) = took {
                (work, failed) = (None, Some(failure));
            }
        }
        let _ = answer.send(failed.map_or(Ok(finishes), Err));
    }
}

/// Turns a panic, which must not leave the others at the start line, into a failure.
fn attempt<R>(work: impl FnOnce() -> Result<R, Failure>) -> Result<R, Failure> {
    let panicked = |_| Err(Failure::Failed("a rank panicked, see above".into()));
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(panicked)
}

/// Where members wait for one another, awake: waking from a sleep takes longer than a small
/// average.
#[derive(Default)]
struct StartLine {
    members: u32,
    arrived: AtomicU32,
    /// Times that all were released.
    released: AtomicU32,
    /// Moments of release, of the iterations of one order.
    starts: Mutex<Vec<Instant>>,
    /// Each member has a core.
    settled: AtomicBool,
}

impl StartLine {
    fn starts(&self) -> std::sync::MutexGuard<'_, Vec<Instant>> {
        // No thread panics with it.
        self.starts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The start of an iteration. With more members than cores they give way to one another.
    fn meet(&self) {
        let start = || self.starts().push(Instant::now());
        self.pass(start, |spins| match spins {
            0..200 => std::hint::spin_loop(),
            _ => std::thread::yield_now(),
        });
    }

    /// Meets until that is quick, which it is not where two members share a core: no member gives
    /// way, so that the scheduler sees it. Not for long, since there may be no core free.
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
            meet(); // after it all members see the store
            if self.settled.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// Returns when all members are here. The last one runs `last` before it releases the others,
    /// which run `wait` meanwhile.
    fn pass(&self, last: impl FnOnce(), wait: impl Fn(u32)) {
        let released = self.released.load(Ordering::Acquire);
        // Acquire and release: the last one has seen what all others did before they came.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn crew(
        members: std::ops::Range<u64>,
        work: fn(u64) -> Result<Option<Duration>, Failure>,
    ) -> Crew {
        let member = |index| -> Make { Box::new(move || Ok(Box::new(move || work(index)))) };
        Crew::new(members.map(member).collect(), None).unwrap()
    }

    #[test]
    fn an_iteration_lasts_until_the_slowest_is_done() {
        let mut crew = crew(0..4, |index| {
            std::thread::sleep(Duration::from_millis(4 * index));
            Ok(None)
        });
        for iterations in [1, 3] {
            let times = crew.run(iterations).unwrap();
            assert_eq!(times.len(), iterations as usize);
            assert!(times.iter().all(|time| *time >= Duration::from_millis(12)), "{times:?}");
        }
    }

    #[test]
    fn a_clock_of_the_members_own_counts_and_the_slowest_of_them() {
        let mut crew = crew(1..4, |index| Ok(Some(Duration::from_secs(index))));
        assert_eq!(crew.run(2).unwrap(), [Duration::from_secs(3); 2]);
    }

    #[test]
    fn a_failure_ends_the_run_for_all_and_hangs_nobody() {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let failure = || Failure::from(param_averager::Error::AllWeightsZero);
        let mut crew = crew(0..2, |index| {
            RUNS.fetch_add(1, Ordering::Relaxed);
            if index == 1 {
                panic!("on purpose");
            }
            Ok(None)
        });
        assert!(crew.run(5).unwrap_err().to_string().contains("panicked"));
        assert_eq!(RUNS.load(Ordering::Relaxed), 6, "what has failed is not run again");
        let failing = || -> Make { Box::new(move || Err(failure())) };
        assert!(matches!(
            Crew::new(vec![failing(), failing()], None),
            Err(Failure::Library(param_averager::Error::AllWeightsZero))
        ));
    }

    #[test]
    fn a_member_that_does_not_come_back_is_left_behind() {
        let limit = Some(Duration::from_millis(20));
        let hang = || std::thread::sleep(Duration::from_secs(3600));
        let ready: Make = Box::new(|| Ok(Box::new(|| Ok(None))));
        let late: Make = Box::new(move || {
            hang();
            Ok(Box::new(|| Ok(None)))
        });
        assert!(matches!(Crew::new(vec![ready, late], limit), Err(Failure::Late)));
        let late: Make = Box::new(move || {
            Ok(Box::new(move || {
                hang();
                Ok(None)
            }))
        });
        let mut crew = Crew::new(vec![late], Some(Duration::from_secs(1))).unwrap();
        assert!(matches!(crew.run(1), Err(Failure::Late)));
    }
}
