//! Costs and savings of H: trains both tasks with many settings and 5 seeds, writes every test to
//! `DIR/digits.csv` and `DIR/chars.csv`, and draws `DIR/digits.svg` and `DIR/chars.svg`.
//!
//!     cargo run --release -p param-averager-candle --example curves -- DIR

mod train;

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use train::record::{kinds, summary, Row};
use train::{chars::Chars, digits::Digits, plot, world, Failure, Options, Task};

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
    /// One run on the digits
    Digits(Options),
    /// One run on the text
    Chars(Options),
}

fn main() -> Result<(), Failure> {
    match Cli::parse().what {
        What::All { folder, seeds, digits_epochs, chars_epochs } => {
            std::fs::create_dir_all(&folder)?;
            record::<Digits>(&folder, seeds, digits_epochs)?;
            draw::<Digits>(&folder)?;
            record::<Chars>(&folder, seeds, chars_epochs)?;
            draw::<Chars>(&folder)
        }
        What::Draw { folder } => draw::<Digits>(&folder).and(draw::<Chars>(&folder)),
        What::Digits(options) => world::main::<Digits>(&options),
        What::Chars(options) => world::main::<Chars>(&options),
    }
}

fn record<T: Task>(folder: &std::path::Path, seeds: u64, epochs: f64) -> Result<(), Failure> {
    let mut rows = csv::Writer::from_path(folder.join(format!("{}.csv", T::NAME)))?;
    for seed in 1..=seeds {
        for kind in kinds(T::NAME, epochs) {
            let run = Options { seed, ..kind };
            let start = std::time::Instant::now();
            for point in world::run::<T>(&run, &arguments(T::NAME, &run))? {
                rows.serialize(Row::new(T::NAME, &run, &point))?;
            }
            eprintln!("{:.1} s: {} {run:?}", start.elapsed().as_secs_f64(), T::NAME);
        }
    }
    Ok(rows.flush()?)
}

/// Command line of a rank that is a process.
fn arguments(task: &str, run: &Options) -> Vec<String> {
    let Options { every, epochs, seed, .. } = run;
    let line =
        format!("{task} --every {every} --epochs {epochs} --seed {seed} --ranks {}", run.ranks);
    line.split(' ').map(str::to_owned).collect()
}

fn draw<T: Task>(folder: &std::path::Path) -> Result<(), Failure> {
    let file = |ending: &str| folder.join(format!("{}.{ending}", T::NAME));
    let rows: Vec<Row> =
        csv::Reader::from_path(file("csv"))?.deserialize().collect::<Result<_, _>>()?;
    let picture = plot::svg(T::NAME, &rows).map_err(|error| error.to_string())?;
    std::fs::write(file("svg"), picture)?;
    std::fs::write(file("md"), summary(&rows))?;
    println!("{}", summary(&rows));
    Ok(())
}
