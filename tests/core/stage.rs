//! A user's own stage on the ranks' shards of the mean: what it sees, what ranks get of what it
//! leaves, and vetoes.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use param_averager::{
    Algorithm, Builder, Communicator, Dtype, Error, ErrorKind, LocalSgd, Outer, ParamAverager,
    Part, Schedule, Shard, Start, TensorState, Values, Veto,
};
use proptest::prelude::*;
use test_support::{count, options, ranks, Guarded, Random};

/// Tensors of a model: dtype and elements.
type Layout = Vec<(Dtype, usize)>;

fn model(layout: &Layout, seed: u64) -> Vec<Guarded> {
    let mut random = Random(seed);
    let tensor = |&(dtype, elements): &(Dtype, usize)| {
        let mut tensor = Guarded::new(dtype, elements, 0);
        tensor.fill_random(&mut random);
        tensor
    };
    layout.iter().map(tensor).collect()
}

fn bits(model: &[Guarded]) -> Vec<Vec<u8>> {
    model.iter().map(|tensor| tensor.bytes().to_vec()).collect()
}

/// Calls `f(tensor, element, value)` for each value of a shard.
fn each(shard: &mut Shard<'_>, mut f: impl FnMut(usize, usize, &mut dyn Number)) {
    for Part { tensor, first, values, .. } in shard.parts() {
        match values {
            Values::F32(values) => {
                values.iter_mut().enumerate().for_each(|(i, x)| f(tensor, first + i, x));
            }
            Values::F64(values) => {
                values.iter_mut().enumerate().for_each(|(i, x)| f(tensor, first + i, x));
            }
            other => panic!("{other:?}"),
        }
    }
}

trait Number {
    fn get(&self) -> f64;
    fn set(&mut self, value: f64);
}
impl Number for f32 {
    fn get(&self) -> f64 {
        (*self).into()
    }
    fn set(&mut self, value: f64) {
        *self = value as f32;
    }
}
impl Number for f64 {
    fn get(&self) -> f64 {
        *self
    }
    fn set(&mut self, value: f64) {
        *self = value;
    }
}

#[derive(Clone, Debug)]
struct Case {
    world: usize,
    layout: Layout,
    channels: u32,
    chunk_bytes: usize,
    narrow_wire: bool,
    outer: Outer,
    start: Start,
}

impl Case {
    fn builder(&self, communicator: Communicator) -> Builder {
        options(communicator)
            .start_from(self.start)
            .channels(self.channels)
            .chunk_bytes(self.chunk_bytes)
            .narrow_wire(self.narrow_wire)
            .outer(self.outer)
    }

    /// Values of all ranks' tensors after each of three averages.
    fn run(&self, stage: impl Fn(Builder) -> Builder + Sync) -> Vec<Vec<Vec<Vec<u8>>>> {
        ranks(self.world, |communicator| {
            let rank = communicator.rank();
            let mut model = model(&self.layout, rank as u64);
            let builder = stage(self.builder(communicator));
            let mut averager = builder.build(&mut model).unwrap();
            let mut random = Random(100 + rank as u64);
            let mut round = |_| {
                for tensor in &mut model {
                    for i in 0..tensor.elements {
                        tensor.set(i, tensor.get(i) + random.value() / 4.0);
                    }
                }
                averager.average(&mut model).unwrap();
                assert!(model.iter().all(Guarded::guards_are_whole));
                bits(&model)
            };
            (0..3).map(&mut round).collect()
        })
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let dtype = (0..4usize).prop_map(|d| Dtype::ALL[d]);
    let elements = prop_oneof![Just(0), Just(1), 2..40usize, 0..3000usize];
    let layout = prop::collection::vec((dtype, elements), 1..8);
    let chunk = prop_oneof![Just(128usize), Just(256), Just(4096)];
    let outer = prop_oneof![
        3 => Just(Outer::mean()), 1 => Just(Outer::diloco()), 1 => Just(Outer::ease(0.5))
    ];
    (1..=4usize, layout, 1..4u32, chunk, any::<bool>(), outer, any::<bool>()).prop_map(
        |(world, layout, channels, chunk_bytes, narrow_wire, outer, mean)| Case {
            world,
            layout,
            channels,
            chunk_bytes,
            narrow_wire,
            outer,
            start: if mean { Start::Mean } else { Start::Rank(0) },
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(48, 256) as u32))]

