//! Telemetry of runs: a file with a line for each average of rank 0, and a picture of such files.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use param_averager::{Report, Schedule};
use plotters::prelude::*;

use super::plot::{font, legend, panel, Curve, WIDTH};
use super::record::one_rank;
use super::{Options, Rule, Shards};

/// File of comma-separated values with a line for each average, if it is wanted.
pub struct Log(Option<File>);

impl Log {
    pub fn new(path: Option<&Path>) -> std::io::Result<Log> {
        let mut file = path.map(File::create).transpose()?;
        if let Some(file) = &mut file {
            writeln!(file, "step,{}", Report::CSV_COLUMNS)?;
        }
        Ok(Log(file))
    }

    pub fn average(&mut self, step: u64, report: &Report) -> std::io::Result<()> {
        self.0.as_mut().map_or(Ok(()), |file| writeln!(file, "{step},{}", report.csv()))
    }
}

/// Runs of 4 ranks on one task: their name in files, their label, and their options.
pub fn runs(epochs: f64) -> Vec<(&'static str, &'static str, Options)> {
    let run = |shards, schedule| Options {
        ranks: 4,
        every: 8,
        seed: 1,
        shards,
        schedule,
        ..one_rank(epochs)
    };
    vec![
        ("mixed-every", "mixed data, H = 8", run(Shards::Mixed, Rule::Every)),
        ("mixed-divergence", "mixed data, divergence 5 %", run(Shards::Mixed, Rule::Divergence)),
        ("sorted-every", "own labels, H = 8", run(Shards::Sorted, Rule::Every)),
        ("sorted-divergence", "own labels, divergence 5 %", run(Shards::Sorted, Rule::Divergence)),
    ]
}

/// Columns of one file: steps, relative changes in percent, and H.
fn read(path: &Path) -> Result<[Vec<f64>; 3], Box<dyn Error>> {
    let mut columns = [vec![], vec![], vec![]];
    for row in csv::Reader::from_path(path)?.deserialize() {
        let row: std::collections::BTreeMap<String, String> = row?;
        for (column, name) in columns.iter_mut().zip(["step", "relative_change", "local_steps"]) {
            column.push(row.get(name).ok_or_else(|| format!("no column {name}"))?.parse::<f64>()?);
        }
    }
    columns[1].iter_mut().for_each(|change| *change *= 100.0);
    Ok(columns)
}

/// Picture of the files in a folder: the relative change by each average, and H.
pub fn svg(task: &str, folder: &Path) -> Result<String, Box<dyn Error>> {
    const COLOURS: [RGBColor; 2] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0)];
    let (mut changes, mut rounds) = (vec![], vec![]);
    for (index, (name, label, _)) in runs(0.0).into_iter().enumerate() {
        let [steps, change, h] = read(&folder.join(format!("{task}-{name}.csv")))?;
        let over = |values: Vec<f64>| steps.iter().copied().zip(values).collect::<Vec<_>>();
        let curve = |values| {
            let (colour, is_dashed) = (COLOURS[index / 2], index % 2 == 0);
            Curve::of_run(label.into(), colour, is_dashed, &over(values))
        };
        changes.push(curve(change));
        rounds.push(curve(h));
    }
    let mut text = String::new();
    let root = SVGBackend::with_string(&mut text, (WIDTH, 470)).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("{task}: how far averages move rank 0 of 4, in % of the norm; and H");
    root.draw_text(&title, &font(20), (20, 12))?;
    let (top, rest) = root.split_vertically(74);
    for (index, curve) in changes.iter().enumerate() {
        legend(&top, (20 + 262 * index as i32, 56), 13, curve)?;
    }
    let (panels, notes) = rest.split_vertically(330);
    let (left, right) = panels.split_horizontally(WIDTH / 2);
    panel(&left, ("steps of each rank", "relative change, %"), &changes, false)?;
    panel(&right, ("steps of each rank", "H"), &rounds, false)?;
    let note = format!(
        "divergence: H shrinks where the change is above {} %, and grows by one step where it is \
         below half of that. One seed. Drawn by adapters/candle/examples/curves.rs.",
        100.0 * Schedule::DIVERGENCE
    );
    notes.draw_text(&note, &font(13), (20, 12))?;
    root.present()?;
    drop((root, top, left, right, panels, notes, rest));
    Ok(text)
}
