//! Pictures of a record: the loss over steps, over bytes, and over the time of three links.

use std::collections::BTreeMap;
use std::error::Error;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::FontFamily;

use super::record::{step_ms, Row, EVERY, LINKS};
use super::{Init, Shards};

pub const WIDTH: u32 = 1080;
/// Name of the axis of losses.
pub const LOSS: &str = "test loss";
const PANEL: u32 = 330;
const TITLE: u32 = 58;
const NOTES: u32 = 74;

/// Colours that are told apart with any kind of colour vision (Okabe and Ito), for each H.
const COLOURS: [RGBColor; 3] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115)];
pub const ONE_RANK: RGBColor = RGBColor(110, 110, 110);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub type Drawn = Result<(), Box<dyn Error>>;

/// Points of one kind of run: x, then mean, least and most of the loss over all seeds.
pub struct Curve {
    label: String,
    pub colour: RGBColor,
    is_dashed: bool,
    points: Vec<(f64, f64, f64, f64)>,
}

impl Curve {
    /// Curve of one run.
    pub fn of_run(label: String, colour: RGBColor, is_dashed: bool, run: &[(f64, f64)]) -> Curve {
        let points = run.iter().map(|&(x, y)| (x, y, y, y)).collect();
        Curve { label, colour, is_dashed, points }
    }

    /// Curve of the rows that `keep` keeps.
    pub fn new(
        label: String,
        colour: RGBColor,
        is_dashed: bool,
        rows: &[Row],
        keep: &dyn Fn(&Row) -> bool,
        x: &dyn Fn(&Row) -> f64,
    ) -> Curve {
        let mut losses: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
        // Without the start, where all are the same, and the end of a last, shorter interval.
        let shown = rows.iter().filter(|row| row.step > 0 && row.step % 64 == 0 && keep(row));
        for row in shown {
            losses.entry(row.step).or_default().push((x(row), f64::from(row.test_loss)));
        }
        let point = |found: &Vec<(f64, f64)>| {
            let losses = || found.iter().map(|&(_, loss)| loss);
            let mean = losses().sum::<f64>() / found.len() as f64;
            (found[0].0, mean, losses().fold(f64::MAX, f64::min), losses().fold(0.0, f64::max))
        };
        Curve { label, colour, is_dashed, points: losses.values().map(point).collect() }
    }
}

/// Picture of the runs of one task with 4 ranks, beside 1 rank.
pub fn svg(task: &str, rows: &[Row]) -> Result<String, Box<dyn Error>> {
    let mut text = String::new();
    draw(task, rows, &mut text)?;
    Ok(text)
}

fn draw(task: &str, rows: &[Row], text: &mut String) -> Drawn {
    let height = TITLE + 3 * PANEL + NOTES;
    let root = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let seeds = rows.iter().map(|row| row.seed).max().unwrap_or(0);
    let title = format!("{task}: test loss of 4 ranks that average every H steps");
    root.draw_text(&title, &font(20), (20, 12))?;
    let below = format!(
        "lines: mean of {seeds} seeds; bands: least and most; solid: data mixed among ranks"
    );
    root.draw_text(&below, &font(13), (20, 38))?;

    let step_ms = step_ms(rows);
    let (_, rest) = root.split_vertically(TITLE);
    let (panels, notes) = rest.split_vertically(3 * PANEL);
    let panels = panels.split_evenly((3, 2));
    let steps = |row: &Row| row.step as f64;
    panel(&panels[0], ("steps of each rank", LOSS), &curves(rows, true, &steps), false)?;
    let sent = |row: &Row| row.bytes_sent / 1e6;
    let mut averaging = curves(rows, false, &sent);
    averaging.retain(|curve| curve.colour != ONE_RANK);
    panel(&panels[1], ("MB that each rank has sent", LOSS), &averaging, true)?;
    for ((link, speed), area) in LINKS.iter().zip(&panels[2..]) {
        let time = |row: &Row| row.seconds(step_ms, *speed);
        let name = format!("seconds over {link}, computed");
        panel(area, (&name, LOSS), &curves(rows, false, &time), false)?;
    }
    for (index, curve) in curves(rows, true, &steps).iter().enumerate() {
        legend(&panels[5], (70, 40 + 26 * index as i32), 15, curve)?;
    }

    let lines = [
        format!(
            "computed time = steps x {step_ms:.3} ms (median time of a step of one rank on one CPU \
             core, measured) + bytes sent / speed of the link;"
        ),
        "a ring: 2 (n - 1) / n times the model for an average. No latency, and nothing overlaps. \
         It is not a measurement of a cluster."
            .to_owned(),
        "Every 64 steps the ranks hold one model, which is tested. Drawn by \
         adapters/candle/examples/curves.rs."
            .to_owned(),
    ];
    for (index, line) in lines.iter().enumerate() {
        notes.draw_text(line, &font(13), (20, 8 + 20 * index as i32))?;
    }
    root.present()?;
    Ok(())
}