    /// A stage that changes nothing leaves the bits of the plain ring, for every dtype, layout and
    /// world, also with an outer optimizer behind it; and it sees each element of the model on one
    /// rank, once, at its place.
    #[test]
    fn a_stage_that_changes_nothing_gives_the_plain_bits(case in cases()) {
        let plain = case.run(|builder| builder.algorithm(Algorithm::Ring));
        let seen = Arc::new(Mutex::new(vec![]));
        let staged = case.run(|builder| {
            let seen = seen.clone();
            builder.stage(move |shard| {
                let sets_values = shard.sets_values();
                let mut next = 0;
                for part in shard.parts() {
                    assert_eq!(part.at, next);
                    next += part.values.len();
                }
                assert_eq!((next, next == 0), (shard.len(), shard.is_empty()));
                each(shard, |tensor, element, x| {
                    if !sets_values {
                        seen.lock().unwrap().push((tensor, element, x.get()));
                    }
                });
                Ok(())
            })
        });
        // A world of one rank has no ring to compare with: its own values are its mean.
        prop_assert!(case.world == 1 && !case.outer.eq(&Outer::mean()) || plain == staged);
        let mut seen = std::mem::take(&mut *seen.lock().unwrap());
        seen.sort_by(|a, b| a.partial_cmp(b).unwrap());
        let all = case.layout.iter().enumerate();
        let all = all.flat_map(|(tensor, &(_, n))| (0..n).map(move |element| (tensor, element)));
        let places: Vec<_> = seen.iter().map(|&(tensor, element, _)| (tensor, element)).collect();
        let want: Vec<_> = all.flat_map(|place| [place; 3]).collect();
        prop_assert_eq!(places, want);
    }

    /// What a stage leaves at a place is what every rank's tensors hold there, rounded once.
    #[test]
    fn ranks_get_what_the_stage_leaves(case in cases()) {
        let case = Case { outer: Outer::mean(), ..case };
        let value = |tensor: usize, element: usize| {
            let number = (tensor * 31 + element * 7) % 2001;
            (number as f64 - 1000.0) / 7.0
        };
        let staged = case.run(|builder| {
            builder.stage(move |shard| {
                let leaves = shard.sets_values();
                each(shard, |tensor, element, x| {
                    if !leaves {
                        x.set(value(tensor, element));
                    }
                });
                Ok(())
            })
        });
        let mut want = model(&case.layout, 0);
        for (index, tensor) in want.iter_mut().enumerate() {
            for i in 0..tensor.elements {
                let exact = value(index, i);
                let summed =
                    if tensor.dtype == Dtype::F64 { exact } else { f64::from(exact as f32) };
                tensor.set(i, summed);
            }
        }
        for rank in &staged {
            for round in rank {
                prop_assert_eq!(round, &bits(&want));
            }
        }
    }
}

/// `sgd(lr)` as a user writes it: an anchor for each value, in one vector.
fn user_sgd(lr: f32) -> impl FnMut(&mut Shard<'_>) -> Result<(), Veto> + Send {
    let (mut anchor, mut next, mut layout) = (vec![], vec![], None);
    move |shard| {
        if shard.was_committed() {
            anchor = std::mem::take(&mut next);
        }
        let has_moved = layout.replace(shard.layout()) != Some(shard.layout());
        let begins = shard.sets_values() || has_moved;
        next = vec![0.0f32; shard.len()];
        for part in shard.parts() {
            let Values::F32(values) = part.values else { return Err(Veto::new("no f32")) };
            for (i, value) in values.iter_mut().enumerate() {
                let at = part.at + i;
                if !begins {
                    *value = anchor[at] - lr * (anchor[at] - *value);
                }
                next[at] = *value;
            }
        }
        Ok(())
    }
}

#[test]
fn a_users_sgd_is_that_of_outer() {
    for world in [1, 2, 3] {
        let case = Case {
            world,
            layout: vec![(Dtype::F32, 1000), (Dtype::F32, 7), (Dtype::F32, 333)],
            channels: 2,
            chunk_bytes: 256,
            narrow_wire: false,
            outer: Outer::mean(),
            start: Start::Rank(0),
        };
        let own = case.run(|builder| builder.stage(user_sgd(0.5)));
        let outer = case.run(|builder| builder.algorithm(Algorithm::Ring).outer(Outer::sgd(0.5)));
        for (own, outer) in own.iter().flatten().flatten().zip(outer.iter().flatten().flatten()) {
            let of = |bytes: &[u8]| -> Vec<f32> {
                bytes.chunks(4).map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect()
            };
            for (own, outer) in of(own).iter().zip(&of(outer)) {
                assert!((own - outer).abs() <= 4e-7, "{own} instead of {outer}");
            }
        }
    }
}

