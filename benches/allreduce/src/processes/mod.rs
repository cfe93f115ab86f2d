//! `--processes`: every rank is a process of its own, on CPUs. A launcher has started them, or this
//! program is its own launcher; ranks can't tell the difference. Rank 0 measures the same ring
//! between threads beside it, and prints.

mod launch;

use std::sync::OnceLock;
use std::time::Duration;

use param_averager::{Communicator, Device, ParamAverager, Reduction, Start};
use rustix::time::{clock_gettime, ClockId};

use crate::averager::{self, Host, Replica};
use crate::cli::{Args, Options};
use crate::crew::Work;
use crate::failure::Failure;
use crate::layout::Layout;
use crate::memory::{arena, cores, cpus, place};
use crate::plan::Group;
use crate::record::{Details, Record};
use crate::rows::Kind;
use crate::run::{Ranks, Replicas};
use crate::threads::{self, Threads};
use crate::verify::{Check, Found};

/// From the moment the last rank has come to the release, in ns: until then all have heard of it.
const RELEASE_LEAD: f64 = 500e3;
/// The same after a rest: the scheduler may have to see first that two ranks share a core and
/// another is free.
const SETTLING: f64 = 20e6;
/// Between two messages to ranks that wait for rank 0's threads.
const PIECE: Duration = Duration::from_millis(300);

/// Rows of a group.
const PROCESSES: usize = 0;

/// The least time to wait: others may be busy with what they don't share, such as a check. A rank
/// that is gone is seen at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// Nanoseconds of the clock that all processes of a host share.
fn now() -> f64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

fn duration(ns: f64) -> Duration {
    Duration::from_nanos(ns.max(0.0) as u64)
}

/// One rank. All do the same in the same order, and rank 0 measures its threads besides.
pub struct Processes {
    /// Averager by which ranks tell each other numbers.
    board: ParamAverager,
    options: Options,
    /// From the start of the first process to the end of the first average.
    start: Duration,
    /// Rank 0's threads. Their first replica is this rank's own.
    threads: Threads,
    group: Option<Entered>,
}

/// The present group.
struct Entered {
    replicas: Replicas,
    average: Work,
    extra: Option<u64>,
}

/// Starts a process for each rank and returns `None` when all have ended; or, in such a process or
/// one that a launcher started, joins the others. `args` has their number then.
pub fn start(args: &mut Args) -> Result<Option<Processes>, Failure> {
    let began = now();
    let ranks = args.what.ranks.first().copied();
    let began = launch::began().unwrap_or(began);
    if !Communicator::is_launched() {
        return launch::launch(ranks.unwrap_or(2).into(), began).map(|()| None);
    }
    let communicator = Communicator::from_env(Device::cpu())?;
    let world = communicator.world_size();
    if let Some(asked) = ranks.filter(|&asked| usize::from(asked) != world) {
        return Err(Failure::Usage(format!(
            "-g {asked}, but the launcher has started {world} ranks: leave -g out"
        )));
    }
    args.what.ranks = vec![world as u16];
    let timeout = args.options.timeout.map_or(10 * PATIENCE, |timeout| timeout.max(PATIENCE));
    let builder = ParamAverager::builder(communicator).start_from(Start::Own).timeout(timeout);
    let mut model = [vec![0.0f32]];
    let mut board = builder.channels(1).build(&mut model[..])?;
    board.average(&mut model[..])?;
    let (options, threads) = (args.options.clone(), Threads::new(&args.options));
    let mut ranks = Processes { board, options, start: Duration::ZERO, threads, group: None };
    let [first, began] = ranks.most([now(), -began])?;
    ranks.start = duration(first + began);
    Ok(Some(ranks))
}

impl Processes {
    fn rank(&self) -> usize {
        self.board.rank()
    }

    fn world(&self) -> usize {
        self.board.world_size()
    }

    /// The largest of all ranks' numbers. Also a barrier.
    fn most<const N: usize>(&mut self, mut numbers: [f64; N]) -> Result<[f64; N], Failure> {
        self.board.all_reduce_scalars(&mut numbers, Reduction::Max)?;
        Ok(numbers)
    }

    fn entered(&mut self) -> &mut Entered {
        self.group.as_mut().expect("enter was called")
    }

    /// Runs this rank's averages. An iteration lasts from the release, which all ranks agree on, to
    /// the end of the last.
    fn iterate(&mut self, iterations: u32) -> Result<Vec<Duration>, Failure> {
        let (mut times, mut start, mut end) = (vec![], 0.0, 0.0);
        let room = self.world() <= cores();
        let wait: fn() = if room { std::hint::spin_loop } else { std::thread::yield_now };
        for iteration in 0..=iterations {
            let [here, last, first] = self.most([now(), end, -start])?;
            if iteration > 0 {
                times.push(duration(last + first));
            }
            if iteration < iterations {
                let lead = if iteration == 0 && room { SETTLING } else { RELEASE_LEAD };
                start = now();
                while start < here + lead {
                    wait();
                    start = now();
                }
                (self.entered().average)()?;
                end = now();
            }
        }
        Ok(times)
    }

