//! One rank: all do the same in the same order, and rank 0 besides measures threads and prints.

use std::sync::Arc;
use std::time::Duration;

use param_averager::{Algorithm, Communicator, ParamAverager};

use super::exchange::Exchange;
use super::now;
use super::print::{record, Printer};
use crate::bench::{self, TURNS};
use crate::cli::Args;
use crate::crew::Crew;
use crate::failure::Failure;
use crate::memory::{self, cores, place, Arena, Placed, Pool, Replica};
use crate::methods::{Method, Options};
use crate::plan::{self, Group};
use crate::records::{Apart, Record};
use crate::reference::{Check, Wire};

/// From when all ranks have come to their release, in ns: until then all have heard of it.
const NOTICE: u64 = 100_000;

/// The same after a rest: the scheduler may have to see first that two ranks share a core and
/// another is free.
const SETTLING: u64 = 20_000_000;

/// Between two looks at the others.
const PIECE: Duration = Duration::from_millis(300);

/// `began`: when this process did, or its launcher, by `now`.
pub fn run(args: &Args, communicator: Communicator, began: u64) -> Result<u64, Failure> {
    let (options, sections) = (plan::options(args), plan::plan(args)?);
    let mut world = World::new(args, options, communicator)?;
    let began = world.exchange.tell([began, 0, 0, 0])?;
    let first = world.exchange.tell([now(), 0, 0, 0])?;
    let [began, first] = [began, first].map(|told| told.into_iter().map(|[at, ..]| at));
    let start =
        Duration::from_nanos(first.max().unwrap_or(0).saturating_sub(began.min().unwrap_or(0)));

    let printer =
        (world.rank == 0).then(|| Printer::new(args, &options, &sections, start)).transpose();
    let mut printer = world.unless_failed(printer)?;
    for section in &sections {
        for (index, group) in section.groups.iter().enumerate() {
            let records = world.measure(group, start)?;
            let printed = match &mut printer {
                Some(printer) => {
                    printer.print(section, index, &bench::who(&options, world.ranks), records)
                }
                None => Ok(()),
            };
            world.unless_failed(printed)?;
        }
    }
    printer.map_or(Ok(0), Printer::end)
}

/// As this rank sees it.
struct World {
    communicator: Communicator,
    exchange: Exchange,
    rank: usize,
    ranks: usize,
    options: Options,
    check: bool,
    sabotage: bool,
    pool: Pool,
    /// Of the next data.
    seed: u64,
}

impl World {
    fn new(args: &Args, options: Options, communicator: Communicator) -> Result<Self, Failure> {
        Ok(World {
            rank: communicator.rank(),
            ranks: communicator.world_size(),
            exchange: Exchange::new(communicator.clone(), args.timeout)?,
            communicator,
            options,
            check: args.check == 1,
            sabotage: args.sabotage,
            pool: Pool::default(),
            seed: 0,
        })
    }

    /// What failed on one rank alone ends all. Collective.
    fn unless_failed<T>(&mut self, result: Result<T, Failure>) -> Result<T, Failure> {
        let code = result.as_ref().err().map_or(0, |failure| 1 + u64::from(failure.exit_code()));
        let told = self.exchange.tell([code, 0, 0, 0])?;
        let result = result?;
        match told.iter().find(|told| told[0] != 0) {
            Some(told) => Err(Failure::Told((told[0] - 1) as u8)),
            None => Ok(result),
        }
    }

    /// Two records for each method, on rank 0.
    fn measure(&mut self, group: &Group, start: Duration) -> Result<Vec<Record>, Failure> {
        let Group { layout, ranks, methods, iterations, warmup } = group;
        let (placed, bytes) = place(layout);
        // Rank 0's threads need replicas, too. One is its own: it does one thing at a time.
        let arenas = self.pool.get(if self.rank == 0 { *ranks } else { 1 }, bytes);
        let replica = Replica { arena: arenas[0].clone(), tensors: placed.clone() };
        self.data(&placed, &arenas);
        let mut rings = vec![];
        for &method in methods {
            let (averager, extra) = self.averager_and_extra(method, &replica)?;
            let crew =
                (self.rank == 0).then(|| method.crew(self.options, layout, &placed, &arenas, &[]));
            rings.push((method, averager, extra, crew.transpose()?, vec![], vec![]));
        }
        for turn in 0..TURNS {
            let (before, share) = bench::turn(turn, *iterations, *warmup);
            for (_, averager, _, crew, by_threads, by_processes) in
                rings.iter_mut().filter(|_| share > 0)
            {
                let times = self.watch(crew.as_ref(), before + share)?;
                by_threads.extend(times.into_iter().skip(before as usize));
                let times = self.iterate(averager, &replica, before + share)?;
                by_processes.extend_from_slice(&times[before as usize..]);
            }
        }
        let mut records = vec![];
        for (method, mut averager, extra, crew, by_threads, by_processes) in rings {
            let wrong = [
                self.check_processes(&mut averager, &replica)?,
                crew.map_or(Ok(None), |crew| self.check_threads(&crew, &placed, &arenas))?,
            ];
            let apart = Apart { processes: false, threads: None, start, extra: None };
            let threads = record(layout, *ranks, method, by_threads, wrong[1], apart);
            let apart = Apart { processes: true, threads: threads.time(), start, extra };
            records
                .extend([record(layout, *ranks, method, by_processes, wrong[0], apart), threads]);
        }
        Ok(records)
    }

