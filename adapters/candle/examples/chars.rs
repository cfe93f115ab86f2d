//! Local SGD with candle on the text of a novel. Prints CSV: loss and accuracy over steps and
//! bytes. `train/mod.rs` has the loop, `train/chars.rs` the model and the data.
//!
//!     cargo run --release -p param-averager-candle --example chars -- --ranks 4 --epochs 20
//!     cargo run --release -p param-averager-candle --example chars -- --ranks 2 --processes

#[allow(dead_code)] // What other examples use.
mod train;

use clap::Parser;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    options: train::Options,
}

fn main() -> Result<(), train::Failure> {
    train::world::main::<train::chars::Chars>(&Cli::parse().options)
}
