//! What is printed: nccl-tests' columns, for people with 110 columns and for their scripts. Lines
//! of text begin with #.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::ProgressBar;

use crate::cli::{Args, Backend};
use crate::memory::{available, cores};
use crate::methods::Options;
use crate::plan::Section;
use crate::records::Record;

/// Standard output.
pub struct Table {
    out: io::Stdout,
    colour: bool,
    /// Of ranks on CUDA devices: it has a column more.
    cuda: bool,
    /// Of ranks that are processes, beside threads: the last column is another.
    processes: bool,
    /// Notes of this section that have been printed.
    noted: BTreeSet<String>,
    /// Cleared while a line is printed.
    progress: ProgressBar,
}

const BOLD: &str = "1";
const DIM: &str = "2";
const RED: &str = "1;31";

impl Table {
    pub fn new(progress: ProgressBar, cuda: bool, processes: bool) -> Self {
        let out = io::stdout();
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        Table {
            colour: out.is_terminal() && wanted,
            out,
            cuda,
            processes,
            noted: BTreeSet::new(),
            progress,
        }
    }

    fn line(&mut self, style: &str, text: &str) -> io::Result<()> {
        let (out, colour) = (&mut self.out, self.colour && !style.is_empty());
        self.progress.suspend(|| {
            let mut out = out.lock();
            if colour {
                writeln!(out, "\x1b[{style}m{text}\x1b[0m")
            } else {
                writeln!(out, "{text}")
            }
        })
    }

    /// Who and what, before anything is measured.
    pub fn preamble(&mut self, args: &Args, options: &Options) -> io::Result<()> {
        let set = param_averager::BuildInfo::get().instruction_set;
        let memory = available().map_or(String::new(), |(free, all)| {
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            format!(", {:.1} of {:.1} GiB memory free", gib(free), gib(all))
        });
        let version = env!("CARGO_PKG_VERSION");
        self.line(
            BOLD,
            &format!("# allreduce-bench {version}: averages model parameters over ranks, in place"),
        )?;
        if cfg!(debug_assertions) {
            self.line(
                RED,
                "# DEBUG BUILD: baselines and limit are slow, ratios mean nothing; build with \
                 --release",
            )?;
        }
        self.line("", &format!("# machine   {} cores, {set}{}{memory}", cores(), cpu_model()))?;
        self.line(
            "",
            &format!(
                "# ranks     {}, each with a replica of its own; {}",
                if self.processes { "processes" } else { "threads of this process" },
                choices(args, options)
            ),
        )?;
        let text = match (self.cuda, self.processes) {
            (true, _) => &ON_CUDA[..],
            (_, true) => &APART,
            _ => &ON_CPUS,
        };
        text.iter().try_for_each(|text| self.line("", text))
    }

    /// What stands in for a GPU is not one.
    pub fn simulated(&mut self) -> io::Result<()> {
        self.line(RED, "# simulated: no GPU; figures of time are left out")
    }

    /// How long processes take to begin.
    pub fn started(&mut self, ranks: u16, start: Duration) -> io::Result<()> {
        let ms = start.as_secs_f64() * 1e3;
        self.line(
            "",
            &format!("# start     {ranks} processes: {ms:.0} ms from start to first average"),
        )
    }

    /// A launcher has bound each rank, and with it rank 0's threads.
    pub fn bound(&mut self, cores: usize, all: usize) -> io::Result<()> {
        let text = format!(
            "# bound     rank 0 may use {cores} of {all} cores, and so its threads: xthr means \
             little"
        );
        self.line(RED, &format!("{text}; try mpirun --bind-to none"))
    }

    /// A heading and the columns.
    pub fn section(&mut self, section: &Section, who: &str) -> io::Result<()> {
        self.noted.clear();
        self.line("", "#")?;
        self.line(BOLD, &format!("# {}", section.heading))?;
        self.line("", &format!("# {who}"))?;
        let titles = [
            "size",
            "count",
            "type",
            "redop",
            "method",
            "time",
            "min",
            "max",
            "algbw",
            "busbw",
            "#wrong",
            if self.processes { "xthr" } else { "xlimit" },
        ];
        let units =
            ["(B)", "(elements)", "", "", "", "(us)", "(us)", "(us)", "(GB/s)", "(GB/s)", "", ""];
        let (ulp, none) = (self.cuda.then_some("ulp"), self.cuda.then_some(""));
        self.line("", &columns("#", titles, ulp))?;
        self.line("", &columns("#", units, none))
    }

