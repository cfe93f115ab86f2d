//! Records: what runs there are, their rows, and a summary of them.

use std::collections::BTreeMap;
use std::fmt::Write;

use clap::ValueEnum;
use param_averager::{Outer, Overlap};
use serde::{Deserialize, Serialize};

use super::{Codec, Init, Options, Point, Rule, Shards};

/// Links that times are computed for: name, and bytes per second of each rank in each direction.
pub const LINKS: [(&str, f64); 3] =
    [("1 Gbit/s", 0.125e9), ("10 Gbit/s", 1.25e9), ("PCIe 4 x16", 31.5e9)];

/// H of the runs.
pub const EVERY: [u64; 3] = [1, 8, 64];

/// One test of one run: a row of a record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub task: String,
    pub ranks: usize,
    pub every: u64,
    pub shards: Shards,
    pub init: Init,
    pub processes: bool,
    pub epochs: f64,
    pub seed: u64,
    pub step: u64,
    pub averages: u64,
    pub bytes_sent: f64,
    pub test_loss: f32,
    pub test_accuracy: f32,
    pub step_ms: f64,
    /// As [`Outer`](param_averager::Outer) is displayed; records before it was there have none.
    #[serde(default)]
    pub outer: String,
    /// As [`Overlap`](param_averager::Overlap) is displayed.
    #[serde(default = "no_overlap")]
    pub overlap: String,
    #[serde(default)]
    pub codec: Codec,
    #[serde(default)]
    pub schedule: Rule,
    /// True if the learning rate fell.
    #[serde(default)]
    pub cosine: bool,
}

impl Row {
    pub fn new(task: &str, run: &Options, point: &Point) -> Self {
        Row {
            task: task.to_owned(),
            ranks: run.ranks,
            every: run.every,
            shards: run.shards,
            init: run.init,
            processes: run.processes,
            epochs: run.epochs,
            seed: run.seed,
            step: point.step,
            averages: point.averages,
            bytes_sent: point.bytes_sent,
            test_loss: point.test_loss,
            test_accuracy: point.test_accuracy,
            step_ms: point.step_ms,
            outer: run.outer.to_string(),
            overlap: run.overlap().to_string(),
            codec: run.codec,
            schedule: run.schedule,
            cosine: run.cosine,
        }
    }

    /// Time of training so far over a link without latency, computed: a rank computes, then sends,
    /// and of each average as much is hidden as its delay in steps takes.
    pub fn seconds(&self, step_ms: f64, bytes_per_second: f64) -> f64 {
        let step = step_ms / 1e3;
        let averages = self.averages.max(1) as f64;
        let average = self.bytes_sent / averages / bytes_per_second;
        let lost = (average - self.delay() * step).max(0.0);
        self.step as f64 * step + averages * lost
    }

    fn delay(&self) -> f64 {
        let delay = self.overlap.split(", ").find_map(|part| part.strip_prefix("delay "));
        delay.and_then(|delay| delay.parse().ok()).unwrap_or(0.0)
    }

    /// True if both are of the same run.
    pub fn is_of_run(&self, other: &Row) -> bool {
        let kind =
            |row: &Row| (row.ranks, row.every, row.shards, row.init, row.processes, row.seed);
        let way = |row: &Row| (row.outer.clone(), row.overlap.clone(), row.codec, row.schedule);
        (kind(self), way(self), self.cosine, self.epochs)
            == (kind(other), way(other), other.cosine, other.epochs)
    }
}

fn no_overlap() -> String {
    Overlap::default().to_string()
}

/// A run of one rank.
pub fn one_rank(epochs: f64) -> Options {
    Options {
        ranks: 1,
        every: 1,
        epochs,
        seed: 0,
        shards: Shards::Mixed,
        init: Init::Seed,
        outer: Outer::mean(),
        fragments: 1,
        delay: 0,
        alpha: 0.0,
        codec: Codec::Full,
        schedule: Rule::Every,
        cosine: false,
        processes: false,
        telemetry: None,
    }
}

/// Runs that differ in their seed only.
pub fn kinds(task: &str, epochs: f64) -> Vec<Options> {
    let one = one_rank(epochs);
    let mut kinds = vec![one.clone()];
    for every in EVERY {
        let four = Options { ranks: 4, every, ..one.clone() };
        kinds.push(four.clone());
        if task == "digits" {
            kinds.push(Options { ranks: 2, ..four.clone() });
            for ranks in [2, 4] {
                kinds.push(Options { ranks, shards: Shards::Sorted, ..four.clone() });
                kinds.push(Options { ranks, processes: true, ..four.clone() });
            }
            kinds.push(Options { init: Init::Candle, ..four });
        }
    }
    kinds
}

/// Time that a step takes on a core: the median of the runs of one rank.
pub fn step_ms(rows: &[Row]) -> f64 {
    let alone = rows.iter().filter(|row| row.ranks == 1 && row.step > 0);
    let mut times: Vec<f64> = alone.map(|row| row.step_ms).collect();
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(0.0)
}

/// Mean, least and most of a value of rows.
pub fn shown(value: &dyn Fn(&Row) -> f64, of: &[&Row], digits: usize) -> String {
    let values: Vec<f64> = of.iter().map(|row| value(row)).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let (least, most) = values.iter().fold((f64::MAX, f64::MIN), |(a, b), &v| (a.min(v), b.max(v)));
    format!("{mean:.digits$} ({least:.digits$}..{most:.digits$})")
}

/// Table of the last tests, in Markdown.
pub fn summary(rows: &[Row]) -> String {
    let name = |value: Option<clap::builder::PossibleValue>| {
        value.map_or(String::new(), |value| value.get_name().to_owned())
    };
    let mut groups: BTreeMap<_, BTreeMap<u64, &Row>> = BTreeMap::new();
    for row in rows {
        let (shards, init) =
            (name(row.shards.to_possible_value()), name(row.init.to_possible_value()));
        let kind = (row.ranks, shards, init, row.processes, row.every);
        groups.entry(kind).or_default().insert(row.seed, row); // the last row of a run stays
    }
    let step_ms = step_ms(rows);
    let mut text = format!("A step takes {step_ms:.3} ms on a core (median).\n\n");
    text +=
        "| ranks | data | initial weights | H | test accuracy, % | test loss | steps | MB sent |";
    LINKS.iter().for_each(|(link, _)| write!(text, " s at {link} |").unwrap());
    text += "\n|---|---|---|---|---|---|---|---|---|---|---|\n";
    for ((ranks, shards, init, processes, every), last) in groups {
        let last: Vec<&Row> = last.into_values().collect();
        let kind = if processes { "processes" } else { "threads" };
        write!(
            text,
            "| {ranks} {kind} | {shards} | {init} | {every} | {} | {} | {} | {:.2} |",
            shown(&|row| f64::from(row.test_accuracy) * 100.0, &last, 1),
            shown(&|row| f64::from(row.test_loss), &last, 3),
            last[0].step,
            last[0].bytes_sent / 1e6,
        )
        .unwrap();
        for (_, link) in LINKS {
            write!(text, " {:.2} |", last[0].seconds(step_ms, link)).unwrap();
        }
        text.push('\n');
    }
    text
}
