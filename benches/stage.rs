//! Cost of an empty stage in an average on CPUs by the ring: `cargo bench --bench stage`. Averages
//! with and without it take turns, and each line has the median of the ratios of neighbouring
//! turns. With `-- --test`, one turn of each.

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
    println!("ranks  not finite      bytes  {}", Turns::HEAD);
    for n in [2, 4] {
        for rejects in [true, false] {
            for bytes in SIZES {
                let layout = vec![bytes / 4 / 16; 16];
                let ranks = |has_stage: bool| {
                    Ranks::new(n, &layout, move |builder| {
                        let builder = builder.algorithm(Algorithm::Ring).reject_non_finite(rejects);
                        if has_stage {
                            builder.stage(|_| Ok(()))
                        } else {
                            builder
                        }
                    })
                };
                let turns = Turns::measure(&ranks(false), &ranks(true), is_test);
                let not_finite = if rejects { "rejected" } else { "accepted" };
                println!("{n:>5}  {not_finite:<10} {bytes:>10}  {turns}");
            }
        }
    }
}