const SIZES: [usize; 3] = [100, 7, 501];

fn vectors(rank: usize) -> Vec<Vec<f32>> {
    SIZES.iter().map(|&n| (0..n).map(|i| (rank * n + i) as f32).collect()).collect()
}

/// A stage that fails in its `at`-th call, counted from 1.
fn fails(at: usize, fail: impl Fn() -> Result<(), Veto> + Send + 'static) -> impl Fn() -> Step {
    let fail = Arc::new(Mutex::new(fail));
    move || {
        let (fail, mut call) = (fail.clone(), 0);
        Box::new(move |shard: &mut Shard<'_>| {
            call += 1;
            // What the function does to a shard that it then refuses has no effect.
            each(shard, |_, _, x| x.set(x.get() + 1.0));
            if call == at {
                fail.lock().unwrap()()
            } else {
                Ok(())
            }
        })
    }
}
type Step = Box<dyn FnMut(&mut Shard<'_>) -> Result<(), Veto> + Send>;

/// A veto by each rank in turn: all ranks get the error, no bit changes, the next average works.
#[test]
fn a_veto_changes_nothing_and_the_world_lives() {
    for world in [1, 2, 3, 4] {
        for bad in 0..world {
            ranks(world, |communicator| {
                let rank = communicator.rank();
                let stage = fails(2, || Err(Veto::new("the norm is 12, more than 10")));
                let never = fails(0, || Ok(()));
                let stage = if rank == bad { stage() } else { never() };
                let mut model = vectors(rank);
                let builder = options(communicator).channels(2).chunk_bytes(128);
                let mut averager = builder.stage(stage).build(&mut model).unwrap();
                averager.average(&mut model).unwrap();
                let mut again = vectors(rank);
                let error = averager.average(&mut again).unwrap_err();
                assert_eq!(again, vectors(rank), "rank {rank}");
                let Error::StageVetoed { rank: named, reason } = &error else { panic!("{error}") };
                assert_eq!(*named, bad);
                let own = "the norm is 12, more than 10";
                assert_eq!(reason == own, rank == bad, "{reason}");
                assert_eq!(error.tensors(), TensorState::Unchanged);
                assert_eq!((error.kind(), error.is_fatal()), (ErrorKind::Usage, false));
                averager.average(&mut again).unwrap();
                assert_eq!(again, model, "the next average is the first one again");
            });
        }
    }
}

#[test]
fn each_rank_that_refuses_gets_its_own_reason() {
    ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = vectors(rank);
        let builder = options(communicator).stage(move |shard| match shard.rank() {
            1 => Ok(()),
            _ => {
                Err("no".parse::<u32>().map_err(|_| Veto::new(format!("own {rank}"))).unwrap_err())
            }
        });
        let mut averager = builder.build(&mut model).unwrap();
        let error = averager.average(&mut model).unwrap_err();
        let Error::StageVetoed { rank: named, reason } = &error else { panic!("{error}") };
        assert!(rank == 1 || *reason == format!("own {rank}"), "{error}");
        assert!(rank == 1 || *named == rank, "{error}");
        assert_eq!(model, vectors(rank));
    });
}

/// A panic is a veto, and so is every later call, since the function's state may be half changed.
#[test]
fn a_panic_is_a_veto_on_every_rank() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        let mut model = vectors(rank);
        let builder = options(communicator).stage(move |shard| {
            if counted.fetch_add(1, Relaxed) == 1 && shard.rank() == 1 {
                std::panic::resume_unwind(Box::new("as it should")); // without a message
            }
            Ok(())
        });
        let mut averager = builder.build(&mut model).unwrap();
        averager.average(&mut model).unwrap();
        for round in 0..2 {
            let mut again = vectors(rank);
            let error = averager.average(&mut again).unwrap_err();
            let Error::StageVetoed { rank: 1, reason } = &error else { panic!("{error}") };
            let text = ["as it should", "an earlier average"][round];
            assert_eq!(reason.contains(text), rank == 1, "{error}");
            assert_eq!(again, vectors(rank));
        }
        let want = if rank == 0 { 3 } else { 2 };
        assert_eq!(calls.load(Relaxed), want, "calls of rank {rank}");
    });
}

