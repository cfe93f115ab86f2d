//! The table: nccl-tests' columns, for people with 110 columns and for their scripts. Lines of text
//! begin with #.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::Duration;

use console::Style;
use indicatif::ProgressBar;

use crate::cli::{Args, Backend};
use crate::memory::{available, cores, cpus, gib};
use crate::plan::Section;
use crate::record::{self, Details, Record, Sink};
use crate::run::{self, Ranks};
use crate::{failure::Failure, plot};

/// Outputs: the table on standard output, files and pictures.
pub struct Report {
    cuda: bool,
    processes: bool,
    sinks: Vec<Sink>,
    records: Vec<Record>,
    /// Notes of this section that have been printed.
    noted: BTreeSet<String>,
    /// Cleared while a line is printed.
    progress: ProgressBar,
}

impl Report {
    /// Refuses what does not fit and what can't be written, and prints the preamble.
    pub fn open(
        args: &Args,
        sections: &[Section],
        ranks: &dyn Ranks,
        progress: ProgressBar,
    ) -> Result<Self, Failure> {
        run::fits(ranks, sections)?;
        let (cuda, processes) = (args.what.backend == Backend::Cuda, args.what.processes);
        let (mut sinks, measuring) = (vec![], &args.measuring);
        for (path, format) in [
            (&measuring.json, record::json as record::Format),
            (&measuring.csv, record::csv),
            (&measuring.plot, plot::svg),
        ] {
            sinks.extend(path.as_deref().map(|path| Sink::create(path, format)).transpose()?);
        }
        let (records, noted) = Default::default();
        let report = Report { cuda, processes, sinks, records, noted, progress };
        report.preamble(args, &ranks.preamble())?;
        Ok(report)
    }

    /// The records of a group, under a heading if it is the first of a section.
    pub fn group(
        &mut self,
        heading: Option<[String; 2]>,
        records: Vec<Record>,
    ) -> Result<(), Failure> {
        if let Some(lines) = heading {
            self.section(lines)?;
        }
        records.iter().try_for_each(|record| self.row(record))?;
        // Version of NCCL, or the reason why rows were not measured; once in a section.
        for record in &records {
            let Details::Cuda { note: Some(note), .. } = &record.details else { continue };
            if self.noted.insert(note.clone()) {
                self.plain(&format!("# {note}"))?;
            }
        }
        self.records.extend(records);
        Ok(())
    }

    /// The last lines of nccl-tests, and the files. Returns the number of wrong elements.
    pub fn close(self) -> Result<u64, Failure> {
        self.progress.finish_and_clear();
        // None if no row was checked.
        let wrong = self.records.iter().filter_map(|record| record.wrong).reduce(|a, b| a + b);
        self.plain("#")?;
        match wrong {
            None => self.plain("# Out of bounds values : not checked"),
            Some(0) => self.line(Style::new().bold(), "# Out of bounds values : 0 OK"),
            Some(wrong) => self.warning(&format!("# Out of bounds values : {wrong} FAILED")),
        }?;
        self.sinks.into_iter().try_for_each(|sink| sink.write(&self.records))?;
        Ok(wrong.unwrap_or(0))
    }

    fn line(&self, style: Style, text: &str) -> io::Result<()> {
        // console looks whether standard output is a terminal, and at NO_COLOR and TERM.
        self.progress.suspend(|| writeln!(io::stdout().lock(), "{}", style.apply_to(text)))
    }

    fn plain(&self, text: &str) -> io::Result<()> {
        self.line(Style::new(), text)
    }

    /// Heading: methods and machine, before anything is measured. `more`: lines, and whether they
    /// are warnings.
    fn preamble(&self, args: &Args, more: &[(String, bool)]) -> io::Result<()> {
        let set = param_averager::BuildInfo::get().instruction_set;
        let memory = available().map_or(String::new(), |(free, all)| {
            format!(", {:.1} of {:.1} GiB memory free", gib(free), gib(all))
        });
        let version = env!("CARGO_PKG_VERSION");
        let title =
            format!("# allreduce-bench {version}: averages model parameters over ranks, in place");
        self.line(Style::new().bold(), &title)?;
        if cfg!(debug_assertions) {
            self.warning(
                "# DEBUG BUILD: baselines are slow, ratios mean nothing; build with --release",
            )?;
        }
        let cpu = cpus().first().map_or(String::new(), |brand| format!(", {brand}"));
        self.plain(&format!("# machine   {} cores, {set}{cpu}{memory}", cores()))?;
        let are = if self.processes { "processes" } else { "threads of this process" };
        let options = choices(args);
        self.plain(&format!("# ranks     {are}, each with a replica of its own; {options}"))?;
        let column = match (self.cuda, self.processes) {
            (true, _) => &ON_CUDA[..],
            (_, true) => &ON_PROCESSES,
            _ => &ON_CPUS,
        };
        column.iter().try_for_each(|text| self.plain(text))?;
        let mut more = more.iter();
        more.try_for_each(
            |(text, warns)| if *warns { self.warning(text) } else { self.plain(text) },
        )
    }

    fn warning(&self, text: &str) -> io::Result<()> {
        self.line(Style::new().red().bold(), text)
    }

