//! Cost of telemetry in an average on CPUs: `cargo bench --bench telemetry`. Averages with and
//! without it take turns, and each line has the median of the ratios of neighbouring turns. With
//! `-- --test`, one turn of each.

#[path = "common/ranks.rs"]
mod ranks;
#[path = "common/turns.rs"]
mod turns;

use param_averager::Algorithm;
use ranks::Ranks;
use turns::Turns;

/// Bytes of f32 of each rank.
const SIZES: [usize; 5] = [16 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20];

fn main() {
    let is_test = std::env::args().any(|argument| argument == "--test");
    println!("ranks  algorithm      bytes  {}", Turns::HEAD);
    for n in [2, 4] {
        for algorithm in [Algorithm::Direct, Algorithm::Ring] {
            for bytes in SIZES {
                let layout = vec![bytes / 4 / 16; 16];
                let ranks = |telemetry| {
                    Ranks::new(n, &layout, move |builder| {
                        builder.algorithm(algorithm).telemetry(telemetry)
                    })
                };
                let turns = Turns::measure(&ranks(false), &ranks(true), is_test);
                println!("{n:>5}  {:<9} {bytes:>10}  {turns}", format!("{algorithm:?}"));
            }
        }
    }
}
