//! Promises of the docs of `Outer` and `Builder::outer` besides the formulas: which averages make a
//! step, and what is refused.

use param_averager::{
    Action, Algorithm, Builder, Communicator, Dtype, Error, LocalSgd, Outer, ParamAverager,
    Schedule, Start, TensorState,
};
use test_support::{bits, ranks, Guarded, Random};

pub const WAYS: [Algorithm; 2] = [Algorithm::Ring, Algorithm::Direct];
/// Numbers with which every result below is exact in every dtype.
pub const HALVES: Outer = Outer::nesterov(0.5, 0.5);

pub fn builder(communicator: Communicator, algorithm: Algorithm, outer: Outer) -> Builder {
    let builder = ParamAverager::builder(communicator).algorithm(algorithm).outer(outer);
    builder.allow_unnamed().channels(2).chunk_bytes(128)
}

/// A tensor of each dtype, filled with one number.
pub fn filled(value: f64) -> Vec<Guarded> {
    let mut model: Vec<Guarded> =
        Dtype::ALL.iter().map(|&dtype| Guarded::new(dtype, 301, 1)).collect();
    fill(&mut model, value);
    model
}

pub fn fill(model: &mut [Guarded], value: f64) {
    for tensor in model {
        (0..tensor.elements).for_each(|i| tensor.set(i, value));
    }
}

/// The number that all elements are.
fn the_one(model: &[Guarded]) -> f64 {
    let first = model[0].get(0);
    for tensor in model {
        for i in 0..tensor.elements {
            assert_eq!(tensor.get(i), first, "{}, element {i}", tensor.dtype);
        }
    }
    first
}

fn each_way(worlds: &[usize], rank: impl Fn(Communicator, Algorithm) + Sync) {
    for algorithm in WAYS {
        for &world in worlds {
            ranks(world, |communicator| rank(communicator, algorithm));
        }
    }
}

#[test]
fn build_and_broadcast_make_no_step_and_set_the_anchor() {
    each_way(&[1, 2, 3], |communicator, algorithm| {
        let (rank, last) = (communicator.rank(), communicator.world_size() - 1);
        let mut model = filled(if rank == 0 { 8.0 } else { 100.0 });
        let mut averager = builder(communicator, algorithm, HALVES).build(&mut model).unwrap();
        assert_eq!(the_one(&model), 8.0, "rank 0's");
        fill(&mut model, 4.0);
        averager.average(&mut model).unwrap();
        assert_eq!(the_one(&model), 5.0, "8 - (4 + 2) / 2");
        fill(&mut model, if rank == last { 16.0 } else { f64::from(rank as u32) });
        averager.broadcast(last, &mut model).unwrap();
        assert_eq!(the_one(&model), 16.0, "the last rank's");
        fill(&mut model, 12.0);
        averager.average(&mut model).unwrap();
        assert_eq!(the_one(&model), 12.5, "16 - (4 + 3) / 2: v = 4 / 2 + 4, which stays");
    });
}

#[test]
fn a_start_from_the_mean_makes_no_step() {
    each_way(&[1, 2, 4], |communicator, algorithm| {
        let (rank, world) = (communicator.rank(), communicator.world_size());
        let mut model = filled(2.0 * rank as f64);
        let builder = builder(communicator, algorithm, HALVES).start_from(Start::Mean);
        let mut averager = builder.build(&mut model).unwrap();
        let begin = world as f64 - 1.0;
        assert_eq!(the_one(&model), begin);
        fill(&mut model, begin - 4.0);
        averager.average(&mut model).unwrap();
        assert_eq!(the_one(&model), begin - 3.0);
    });
}

#[test]
fn local_sgd_makes_outer_steps_also_alone() {
    each_way(&[1, 2, 3], |communicator, algorithm| {
        let rank = communicator.rank() as f64;
        let middle = (communicator.world_size() - 1) as f64 / 2.0;
        let mut model = filled(8.0);
        let averager = builder(communicator, algorithm, HALVES).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(2));
        assert_eq!(sgd.finish(&mut model).unwrap(), Action::Unneeded, "no rank has stepped");
        assert_eq!(sgd.step(&mut model).unwrap(), Action::Counted { until_next: 1 });
        fill(&mut model, 4.0 + rank - middle);
        assert!(matches!(sgd.step(&mut model).unwrap(), Action::Averaged(_)));
        assert_eq!(the_one(&model), 5.0, "8 - (4 + 2) / 2");
        fill(&mut model, 3.0 + rank - middle);
        assert!(matches!(sgd.step(&mut model).unwrap(), Action::Counted { .. }));
        assert!(matches!(sgd.sync(&mut model).unwrap(), Action::Averaged(_)));
        assert_eq!(the_one(&model), 3.0, "5 - (2 + 2) / 2: v = 4 / 2 + 2");
        assert_eq!(sgd.finish(&mut model).unwrap(), Action::Unneeded);
        assert_eq!(sgd.done(&mut model).unwrap(), Action::Unneeded);
        assert_eq!((the_one(&model), sgd.averages()), (3.0, 2));
    });
}

