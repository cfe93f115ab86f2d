//! The measuring loop: the rows of a group turn by turn, so that all meet the machine in the same
//! states, then a check of each. And what it asks of ranks, whatever these are.

use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;

use crate::cli::{Args, Options};
use crate::failure::Failure;
use crate::layout::Layout;
use crate::memory::{available, gib, Arena, Placed};
use crate::plan::{Group, Section};
use crate::record::{Details, Record};
use crate::rows::Row;
use crate::verify::{Check, Found};

/// The iterations of a row are made in so many turns.
const TURNS: u32 = 3;

/// Ranks that average: threads, processes, or threads with CUDA devices. Of ranks that are
/// processes, all call the same methods in the same order.
pub trait Ranks {
    /// Description of the ranks and their machine, for the table.
    fn describe(&self, ranks: usize) -> String;

    /// Lines of the table's preamble, and whether they are warnings.
    fn preamble(&self) -> Vec<(String, bool)> {
        vec![]
    }

    /// True if this process prints.
    fn prints(&self) -> bool {
        true
    }

    /// Bytes of the host's memory that the group takes with this layout.
    fn memory(&self, group: &Group, layout: &Layout) -> u64;

    /// Prepares every row of the group.
    fn enter(&mut self, group: &Group) -> Result<(), Failure>;

    /// Frees what `enter` prepared.
    fn leave(&mut self) {}

    /// Host memory of the replicas of a row that this process has.
    fn replicas(&self, row: usize) -> Replicas;

