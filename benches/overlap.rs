//! Time that a trainer loses to an average, with overlap and without: `cargo bench --bench
//! overlap`. Two ranks on CPUs, steps of 10 ms, H = 16. With `-- --test`, one round of a small
//! model.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use param_averager::{
    Action, Algorithm, Communicator, Device, LocalSgd, Overlap, ParamAverager, Schedule,
};

const RANKS: usize = 2;
const H: u64 = 16;
const STEP: Duration = Duration::from_millis(10);

/// A trainer's step, in which it uses no parameter.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The core is free, as while a device computes.
    Idle,
    /// The same, and each step takes from 5 to 15 ms.
    Uneven,
    /// The core is free, and the last step of a round takes 40 ms more, on each rank in turn: the
    /// average takes 40 ms, as over a slow link.
    Late,
    /// The core computes, in its registers.
    Busy,
}

const LATE: Duration = Duration::from_millis(40);

impl Step {
    /// Makes step `number` of a rank.
    fn make(self, work: u64, random: &mut u64, rank: usize, number: u64) {
        match self {
            Step::Idle => std::thread::sleep(STEP),
            Step::Late => {
                let is_late = number % H == H - 1 && number / H % 2 == rank as u64;
                std::thread::sleep(STEP + if is_late { LATE } else { Duration::ZERO });
            }
            Step::Uneven => {
                *random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                std::thread::sleep(Duration::from_micros(5000 + (*random >> 33) % 10_001));
            }
            Step::Busy => compute(work),
        }
    }
}

fn compute(work: u64) {
    let mut x = 1.0f64;
    (0..work).for_each(|_| x = black_box(x * 0.999_999 + 1e-9));
}

/// Iterations that take the time of a step.
fn calibrate() -> u64 {
    const TRIAL: u64 = 10_000_000;
    let start = Instant::now();
    compute(TRIAL);
    (TRIAL as f64 * STEP.as_secs_f64() / start.elapsed().as_secs_f64()) as u64
}

/// Seconds of a round of H steps, and seconds of its calls that do not return at once.
struct Round {
    all: f64,
    calls: f64,
}

/// The rounds of one rank after two others.
fn train(
    communicator: Communicator,
    (elements, algorithm, overlap): (usize, Algorithm, Option<Overlap>),
    (step, work): (Step, u64),
    rounds: u64,
    meeting: &Barrier,
) -> Round {
    let rank = communicator.rank();
    let mut random = 7 + rank as u64;
    let mut model = vec![vec![1.0f32; elements / 16]; 16];
    let builder = ParamAverager::builder(communicator).allow_unnamed().algorithm(algorithm);
    let averager = builder.overlap(overlap.unwrap_or_default()).build(&mut model).unwrap();
    let mut sgd = LocalSgd::new(averager, Schedule::every(H)).enabled(overlap.is_some());
    let (mut start, mut calls) = (Instant::now(), 0.0);
    for number in 0..(rounds + 2) * H {
        if number == 2 * H {
            meeting.wait();
            (start, calls) = (Instant::now(), 0.0);
        }
        step.make(work, &mut random, rank, number);
        let call = Instant::now();
        let action = sgd.step(&mut model).unwrap();
        if !matches!(action, Action::Counted { .. } | Action::Alone) {
            calls += call.elapsed().as_secs_f64();
        }
    }
    meeting.wait(); // ends with the slower rank
    let all = start.elapsed().as_secs_f64() / rounds as f64;
    sgd.finish(&mut model).unwrap();
    Round { all, calls: calls / rounds as f64 }
}

fn main() {
    let is_test = std::env::args().any(|argument| argument == "--test");
    let (rounds, turns) = if is_test { (1, 1) } else { (2, 7) };
    let work = calibrate();
    let ways: [(&str, Option<Overlap>); 4] = [
        ("no average", None),
        ("average", Some(Overlap::default())),
        ("overlap", Some(Overlap::default().delay(8))),
        ("4 fragments", Some(Overlap::default().fragments(4).delay(4))),
    ];
    println!(
        "step    algorithm      bytes  way          round, ms  lost, ms  in calls, ms  / average"
    );
    let steps = [(Step::Idle, 64), (Step::Uneven, 64), (Step::Late, 8), (Step::Busy, 64)];
    for (step, mebibytes) in steps {
        for algorithm in [Algorithm::Direct, Algorithm::Ring] {
            let bytes = if is_test { 1 << 20 } else { mebibytes << 20 };
            // All ways take turns.
            let mut all: Vec<Vec<Round>> = ways.iter().map(|_| vec![]).collect();
            for _ in 0..turns {
                for (way, rounds_of) in ways.iter().zip(&mut all) {
                    let meeting = Barrier::new(RANKS);
                    let world = Communicator::from_devices(&[Device::cpu(); RANKS]).unwrap();
                    let options = (bytes / 4, algorithm, way.1);
                    let mut made: Vec<Round> = std::thread::scope(|scope| {
                        let rank = |communicator| {
                            let meeting = &meeting;
                            scope.spawn(move || {
                                train(communicator, options, (step, work), rounds, meeting)
                            })
                        };
                        let ranks: Vec<_> = world.into_iter().map(rank).collect();
                        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
                    });
                    rounds_of.push(made.swap_remove(0));
                }
            }
            let median = |rounds: &mut Vec<Round>, of: fn(&Round) -> f64| {
                rounds.sort_by(|a, b| of(a).total_cmp(&of(b)));
                1e3 * of(&rounds[rounds.len() / 2])
            };
            let rounds: Vec<f64> =
                all.iter_mut().map(|rounds| median(rounds, |round| round.all)).collect();
            for (index, (name, _)) in ways.iter().enumerate() {
                let lost = rounds[index] - rounds[0];
                println!(
                    "{:<7} {:<9} {bytes:>10}  {name:<11}  {:>9.1}  {lost:>8.1}  {:>12.1}  \
                     {:>9.2}",
                    format!("{step:?}"),
                    format!("{algorithm:?}"),
                    rounds[index],
                    median(&mut all[index], |round| round.calls),
                    lost / (rounds[1] - rounds[0]),
                );
            }
        }
    }
}