#[test]
fn ranks_that_keep_a_share_differ_until_finish() {
    for outer in [Outer::ease(0.25), Outer::mean().keeping(0.75), HALVES.keeping(0.75)] {
        each_way(&[2, 3], |communicator, algorithm| {
            let (rank, world) = (communicator.rank() as f64, communicator.world_size() as f64);
            let mut model = filled(0.0);
            let averager = builder(communicator, algorithm, outer).build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(1));
            let (own, mean) = (8.0 * rank, 4.0 * (world - 1.0)); // θ = 0: Δ = -mean
            let after = if outer == HALVES.keeping(0.75) { 0.75 * mean } else { mean };
            fill(&mut model, own);
            sgd.step(&mut model).unwrap();
            assert_eq!(the_one(&model), 0.75 * own + 0.25 * after, "{outer}");
            // `finish` steps from the mean of what the ranks have kept, and mixes nothing: for
            // HALVES Δ = -3/16, v = -11/16 of the mean.
            assert!(matches!(sgd.finish(&mut model).unwrap(), Action::Averaged(_)));
            let end = if outer == HALVES.keeping(0.75) { 1.015625 * mean } else { mean };
            assert_eq!(the_one(&model), end, "{outer}");
            assert_eq!(sgd.finish(&mut model).unwrap(), Action::Unneeded);
            assert_eq!(the_one(&model), end, "{outer}");
        });
        // With samples; after a failure; and from a saved state.
        each_way(&[2, 3], |communicator, algorithm| {
            let mut model = filled(0.0);
            let averager =
                builder(communicator.clone(), algorithm, outer).build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(1));
            fill(&mut model, 8.0 * communicator.rank() as f64);
            sgd.step_weighted(&mut model, 32.0).unwrap();
            let (state, mixed) = (sgd.save().unwrap(), the_one(&model));
            let last = model.pop().unwrap();
            assert!(!sgd.finish(&mut model).unwrap_err().is_fatal());
            model.push(last);
            assert!(matches!(sgd.finish(&mut model).unwrap(), Action::Averaged(_)), "{outer}");
            let end = the_one(&model);
            let mut again = filled(0.0);
            let averager = builder(communicator, algorithm, outer).build(&mut again).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(1));
            fill(&mut again, mixed);
            sgd.load(&state).unwrap();
            assert!(matches!(sgd.finish(&mut again).unwrap(), Action::Averaged(_)), "{outer}");
            assert_eq!(the_one(&again), end, "{outer}");
        });
        each_way(&[1, 2, 3], |communicator, algorithm| {
            let rank = communicator.rank() as f64;
            let middle = (communicator.world_size() - 1) as f64 / 2.0;
            let mut model = filled(8.0);
            let averager = builder(communicator, algorithm, outer).build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(2));
            fill(&mut model, 4.0 + rank - middle);
            sgd.step(&mut model).unwrap();
            assert!(matches!(sgd.finish(&mut model).unwrap(), Action::Averaged(_)));
            let after = if outer == HALVES.keeping(0.75) { 5.0 } else { 4.0 };
            assert_eq!(the_one(&model), after, "all ranks have θ: {outer}");
        });
    }
}

/// A rank that is done can't tell a due average, which mixes, from the last one, which does not.
#[test]
fn done_is_refused_where_ranks_keep_a_share() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = filled(0.0);
        let outer = Outer::diloco().keeping(0.5);
        let averager = builder(communicator, Algorithm::Auto, outer).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(2));
        sgd.step(&mut model).unwrap();
        let before = bits(&model);
        let error = sgd.done(&mut model).unwrap_err();
        let Error::InvalidOption { rank: named, option: "outer", found, expected } = &error else {
            panic!("{error}")
        };
        assert_eq!((*named, error.is_fatal(), error.tensors()), {
            (rank, false, TensorState::Unchanged)
        });
        assert!(found.contains("nesterov(0.7, 0.9).keeping(0.5)"), "{error}");
        assert!(found.contains("done") && expected.contains("finish"), "{error}");
        assert_eq!(bits(&model), before);
        assert!(matches!(sgd.finish(&mut model).unwrap(), Action::Averaged(_)));
        let mut sgd = sgd.enabled(false);
        assert_eq!(sgd.done(&mut model).unwrap(), Action::Alone, "nothing is averaged");
    });
}

#[test]
fn the_mean_as_outer_optimizer_is_no_outer_optimizer() {
    let run = |world, algorithm, outer: Option<Outer>| {
        ranks(world, |communicator| {
            let mut random = Random(communicator.rank() as u64);
            let mut model = filled(0.0);
            model.iter_mut().for_each(|tensor| tensor.fill_random(&mut random));
            let builder = test_support::options(communicator).algorithm(algorithm).channels(2);
            let builder = outer.into_iter().fold(builder, |builder, outer| builder.outer(outer));
            let mut averager = builder.build(&mut model).unwrap();
            averager.average(&mut model).unwrap();
            (bits(&model), averager.memory_overhead())
        })
    };
    for algorithm in WAYS {
        for world in [1, 2, 3] {
            assert!(run(world, algorithm, Some(Outer::mean())) == run(world, algorithm, None));
        }
    }
}

