//! `--plot`: the rows as an SVG picture, with a panel for each section. A sweep of sizes has a line
//! for each row, bandwidth over size; a model has a bar for each row, beside the limit's.

use std::error::Error;
use std::io::{self, Write};

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::FontFamily;

use crate::record::{Details, Record};
use crate::rows::Row;

const WIDTH: u32 = 960;
/// Heights of a title, of a panel of lines, and of a bar with the gap after it.
const TITLE: u32 = 44;
const LINES: u32 = 400;
const BAR: u32 = 30;
/// Left end of bars, and of the figures right of them.
const LEFT: i32 = 210;
const FIGURES: i32 = 730;

/// Colours that are told apart with any kind of colour vision (Okabe and Ito), in turn with
/// markers.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

/// Writes a picture of the records.
pub fn svg(records: &[Record], file: &mut dyn Write) -> io::Result<()> {
    let mut text = String::new();
    draw(records, &mut text).map_err(|error| io::Error::other(error.to_string()))?;
    file.write_all(text.as_bytes())
}

fn draw(records: &[Record], text: &mut String) -> Drawn {
    // A panel of one layout, dtype and number of ranks; of flat buffers, all sizes.
    let key = |r: &Record| (r.layout.name.clone(), r.layout.dtype_name(), r.ranks);
    let panels: Vec<&[Record]> = records.chunk_by(|a, b| key(a) == key(b)).collect();
    let height = |panel: &&[Record]| match has_sizes(panel) {
        true => LINES,
        false => TITLE + BAR * panel.len() as u32 + 34,
    };
    let all: u32 = panels.iter().map(height).sum();
    let root = SVGBackend::with_string(text, (WIDTH, all + 40)).into_drawing_area();
    root.fill(&WHITE)?;
    let note = "median times; bandwidth is size / time in GB/s (10^9 bytes); written by \
                allreduce-bench --plot";
    root.draw_text(note, &font(12), (16, all as i32 + 14))?;
    let mut rest = root.clone();
    for panel in panels {
        let (area, below) = rest.split_vertically(height(&panel));
        rest = below;
        if has_sizes(panel) {
            lines(&area, panel)?;
        } else {
            bars(&area, panel)?;
        }
    }
    root.present()?;
    Ok(())
}

fn font(size: i32) -> TextStyle<'static> {
    (FontFamily::SansSerif, size).into_text_style(&(WIDTH, WIDTH)).color(&BLACK)
}

/// True for a sweep.
fn has_sizes(panel: &[Record]) -> bool {
    panel.iter().any(|record| record.layout.bytes() != panel[0].layout.bytes())
}

fn title(panel: &[Record]) -> String {
    let Record { layout, ranks, .. } = &panel[0];
    let (name, on) = (&layout.name, format!("{}, {ranks} ranks", layout.dtype_name()));
    if has_sizes(panel) {
        return format!("Bandwidth over size: {name} buffers, {on}");
    }
    let (tensors, size) = (layout.tensors.len(), shown(layout.bytes() as f64));
    let tensors = format!("{tensors} tensor{}", if tensors == 1 { "" } else { "s" });
    format!("Time of an average (ms): {name}, {tensors}, {size}, {on}")
}

/// Bytes in powers of 1024.
fn shown(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = ((bytes.max(1.0).log2() / 10.0) as usize).min(4);
    let number = bytes / 1024f64.powi(power as i32);
    let decimals = usize::from(number < 10.0 && number.fract() > 0.05);
    format!("{number:.decimals$} {}", units[power])
}