    /// A heading, its ranks, and the columns.
    fn section(&mut self, [heading, ranks]: [String; 2]) -> io::Result<()> {
        self.noted.clear();
        self.plain("#")?;
        self.line(Style::new().bold(), &format!("# {heading}"))?;
        self.plain(&format!("# {ranks}"))?;
        let last = if self.processes { "xthr" } else { "xlimit" };
        let titles = [
            "size", "count", "type", "redop", "method", "time", "min", "max", "algbw", "busbw",
            "#wrong", last,
        ];
        let units =
            ["(B)", "(elements)", "", "", "", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)", "", ""];
        self.plain(&columns("#", titles, self.cuda.then_some("ulp")))?;
        self.plain(&columns("#", units, self.cuda.then_some("")))
    }

    fn row(&self, record: &Record) -> io::Result<()> {
        let style = match record.wrong {
            Some(1..) => Style::new().red().bold(),
            _ if record.row.is_baseline() => Style::new().dim(),
            _ => Style::new(),
        };
        let time = |time: Option<Duration>| time.map_or("-".into(), microseconds);
        let figure = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.2}"));
        let compared = record.ratio().filter(|_| !(self.processes && record.row.is_yardstick()));
        let cells = [
            &record.layout.bytes().to_string(),
            &record.layout.elements().to_string(),
            &record.layout.dtype_name(),
            record.row.redop(),
            &record.row.label(),
            &time(record.time()),
            &time(record.times.first().copied()),
            &time(record.times.last().copied()),
            &figure(record.algbw()),
            &figure(record.busbw()),
            &record.wrong.map_or("N/A".into(), |wrong| wrong.to_string()),
            &figure(compared),
        ];
        let ulps = match &record.details {
            Details::Cuda { ulps, .. } => Some(ulps.map_or("N/A".into(), self::ulps)),
            _ => None,
        };
        self.line(style, &columns("", cells, ulps.as_deref()))
    }
}

const ON_CPUS: [&str; 5] = [
    "# time      median, from the release of all ranks to the end of the last;",
    "#           busbw = algbw * 2(n-1)/n",
    "# #wrong    elements further from the f64 mean than rounding allows, or that differ by rank",
    "# xlimit    time / one-pass limit: all cores read all replicas once, write the mean to all;",
    "#           no averager can be faster in one host's memory; a little below 1 is noise",
];

const ON_PROCESSES: [&str; 5] = [
    ON_CPUS[0],
    ON_CPUS[1],
    ON_CPUS[2],
    "# xthr      time / the same ring between threads of one process, which is measured turn by",
    "#           turn with it",
];

const ON_CUDA: [&str; 6] = [
    "# time      median of the slowest rank's, between events on its stream;",
    ON_CPUS[1],
    ON_CPUS[2],
    "# ulp       largest error against the f64 mean, in ulp of the dtype at the largest input",
    "# xlimit    time / device copy: every rank reads and writes its size once within its device;",
    "#           between GPUs the links are a limit, too, which this is not",
];

/// `ulp`: a column more, before the last.
fn columns(first: &str, cells: [&str; 12], ulp: Option<&str>) -> String {
    let [size, count, dtype, op, method, time, min, max, algbw, busbw, wrong, ratio] = cells;
    let ulp = ulp.map_or(String::new(), |ulp| format!("{ulp:>6} "));
    let width = 11 - first.len();
    let text = format!(
        "{first}{size:>width$} {count:>10} {dtype:>5} {op:>5}  {method:<22} {time:>7} {min:>7} \
         {max:>7} {algbw:>6} {busbw:>6} {wrong:>6} {ulp}{ratio:>6}",
    );
    text.trim_end().into()
}

fn ulps(x: f64) -> String {
    let decimals = if x < 999.5 { 2 } else { 0 };
    format!("{x:.decimals$}")
}

/// Four digits or all before the point.
fn microseconds(time: Duration) -> String {
    let us = time.as_nanos() as f64 / 1e3;
    let decimals = [99.995, 9999.95].iter().filter(|&&bound| us < bound).count();
    format!("{us:.decimals$}")
}

/// The options that results depend on.
fn choices(args: &Args) -> String {
    let options = &args.options;
    let wire = if options.narrow_wire { "the tensors' dtype" } else { "partial sums as f32" };
    let cpus = args.what.backend == Backend::Cpu && !args.what.processes;
    let words = [
        cpus.then(|| "auto is direct".to_string()), // elsewhere rows have the name of what it is
        Some(format!("ring sends {wire}")),
        options.chunk.map(|bytes| format!("chunk {bytes}")),
        options.slots.map(|slots| format!("slots {slots}")),
        options.reject_non_finite.then(|| "rejects NaN".to_string()),
        options.weighted.then(|| "rank r has weight r + 1".to_string()),
    ];
    words.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_as_wide_as_a_terminal() {
        let header = "size count type redop method time min max algbw busbw #wrong xlimit";
        let row = "16060522496 8030261248 bf16 avg flatten+ring+unflatten 1234567 1234567 1234567 \
                   123.45 123.45 0 123.45";
        let [header, row] = [("#", header), ("", row)].map(|(first, cells)| {
            let cells: Vec<&str> = cells.split_whitespace().collect();
            columns(first, cells.try_into().unwrap(), None)
        });
        assert_eq!(header.len(), row.len());
        assert!(row.len() <= 110, "{}", row.len());
    }

    #[test]
    fn times_have_the_digits_that_matter() {
        let shown = [1.234, 99.996, 1234.56, 9999.96, 1_234_567.8]
            .map(|us| microseconds(Duration::from_secs_f64(us / 1e6)));
        assert_eq!(shown, ["1.23", "100.0", "1234.6", "10000", "1234568"]);
    }
}
