//! Telemetry of averages: its numbers against those of the tensors before and after, and the
//! schedule that follows them.

use std::fmt::Debug;

use param_averager::{
    Action, Algorithm, Builder, Dtype, Error, LocalSgd, Outer, ParamAverager, Schedule, Telemetry,
};
use test_support::{ranks, Guarded, Random};

/// As `Telemetry`, of all elements.
struct Exact {
    norm: f64,
    change: f64,
    largest_change: f64,
    non_finite: f64,
}

fn exact(before: &[Guarded], after: &[Guarded]) -> Exact {
    let (mut norm, mut change, mut largest, mut bad, mut count) = (0.0, 0.0, 0.0f64, 0, 0);
    for (before, after) in before.iter().zip(after) {
        for element in 0..after.elements {
            let (x, old) = (after.get(element), before.get(element));
            let difference = x - old;
            count += 1;
            match difference.is_finite() {
                true => {
                    norm += x * x;
                    change += difference * difference;
                    largest = largest.max(difference.abs());
                }
                false => bad += 1,
            }
        }
    }
    let non_finite = bad as f64 / count as f64;
    Exact { norm: f64::sqrt(norm), change: f64::sqrt(change), largest_change: largest, non_finite }
}

/// Numbers that averages of `model(rank)` have told, and the exact ones, by rank.
fn told_and_exact(
    n: usize,
    options: impl Fn(Builder) -> Builder + Sync,
    model: impl Fn(usize) -> Vec<Guarded> + Sync,
) -> Vec<(Telemetry, Exact)> {
    let all = ranks(n, |communicator| {
        let mut model = model(communicator.rank());
        let builder = options(test_support::options(communicator)).telemetry(true);
        let mut averager = builder.build(&mut model).unwrap();
        let before: Vec<Guarded> = model.iter().map(Guarded::copy).collect();
        let report = averager.average(&mut model).unwrap();
        assert!(model.iter().all(Guarded::guards_are_whole));
        (report.telemetry.unwrap(), before, model)
    });
    all.into_iter().map(|(told, before, after)| (told, exact(&before, &after))).collect()
}

fn assert_near(found: f64, expected: f64, tolerance: f64, what: &dyn Debug) {
    assert!((found - expected).abs() <= tolerance * expected, "{found}, {expected}: {what:?}");
}

/// Values around 1, which differ from rank to rank by about a tenth.
fn fill(tensor: &mut Guarded, rank: usize, seed: u64) {
    let (mut same, mut own) = (Random(seed), Random(1000 * (rank as u64 + 1) + seed));
    let uniform = |random: &mut Random| random.below(1 << 20) as f64 / (1 << 20) as f64 - 0.5;
    for element in 0..tensor.elements {
        tensor.set(element, 1.0 + uniform(&mut same) + uniform(&mut own) / 5.0);
    }
}

pub const WAYS: [(Algorithm, bool); 3] =
    [(Algorithm::Direct, true), (Algorithm::Ring, true), (Algorithm::Ring, false)];

#[test]
fn small_models_are_measured_exactly() {
    for n in [2, 3, 5] {
        for (algorithm, all_or_nothing) in WAYS {
            for channels in [1, 2] {
                let told = told_and_exact(
                    n,
                    |builder| {
                        builder
                            .algorithm(algorithm)
                            .all_or_nothing(all_or_nothing)
                            .channels(channels)
                            .chunk_bytes(128)
                    },
                    |rank| {
                        let mut tensors = vec![];
                        for (i, dtype) in Dtype::ALL.into_iter().enumerate() {
                            for (j, elements) in [1, 77, 0, 400].into_iter().enumerate() {
                                let mut tensor = Guarded::new(dtype, elements, rank % 3);
                                fill(&mut tensor, rank, (10 * i + j) as u64);
                                tensors.push(tensor);
                            }
                        }
                        tensors
                    },
                );
                for (told, exact) in told {
                    let what = (n, algorithm, all_or_nothing, channels);
                    assert_near(told.norm, exact.norm, 1e-12, &what);
                    assert_near(told.change, exact.change, 1e-12, &what);
                    assert_eq!(told.largest_change, exact.largest_change, "{what:?}");
                    assert_eq!(told.non_finite, 0.0);
                    let relative = told.relative_change();
                    assert!((0.01..0.1).contains(&relative), "{relative} {what:?}");
                }
            }
        }
    }
}