/// State follows commits: the stage learns whether all ranks have what it left.
#[test]
fn a_stage_learns_whether_its_last_call_was_committed() {
    let seen = Arc::new(Mutex::new(vec![]));
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let (seen, mut call) = (seen.clone(), 0);
        let mut model = vectors(rank);
        let builder = options(communicator).stage(move |shard| {
            call += 1;
            if shard.rank() == 0 {
                seen.lock().unwrap().push((shard.sets_values(), shard.was_committed()));
            }
            assert_eq!((shard.world_size(), shard.layout()), (2, 0));
            if shard.rank() == 1 && call == 3 {
                return Err(Veto::new("the third"));
            }
            Ok(())
        });
        let mut averager = builder.build(&mut model).unwrap();
        for round in 0..5 {
            assert_eq!(averager.average(&mut model).is_ok(), round != 2);
        }
        averager.broadcast(1, &mut model).unwrap();
        // A call that is refused before it has summed is none of the stage's.
        let weight = if rank == 0 { -1.0 } else { 1.0 };
        averager.average_weighted(&mut model, weight).unwrap_err();
        averager.average(&mut model).unwrap();
    });
    let seen = seen.lock().unwrap();
    let committed = [false, true, true, false, true, true, true];
    let want: Vec<_> = committed.into_iter().enumerate().map(|(i, it)| (i == 5, it)).collect();
    assert_eq!(*seen, want);
}

/// Values that all ranks begin with are none that a stage may change.
#[test]
fn a_stage_that_changes_what_ranks_begin_with_is_refused() {
    for start in [Start::Rank(1), Start::Mean] {
        ranks(2, |communicator| {
            let rank = communicator.rank();
            let mut model = vectors(rank);
            let builder = options(communicator).start_from(start).stage(|shard| {
                each(shard, |tensor, element, x| {
                    if (tensor, element) == (2, 500) {
                        x.set(x.get() + 0.5);
                    }
                });
                Ok(())
            });
            let error = builder.build(&mut model).unwrap_err();
            assert!(matches!(error, Error::StageVetoed { .. }), "{error}");
            assert_eq!(model, vectors(rank));
        });
    }
}

/// Values that the tensors can't hold are refused, with their place, unless they are let through.
#[test]
fn a_stage_that_leaves_no_number_is_refused() {
    let cases = [
        (Dtype::F32, f64::NAN),
        (Dtype::F64, f64::INFINITY),
        (Dtype::F16, 65520.0),
        (Dtype::Bf16, 3.3962e38),
    ];
    for ((dtype, bad), rejects) in cases.into_iter().flat_map(|case| [(case, true), (case, false)])
    {
        let layout = vec![(dtype, 77), (dtype, 500)];
        ranks(2, |communicator| {
            let mut model = model(&layout, communicator.rank() as u64);
            let before = bits(&model);
            let builder = options(communicator).reject_non_finite(rejects).stage(move |shard| {
                each(shard, |tensor, element, x| {
                    if (tensor, element) == (1, 433) {
                        x.set(bad);
                    }
                });
                Ok(())
            });
            let mut averager = builder.build(&mut model).unwrap();
            let averaged = averager.average(&mut model);
            if !rejects {
                averaged.unwrap();
                assert!(!model[1].get(433).is_finite(), "{dtype}: {}", model[1].get(433));
                return None;
            }
            assert_eq!(bits(&model), before);
            match averaged.unwrap_err() {
                Error::StageVetoed { reason, .. } => Some(reason),
                other => panic!("{other}"),
            }
        })
        .into_iter()
        .flatten()
        .for_each(|reason| {
            let own = reason.contains("tensor 1") && reason.contains("element 433");
            assert!(own || reason.contains("own error"), "{reason}");
        });
    }
    // The largest that is rounded to a finite one.
    for (dtype, most) in [(Dtype::F16, 65519.0), (Dtype::Bf16, 3.3961e38)] {
        ranks(2, |communicator| {
            let mut model = model(&vec![(dtype, 100)], 1);
            let builder = options(communicator).stage(move |shard| {
                each(shard, |_, _, x| x.set(-most));
                Ok(())
            });
            builder.build(&mut model).unwrap().average(&mut model).unwrap();
            assert!((0..100).all(|i| model[0].get(i).is_finite()));
        });
    }
}

/// The rank that holds a NaN is named, not the ranks whose stages see it in the mean.
#[test]
fn a_value_that_is_not_finite_is_told_rather_than_a_veto() {
    for bad in 0..3 {
        ranks(3, |communicator| {
            let rank = communicator.rank();
            let mut model = vectors(rank);
            if rank == bad {
                model.iter_mut().flatten().for_each(|x| *x = f32::NAN);
            }
            let mut averager = options(communicator)
                .stage(|shard| {
                    each(shard, |_, _, x| assert!(x.get().is_finite()));
                    Ok(())
                })
                .build(&mut model)
                .unwrap();
            let error = averager.average(&mut model).unwrap_err();
            assert!(matches!(error, Error::NonFinite { rank, .. } if rank == bad), "{error}");
            model = vectors(rank);
            averager.average(&mut model).unwrap();
        });
    }
}