pub fn font(size: i32) -> TextStyle<'static> {
    (FontFamily::SansSerif, size).into_text_style(&(WIDTH, WIDTH)).color(&BLACK)
}

/// A number with four decimals at most.
fn short(number: f64) -> String {
    let text = format!("{number:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn curves(rows: &[Row], with_sorted: bool, x: &dyn Fn(&Row) -> f64) -> Vec<Curve> {
    let of = |label: String, colour, is_sorted, keep: &dyn Fn(&Row) -> bool| {
        Curve::new(label, colour, is_sorted, rows, keep, x)
    };
    let plain = |row: &Row| row.init == Init::Seed && !row.processes;
    let last = rows.iter().filter(|row| row.ranks == 4).map(|row| row.step).max().unwrap_or(0);
    let mut curves = vec![of("1 rank".into(), ONE_RANK, false, &|row| {
        row.ranks == 1 && row.step <= last && plain(row)
    })];
    for shards in [Shards::Mixed, Shards::Sorted] {
        let is_sorted = shards == Shards::Sorted;
        for (every, colour) in EVERY.into_iter().zip(COLOURS) {
            let name = if is_sorted { ", each rank its own labels" } else { "" };
            curves.push(of(format!("H = {every}{name}"), colour, is_sorted, &|row| {
                row.ranks == 4 && row.every == every && row.shards == shards && plain(row)
            }));
        }
    }
    curves.retain(|curve| !curve.points.is_empty() && (with_sorted || !curve.is_dashed));
    curves
}

/// Curves over x. `names`: those of x and of y.
pub fn panel(area: &Area, names: (&str, &str), curves: &[Curve], is_log: bool) -> Drawn {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let (mut from, mut to) = (0.0, points().fold(0.0, |most: f64, it| most.max(it.0)));
    if is_log {
        from = points().fold(f64::MAX, |least: f64, it| least.min(it.0)) / 1.5;
        to *= 1.5;
    }
    let low = points().fold(f64::MAX, |least: f64, it| least.min(it.2)) / 1.04;
    let high = points().fold(0.0, |most: f64, it| most.max(it.3)) * 1.04;
    let (low, high) = if points().count() == 0 { (0.1, 1.0) } else { (low, high) };
    let mut builder = ChartBuilder::on(area);
    builder.margin(12).margin_right(24).x_label_area_size(46).y_label_area_size(62);
    macro_rules! series {
        ($x:expr, $y:expr) => {{
            let mut chart = builder.build_cartesian_2d($x, $y)?;
            chart
                .configure_mesh()
                .x_desc(names.0)
                .y_desc(names.1)
                .y_label_formatter(&|loss| short(*loss))
                .x_label_formatter(&|x| short(*x))
                .x_labels(7)
                .y_labels(6)
                .light_line_style(WHITE)
                .label_style(font(13))
                .axis_desc_style(font(14))
                .draw()?;
            for Curve { colour, is_dashed, points, .. } in curves {
                let up = points.iter().map(|&(x, _, _, most)| (x, most));
                let down = points.iter().rev().map(|&(x, _, least, _)| (x, least));
                let band: Vec<_> = up.chain(down).collect();
                chart.draw_series([Polygon::new(band, colour.mix(0.12))])?;
                let mean = points.iter().map(|&(x, mean, _, _)| (x, mean));
                match is_dashed {
                    true => chart.draw_series(DashedLineSeries::new(mean, 6, 4, colour.into()))?,
                    false => chart.draw_series(LineSeries::new(mean, colour.stroke_width(2)))?,
                };
            }
        }};
    }
    let ratio = (low..high).log_scale().base(2.0);
    match (is_log, high / low > 3.0) {
        (true, true) => series!((from..to).log_scale(), ratio),
        (true, false) => series!((from..to).log_scale(), low..high),
        (false, true) => series!(from..to.max(f64::MIN_POSITIVE), ratio),
        (false, false) => series!(from..to.max(f64::MIN_POSITIVE), low..high),
    }
    Ok(())
}

/// A line of the curve's colour, and its label.
pub fn legend(area: &Area, (x, y): (i32, i32), size: i32, curve: &Curve) -> Drawn {
    let pieces: &[(i32, i32)] =
        if curve.is_dashed { &[(0, 12), (18, 30), (36, 44)] } else { &[(0, 44)] };
    for (from, to) in pieces {
        let line = [(x + from, y), (x + to, y)];
        area.draw(&PathElement::new(line, curve.colour.stroke_width(2)))?;
    }
    let middle = font(size).pos(Pos::new(HPos::Left, VPos::Center));
    area.draw_text(&curve.label, &middle, (x + 56, y))?;
    Ok(())
}
