//! Costs and savings of H: trains both tasks with many settings and 5 seeds, writes every test to
//! `DIR/digits.csv` and `DIR/chars.csv`, and draws `DIR/digits.svg` and `DIR/chars.svg`.
//!
//!     cargo run --release -p param-averager-candle --example curves -- all DIR
//!
//! `outer DIR` does the same with outer optimizers, and `overlap DIR` with averages that overlap
//! with training. Runs that the record has are not made again.

mod train;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand, ValueEnum};
use train::outer::Study;
use train::record::{kinds, one_rank, summary, Row};
use train::{chars::Chars, digits::Digits, outer, plot, telemetry, world};
use train::{Failure, Options, Point, Task};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Train, and write the rows and the pictures
    All {
        /// Folder of the record
        folder: PathBuf,
        #[arg(long, default_value_t = 5)]
        seeds: u64,
        /// Passes over the digits
        #[arg(long, default_value_t = 30.0)]
        digits_epochs: f64,
        /// Passes over the text
        #[arg(long, default_value_t = 3.6)]
        chars_epochs: f64,
    },
    /// Draw the pictures of a record again
    Draw {
        /// Folder of the record
        folder: PathBuf,
    },
    /// Train with outer optimizers and without, and write the rows and the pictures
    Outer {
        /// Folder of the record
        folder: PathBuf,
        #[arg(long, default_value_t = 5)]
        seeds: u64,
        /// Passes over the digits; 0: only the text
        #[arg(long, default_value_t = 60.0)]
        digits_epochs: f64,
        /// Passes over the text; 0: only the digits
        #[arg(long, default_value_t = 3.6)]
        chars_epochs: f64,
        /// Draw the pictures of a record again
        #[arg(long)]
        draw: bool,
    },
    /// Train with averages that overlap with training, and write the rows and the pictures
    Overlap {
        /// Folder of the record
        folder: PathBuf,
        #[arg(long, default_value_t = 5)]
        seeds: u64,
        /// Passes over the digits; 0: only the text
        #[arg(long, default_value_t = 60.0)]
        digits_epochs: f64,
        /// Passes over the text; 0: only the digits
        #[arg(long, default_value_t = 3.6)]
        chars_epochs: f64,
        /// Draw the picture of a record again
        #[arg(long)]
        draw: bool,
    },
    /// Train on the digits with telemetry, and write a file for each run and a picture
    Telemetry {
        /// Folder of the record
        folder: PathBuf,
        /// Passes over the digits
        #[arg(long, default_value_t = 60.0)]
        epochs: f64,
        /// Draw the picture of a record again
        #[arg(long)]
        draw: bool,
    },
    /// One run on the digits
    Digits(Options),
    /// One run on the text
    Chars(Options),
}

fn main() -> Result<(), Failure> {
    match Cli::parse().what {
        What::All { folder, seeds, digits_epochs, chars_epochs } => {
            std::fs::create_dir_all(&folder)?;
            record::<Digits>(&folder, seeds, kinds(Digits::NAME, digits_epochs))?;
            draw::<Digits>(&folder)?;
            record::<Chars>(&folder, seeds, kinds(Chars::NAME, chars_epochs))?;
            draw::<Chars>(&folder)
        }
        What::Draw { folder } => draw::<Digits>(&folder).and(draw::<Chars>(&folder)),
        What::Outer { folder, seeds, digits_epochs, chars_epochs, draw } => {
            studies(Study::Outer, &folder, seeds, [digits_epochs, chars_epochs], draw)
        }
        What::Overlap { folder, seeds, digits_epochs, chars_epochs, draw } => {
            studies(Study::Overlap, &folder, seeds, [digits_epochs, chars_epochs], draw)
        }
        What::Telemetry { folder, epochs, draw } => {
            std::fs::create_dir_all(&folder)?;
            for (name, _, run) in telemetry::runs(epochs).into_iter().filter(|_| !draw) {
                let file = folder.join(format!("{}-{name}.csv", Digits::NAME));
                let run = Options { telemetry: Some(file), ..run };
                world::run::<Digits>(&run, &arguments(Digits::NAME, &run))?;
            }
            let picture = telemetry::svg(Digits::NAME, &folder);
            let picture = picture.map_err(|error| error.to_string())?;
            Ok(std::fs::write(folder.join("telemetry.svg"), picture)?)
        }
        What::Digits(options) => world::main::<Digits>(&options),
        What::Chars(options) => world::main::<Chars>(&options),
    }
}

