//! Role of a rank with an outer optimizer, in a world that loses ranks and gets new ones: the value
//! of each element after a step tells the velocity that the step was made with.

use std::time::Duration;

use param_averager::*;

use super::model::Tensors;
use super::worker::{builder, device, is_late, join, number, say};
use crate::Random;

const LR: f32 = 0.5;
const MU: f32 = 0.75;
const SIZES: [usize; 3] = [3001, 7, 1500];

/// Values of a rank in a round: small integers, so that their sums are exact.
fn values(origin: u32, round: u64) -> Vec<Vec<f32>> {
    let mut random = Random(round << 8 | u64::from(origin));
    let tensor = |size| (0..size).map(|_| random.below(64) as f32).collect();
    SIZES.into_iter().map(tensor).collect()
}

/// Values that all ranks have after a recovery.
fn base(round: u64) -> Vec<Vec<f32>> {
    values(99, round)
}

/// Velocity and outer parameters after a step from a mean; Nesterov's, operation by operation as in
/// kernels/stage.h.
fn step(anchor: f32, velocity: f32, mean: f32) -> (f32, f32) {
    let delta = anchor - mean;
    let velocity = velocity * MU + delta;
    (velocity, anchor - (delta + velocity * MU) * LR)
}

/// The outer optimizer's state of the whole model, as this process expects it.
struct Expected {
    anchor: Vec<f32>,
    /// Several after a failure: the average that failed may have made its step, on all ranks that
    /// are left or on none.
    histories: Vec<History>,
}

/// The velocity after a sequence of steps, the same for all elements, but for those that a lost
/// rank had.
#[derive(Clone)]
struct History {
    velocity: Vec<f32>,
    /// Velocities of elements that were lost, by the recovery in which they began at 0.
    of_lost: Vec<Vec<f32>>,
    /// Velocities of elements whose rank was lost before it had made the last step, and whose state
    /// was not.
    of_late: Vec<Vec<f32>>,
}

fn is_shared() -> bool {
    number("PA_TEST_SHARES") == Some(1)
}

fn flat(model: &[Vec<f32>]) -> Vec<f32> {
    model.concat()
}

/// Mean of the values of the ranks in a mask.
fn mean(members: u64, round: u64) -> Vec<f32> {
    let of = |origin| flat(&values(origin, round));
    let all: Vec<Vec<f32>> = (0..64).filter(|bit| members >> bit & 1 == 1).map(of).collect();
    (0..all[0].len())
        .map(|i| all.iter().map(|values| values[i]).sum::<f32>() / all.len() as f32)
        .collect()
}

impl Expected {
    fn new(anchor: Vec<f32>) -> Self {
        let velocity = vec![0.0; anchor.len()];
        let history = History { velocity, of_lost: vec![], of_late: vec![] };
        Expected { anchor, histories: vec![history] }
    }

    /// Checks the result of a step, and learns from it which history was the one. Returns the share
    /// of elements that were lost. `tolerance`: largest error of the result, where it is known as a
    /// difference only.
    fn check(&mut self, model: Vec<f32>, members: u64, round: u64, tolerance: f32) -> f64 {
        let mean = mean(members, round);
        let made = |velocity: f32, i: usize| step(self.anchor[i], velocity, mean[i]);
        let fits =
            |velocities: &[f32], i: usize| (made(velocities[i], i).1 - model[i]).abs() <= tolerance;
        // For each element the velocity that fits and, where another one fits as well, since the
        // two differ by less than the model's rounding, that one too.
        let explain = |history: &History| {
            let one = |i: usize| {
                let fitting = |all: &[Vec<f32>]| {
                    all.iter().rfind(|other| fits(other, i)).map(|other| other[i])
                };
                let late = fitting(&history.of_late);
                let kept = fitting(std::slice::from_ref(&history.velocity)).or(late);
                let other = fitting(&history.of_lost).or(late); // 0 is the last one
                let velocity = kept.or(other)?;
                let other = other.unwrap_or(velocity);
                Some((made(velocity, i).0, made(other, i).0, kept.is_some()))
            };
            (0..model.len()).map(one).collect::<Option<Vec<(f32, f32, bool)>>>()
        };
        let Some(found) = self.histories.iter().find_map(explain) else {
            let first = &self.histories[0].velocity;
            let wrong = (0..model.len()).find(|&i| !fits(first, i));
            panic!("round {round}, members {members:b}: element {wrong:?} and others fit none");
        };
        let lost = found.iter().filter(|(_, _, is_kept)| !is_kept).count();
        let velocity = found.iter().map(|(velocity, ..)| *velocity).collect();
        let other = found.iter().map(|(_, other, _)| *other).collect();
        self.histories = vec![History { velocity, of_lost: vec![other], of_late: vec![] }];
        self.anchor = model;
        lost as f64 / found.len() as f64
    }

    /// An average that failed may have made its step.
    fn failed(&mut self, members: u64, round: u64) {
        let mean = mean(members, round);
        let after = |velocities: &Vec<f32>| {
            (0..mean.len()).map(|i| step(self.anchor[i], velocities[i], mean[i]).0).collect()
        };
        let made = |history: &History| History {
            velocity: after(&history.velocity),
            of_lost: history.of_lost.iter().map(after).collect(),
            of_late: match is_shared() {
                true => {
                    history.of_late.iter().map(after).chain([history.velocity.clone()]).collect()
                }
                false => vec![],
            },
        };
        let made: Vec<History> = self.histories.iter().map(made).collect();
        self.histories.extend(made);
    }

