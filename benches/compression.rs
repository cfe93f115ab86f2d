//! Cost and error of compression on CPUs: `cargo bench --bench compression`. Averages in full, in
//! bf16 and in int8 take turns, and each line has the median of the ratios of neighbouring turns to
//! those in full. With `-- --test`, one turn of each, and small models.

#[path = "common/ranks.rs"]
mod ranks;

use std::time::Duration;

use param_averager::{Algorithm, Communicator, Compression, Device, ParamAverager};
use ranks::Ranks;

const CODES: [Compression; 3] = [Compression::None, Compression::Bf16, Compression::Int8];
/// Bytes of f32 of each rank.
const SIZES: [usize; 2] = [16 << 20, 64 << 20];
const TURNS: usize = 21;
const TURN: Duration = Duration::from_millis(100);
/// Averages after which the error is taken, the first time and the last.
const ROUNDS: u32 = 20;

fn main() {
    let is_test = std::env::args().any(|argument| argument == "--test");
    println!(
        "ranks      bytes  code   bytes an element  average, us  ratio  quarters        error of \
         the largest difference, after 1 and {ROUNDS}"
    );
    for n in [2, 4] {
        for bytes in SIZES {
            let bytes = if is_test { bytes >> 8 } else { bytes };
            let times = times(n, bytes, is_test);
            for (code, times) in CODES.into_iter().zip(&times) {
                let mut ratios: Vec<(f64, f64)> =
                    times.iter().map(|&(full, own)| (own / full, own)).collect();
                ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
                let mut own: Vec<f64> = times.iter().map(|times| times.1).collect();
                own.sort_by(f64::total_cmp);
                let at = |share: f64| ((times.len() - 1) as f64 * share) as usize;
                let (first, last) = errors(n, bytes / 4, code);
                println!(
                    "{n:>5} {bytes:>10}  {:<5}  {:>16.3}  {:>11.0}  {:>5.2}  {:.2} to {:.2}  \
                     {first:>12.2e} {last:.2e}",
                    format!("{code:?}"),
                    4.0 * code.ratio(),
                    1e6 * own[at(0.5)],
                    ratios[at(0.5)].0,
                    ratios[at(0.25)].0,
                    ratios[at(0.75)].0,
                );
            }
        }
    }
}

/// Seconds of an average in full, and with each code, of neighbouring turns.
fn times(n: usize, bytes: usize, is_test: bool) -> Vec<Vec<(f64, f64)>> {
    let layout = vec![bytes / 4 / 16; 16];
    let all = CODES.map(|code| {
        Ranks::new(n, &layout, move |builder| builder.algorithm(Algorithm::Ring).compression(code))
    });
    let once = all.iter().map(|ranks| ranks.time(2) / 2).max().unwrap();
    let count = (TURN.as_nanos() / once.as_nanos().max(1)).clamp(1, 10_000) as u64;
    let (turns, count) = if is_test { (1, 1) } else { (TURNS, count) };
    let per = |ranks: &Ranks| ranks.time(count).as_secs_f64() / count as f64;
    let mut times = vec![vec![]; CODES.len()];
    for _ in 0..turns {
        let turn = all.each_ref().map(per);
        times.iter_mut().zip(turn).for_each(|(times, own)| times.push((turn[0], own)));
    }
    times
}

/// Number from 0 to 1 of an element of a rank.
fn number(rank: usize, element: usize) -> f32 {
    let key = (rank as u64 + 1) << 40 | element as u64;
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 40) as f32 / (1u64 << 24) as f32
}

/// How far a rank moves an element in each round: from -1 to 1, many near 0, as gradients are.
fn way(rank: usize, element: usize) -> f32 {
    let number = 2.0 * number(rank, element) - 1.0;
    number * number * number
}

/// The largest error of an element after one average, and after some, of ranks that move by the
/// same way each time; as a part of the largest way.
fn errors(n: usize, elements: usize, code: Compression) -> (f64, f64) {
    let found = Communicator::run(&vec![Device::cpu(); n], |communicator| {
        let rank = communicator.rank();
        let mut model = vec![0.0f32; elements];
        let builder = ParamAverager::builder(communicator).algorithm(Algorithm::Ring);
        let mut averager = builder.compression(code).build(&mut model)?;
        let mut errors = vec![];
        for round in 1..=ROUNDS {
            model.iter_mut().enumerate().for_each(|(i, x)| *x += way(rank, i));
            averager.average(&mut model)?;
            if rank == 0 && (round == 1 || round == ROUNDS) {
                let mean = |i| (0..n).map(|rank| f64::from(way(rank, i))).sum::<f64>() / n as f64;
                let error = |(i, x): (usize, &f32)| f64::from(*x) - f64::from(round) * mean(i);
                errors.push(model.iter().enumerate().map(error).fold(0.0, |m, e| e.abs().max(m)));
            }
        }
        Ok::<_, param_averager::Error>(errors)
    });
    let errors = &found.expect("averages")[0]; // the largest way is 1, all but
    (errors[0], errors[1])
}