    /// What rank 0's threads take, in pieces after each of which all ranks meet: none is lost for
    /// long without the others' seeing it.
    fn watch(&mut self, crew: Option<&Crew>, iterations: u32) -> Result<Vec<Duration>, Failure> {
        let (mut times, mut left, mut piece) = (vec![], iterations, 1);
        loop {
            if let Some(crew) = crew {
                let new = crew.run(piece.min(left))?;
                left -= new.len() as u32;
                let each = new.iter().sum::<Duration>().as_secs_f64() / new.len() as f64;
                piece = (PIECE.as_secs_f64() / each.max(1e-9)).max(1.0) as u32;
                times.extend(new);
            }
            if self.exchange.tell([left.into(), 0, 0, 0])?[0][0] == 0 {
                return Ok(times);
            }
        }
    }

    fn averager(&self, method: Method, replica: &Replica) -> Result<ParamAverager, Failure> {
        let commit = method == Method::RING;
        let builder = self.options.builder(self.communicator.clone(), Algorithm::Ring, commit);
        Ok(builder.build(&mut replica.clone())?)
    }

    /// And what it and its first average add to the memory of the rank that took most, in bytes;
    /// `None` if a rank can't tell.
    fn averager_and_extra(
        &mut self,
        method: Method,
        replica: &Replica,
    ) -> Result<(ParamAverager, Option<u64>), Failure> {
        let before = memory::resident_afresh();
        let mut averager = self.averager(method, replica)?;
        self.average(&mut averager, replica)?;
        let extra = before.and_then(|before| Some(memory::most_resident()?.saturating_sub(before)));
        let told = self.exchange.tell([extra.map_or(0, |extra| extra + 1), 0, 0, 0])?;
        let known = told.iter().all(|told| told[0] > 0);
        Ok((averager, told.iter().map(|told| told[0].saturating_sub(1)).max().filter(|_| known)))
    }

    fn average(&self, averager: &mut ParamAverager, replica: &Replica) -> Result<(), Failure> {
        let mut replica = replica.clone();
        match self.options.weighted {
            true => averager.average_weighted(&mut replica, self.rank as f64 + 1.0)?,
            false => averager.average(&mut replica)?,
        };
        Ok(())
    }

    /// Averages so many times, and how long each took: from the release, which all ranks agree on,
    /// to the end of the last.
    fn iterate(
        &mut self,
        averager: &mut ParamAverager,
        replica: &Replica,
        iterations: u32,
    ) -> Result<Vec<Duration>, Failure> {
        let (mut times, mut start, mut end) = (vec![], 0, 0);
        let room = self.ranks <= cores();
        let wait: fn() = if room { std::hint::spin_loop } else { std::thread::yield_now };
        for iteration in 0..=iterations {
            let told = self.exchange.tell([now(), start, end, 0])?;
            let all = |field: usize| told.iter().map(move |told| told[field]);
            if iteration > 0 {
                let (first, last) = (all(1).min().unwrap_or(0), all(2).max().unwrap_or(0));
                times.push(Duration::from_nanos(last.saturating_sub(first)));
            }
            if iteration < iterations {
                let notice = if iteration == 0 && room { SETTLING } else { NOTICE };
                let release = all(0).max().unwrap_or(0) + notice;
                start = now();
                while start < release {
                    wait();
                    start = now();
                }
                self.average(averager, replica)?;
                end = now();
            }
        }
        Ok(times)
    }

    /// Gives these replicas fresh data: this rank's own, or on rank 0 all of its threads'.
    fn data(&mut self, placed: &Arc<[Placed]>, arenas: &[Arc<Arena>]) -> Check {
        let weighted = self.options.weighted;
        let check = Check {
            seed: self.seed,
            arenas: arenas.to_vec(),
            first: self.rank,
            tensors: placed.clone(),
            weights: (0..self.ranks)
                .map(|rank| if weighted { rank as f64 + 1.0 } else { 1.0 })
                .collect(),
            more_roundings: if weighted { 3 } else { 0 },
            wire: if self.options.narrow_wire { Wire::Narrow } else { Wire::Wide },
        };
        // SAFETY: nobody averages.
        unsafe { check.fill() };
        check
    }

    /// Every rank holds its own elements against the mean, and all compare their digests.
    fn check_processes(
        &mut self,
        averager: &mut ParamAverager,
        replica: &Replica,
    ) -> Result<Option<u64>, Failure> {
        if !self.check {
            return Ok(None);
        }
        self.seed += 1;
        let arenas = std::slice::from_ref(&replica.arena);
        let check = self.data(&replica.tensors, arenas);
        self.average(averager, replica)?;
        if self.sabotage && self.rank + 1 == self.ranks {
            bench::sabotage(arenas);
        }
        // SAFETY: nobody averages.
        let (wrong, digest) = unsafe { (check.found().wrong, check.digest()) };
        let told = self.exchange.tell([wrong, digest, 0, 0])?;
        Ok(Some(told.iter().map(|rank| rank[0].max(u64::from(rank[1] != told[0][1]))).sum()))
    }

    fn check_threads(
        &mut self,
        crew: &Crew,
        placed: &Arc<[Placed]>,
        arenas: &[Arc<Arena>],
    ) -> Result<Option<u64>, Failure> {
        if !self.check {
            return Ok(None);
        }
        let check = self.data(placed, arenas);
        crew.run(1)?;
        if self.sabotage {
            bench::sabotage(arenas);
        }
        // SAFETY: the crew rests.
        Ok(Some(unsafe { check.found() }.wrong))
    }
}
