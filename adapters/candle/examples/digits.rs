//! Local SGD with candle on scikit-learn's digits. Prints CSV: loss and accuracy over steps and
//! bytes. `train/mod.rs` has the loop, `train/digits.rs` the model and the data.
//!
//!     cargo run --release -p param-averager-candle --example digits -- --ranks 4 --epochs 20
//!     cargo run --release -p param-averager-candle --example digits -- --ranks 2 --processes

#[allow(dead_code)] // What other examples use.
mod train;

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    options: train::Options,
}

fn main() -> Result<(), train::Failure> {
    train::world::main::<train::digits::Digits>(&Cli::parse().options)
}