    /// One row.
    pub fn row(&mut self, record: &Record) -> io::Result<()> {
        let style = match record.wrong {
            Some(1..) => RED,
            _ if record.method.is_baseline() => DIM,
            _ if record.apart.as_ref().is_some_and(|apart| !apart.processes) => DIM,
            _ => "",
        };
        let time = |time: Option<Duration>| time.map_or("-".into(), microseconds);
        let figure = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.2}"));
        let cells = [
            &record.bytes.to_string(),
            &record.elements.to_string(),
            &record.dtype,
            record.method.redop(),
            &record.label(),
            &time(record.time()),
            &time(record.times.first().copied()),
            &time(record.times.last().copied()),
            &figure(record.algbw()),
            &figure(record.busbw()),
            &record.wrong.map_or("N/A".into(), |wrong| wrong.to_string()),
            &figure(if self.processes { record.times_threads() } else { record.ratio() }),
        ];
        let ulps = record.device.as_ref().map(|device| device.ulps.map_or("N/A".into(), ulps));
        self.line(style, &columns("", cells, ulps.as_deref()))
    }

    /// What NCCL's rows were measured with, or why they were not; once in a section.
    pub fn notes(&mut self, records: &[Record]) -> io::Result<()> {
        let notes = records.iter().filter_map(|record| record.device.as_ref()?.note.as_ref());
        for note in notes {
            if self.noted.insert(note.clone()) {
                self.line("", &format!("# {note}"))?;
            }
        }
        Ok(())
    }

    /// What nccl-tests ends with.
    pub fn ending(&mut self, records: &[Record]) -> io::Result<()> {
        let wrong: u64 = records.iter().filter_map(|record| record.wrong).sum();
        let checked = records.iter().filter(|record| record.wrong.is_some()).count();
        self.line("", "#")?;
        match (checked, wrong) {
            (0, _) => self.line("", "# Out of bounds values : not checked"),
            (_, 0) => self.line(BOLD, "# Out of bounds values : 0 OK"),
            _ => self.line(RED, &format!("# Out of bounds values : {wrong} FAILED")),
        }
    }
}

const ON_CPUS: [&str; 4] = [
    "# time      median, from the release of all ranks to the end of the last; busbw = algbw * \
     2(n-1)/n",
    "# #wrong    elements further from the f64 mean than rounding allows, or not the same bits on \
     all ranks",
    "# xlimit    time / one-pass limit: all cores read all replicas once and write the mean to \
     all, nothing else;",
    "#           no averager can be faster on one host's memory: a little below 1 is noise",
];

const APART: [&str; 3] = [
    "# time      median, from the release of all ranks to the end of the last; busbw = algbw * \
     2(n-1)/n",
    "# #wrong    elements further from the f64 mean than rounding allows, or ranks that have not \
     the same bits",
    "# xthr      time / the same ring between threads of one process, which is measured turn by \
     turn with it",
];

const ON_CUDA: [&str; 5] = [
    "# time      median of the slowest rank's, between events on its stream; busbw = algbw * \
     2(n-1)/n",
    "# #wrong    elements further from the f64 mean than rounding allows, or not the same bits on \
     all ranks",
    "# ulp       largest error against the f64 mean, in ulp of the dtype at the largest input",
    "# xlimit    time / device copy: every rank reads and writes its size once within its device; \
     between GPUs the",
    "#           links are a limit, too, which this is not",
];

/// `ulp`: a column more, before the last.
fn columns(first: &str, cells: [&str; 12], ulp: Option<&str>) -> String {
    let [size, count, dtype, op, method, time, min, max, algbw, busbw, wrong, ratio] = cells;
    let ulp = ulp.map_or(String::new(), |ulp| format!("{ulp:>6} "));
    let text = format!(
        "{first}{size:>width$} {count:>10} {dtype:>5} {op:>5}  {method:<22} {time:>7} {min:>7} \
         {max:>7} {algbw:>6} \
         {busbw:>6} {wrong:>6} {ulp}{ratio:>6}",
        width = 11 - first.len()
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
    let decimals = if us < 99.995 {
        2
    } else if us < 9999.95 {
        1
    } else {
        0
    };
    format!("{us:.decimals$}")
}

fn choices(args: &Args, options: &Options) -> String {
    let mut words = vec!["auto is direct".to_string()];
    if args.backend == Backend::Cuda || args.processes {
        words.clear(); // rows have the name of what it came to
    }
    words.push(format!(
        "ring sends {}",
        if args.narrow_wire { "the tensors' dtype" } else { "partial sums as f32" }
    ));
    let number = |name: &str, value: Option<String>| value.map(|value| format!("{name} {value}"));
    words.extend(number("chunk", options.chunk.map(|bytes| bytes.to_string())));
    words.extend(number("slots", options.slots.map(|slots| slots.to_string())));
    words.extend(options.reject_non_finite.then(|| "rejects NaN".to_string()));
    words.extend(options.weighted.then(|| "rank r has weight r + 1".to_string()));
    words.join(", ")
}

fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or(String::new(), |(_, name)| format!(", {}", name.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_as_wide_as_a_terminal() {
        let header = columns(
            "#",
            [
                "size", "count", "type", "redop", "method", "time", "min", "max", "algbw", "busbw",
                "#wrong", "xlimit",
            ],
            None,
        );
        let row = columns(
            "",
            [
                "16060522496",
                "8030261248",
                "bf16",
                "avg",
                "flatten+ring+unflatten",
                "1234567",
                "1234567",
                "1234567",
                "123.45",
                "123.45",
                "0",
                "123.45",
            ],
            None,
        );
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