    /// Moves the replicas from host memory to where they are averaged.
    fn upload(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    /// … and back.
    fn download(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    /// Runs a row so many times and returns how long each took. Nothing: it can't be measured.
    fn run(&mut self, row: usize, iterations: u32) -> Result<Vec<Duration>, Failure>;

    /// Puts together what all processes found.
    fn agree(&mut self, _row: usize, _check: &Check, found: Found) -> Result<Found, Failure> {
        Ok(found)
    }

    /// Adds what these ranks know to a row's record.
    fn complete(&mut self, _row: usize, _found: Option<Found>, _record: &mut Record) {}

    /// Tells all processes whether this one failed. An error where another did.
    fn confirm(&mut self, _failed: Option<&Failure>) -> Result<(), Failure> {
        Ok(())
    }
}

/// Host memory of the ranks from `first` on.
#[derive(Clone)]
pub struct Replicas {
    pub first: usize,
    pub arenas: Vec<Arc<Arena>>,
    pub tensors: Arc<[Placed]>,
}

pub struct Bench {
    options: Options,
    check: bool,
    /// Every checked result gets a wrong element.
    corrupt: bool,
    progress: ProgressBar,
    /// Seed of the next data.
    seed: u64,
}

impl Bench {
    pub fn new(args: &Args, progress: ProgressBar) -> Self {
        let (check, corrupt) = (args.measuring.check == 1, args.corrupt);
        Bench { options: args.options.clone(), check, corrupt, progress, seed: 0 }
    }

    /// Steps of the progress bar.
    pub fn steps(sections: &[Section]) -> u64 {
        let groups = sections.iter().flat_map(|section| &section.groups);
        groups.map(|group| group.rows.len() as u64 * u64::from(TURNS + 1)).sum()
    }

    /// A record for each row.
    pub fn measure(
        &mut self,
        ranks: &mut dyn Ranks,
        group: &Group,
    ) -> Result<Vec<Record>, Failure> {
        ranks.enter(group)?;
        // The bytes there may be of another dtype, and NaNs and subnormals are slow on some
        // machines. Where dtypes are mixed, a flat buffer has them in other places.
        self.fill(ranks, group, 0)?;
        let mixed = group.layout.dtype().is_none();
        let mut records: Vec<Record> = group.rows.iter().map(|&row| record(group, row)).collect();
        for turn in 0..TURNS {
            let before = if turn == 0 { group.warmup } else { group.warmup / 4 };
            let share = (group.iterations + TURNS - 1 - turn) / TURNS;
            for (row, record) in records.iter_mut().enumerate() {
                self.show(group, row, "");
                if share > 0 {
                    if mixed {
                        self.fill(ranks, group, row)?;
                    }
                    let new = ranks.run(row, before + share)?;
                    record.times.extend(new.into_iter().skip(before as usize));
                }
            }
        }
        for (row, record) in records.iter_mut().enumerate() {
            self.show(group, row, "checking ");
            let check = self.check && !record.row.is_copy();
            let found = if check { self.check(ranks, group, row)? } else { None };
            record.times.sort();
            record.wrong = found.map(|found| found.wrong);
            ranks.complete(row, found, record);
        }
        ranks.leave();
        let yardstick = records.iter().find(|record| record.row.is_yardstick());
        let yardstick = yardstick.and_then(Record::time);
        records.iter_mut().for_each(|record| record.yardstick = yardstick);
        Ok(records)
    }

    /// Writes fresh data to all replicas of a row.
    fn fill(&mut self, ranks: &mut dyn Ranks, group: &Group, row: usize) -> Result<Check, Failure> {
        self.seed += 1;
        let (Replicas { first, arenas, tensors }, of) = (ranks.replicas(row), group.rows[row]);
        let weight = |rank| self.options.weight(rank).filter(|_| of.is_weighted()).unwrap_or(1.0);
        let check = Check {
            seed: self.seed,
            arenas,
            first,
            tensors,
            weights: (0..group.ranks).map(weight).collect(),
            roundings: of.roundings(&self.options),
        };
        // SAFETY: no rank averages between two runs.
        unsafe { check.fill() };
        ranks.upload()?;
        Ok(check)
    }

    /// `None`: the row can't be measured.
    fn check(
        &mut self,
        ranks: &mut dyn Ranks,
        group: &Group,
        row: usize,
    ) -> Result<Option<Found>, Failure> {
        let check = self.fill(ranks, group, row)?;
        if ranks.run(row, 1)?.is_empty() {
            return Ok(None);
        }
        ranks.download()?;
        let last = check.arenas.last().filter(|_| check.first + check.arenas.len() == group.ranks);
        if let (true, Some(last)) = (self.corrupt, last) {
            // SAFETY: it has a byte at least, and no rank averages.
            unsafe { *last.as_mut_ptr() ^= 1 };
        }
        // SAFETY: no rank averages.
        let found = unsafe { check.found() };
        ranks.agree(row, &check, found).map(Some)
    }

    fn show(&self, group: &Group, row: usize, what: &str) {
        let (name, label) = (&group.layout.name, group.rows[row].label());
        self.progress.set_message(format!("{name}, {} ranks: {what}{label}", group.ranks));
        self.progress.inc(1);
    }
}

/// The record of a row that has not been measured yet.
fn record(group: &Group, row: Row) -> Record {
    let (layout, ranks) = (group.layout.clone(), group.ranks);
    let (times, wrong, yardstick, details) = (vec![], None, None, Details::Cpu);
    Record { row, layout, ranks, times, wrong, yardstick, details }
}

/// Refuses what does not fit in memory, before anything is allocated.
pub fn fits(ranks: &dyn Ranks, sections: &[Section]) -> Result<(), Failure> {
    let Some((free, _)) = available() else { return Ok(()) };
    let needs = |group: &&Group| ranks.memory(group, &group.layout);
    let Some(group) = sections.iter().flat_map(|section| &section.groups).max_by_key(needs) else {
        return Ok(());
    };
    // the rest is for slots, tables and other programs
    let (need, budget) = (needs(&group), free / 10 * 9);
    if need <= budget {
        return Ok(());
    }
    let scale = group.layout.scale.unwrap_or(1.0);
    let fits =
        |factor: &f64| ranks.memory(group, &group.layout.clone().scaled(factor / scale)) <= budget;
    let mut smaller = (1..=6)
        .flat_map(|digits| (1..=9).rev().map(move |first| f64::from(first) / 10f64.powi(digits)))
        .filter(|&factor| factor < scale);
    let instead = match smaller.find(fits) {
        _ if group.layout.name == "flat" => "use a smaller -e, or fewer ranks with -g".into(),
        Some(factor) => format!("shrink it with --scale {factor}, or use fewer ranks with -g"),
        None => "use fewer ranks with -g".to_string(),
    };
    Err(Failure::Failed(format!(
        "{} on {} ranks needs {:.1} GiB of memory, of which {:.1} GiB for each rank's tensors, but \
         {:.1} GiB are available: {instead}",
        group.layout.name,
        group.ranks,
        gib(need),
        gib(group.layout.bytes()),
        gib(free)
    )))
}
