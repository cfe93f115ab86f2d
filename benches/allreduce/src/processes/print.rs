//! What rank 0 prints and writes.

use std::time::Duration;

use indicatif::ProgressBar;

use crate::cli::Args;
use crate::failure::Failure;
use crate::layout::Layout;
use crate::memory::{arena_bytes, available, cores};
use crate::methods::{Method, Options};
use crate::plan::Section;
use crate::records::{self, Apart, Record, Sink};
use crate::table::Table;

pub struct Printer {
    table: Table,
    sinks: Vec<Sink>,
    records: Vec<Record>,
}

impl Printer {
    /// `start`: until the first average.
    pub fn new(
        args: &Args,
        options: &Options,
        sections: &[Section],
        start: Duration,
    ) -> Result<Self, Failure> {
        fits(sections)?;
        let json =
            args.json.as_deref().map(|path| Sink::create(path, records::json)).transpose()?;
        let csv = args.csv.as_deref().map(|path| Sink::create(path, records::csv)).transpose()?;
        let mut table = Table::new(ProgressBar::hidden(), false, true);
        table.preamble(args, options)?;
        table.started(args.ranks[0], start)?;
        let all = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let all = all.lines().filter(|line| line.starts_with("processor")).count();
        if cores() < all.min(args.ranks[0].into()) {
            table.bound(cores(), all)?;
        }
        Ok(Printer { table, sinks: json.into_iter().chain(csv).collect(), records: vec![] })
    }

    /// What the section's group `index` came to.
    pub fn print(
        &mut self,
        section: &Section,
        index: usize,
        who: &str,
        records: Vec<Record>,
    ) -> Result<(), Failure> {
        if index == 0 {
            self.table.section(section, who)?;
        }
        records.iter().try_for_each(|record| self.table.row(record))?;
        self.records.extend(records);
        Ok(())
    }

    /// Returns the number of wrong elements.
    pub fn end(mut self) -> Result<u64, Failure> {
        self.table.ending(&self.records)?;
        self.sinks.into_iter().try_for_each(|sink| sink.write(&self.records))?;
        Ok(self.records.iter().filter_map(|record| record.wrong).sum())
    }
}

pub fn record(
    layout: &Layout,
    ranks: usize,
    method: Method,
    mut times: Vec<Duration>,
    wrong: Option<u64>,
    apart: Apart,
) -> Record {
    times.sort();
    Record {
        method,
        layout: layout.name.clone(),
        tensors: layout.tensors.len(),
        dtype: layout.dtype_name(),
        ranks,
        elements: layout.elements(),
        bytes: layout.bytes(),
        times,
        wrong,
        limit: None,
        device: None,
        apart: Some(apart),
    }
}

/// Refuses what does not fit in memory: a replica and what the ring needs for every process, and
/// for every thread but one.
fn fits(sections: &[Section]) -> Result<(), Failure> {
    let Some((free, _)) = available() else { return Ok(()) };
    let groups = sections.iter().flat_map(|section| &section.groups);
    let needs = groups.map(|group| {
        let extra = group
            .methods
            .iter()
            .map(|method| 2 * method.memory_overhead(&group.layout, group.ranks));
        arena_bytes(&group.layout, 2 * group.ranks - 1) + extra.sum::<u64>()
    });
    let (need, gib) = (needs.max().unwrap_or(0), |bytes: u64| bytes as f64 / f64::from(1 << 30));
    if need <= free / 10 * 9 {
        return Ok(());
    }
    Err(Failure::Failed(format!(
        "that needs {:.1} GiB of memory, but {:.1} GiB are available: use --scale, a smaller -e, \
         or fewer ranks",
        gib(need),
        gib(free)
    )))
}
