//! Outer optimizers: the runs that compare them with the mean, their picture, and their table.

use std::error::Error;
use std::fmt::Write;

use clap::ValueEnum;
use param_averager::Outer;
use plotters::prelude::*;

use super::plot::{font, legend, panel, Curve, Drawn, ONE_RANK, WIDTH};
use super::record::{one_rank, shown, Row};
use super::{Options, Shards};

const TITLE: u32 = 96;
const PANEL: u32 = 330;
const NOTES: u32 = 54;

/// H of a task's runs, except those that average at each step.
fn every(task: &str) -> u64 {
    match task {
        "digits" => 64,
        _ => 16, // of a few hundred steps in all
    }
}

/// Ways to average: name, H, optimizer, and a colour.
fn ways(task: &str) -> [(&'static str, u64, Outer, RGBColor); 6] {
    let every = every(task);
    [
        ("mean, H = 1", 1, Outer::mean(), RGBColor(86, 180, 233)),
        ("mean", every, Outer::mean(), RGBColor(0, 114, 178)),
        ("DiLoCo", every, Outer::diloco(), RGBColor(213, 94, 0)),
        ("MaxText", every, Outer::maxtext(), RGBColor(230, 159, 0)),
        ("SlowMo", every, Outer::slowmo(), RGBColor(0, 158, 115)),
        ("EASGD", every, Outer::ease(0.5), RGBColor(204, 121, 167)),
    ]
}

/// Divisions of the data among ranks that are recorded for a task.
fn shards(task: &str) -> &'static [Shards] {
    match task {
        "digits" => &[Shards::Mixed, Shards::Sorted],
        _ => &[Shards::Mixed],
    }
}

/// Runs that differ in their seed only.
pub fn kinds(task: &str, epochs: f64) -> Vec<Options> {
    let one = one_rank(epochs);
    let mut kinds = vec![one.clone()];
    for &shards in shards(task) {
        for (_, every, outer, _) in ways(task) {
            kinds.push(Options { ranks: 4, every, outer, shards, ..one.clone() });
        }
    }
    kinds
}

fn is_of(row: &Row, shards: Shards, every: u64, outer: &Outer) -> bool {
    let is_outer = row.outer == outer.to_string();
    row.ranks == 4 && row.shards == shards && row.every == every && is_outer
}

fn curves(task: &str, rows: &[Row], shards: Shards, x: &dyn Fn(&Row) -> f64) -> Vec<Curve> {
    let last = rows.iter().filter(|row| row.ranks == 4).map(|row| row.step).max().unwrap_or(0);
    let alone = |row: &Row| row.ranks == 1 && row.step <= last;
    let mut curves = vec![Curve::new("1 rank".into(), ONE_RANK, true, rows, &alone, x)];
    for (name, every, outer, colour) in ways(task) {
        let keep = |row: &Row| is_of(row, shards, every, &outer);
        curves.push(Curve::new(name.into(), colour, false, rows, &keep, x));
    }
    curves
}

/// Picture of a record: the loss over steps and over bytes, a line of panels for each division of
/// the data.
pub fn svg(task: &str, rows: &[Row]) -> Result<String, Box<dyn Error>> {
    let mut text = String::new();
    draw(task, rows, &mut text)?;
    Ok(text)
}

fn draw(task: &str, rows: &[Row], text: &mut String) -> Drawn {
    let shards = shards(task);
    let lines = shards.len() as u32;
    let height = TITLE + lines * PANEL + NOTES;
    let root = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let seeds = rows.iter().map(|row| row.seed).max().unwrap_or(0);
    let title =
        format!("{task}: test loss of 4 ranks, by what the outer optimizer makes of the mean");
    root.draw_text(&title, &font(20), (20, 12))?;
    let below = format!(
        "H = {} where nothing else is said; lines: mean of {seeds} seeds; bands: least and most",
        every(task)
    );
    root.draw_text(&below, &font(13), (20, 38))?;

    let (top, rest) = root.split_vertically(TITLE);
    let (panels, notes) = rest.split_vertically(lines * PANEL);
    let panels = panels.split_evenly((shards.len(), 2));
    let steps = |row: &Row| row.step as f64;
    let sent = |row: &Row| row.bytes_sent / 1e6;
    for (&shards, panels) in shards.iter().zip(panels.chunks(2)) {
        let data = match shards {
            Shards::Mixed => "data mixed among ranks",
            Shards::Sorted => "each rank its own labels",
        };
        let over = curves(task, rows, shards, &steps);
        panel(&panels[0], &format!("steps of each rank; {data}"), &over, false)?;
        let mut averaging = curves(task, rows, shards, &sent);
        averaging.retain(|curve| curve.colour != ONE_RANK);
        panel(&panels[1], &format!("MB that each rank has sent; {data}"), &averaging, true)?;
    }
    for (index, curve) in curves(task, rows, Shards::Mixed, &steps).iter().enumerate() {
        legend(&top, (20 + 150 * index as i32, 76), 13, curve)?;
    }
    let lines = [
        "A ring sends 2 (n - 1) / n times the model for an average; an outer optimizer sends \
         nothing more.",
        "DiLoCo: nesterov(0.7, 0.9). MaxText: nesterov(0.3, 0.9). SlowMo: momentum(1, 0.5). EASGD: \
         ease(0.5). Drawn by adapters/candle/examples/curves.rs.",
    ];
    for (index, line) in lines.iter().enumerate() {
        notes.draw_text(line, &font(13), (20, 8 + 20 * index as i32))?;
    }
    root.present()?;
    Ok(())
}

/// Table of the last tests, in Markdown.
pub fn summary(task: &str, rows: &[Row]) -> String {
    let mut text = "| ranks | data | H | outer optimizer | test accuracy, % | test loss | \
        least test loss on the way | steps | MB sent |\n|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    let mut line = |ranks: usize, shards: Shards, every: u64, outer: &Outer| {
        let of = |row: &&Row| match ranks {
            1 => row.ranks == 1,
            _ => is_of(row, shards, every, outer),
        };
        let kept: Vec<&Row> = rows.iter().filter(of).collect();
        let Some(steps) = kept.iter().map(|row| row.step).max() else { return };
        let last: Vec<&Row> = kept.iter().filter(|row| row.step == steps).copied().collect();
        let least = |last: &Row| {
            let run = kept.iter().filter(|row| row.seed == last.seed);
            run.map(|row| f64::from(row.test_loss)).fold(f64::MAX, f64::min)
        };
        let data = shards.to_possible_value().map_or(String::new(), |it| it.get_name().to_owned());
        writeln!(
            text,
            "| {ranks} | {data} | {every} | {outer} | {} | {} | {} | {steps} | {:.2} |",
            shown(&|row| f64::from(row.test_accuracy) * 100.0, &last, 1),
            shown(&|row| f64::from(row.test_loss), &last, 3),
            shown(&least, &last, 3),
            last[0].bytes_sent / 1e6,
        )
        .expect("a String takes all");
    };
    line(1, Shards::Mixed, 1, &Outer::mean());
    for &shards in shards(task) {
        for (_, every, outer, _) in ways(task) {
            line(4, shards, every, &outer);
        }
    }
    text
}