/// 20 MB, whose first half has values ten times as large: the sample is of all parts alike.
#[test]
fn large_models_are_estimated_from_a_sample() {
    for channels in [1, 3] {
        let told = told_and_exact(
            2,
            |builder| builder.channels(channels),
            |rank| {
                let mut tensors = vec![];
                for (seed, elements) in [2_000_003, 7, 1_000_000, 2_000_000].into_iter().enumerate()
                {
                    let mut tensor = Guarded::new(Dtype::F32, elements, 1);
                    fill(&mut tensor, rank, seed as u64);
                    if seed == 0 {
                        (0..elements).for_each(|i| tensor.set(i, 10.0 * tensor.get(i)));
                    }
                    tensors.push(tensor);
                }
                tensors
            },
        );
        for (told, exact) in told {
            assert_near(told.norm, exact.norm, 0.02, &channels);
            assert_near(told.change, exact.change, 0.02, &channels);
            let (largest, of_all) = (told.largest_change, exact.largest_change);
            assert!(largest <= of_all && largest > 0.9 * of_all, "{largest} {of_all}");
        }
    }
}

#[test]
fn elements_that_are_not_finite_are_counted_and_in_no_norm() {
    for (algorithm, all_or_nothing) in WAYS {
        let told = told_and_exact(
            2,
            |builder| {
                builder
                    .algorithm(algorithm)
                    .all_or_nothing(all_or_nothing)
                    .reject_non_finite(false)
                    .channels(1)
            },
            |rank| {
                let mut tensor = Guarded::new(Dtype::F32, 1000, 0);
                fill(&mut tensor, rank, 1);
                if rank == 1 {
                    tensor.set(3, f64::NAN);
                    tensor.set(998, f64::INFINITY);
                    tensor.set(999, f64::NEG_INFINITY);
                }
                vec![tensor]
            },
        );
        for (told, exact) in told {
            assert_eq!(told.non_finite, 0.003);
            assert_eq!(exact.non_finite, 0.003);
            assert_near(told.norm, exact.norm, 1e-12, &algorithm);
            assert_near(told.change, exact.change, 1e-12, &algorithm);
        }
    }
}

/// The change is the way from a rank's own values to the result of the outer step.
#[test]
fn change_is_measured_to_the_result_of_an_outer_step() {
    for algorithm in [Algorithm::Direct, Algorithm::Ring] {
        for outer in [Outer::sgd(0.5), Outer::sgd(0.5).keeping(0.5)] {
            let told = ranks(2, |communicator| {
                let mut model = vec![1.0f32; 100];
                let mut averager = ParamAverager::builder(communicator)
                    .algorithm(algorithm)
                    .outer(outer)
                    .telemetry(true)
                    .build(&mut model)
                    .unwrap();
                let rank = averager.rank();
                model.fill(3.0 + 2.0 * rank as f32); // Δ = 1 − 4, so the result is 2.5
                averager.average(&mut model).unwrap().telemetry.unwrap()
            });
            let (kept, to) = if outer == Outer::sgd(0.5) { (0.0, 2.5) } else { (0.5, 2.5) };
            for (rank, told) in told.into_iter().enumerate() {
                let own = 3.0 + 2.0 * rank as f64;
                let result = kept * own + (1.0 - kept) * to;
                assert_near(told.norm, 10.0 * result, 1e-12, &outer);
                assert_near(told.change, 10.0 * (own - result), 1e-12, &outer);
                assert_eq!(told.largest_change, own - result);
            }
        }
    }
    // Alone with an outer optimizer, and alone without, where nothing is done.
    ranks(1, |communicator| {
        let mut model = vec![1.0f32; 100];
        let builder = ParamAverager::builder(communicator.clone()).telemetry(true);
        let mut averager = builder.outer(Outer::sgd(0.5)).build(&mut model).unwrap();
        model.fill(3.0);
        let told = averager.average(&mut model).unwrap().telemetry.unwrap();
        assert_eq!((told.norm, told.change), (20.0, 10.0));
        let builder = ParamAverager::builder(communicator).telemetry(true);
        let mut averager = builder.build(&mut model).unwrap();
        assert_eq!(averager.average(&mut model).unwrap().telemetry, None);
    });
}

