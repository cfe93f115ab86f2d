//! Cost of telemetry in an average on CPUs: `cargo bench --bench telemetry`. Averages with and
//! without it take turns, and each line has the median of the ratios of neighbouring turns. With
//! `-- --test`, one turn of each.

#[path = "common/ranks.rs"]
mod ranks;

use std::time::Duration;

use param_averager::Algorithm;
use ranks::Ranks;

/// Bytes of f32 of each rank.
const SIZES: [usize; 5] = [16 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20];
const TURNS: usize = 41;
const TURN: Duration = Duration::from_millis(30);

fn main() {
    let is_test = std::env::args().any(|argument| argument == "--test");
    println!("ranks  algorithm      bytes  without, us  with, us  ratio  quarters");
    for n in [2, 4] {
        for algorithm in [Algorithm::Direct, Algorithm::Ring] {
            for bytes in SIZES {
                let layout = vec![bytes / 4 / 16; 16];
                let ranks = |telemetry| {
                    Ranks::new(n, &layout, move |builder| {
                        builder.algorithm(algorithm).telemetry(telemetry)
                    })
                };
                let (without, with) = (ranks(false), ranks(true));
                let once = without.time(1).max(with.time(1)).max(Duration::from_nanos(1));
                let count = (TURN.as_nanos() / once.as_nanos()).clamp(1, 100_000) as u64;
                let count = if is_test { 1 } else { count };
                let mut turns: Vec<(f64, f64)> = (0..if is_test { 1 } else { TURNS })
                    .map(|_| {
                        let per = |ranks: &Ranks| ranks.time(count).as_secs_f64() / count as f64;
                        (per(&without), per(&with))
                    })
                    .collect();
                let middle = |turns: &mut Vec<(f64, f64)>, of: fn(&(f64, f64)) -> f64, at: f64| {
                    turns.sort_by(|a, b| of(a).total_cmp(&of(b)));
                    of(&turns[((turns.len() - 1) as f64 * at) as usize])
                };
                let ratio = |turn: &(f64, f64)| turn.1 / turn.0;
                println!(
                    "{n:>5}  {:<9} {bytes:>10}  {:>11.1}  {:>8.1}  {:>5.3}  {:.3} to {:.3}",
                    format!("{algorithm:?}"),
                    1e6 * middle(&mut turns, |turn| turn.0, 0.5),
                    1e6 * middle(&mut turns, |turn| turn.1, 0.5),
                    middle(&mut turns, ratio, 0.5),
                    middle(&mut turns, ratio, 0.25),
                    middle(&mut turns, ratio, 0.75),
                );
            }
        }
    }
}