    /// Runs rank 0's threads, in pieces after each of which all ranks exchange a message: a rank
    /// that is lost meanwhile is seen soon.
    fn watch(&mut self, iterations: u32) -> Result<Vec<Duration>, Failure> {
        let (mut times, mut left, mut piece) = (vec![], iterations, 1);
        loop {
            if self.rank() == 0 {
                let new = self.threads.run(0, piece.min(left))?;
                left -= new.len() as u32;
                let each = new.iter().sum::<Duration>().as_secs_f64() / new.len() as f64;
                piece = (PIECE.as_secs_f64() / each.max(1e-9)).max(1.0) as u32;
                times.extend(new);
            }
            let rank_0s = if self.rank() == 0 { left } else { 0 };
            if self.most([rank_0s.into()])? == [0.0] {
                return Ok(times);
            }
        }
    }
}

impl Ranks for Processes {
    fn describe(&self, ranks: usize) -> String {
        threads::describe(&self.options, ranks)
    }

    fn preamble(&self) -> Vec<(String, bool)> {
        let (ranks, ms) = (self.world(), self.start.as_secs_f64() * 1e3);
        let start =
            format!("# start     {ranks} processes: {ms:.0} ms from start to first average");
        let (some, all) = (cores(), cpus().len());
        let bound = format!(
            "# bound     rank 0 may use {some} of {all} cores, and so its threads: xthr means \
             little; try mpirun --bind-to none"
        );
        let bound = (some < all.min(ranks)).then_some((bound, true));
        [(start, false)].into_iter().chain(bound).collect()
    }

    fn prints(&self) -> bool {
        self.rank() == 0
    }

    /// A replica for each process and for each thread but one, and what their rings need.
    fn memory(&self, group: &Group, layout: &Layout) -> u64 {
        let extra: u64 =
            group.rows.iter().map(|row| row.memory_overhead(layout, group.ranks)).sum();
        place(layout).1 as u64 * (2 * group.ranks as u64 - 1) + extra
    }

    fn enter(&mut self, group: &Group) -> Result<(), Failure> {
        let (tensors, bytes) = place(&group.layout);
        let arena = if self.rank() == 0 {
            let rows = group.rows[PROCESSES + 1..].to_vec();
            self.threads.enter(&Group { rows, ..group.clone() })?;
            self.threads.replicas(0).arenas[0].clone()
        } else {
            arena(bytes)
        };
        let Kind::Average { algorithm, commit, .. } = group.rows[PROCESSES].kind else {
            unreachable!("--processes has rows of the library's only")
        };
        let replica = Replica::on_host(&arena, &tensors);
        let before = resident::now();
        let builder = self.options.builder(self.board.communicator().clone(), algorithm, commit);
        let weight = self.options.weight(self.rank());
        let ran = OnceLock::new();
        let mut average = averager::average(Host, builder, None, replica, weight, &ran)?;
        average()?;
        // The most of any rank; none if a rank can't tell.
        let extra = before.and_then(|before| Some(resident::most()?.saturating_sub(before)));
        let [extra] = self.most([extra.map_or(f64::INFINITY, |extra| extra as f64)])?;
        let extra = extra.is_finite().then_some(extra as u64);
        let replicas = Replicas { first: self.rank(), arenas: vec![arena], tensors };
        self.group = Some(Entered { replicas, average, extra });
        Ok(())
    }

    fn leave(&mut self) {
        self.threads.leave();
        self.group = None;
    }

    fn replicas(&self, row: usize) -> Replicas {
        let own = self.group.as_ref().expect("enter was called").replicas.clone();
        match (row, self.rank()) {
            (PROCESSES, _) => own,
            (_, 0) => self.threads.replicas(0),
            _ => Replicas { arenas: vec![], ..own },
        }
    }

    fn run(&mut self, row: usize, iterations: u32) -> Result<Vec<Duration>, Failure> {
        if row == PROCESSES {
            self.iterate(iterations)
        } else {
            self.watch(iterations)
        }
    }

    /// Every rank compares its own elements with the mean, and all compare their digests.
    fn agree(&mut self, row: usize, check: &Check, found: Found) -> Result<Found, Failure> {
        if row != PROCESSES {
            return Ok(found);
        }
        // SAFETY: no rank averages.
        let digest = unsafe { check.digest() } as f64;
        let [most, least] = self.most([digest, -digest])?;
        let mut wrong = [found.wrong as f64];
        self.board.all_reduce_scalars(&mut wrong, Reduction::Sum)?;
        Ok(Found { wrong: (wrong[0] as u64).max(u64::from(most != -least)), ..found })
    }

    fn complete(&mut self, row: usize, _found: Option<Found>, record: &mut Record) {
        let (start, extra) = (self.start, self.entered().extra.filter(|_| row == PROCESSES));
        record.details = Details::Processes { start, extra };
    }

    fn confirm(&mut self, failed: Option<&Failure>) -> Result<(), Failure> {
        let code = failed.map_or(0.0, |failure| 1.0 + f64::from(failure.exit_code()));
        match self.most([code])? {
            [code] if code > 0.0 && failed.is_none() => Err(Failure::Silent((code - 1.0) as u8)),
            _ => Ok(()),
        }
    }
}

/// Memory of this process. No crate resets the high-water mark.
mod resident {
    /// Bytes now; `most` is of the time from here on.
    pub fn now() -> Option<u64> {
        std::fs::write("/proc/self/clear_refs", "5").ok()?; // resets VmHWM
        field("VmRSS:")
    }

    pub fn most() -> Option<u64> {
        field("VmHWM:")
    }

    fn field(name: &str) -> Option<u64> {
        let text = std::fs::read_to_string("/proc/self/status").ok()?;
        let value = text.lines().find_map(|line| line.strip_prefix(name))?;
        Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    }
}
