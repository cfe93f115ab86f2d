//! Outer optimizers, schedules, and averages that overlap with training: the runs that compare them
//! with the mean every H steps, their picture, and their table.

use std::error::Error;
use std::fmt::Write;

use param_averager::Outer;
use plotters::prelude::*;

use super::plot::{font, legend, panel, Curve, Drawn, LOSS, ONE_RANK, WIDTH};
use super::record::{one_rank, shown, step_ms, Row};
use super::{Codec, Options, Rule, Shards};

const TITLE: u32 = 66;
const LEGEND: u32 = 30;
const PANEL: u32 = 330;
const NOTES: u32 = 98;

const LIGHT_BLUE: RGBColor = RGBColor(86, 180, 233);
const BLUE: RGBColor = RGBColor(0, 114, 178);
const RED: RGBColor = RGBColor(213, 94, 0);
const ORANGE: RGBColor = RGBColor(230, 159, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const PINK: RGBColor = RGBColor(204, 121, 167);

/// A way to average on 4 ranks.
struct Way {
    name: String,
    run: Options,
    colour: RGBColor,
}

impl Way {
    fn is_of(&self, row: &Row) -> bool {
        let Options { shards, every, outer, schedule, cosine, .. } = &self.run;
        (row.ranks, row.shards, row.every) == (4, *shards, *every)
            && row.outer == outer.to_string()
            && row.overlap == self.run.overlap().to_string()
            && row.codec == self.run.codec
            && (row.schedule, row.cosine) == (*schedule, *cosine)
    }
}

/// Ways that are drawn in the same two panels.
struct Line {
    data: &'static str,
    ways: Vec<Way>,
}

/// Subject of a comparison of runs.
#[derive(Clone, Copy, PartialEq)]
pub enum Study {
    /// Outer optimizers and schedules.
    Outer,
    /// Averages that overlap with training, averages of fragments, codecs, and all of them at once.
    Overlap,
}

fn lines(study: Study, task: &str, epochs: f64) -> Vec<Line> {
    let mixed = ("data mixed among ranks", Shards::Mixed);
    let sorted = ("each rank its own labels", Shards::Sorted);
    let line = |(data, shards), h, ways: fn(Options, u64) -> Vec<Way>| {
        let run = Options { ranks: 4, shards, ..one_rank(epochs) };
        Line { data, ways: ways(run, h) }
    };
    match task {
        _ if study == Study::Overlap => {
            let ways: [fn(Options, u64) -> Vec<Way>; 5] =
                [delays, fragments, slowmo, codecs, streaming];
            let mut lines: Vec<Line> = ways.map(|ways| line(mixed, 16, ways)).into();
            if task == "digits" {
                lines.extend(ways.map(|ways| line(sorted, 16, ways)));
            }
            lines
        }
        "digits" => vec![
            line(mixed, 64, outers),
            line(sorted, 64, outers),
            line(mixed, 8, schedules),
            line(sorted, 8, schedules),
        ],
        _ => vec![line(mixed, 16, outers)], // of a few hundred steps in all
    }
}

fn outers(run: Options, h: u64) -> Vec<Way> {
    let way = |name: &str, every, outer, colour| {
        let run = Options { every, outer, ..run.clone() };
        Way { name: format!("{name}, H = {every}"), run, colour }
    };
    vec![
        way("mean", 1, Outer::mean(), LIGHT_BLUE),
        way("mean", h, Outer::mean(), BLUE),
        way("DiLoCo", h, Outer::diloco(), RED),
        way("MaxText", h, Outer::maxtext(), ORANGE),
        way("SlowMo", h, Outer::slowmo(), GREEN),
        way("EASGD", h, Outer::ease(0.5), PINK),
    ]
}

fn overlapped(run: &Options, h: u64, with: [f64; 3], colour: RGBColor) -> Way {
    let [fragments, delay, alpha] = with;
    let of = |what: &str, value: f64, none: f64| match value == none {
        true => String::new(),
        false => format!(", {what} {value}"),
    };
    let [p, tau, a] = [of("P", fragments, 1.0), of("τ", delay, 0.0), of("α", alpha, 0.0)];
    let run = Options {
        every: h,
        fragments: fragments as u32,
        delay: delay as u64,
        alpha,
        ..run.clone()
    };
    let outer = match run.outer {
        outer if outer == Outer::mean() => "mean",
        outer if outer == Outer::diloco() => "DiLoCo",
        _ => "SlowMo",
    };
    let codec = match run.codec {
        Codec::Full => "",
        Codec::Bf16 => ", bf16",
        Codec::Int8 => ", int8",
    };
    let name = match format!("{p}{tau}{a}{codec}") {
        of if of.is_empty() => format!("{outer}, H {h}"),
        of => format!("{outer}{of}"),
    };
    Way { name, run, colour }
}

fn delays(run: Options, h: u64) -> Vec<Way> {
    let way = |with, colour| overlapped(&run, h, with, colour);
    vec![
        way([1.0, 0.0, 0.0], BLUE),
        way([1.0, 1.0, 0.0], GREEN),
        way([1.0, 4.0, 0.0], RED),
        way([1.0, 4.0, 0.5], PINK),
    ]
}

fn fragments(run: Options, h: u64) -> Vec<Way> {
    let way = |with, colour| overlapped(&run, h, with, colour);
    vec![
        way([1.0, 0.0, 0.0], BLUE),
        way([4.0, 0.0, 0.0], GREEN),
        way([8.0, 0.0, 0.0], RED),
        way([4.0, 4.0, 0.0], PINK),
        way([4.0, 4.0, 0.5], ORANGE),
    ]
}

/// With the outer optimizer that lost least in the study of these.
fn slowmo(run: Options, h: u64) -> Vec<Way> {
    let run = Options { outer: Outer::slowmo(), ..run };
    let way = |with, colour| overlapped(&run, h, with, colour);
    vec![way([1.0, 0.0, 0.0], BLUE), way([1.0, 4.0, 0.0], RED), way([4.0, 4.0, 0.0], PINK)]
}

fn codecs(run: Options, h: u64) -> Vec<Way> {
    let way = |name: &str, outer, codec, colour| {
        let run = Options { every: h, outer, codec, ..run.clone() };
        Way { name: format!("{name}, H {h}"), run, colour }
    };
    vec![
        way("mean", Outer::mean(), Codec::Full, BLUE),
        way("mean, int8", Outer::mean(), Codec::Int8, GREEN),
        way("DiLoCo", Outer::diloco(), Codec::Full, RED),
        way("DiLoCo, bf16", Outer::diloco(), Codec::Bf16, ORANGE),
        way("DiLoCo, int8", Outer::diloco(), Codec::Int8, PINK),
    ]
}

/// Fragments, a delay and a code at once, for slow links: Streaming DiLoCo.
fn streaming(run: Options, h: u64) -> Vec<Way> {
    let way = |outer, codec, with, colour| {
        overlapped(&Options { outer, codec, ..run.clone() }, h, with, colour)
    };
    vec![
        way(Outer::diloco(), Codec::Full, [1.0, 0.0, 0.0], RED),
        way(Outer::diloco(), Codec::Full, [4.0, 4.0, 0.0], ORANGE),
        way(Outer::diloco(), Codec::Int8, [4.0, 4.0, 0.0], PINK),
        way(Outer::slowmo(), Codec::Int8, [4.0, 4.0, 0.0], GREEN),
        way(Outer::mean(), Codec::Int8, [4.0, 4.0, 0.0], BLUE),
    ]
}

fn schedules(run: Options, h: u64) -> Vec<Way> {
    let way = |name: String, every, schedule, cosine, colour| Way {
        name,
        run: Options { every, schedule, cosine, ..run.clone() },
        colour,
    };
    vec![
        way("H = 1".into(), 1, Rule::Every, false, LIGHT_BLUE),
        way(format!("H = {h}"), h, Rule::Every, false, BLUE),
        way("overhead 5 %".into(), h, Rule::Overhead, false, RED),
        way(format!("H = {h}, cosine"), h, Rule::Every, true, GREEN),
        way(format!("QSR from {h}, cosine"), h, Rule::Quadratic, true, PINK),
    ]
}

/// Runs that differ in their seed only.
pub fn kinds(study: Study, task: &str, epochs: f64) -> Vec<Options> {
    let mut kinds: Vec<Options> = vec![one_rank(epochs)];
    for way in lines(study, task, epochs).into_iter().flat_map(|line| line.ways) {
        let is_known = |run: &Options| format!("{run:?}") == format!("{:?}", way.run);
        if !kinds.iter().any(is_known) {
            kinds.push(way.run);
        }
    }
    kinds
}

fn curves(line: &Line, rows: &[Row], x: &dyn Fn(&Row) -> f64) -> Vec<Curve> {
    let last = rows.iter().filter(|row| row.ranks == 4).map(|row| row.step).max().unwrap_or(0);
    let alone = |row: &Row| row.ranks == 1 && row.step <= last;
    let mut curves = vec![Curve::new("1 rank".into(), ONE_RANK, true, rows, &alone, x)];
    for way in &line.ways {
        let keep = |row: &Row| way.is_of(row);
        curves.push(Curve::new(way.name.clone(), way.colour, false, rows, &keep, x));
    }
    curves
}

/// Link of the seconds that are computed: as slow for the transformer as 1 Gbit/s for a model of
/// some 1 million parameters.
const LINK: (&str, f64) = ("0.1 Gbit/s", 0.0125e9);

/// Picture of a record: the loss over steps, over bytes and, of averages that overlap, over
/// seconds.
pub fn svg(study: Study, task: &str, rows: &[Row]) -> Result<String, Box<dyn Error>> {
    let mut text = String::new();
    draw(study, task, rows, &mut text)?;
    Ok(text)
}

fn draw(study: Study, task: &str, rows: &[Row], text: &mut String) -> Drawn {
    let lines = lines(study, task, 0.0);
    let height = TITLE + lines.len() as u32 * (LEGEND + PANEL) + NOTES;
    let root = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let seeds = rows.iter().map(|row| row.seed).max().unwrap_or(0);
    let by = match study {
        Study::Outer => "by outer optimizer and schedule",
        Study::Overlap => "by overlap with training, and by codec",
    };
    let title = format!("{task}: test loss of 4 ranks, {by}");
    root.draw_text(&title, &font(20), (20, 12))?;
    let below = format!("lines: mean of {seeds} seeds; bands: least and most");
    root.draw_text(&below, &font(13), (20, 38))?;

    let (_, mut rest) = root.split_vertically(TITLE);
    let steps = |row: &Row| row.step as f64;
    let sent = |row: &Row| row.bytes_sent / 1e6;
    let step_ms = step_ms(rows);
    let seconds = |row: &Row| row.seconds(step_ms, LINK.1);
    for line in &lines {
        let (area, below) = rest.split_vertically(LEGEND + PANEL);
        rest = below;
        let (top, panels) = area.split_vertically(LEGEND);
        let over = curves(line, rows, &steps);
        for (index, curve) in over.iter().enumerate() {
            let across = (WIDTH as i32 - 20) / over.len() as i32;
            legend(&top, (20 + across * index as i32, 18), 12, curve)?;
        }
        let panels = panels.split_evenly((1, if study == Study::Outer { 2 } else { 3 }));
        panel(&panels[0], (&format!("steps of each rank; {}", line.data), LOSS), &over, false)?;
        let mut averaging = curves(line, rows, &sent);
        averaging.retain(|curve| curve.colour != ONE_RANK);
        panel(&panels[1], ("MB that each rank has sent", LOSS), &averaging, true)?;
        if let Some(panel_of_seconds) = panels.get(2) {
            let x = format!("seconds over {}, computed", LINK.0);
            panel(panel_of_seconds, (&x, LOSS), &curves(line, rows, &seconds), false)?;
        }
    }
    let outer = [
        "DiLoCo: nesterov(0.7, 0.9). MaxText: nesterov(0.3, 0.9). SlowMo: momentum(1, 0.5). EASGD: \
         ease(0.5). An outer optimizer sends nothing more than the mean.",
        "cosine: the learning rate falls to 0 over the run. QSR: H grows with the square of 1 / \
         rate. MB: of a ring, 2 (n - 1) / n times the model for an average.",
        "Between averages, and with EASGD, rank 0's own model is tested. Drawn by \
         adapters/candle/examples/curves.rs.",
    ];
    let computed = format!(
        "Seconds: steps x {step_ms:.2} ms (median of one rank on a core, measured), and for each \
         average its bytes / the link's speed, less the steps of its τ. A computation, not a \
         measurement of a cluster.",
    );
    let overlap = [
        "τ: steps that training goes on while an average is made. P: fragments, averaged one at a \
         time. α: share of the change that a rank does not take over.",
        "int8, bf16: what differences from the last average travel as, with error feedback. MB: of \
         a ring, 2 (n - 1) / n times what is averaged. Colours: see the legends.",
        &computed,
        outer[2],
    ];
    let notes = if study == Study::Outer { &outer[..] } else { &overlap };
    for (index, line) in notes.iter().enumerate() {
        rest.draw_text(line, &font(13), (20, 8 + 20 * index as i32))?;
    }
    root.present()?;
    Ok(())
}

/// Table of the last tests, in Markdown.
pub fn summary(study: Study, task: &str, rows: &[Row]) -> String {
    let mut text = "| data | way | test accuracy, % | test loss | least test loss on the way | \
        steps | averages | MB sent |"
        .to_owned();
    let step_ms = step_ms(rows);
    if study == Study::Overlap {
        write!(text, " s at {}, computed |", LINK.0).expect("a String takes all");
    }
    let columns = text.matches('|').count() - 1;
    writeln!(text, "\n|{}", "---|".repeat(columns)).expect("a String takes all");
    let mut line = |data: &str, name: &str, keep: &dyn Fn(&Row) -> bool| {
        let kept: Vec<&Row> = rows.iter().filter(|row| keep(row)).collect();
        let Some(steps) = kept.iter().map(|row| row.step).max() else { return };
        let last: Vec<&Row> = kept.iter().filter(|row| row.step == steps).copied().collect();
        let least = |last: &Row| {
            let run = kept.iter().filter(|row| row.seed == last.seed);
            run.map(|row| f64::from(row.test_loss)).fold(f64::MAX, f64::min)
        };
        let seconds = |row: &Row| row.seconds(step_ms, LINK.1);
        let seconds = match study {
            Study::Outer => String::new(),
            Study::Overlap => format!(" {} |", shown(&seconds, &last, 1)),
        };
        writeln!(
            text,
            "| {data} | {name} | {} | {} | {} | {steps} | {} | {} |{seconds}",
            shown(&|row| f64::from(row.test_accuracy) * 100.0, &last, 1),
            shown(&|row| f64::from(row.test_loss), &last, 3),
            shown(&least, &last, 3),
            shown(&|row| row.averages as f64, &last, 0),
            shown(&|row| row.bytes_sent / 1e6, &last, 2),
        )
        .expect("a String takes all");
    };
    line("all", "1 rank", &|row| row.ranks == 1);
    for Line { data, ways } in lines(study, task, 0.0) {
        ways.iter().for_each(|way| line(data, &way.name, &|row| way.is_of(row)));
    }
    text
}