/// With telemetry, averages give the same bits, and a failed one leaves no numbers behind.
#[test]
fn telemetry_changes_no_result() {
    let mut results = vec![];
    for telemetry in [false, true] {
        for (algorithm, all_or_nothing) in WAYS {
            results.push(ranks(3, |communicator| {
                let rank = communicator.rank();
                let mut tensors = vec![Guarded::new(Dtype::Bf16, 4001, rank)];
                fill(&mut tensors[0], rank, 5);
                let mut averager = test_support::options(communicator)
                    .algorithm(algorithm)
                    .all_or_nothing(all_or_nothing)
                    .reject_non_finite(true)
                    .telemetry(telemetry)
                    .channels(2)
                    .build(&mut tensors)
                    .unwrap();
                let report = averager.average(&mut tensors).unwrap();
                assert_eq!(report.telemetry.is_some(), telemetry);
                let result = tensors[0].bytes().to_vec();
                if all_or_nothing || algorithm == Algorithm::Direct {
                    let whole = tensors[0].get(7);
                    tensors[0].set(7, if rank == 1 { f64::NAN } else { whole });
                    assert!(averager.average(&mut tensors).is_err());
                    tensors[0].set(7, whole);
                }
                let report = averager.average(&mut tensors).unwrap();
                if let Some(told) = report.telemetry {
                    assert_eq!((told.change, told.relative_change()), (0.0, 0.0));
                    assert!(told.norm > 0.0 && told.non_finite == 0.0);
                }
                result
            }));
        }
    }
    let (without, with) = results.split_at(WAYS.len());
    assert!(without == with);
}

#[test]
fn ranks_with_and_without_telemetry_are_refused() {
    for result in ranks(2, |communicator| {
        let telemetry = communicator.rank() == 1;
        let mut model = vec![0.0f32; 10];
        ParamAverager::builder(communicator).telemetry(telemetry).build(&mut model).map(drop)
    }) {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::OptionsDiffer { .. }), "{error:?}");
        assert!(error.to_string().contains("telemetry"), "{error}");
    }
}

/// H follows the formula, from the largest relative change of a rank, on both ranks.
#[test]
fn divergence_rule_shortens_and_lengthens_rounds() {
    let seen = ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![1.0f32; 1000];
        let builder = ParamAverager::builder(communicator).telemetry(true);
        let averager = builder.build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::divergence(0.05));
        let mut seen: Vec<(u64, u64, f64)> = vec![];
        let mut apart = 0.02f32;
        for step in 1..=60 {
            // Rank 0 stays; the mean moves by half of what rank 1 does. So both are as far from it.
            model.iter_mut().for_each(|x| *x += rank as f32 * apart);
            if let Action::Averaged(report) = sgd.step(&mut model).unwrap() {
                let change = report.telemetry.unwrap().relative_change();
                assert_eq!(report.local_steps, step - seen.last().map_or(0, |&(step, ..)| step));
                seen.push((step, sgd.local_steps(), change));
            }
            if step == 30 {
                apart = 0.0001;
            }
        }
        seen
    });
    let steps = |rank: usize| seen[rank].iter().map(|&(step, h, _)| (step, h)).collect::<Vec<_>>();
    assert_eq!(steps(0), steps(1));
    let mut h = 10;
    for (at, round) in seen[0].iter().enumerate() {
        if at > 0 {
            // Known to all ranks one average later.
            let change = seen[0][at - 1].2.max(seen[1][at - 1].2);
            let before = if at > 1 { seen[0][at - 2].0 } else { 0 };
            let steps = (seen[0][at - 1].0 - before) as f64;
            h = match change / 0.05 {
                excess if excess > 1.0 => ((steps / excess).floor() as u64).clamp(1, h),
                excess if excess < 0.5 => h + 1,
                _ => h,
            };
        }
        assert_eq!(round.1, h, "{seen:#?}");
    }
    let hs: Vec<u64> = seen[0].iter().map(|&(_, h, _)| h).collect();
    assert!(hs.windows(2).any(|h| h[1] < h[0]) && hs.windows(2).any(|h| h[1] > h[0]), "{hs:?}");
}

#[test]
fn divergence_rule_without_telemetry_is_refused() {
    ranks(2, |communicator| {
        let mut model = vec![1.0f32; 10];
        let averager = ParamAverager::builder(communicator).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::divergence(0.05));
        for _ in 1..10 {
            sgd.step(&mut model).unwrap();
        }
        let error = sgd.step(&mut model).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::InvalidOption { option: "telemetry", .. }), "{error:?}");
        assert!(text.contains("divergence(0.05)") && text.contains("true"), "{text}");
        assert!(!error.is_fatal());
    });
}