#[test]
fn outer_optimizers_that_cannot_be_are_refused_by_name() {
    let nan = f64::NAN;
    let refused = |communicator: Communicator, outer: Outer, start| {
        let builder = builder(communicator, Algorithm::Auto, outer).start_from(start);
        builder.build(&mut filled(0.0)).map(drop).unwrap_err()
    };
    for (outer, found) in [
        (Outer::sgd(0.0), "sgd(0)"),
        (Outer::nesterov(nan, 0.9), "nesterov(NaN, 0.9)"),
        (Outer::momentum(1.0, 1.0), "momentum(1, 1)"),
        (Outer::adam(0.1, 0.9, 0.99, 0.0), "adam(0.1, 0.9, 0.99, 0)"),
        (Outer::ease(0.0), "sgd(1).keeping(1)"),
        (Outer::mean().keeping(-0.5), "mean().keeping(-0.5)"),
    ] {
        for error in ranks(2, |communicator| refused(communicator, outer, Start::Rank(0))) {
            assert!(matches!(error, Error::InvalidOption { option: "outer", .. }), "{error}");
            assert!(error.to_string().contains(found), "{error}");
        }
    }
    for outer in [Outer::diloco(), Outer::ease(0.5)] {
        for error in ranks(2, |communicator| refused(communicator, outer, Start::Own)) {
            let Error::InvalidOption { option: "start_from", found, .. } = &error else {
                panic!("{error}")
            };
            assert!(found.contains("outer optimizer"), "{error}");
        }
    }
    for others in [Outer::mean(), Outer::maxtext(), Outer::diloco().keeping(0.1)] {
        let errors = ranks(3, |communicator| {
            let outer = if communicator.rank() == 1 { others } else { Outer::diloco() };
            refused(communicator, outer, Start::Rank(0))
        });
        for error in errors {
            assert!(matches!(error, Error::OptionsDiffer { rank: 1, .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(&format!("outer = {others}")), "{text}");
            assert!(text.contains("outer = nesterov(0.7, 0.9)"), "{text}");
        }
    }
}

/// Ranks that are threads can't recover, so they share no state; but the option is compared.
#[test]
fn threads_share_no_state() {
    let run = |shares: [bool; 2]| {
        ranks(2, |communicator| {
            let rank = communicator.rank();
            let builder = builder(communicator, Algorithm::Ring, HALVES);
            let mut model = filled(8.0);
            let mut averager = builder.share_outer_state(shares[rank]).build(&mut model)?;
            fill(&mut model, rank as f64);
            averager.average(&mut model)?;
            Ok::<_, Error>((bits(&model), averager.memory_overhead()))
        })
    };
    let of = |shares| run(shares).into_iter().map(Result::unwrap).collect::<Vec<_>>();
    assert!(of([true; 2]) == of([false; 2]));
    for error in run([false, true]).into_iter().map(Result::unwrap_err) {
        assert!(matches!(error, Error::OptionsDiffer { rank: 1, .. }), "{error}");
        assert!(error.to_string().contains("share_outer_state = true"), "{error}");
    }
}

/// The numbers in the docs of `Outer`: 8 bytes an element over n ranks, 12 for Adam, twice as much
/// for f64; and by the ring, 4 more for f16 and bf16, whose mean waits for the commit in f32.
#[test]
fn state_is_divided_by_the_number_of_ranks() {
    const ELEMENTS: usize = 1 << 20;
    let of = |world: usize, algorithm, dtype, outer: Outer| {
        let bytes = ranks(world, |communicator| {
            let mut model = Guarded::new(dtype, ELEMENTS, 0);
            let builder = ParamAverager::builder(communicator).algorithm(algorithm).outer(outer);
            builder.channels(2).build(&mut model).unwrap().memory_overhead()
        });
        bytes[0]
    };
    for world in [2, 4] {
        for (algorithm, dtype, outer, bytes) in [
            (Algorithm::Direct, Dtype::F32, Outer::diloco(), 8),
            (Algorithm::Direct, Dtype::Bf16, Outer::diloco(), 8),
            (Algorithm::Direct, Dtype::F64, Outer::diloco(), 16),
            (Algorithm::Direct, Dtype::F32, Outer::adam(0.1, 0.9, 0.99, 1e-3), 12),
            (Algorithm::Ring, Dtype::F32, Outer::diloco(), 8),
            (Algorithm::Ring, Dtype::F16, Outer::diloco(), 12),
        ] {
            let before = of(world, algorithm, dtype, Outer::mean());
            let more = of(world, algorithm, dtype, outer) - before;
            assert_eq!(more, bytes * ELEMENTS / world, "{algorithm:?} {dtype} {outer} {world}");
            let each = more as f64 / ELEMENTS as f64;
            println!("{algorithm:?}, {dtype}, {outer}: {each} bytes an element, {world} ranks");
        }
    }
    println!("torchft: 8 bytes an element on every rank, its backup and its velocity in f32");
}