/// First line of a record.
fn columns() -> Result<String, Failure> {
    let mut line = csv::Writer::from_writer(vec![]);
    line.serialize(Row::new("", &one_rank(1.0), &Point::default()))?;
    let line = String::from_utf8(line.into_inner().map_err(|error| error.to_string())?)?;
    Ok(line.lines().next().unwrap_or_default().to_owned())
}

/// Makes the runs that the record lacks, and adds their rows.
fn record<T: Task>(folder: &Path, seeds: u64, kinds: Vec<Options>) -> Result<(), Failure> {
    let file = folder.join(format!("{}.csv", T::NAME));
    let known = if file.exists() { rows::<T>(folder)? } else { vec![] };
    let is_of = |row: &Row, kind: &Options| {
        let run = Options { seed: row.seed, ..kind.clone() };
        row.is_of_run(&Row::new(T::NAME, &run, &Point::default()))
    };
    let is_of_another = |row: &Row| !kinds.iter().any(|kind| is_of(row, kind));
    let has_columns = || -> Result<bool, Failure> {
        Ok(std::fs::read_to_string(&file)?.lines().next() == Some(&columns()?))
    };
    if known.iter().any(is_of_another) || (!known.is_empty() && !has_columns()?) {
        let file = file.display();
        return Err(format!("{file} has other runs, or other columns: name another folder").into());
    }
    let added = std::fs::OpenOptions::new().create(true).append(true).open(file)?;
    let mut added = csv::WriterBuilder::new().has_headers(known.is_empty()).from_writer(added);
    for seed in 1..=seeds {
        for kind in &kinds {
            let run = Options { seed, ..kind.clone() };
            if known.iter().any(|row| row.is_of_run(&Row::new(T::NAME, &run, &Point::default()))) {
                continue;
            }
            let start = std::time::Instant::now();
            for point in world::run::<T>(&run, &arguments(T::NAME, &run))? {
                added.serialize(Row::new(T::NAME, &run, &point))?;
            }
            added.flush()?;
            eprintln!("{:.1} s: {} {run:?}", start.elapsed().as_secs_f64(), T::NAME);
        }
    }
    Ok(())
}

/// Command line of a rank that is a process.
fn arguments(task: &str, run: &Options) -> Vec<String> {
    let Options { every, epochs, seed, .. } = run;
    let line =
        format!("{task} --every {every} --epochs {epochs} --seed {seed} --ranks {}", run.ranks);
    let outer = ["--outer".to_owned(), run.outer.to_string()];
    let Options { fragments, delay, alpha, codec, .. } = run;
    let codec = codec.to_possible_value().expect("each has a name");
    let overlap = format!(
        "--fragments {fragments} --delay {delay} --alpha {alpha} --codec {}",
        codec.get_name()
    );
    [&line, &overlap]
        .iter()
        .flat_map(|line| line.split(' '))
        .map(str::to_owned)
        .chain(outer)
        .collect()
}

fn studies(
    of: Study,
    folder: &Path,
    seeds: u64,
    [digits, chars]: [f64; 2],
    draw: bool,
) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)?;
    if digits > 0.0 {
        study::<Digits>(of, folder, seeds, digits, draw)?;
    }
    match chars {
        0.0 => Ok(()),
        epochs => study::<Chars>(of, folder, seeds, epochs, draw),
    }
}

fn study<T: Task>(
    study: Study,
    folder: &Path,
    seeds: u64,
    epochs: f64,
    only_draw: bool,
) -> Result<(), Failure> {
    if !only_draw {
        record::<T>(folder, seeds, outer::kinds(study, T::NAME, epochs))?;
    }
    let rows = rows::<T>(folder)?;
    write::<T>(folder, outer::svg(study, T::NAME, &rows), outer::summary(study, T::NAME, &rows))
}

fn draw<T: Task>(folder: &Path) -> Result<(), Failure> {
    let rows = rows::<T>(folder)?;
    write::<T>(folder, plot::svg(T::NAME, &rows), summary(&rows))
}

fn rows<T: Task>(folder: &Path) -> Result<Vec<Row>, Failure> {
    let file = folder.join(format!("{}.csv", T::NAME));
    Ok(csv::Reader::from_path(file)?.deserialize().collect::<Result<_, _>>()?)
}

fn write<T: Task>(
    folder: &Path,
    picture: Result<String, Box<dyn std::error::Error>>,
    table: String,
) -> Result<(), Failure> {
    let file = |ending: &str| folder.join(format!("{}.{ending}", T::NAME));
    std::fs::write(file("svg"), picture.map_err(|error| error.to_string())?)?;
    std::fs::write(file("md"), &table)?;
    println!("{table}");
    Ok(())
}
