//! The threads that run one row, each for as long as the row is measured, and how an iteration is
//! timed.
//!
//! Between orders they sleep, and a scheduler may wake two of them on one core and take some
//! milliseconds to see that another is free: they settle first. Then they meet at the start line
//! before every iteration: it lasts from the moment all have come and are released, when the first
//! of them begins, to the moment the last has finished.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::memory::cores;

/// Work of one member in an iteration. It returns how long that took if it has a clock of its
/// own, such as a device's.
pub type Work = Box<dyn FnMut() -> Result<Option<Duration>, Failure>>;

/// First work of a member, on its own thread, beside that of the others.
pub type Make = Box<dyn FnOnce() -> Result<Work, Failure> + Send>;

/// An iteration of one member: its start, its end, and how long it took by a clock of its own.
type Lap = (Instant, Instant, Option<Duration>);

/// The members of one row.
pub struct Crew {
    /// Iterations to do, one sender for each member.
    orders: Vec<Sender<u32>>,
    /// One answer for each member and order, and one when it is ready.
    done: Receiver<Result<Vec<Lap>, Failure>>,
    limit: Duration,
}

impl Crew {
    /// Starts a thread for each member and waits until all are ready. `limit`: how long that, a run
    /// (a second for each iteration aside) and the end may take. Whatever is late is left behind.
    pub fn new(members: Vec<Make>, limit: Duration) -> Result<Self, Failure> {
        let line = Arc::new(StartLine { members: members.len() as u32, ..Default::default() });
        let (answer, done) = channel();
        let mut crew = Crew { orders: vec![], done, limit };
        for (index, make) in members.into_iter().enumerate() {
            let (order, orders) = channel();
            let (line, answer) = (line.clone(), answer.clone());
            let thread = std::thread::Builder::new().name(format!("member-{index}"));
            let thread = thread.spawn(move || member(index, make, &line, &orders, &answer));
            thread.map_err(|e| {
                let text = format!("cannot start a thread for each rank: {e}; use fewer ranks");
                Failure::Failed(text)
            })?;
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
        let each = Duration::from_secs(1) * iterations;
        let laps = self.answers(self.limit.saturating_add(each))?;
        let slowest = |iteration: usize| {
            let start = laps.iter().map(|member| member[iteration].0).min()?;
            let time = |&(_, end, took): &Lap| took.unwrap_or(end.duration_since(start));
            laps.iter().map(|member| time(&member[iteration])).max()
        };
        Ok((0..iterations as usize).filter_map(slowest).collect())
    }

    /// One answer of each member, or the first failure.
    fn answers(&mut self, limit: Duration) -> Result<Vec<Vec<Lap>>, Failure> {
        let (begin, mut answers) = (Instant::now(), vec![]);
        for _ in &self.orders {
            let answer = self.done.recv_timeout(limit.saturating_sub(begin.elapsed()));
            answers.push(answer.map_err(|error| match error {
                RecvTimeoutError::Disconnected => Failure::Failed("a rank's thread ended".into()),
                RecvTimeoutError::Timeout => Failure::Late(std::mem::take(&mut self.limit)),
            })?);
        }
        answers.into_iter().collect()
    }
}

impl Drop for Crew {
    /// Ends the threads. One that does not return in time, from a library's call, is left behind.
    fn drop(&mut self) {
        self.orders.clear();
        // Until all senders are gone, and so all threads' work.
        let begin = Instant::now();
        while self.done.recv_timeout(self.limit.saturating_sub(begin.elapsed())).is_ok() {}
    }
}

fn member(
    index: usize,
    make: Make,
    line: &StartLine,
    orders: &Receiver<u32>,
    answer: &Sender<Result<Vec<Lap>, Failure>>,
) {
    // After a failure this member meets the others and does nothing else: what has failed or
    // panicked is not used again.
    let (mut work, made) = match attempt(make) {
        Ok(work) => (Some(work), Ok(vec![])),
        Err(failure) => (None, Err(failure)),
    };
    let _ = answer.send(made); // a crew that was dropped needs no answer
    for iterations in orders {
        let (mut laps, mut failed) = (Vec::with_capacity(iterations as usize), None);
        if line.members as usize <= cores() {
            line.settle(index == 0);
        }
        for _ in 0..iterations {
            line.meet(true);
            let start = Instant::now();
            let took = work.as_mut().map_or(Ok(None), attempt);
            laps.push((start, Instant::now(), *took.as_ref().unwrap_or(&None)));
            if let Err(failure) = took {
                (work, failed) = (None, Some(failure));
            }
        }
        let _ = answer.send(failed.map_or(Ok(laps), Err));
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
    /// Each member has a core.
    settled: AtomicBool,
}

impl StartLine {
    /// Returns when all members are here. Those that give way do so after a while, as they have to
    /// where there are more members than cores.
    fn meet(&self, gives_way: bool) {
        let released = self.released.load(Ordering::Acquire);
        // Acquire and release: the last one has seen what all others did before they came.
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.members {
            self.arrived.store(0, Ordering::Relaxed);
            self.released.store(released.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0u32;
        while self.released.load(Ordering::Acquire) == released {
            match spins {
                200.. if gives_way => std::thread::yield_now(),
                _ => std::hint::spin_loop(),
            }
            spins = spins.saturating_add(1);
        }
    }

    /// Meets until that is quick, which it is not where two members share a core: no member gives
    /// way, so that the scheduler sees it. Not for long, since there may be no core free.
    fn settle(&self, first: bool) {
        let begin = Instant::now();
        loop {
            let round = Instant::now();
            (0..32).for_each(|_| self.meet(false));
            if first {
                let settled = round.elapsed() < Duration::from_millis(2)
                    || begin.elapsed() > Duration::from_millis(40);
                self.settled.store(settled, Ordering::Relaxed);
            }
            self.meet(false); // after it all members see the store
            if self.settled.load(Ordering::Relaxed) {
                return;
            }
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
        Crew::new(members.map(member).collect(), Duration::MAX).unwrap()
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
            Crew::new(vec![failing(), failing()], Duration::MAX),
            Err(Failure::Library(param_averager::Error::AllWeightsZero))
        ));
    }

    #[test]
    fn a_member_that_does_not_come_back_is_left_behind() {
        let limit = Duration::from_millis(20);
        let hang = || std::thread::sleep(Duration::from_secs(3600));
        let ready: Make = Box::new(|| Ok(Box::new(|| Ok(None))));
        let late: Make = Box::new(move || {
            hang();
            Ok(Box::new(|| Ok(None)))
        });
        assert!(matches!(Crew::new(vec![ready, late], limit), Err(Failure::Late(_))));
        let late: Make = Box::new(move || {
            Ok(Box::new(move || {
                hang();
                Ok(None)
            }))
        });
        let mut crew = Crew::new(vec![late], limit).unwrap();
        assert!(matches!(crew.run(1), Err(Failure::Late(_))));
    }
}