fn lines(area: &Area, panel: &[Record]) -> Drawn {
    let of = |value: fn(f64, f64) -> f64, first: f64, each: &dyn Fn(&Record) -> Option<f64>| {
        panel.iter().filter_map(each).fold(first, value)
    };
    let size = |record: &Record| Some(record.layout.bytes() as f64);
    let (least, most) = (of(f64::min, f64::MAX, &size), of(f64::max, 1.0, &size));
    let top = of(f64::max, 1e-3, &Record::algbw) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .caption(title(panel), font(17))
        .margin(14)
        .margin_right(220)
        .x_label_area_size(46)
        .y_label_area_size(60)
        .build_cartesian_2d((least..most).log_scale().base(2.0), 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("size of a rank's parameters")
        .y_desc("algbw (GB/s)")
        .x_labels(8)
        .x_label_formatter(&|bytes| shown(*bytes))
        .light_line_style(WHITE)
        .label_style(font(12))
        .axis_desc_style(font(13))
        .draw()?;
    let mut rows: Vec<Row> = vec![];
    for record in panel {
        if !rows.contains(&record.row) {
            rows.push(record.row);
        }
    }
    for (index, row) in rows.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let points = panel.iter().filter(|record| record.row == *row);
        let points = points.filter_map(|record| Some((size(record)?, record.algbw()?)));
        let points: Vec<(f64, f64)> = points.collect();
        let line = colour.stroke_width(2);
        chart.draw_series(LineSeries::new(points.clone(), line).point_size(3))?;
        // Names beside the picture, where no line is.
        let (x, y) = (WIDTH as i32 - 200, 60 + 22 * index as i32);
        area.draw(&PathElement::new([(x, y), (x + 22, y)], line))?;
        area.draw_text(
            &row.label(),
            &font(13).pos(Pos::new(HPos::Left, VPos::Center)),
            (x + 28, y),
        )?;
    }
    Ok(())
}

fn bars(area: &Area, panel: &[Record]) -> Drawn {
    area.draw_text(&title(panel), &font(17), (16, 14))?;
    let ms = |record: &Record| record.time().map(|time| time.as_secs_f64() * 1e3);
    let most = panel.iter().filter_map(ms).fold(1e-6, f64::max);
    let width = |ms: f64| (ms / most * f64::from(FIGURES - 12 - LEFT)) as i32;
    let bottom = (TITLE + BAR * panel.len() as u32) as i32;
    let processes = matches!(panel[0].details, Details::Processes { .. });
    let yardstick = if processes { "threads" } else { "limit" };
    let middle = |h| font(13).pos(Pos::new(h, VPos::Center));
    for (index, record) in panel.iter().enumerate() {
        let top = TITLE as i32 + index as i32 * BAR as i32;
        let y = top + BAR as i32 / 2 - 3;
        area.draw_text(&record.row.label(), &middle(HPos::Right), (LEFT - 10, y))?;
        let Some(ms) = ms(record) else {
            area.draw_text("not measured", &middle(HPos::Left), (FIGURES, y))?;
            continue;
        };
        let colour = COLOURS[if record.row.is_baseline() { 4 } else { 0 }];
        let bar = [(LEFT, top), (LEFT + width(ms), top + BAR as i32 - 6)];
        area.draw(&Rectangle::new(bar, colour.filled()))?;
        let decimals = [1.0, 100.0].iter().filter(|&&bound| ms < bound).count();
        let ratio = record.ratio().map_or(String::new(), |x| format!(" = {x:.2} x {yardstick}"));
        let algbw = record.algbw().map_or(String::new(), |algbw| format!(", {algbw:.1} GB/s"));
        let text = format!("{ms:.decimals$} ms{ratio}{algbw}");
        area.draw_text(&text, &middle(HPos::Left), (FIGURES, y))?;
    }
    if let Some(limit) = panel[0].yardstick {
        let x = LEFT + width(limit.as_secs_f64() * 1e3);
        let line = PathElement::new([(x, TITLE as i32 - 4), (x, bottom)], RED.stroke_width(1));
        area.draw(&line)?;
        let below = font(12).pos(Pos::new(HPos::Center, VPos::Top));
        area.draw_text(&format!("the {yardstick}'s time"), &below, (x, bottom))?;
    }
    Ok(())
}