    fn recovered(&mut self) {
        for history in &mut self.histories {
            history.of_lost.push(vec![0.0; self.anchor.len()]);
        }
    }
}

fn digest(model: &[Vec<f32>]) -> u64 {
    let mix = |hash: u64, value: &f32| (hash ^ u64::from(value.to_bits())).wrapping_mul(0x100_0193);
    model.iter().flatten().fold(0xcbf2_9ce4, mix)
}

/// Role: averages with Nesterov's momentum and checks every element, until `PA_TEST_ROUNDS` rounds
/// have had `PA_TEST_FINAL` ranks.
pub fn outer() -> i32 {
    let mut model = Tensors::new(values(63, 0), device()); // rank 0's after the build
    let origin = number("PA_TEST_ORIGIN").or(number("PA_TEST_RANK")).unwrap() as u32;
    let options = |communicator| {
        let builder = builder(communicator).start_from(Start::Rank(0));
        let overlap = Overlap::default().delay(number("PA_TEST_OVERLAP").unwrap_or(0));
        let builder = builder.outer(Outer::nesterov(0.5, 0.75)).overlap(overlap);
        builder.share_outer_state(is_shared())
    };
    let mut averager = match join().and_then(|world| options(world).build(&mut model)) {
        Ok(averager) => averager,
        Err(error) => {
            say(&format!("error {error}"));
            return 3;
        }
    };
    let left = number("PA_TEST_FINAL").unwrap() as usize;
    // A joiner does not know the steps that its peers have made.
    let mut state = (!is_late()).then(|| Expected::new(flat(&model.values)));
    let (mut round, mut good) = (1u64, 0);
    let mut members = None;
    say("ready");
    loop {
        match one_round(&mut averager, &mut model, origin, &mut state, &mut round, &mut members) {
            Ok(report) => {
                good = if report.world_size == left { good + 1 } else { 0 };
                if good > number("PA_TEST_ROUNDS").unwrap_or(3) {
                    // After averages of copies, ranks differ by what they have trained.
                    let is_same = number("PA_TEST_OVERLAP").is_none();
                    let digest = if is_same { digest(&model.values) } else { 0 };
                    say(&format!("done {:b} {round} {digest:x}", members.unwrap()));
                    return 0;
                }
            }
            Err(error) if error.is_fatal() => {
                say(&format!("failed {error:?}"));
                match averager.recover(&mut model) {
                    Ok(()) => {}
                    Err(Error::Excluded { .. }) => return 5,
                    Err(error) => panic!("recover: {error}"),
                }
                state.iter_mut().for_each(Expected::recovered);
                members = None;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn one_round(
    averager: &mut ParamAverager,
    model: &mut Tensors,
    origin: u32,
    state: &mut Option<Expected>,
    round: &mut u64,
    members: &mut Option<u64>,
) -> Result<Report> {
    let all = match *members {
        Some(all) => all,
        None => {
            let mut numbers = [f64::from(1u32 << origin)];
            averager.all_reduce_scalars(&mut numbers, Reduction::Sum)?;
            let mut farthest = [*round as f64];
            averager.all_reduce_scalars(&mut farthest, Reduction::Max)?;
            *round = farthest[0] as u64 + 1;
            model.set(base(*round));
            let report = averager.broadcast(0, model)?; // gives the anchor
            model.download();
            assert!(model.values == base(*round), "the anchor");
            say(&format!("lost {}", report.lost_state));
            if let Some(state) = state {
                state.anchor = flat(&model.values);
            }
            let all = numbers[0] as u64;
            *members = Some(all);
            all
        }
    };
    *round += 1;
    let own = values(origin, *round);
    model.set(own.clone());
    let overlaps = number("PA_TEST_OVERLAP").is_some();
    let trained = values(origin, *round + 1000);
    let made = match overlaps {
        false => averager.average(model),
        true => averager.start_overlapped(0, model).and_then(|average| {
            model.set(trained.clone());
            if let Some(pause) = number("PA_TEST_TRAIN_US") {
                std::thread::sleep(Duration::from_micros(pause));
            }
            let made = averager.finish_overlapped(average, model);
            model.download();
            assert!(made.is_ok() || model.values == trained, "a failure changes nothing");
            made
        }),
    };
    let report = match made {
        Ok(report) => report,
        Err(error) => {
            state.iter_mut().for_each(|state| state.failed(all, *round));
            return Err(error);
        }
    };
    model.download();
    if let Some(state) = state {
        let result = flat(&model.values);
        let (result, tolerance) = match overlaps {
            false => (result, 0.0),
            true => {
                let (own, trained) = (flat(&own), flat(&trained));
                let added = |i: usize| own[i] + (result[i] - trained[i]);
                ((0..result.len()).map(added).collect(), 1e-3)
            }
        };
        say(&format!("checked {}", state.check(result, all, *round, tolerance)));
    }
    if report.join_pending {
        averager.admit_joiner(model)?;
        *members = None;
    }
    Ok(report)
}