#[test]
fn ranks_with_and_without_a_stage_differ() {
    for with in 0..2 {
        ranks(2, |communicator| {
            let has_one = communicator.rank() == with;
            let builder = options(communicator).algorithm(Algorithm::Ring);
            let builder = if has_one { builder.stage(|_| Ok(())) } else { builder };
            let error = builder.build(&mut vectors(0)).unwrap_err();
            let Error::OptionsDiffer { rank: 1, found, expected } = &error else {
                panic!("{error}")
            };
            let texts = ["stage = a function", "stage = none"];
            let want = if with == 1 { texts } else { [texts[1], texts[0]] };
            assert_eq!([found, expected], want);
        });
    }
}

#[test]
fn options_that_contradict_a_stage_are_refused() {
    for world in [1, 2] {
        let refusal = |with: fn(Builder) -> Builder| {
            let errors = ranks(world, |communicator| {
                let builder = with(options(communicator)).stage(|_| Ok(()));
                match builder.build(&mut vectors(0)).unwrap_err() {
                    Error::InvalidOption { option, found, .. } => {
                        assert!(found.contains("with a stage"), "{found}");
                        option
                    }
                    other => panic!("{other}"),
                }
            });
            errors[0]
        };
        assert_eq!(refusal(|builder| builder.algorithm(Algorithm::Direct)), "algorithm");
        assert_eq!(refusal(|builder| builder.all_or_nothing(false)), "all_or_nothing");
        ranks(world, |communicator| {
            let builder = options(communicator).stage(|_| Ok(()));
            let averager = builder.build(&mut vectors(0)).unwrap();
            assert_eq!(averager.algorithm(), Algorithm::Ring);
        });
    }
}

/// A stage that takes longer than its peers wait: they name its rank, and nothing hangs.
#[test]
fn a_stage_that_takes_too_long_is_a_timeout_of_its_rank() {
    let timeout = Duration::from_millis(300);
    ranks(3, |communicator| {
        let rank = communicator.rank();
        let mut model = vectors(rank);
        let builder = options(communicator).timeout(Duration::from_secs(60)).stage(move |shard| {
            if shard.rank() == 1 {
                std::thread::sleep(10 * timeout);
            }
            Ok(())
        });
        let mut averager = builder.timeout(timeout).build(&mut model).unwrap();
        let error = averager.average(&mut model).unwrap_err();
        assert!(matches!(error, Error::Timeout { rank: 1, committed: false, .. }), "{error}");
        assert_eq!(model, vectors(rank));
    });
}

/// Schedules go on after a veto, as after any error that is not fatal.
#[test]
fn local_sgd_averages_again_after_a_veto() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vectors(rank);
        let mut call = 0;
        let builder = options(communicator).stage(move |_| {
            call += 1;
            if call == 1 {
                Err(Veto::new("the first"))
            } else {
                Ok(())
            }
        });
        let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), Schedule::every(2));
        let made: Vec<bool> = (0..6).map(|_| sgd.step(&mut model).is_ok()).collect();
        assert_eq!(made, [true, false, true, true, true, true]);
        sgd.finish(&mut model).unwrap();
        let mean: Vec<f32> = vectors(0)
            .concat()
            .iter()
            .zip(vectors(1).concat())
            .map(|(a, b)| (a + b) / 2.0)
            .collect();
        assert_eq!(model.concat(), mean);
    });
}

/// The memory of a stage: nothing for f32, and the mean in f32, divided by n, for 16 bits.
#[test]
fn a_stage_takes_four_bytes_an_element_over_n_for_16_bits_and_none_for_f32() {
    for (dtype, bytes) in [(Dtype::F32, 0), (Dtype::F16, 4), (Dtype::Bf16, 4)] {
        let elements = 1 << 18;
        let of = |stage: bool| {
            let overhead = ranks(2, |communicator| {
                let builder = options(communicator).algorithm(Algorithm::Ring).channels(1);
                let builder = if stage { builder.stage(|_| Ok(())) } else { builder };
                let averager: ParamAverager =
                    builder.build(&mut model(&vec![(dtype, elements)], 1)).unwrap();
                averager.memory_overhead()
            });
            overhead[0]
        };
        let (with, without) = (of(true), of(false));
        let more = with - without - bytes * elements / 2;
        assert!(more < 4096, "{dtype}: {more} bytes more than {bytes} an element over 2");
    }
}
