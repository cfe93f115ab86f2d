//! Averages of copies, and of fragments: their values bit for bit, and what the calls of a rank do
//! and refuse meanwhile.

use std::ops::Range;
use std::sync::mpsc::channel;
use std::sync::Mutex;

use param_averager::{
    Algorithm, Builder, Communicator, Dtype, Error, Outer, Overlap, ParamAverager, Reduction,
    Start, TensorState,
};
use proptest::prelude::*;
use test_support::{count, ranks, Guarded, Random};

#[derive(Clone, Debug)]
struct Case {
    world: usize,
    /// Dtype, elements, and how many elements after a 16-byte boundary each begins.
    tensors: Vec<(Dtype, usize, usize)>,
    algorithm: Algorithm,
    outer: Outer,
    overlap: Overlap,
    alpha: f64,
    fragments: u32,
    channels: u32,
    rounds: usize,
    seed: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let tensor = (0..4usize, 1..3000usize, 0..4usize)
        .prop_map(|(dtype, elements, at)| (Dtype::ALL[dtype], elements, at));
    let algorithm = prop::sample::select(vec![Algorithm::Ring, Algorithm::Direct]);
    let outer = prop::sample::select(vec![
        Outer::mean(),
        Outer::nesterov(0.7, 0.9),
        Outer::adam(0.1, 0.9, 0.95, 1e-3),
    ]);
    (
        (1..=5usize, prop::collection::vec(tensor, 1..7), algorithm, outer),
        (prop::sample::select(vec![0.0, 0.5]), 1..5u32, 1..3u32, 1..4usize, any::<u64>()),
    )
        .prop_map(|((world, tensors, algorithm, outer), rest)| {
            let (alpha, fragments, channels, rounds, seed) = rest;
            let overlap = Overlap::default().delay(1).alpha(alpha).fragments(fragments);
            Case {
                world,
                tensors,
                algorithm,
                outer,
                overlap,
                alpha,
                fragments,
                channels,
                rounds,
                seed,
            }
        })
}

impl Case {
    fn builder(&self, communicator: Communicator) -> Builder {
        ParamAverager::builder(communicator)
            .allow_unnamed()
            .algorithm(self.algorithm)
            .outer(self.outer)
            .channels(self.channels)
            .chunk_bytes(128) // the least, so that no layout makes it less
    }

    fn model(&self) -> Vec<Guarded> {
        self.tensors.iter().map(|&(dtype, n, at)| Guarded::new(dtype, n, at)).collect()
    }

    fn copy(&self, model: &[Guarded]) -> Vec<Guarded> {
        let mut copy = self.model();
        for (to, from) in copy.iter_mut().zip(model) {
            to.bytes_mut().copy_from_slice(from.bytes());
        }
        copy
    }

    /// A step of training.
    fn train(&self, model: &mut [Guarded], random: &mut Random) {
        for tensor in model {
            (0..tensor.elements).for_each(|i| tensor.set(i, tensor.get(i) + random.value() / 4.0));
        }
    }

    /// `now` with what an average has changed in `before`, by the arithmetic of the kernels.
    /// In a fragment alone: elsewhere a 0 that is added would change -0.
    fn applied(
        &self,
        now: &mut [Guarded],
        before: &[Guarded],
        after: &[Guarded],
        fragment: &Range<usize>,
    ) {
        let mut deltas = self.copy(before);
        for index in fragment.clone() {
            let (now, delta) = (&mut now[index], &mut deltas[index]);
            let (before, after) = (&before[index], &after[index]);
            for i in 0..now.elements {
                let share = 1.0 - self.alpha;
                if now.dtype == Dtype::F64 {
                    delta.set(i, after.get(i) - before.get(i));
                    now.set(i, now.get(i) + delta.get(i) * share);
                } else {
                    delta.set(i, f64::from(after.get(i) as f32 - before.get(i) as f32));
                    let change = delta.get(i) as f32 * share as f32;
                    now.set(i, f64::from(now.get(i) as f32 + change));
                }
            }
        }
    }
}

/// Tensors of each fragment, of tensors of these bytes: one belongs to the fragment in which its
/// middle lies.
pub fn fragments(bytes: &[usize], fragments: u32) -> Vec<Range<usize>> {
    let (all, parts): (usize, usize) = (bytes.iter().sum(), fragments as usize);
    let mut before = 0;
    let of = bytes.iter().map(|bytes| {
        before += bytes;
        (2 * before - bytes) * parts / (2 * all)
    });
    let of: Vec<usize> = of.collect();
    let first = |fragment: usize| of.partition_point(|&other| other < fragment);
    (0..parts).map(|fragment| first(fragment)..first(fragment + 1)).collect()
}

/// Against plain averages of the same values, by an averager of its own for each fragment.
fn check(case: &Case) {
    ranks(case.world, |communicator| {
        let mut random = Random(case.seed + communicator.rank() as u64);
        let mut model = case.model();
        model.iter_mut().for_each(|tensor| tensor.fill_random(&mut Random(case.seed)));
        let bytes = |&(dtype, elements, _): &(Dtype, usize, usize)| dtype.size() * elements;
        let bytes: Vec<usize> = case.tensors.iter().map(bytes).collect();
        let ranges = fragments(&bytes, case.fragments);
        let mut references: Vec<ParamAverager> = vec![];
        for range in &ranges {
            let builder = case.builder(communicator.clone());
            references.push(builder.build(&mut model[range.clone()]).unwrap());
        }
        let builder = case.builder(communicator).overlap(case.overlap);
        let mut averager = builder.build(&mut model[..]).unwrap();
        for _ in 0..case.rounds {
            for (fragment, range) in ranges.iter().enumerate() {
                case.train(&mut model, &mut random);
                let before = case.copy(&model);
                let average = averager.start_overlapped(fragment, &mut model[..]).unwrap();
                case.train(&mut model, &mut random);
                let mut expected = case.copy(&model);
                let report = averager.finish_overlapped(average, &mut model[..]).unwrap();
                let bytes: usize = model[range.clone()].iter().map(|one| one.bytes().len()).sum();
                assert_eq!((report.bytes, report.world_size), (bytes as u64, case.world));
                let mut after = case.copy(&before);
                references[fragment].average(&mut after[range.clone()]).unwrap();
                case.applied(&mut expected, &before, &after, range);
                for (index, (now, expected)) in model.iter().zip(&expected).enumerate() {
                    let what = format!("tensor {index} after fragment {fragment}, {range:?}");
                    assert!(now.guards_are_whole(), "{what}");
                    assert!(now.bytes() == expected.bytes(), "{what}");
                }
            }
        }
    });
}

#[test]
fn adds_what_an_average_of_the_copy_changes() {
    let config = ProptestConfig::with_cases(count(60, 600) as u32);
    proptest!(config, |(case in case())| check(&case));
}

/// A rank starts, trains and is through with that before its peer has come to the average.
#[test]
fn training_goes_on_while_a_peer_is_late() {
    let (trained, late) = channel();
    let late = Mutex::new(late);
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![0.0f32; 100];
        let builder = ParamAverager::builder(communicator).overlap(Overlap::default().delay(1));
        let mut averager = builder.build(&mut model).unwrap();
        if rank == 1 {
            late.lock().unwrap().recv().unwrap();
        }
        model.fill(rank as f32);
        let average = averager.start_overlapped(0, &mut model).unwrap();
        model.iter_mut().for_each(|x| *x += 10.0);
        if rank == 0 {
            assert!(!averager.is_overlapped_done(), "its peer has not begun");
            trained.send(()).unwrap();
        }
        averager.finish_overlapped(average, &mut model).unwrap();
        assert_eq!(model, [10.5; 100]);
    });
}

#[test]
fn a_failure_changes_no_tensor_of_the_rank() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![1.0f32; 100];
        let builder = ParamAverager::builder(communicator).reject_non_finite(true);
        let mut averager = builder.overlap(Overlap::default().delay(1)).build(&mut model).unwrap();
        if rank == 1 {
            model[3] = f32::NAN;
        }
        let average = averager.start_overlapped(0, &mut model).unwrap();
        model[50] = 7.0;
        let before: Vec<u32> = model.iter().map(|x| x.to_bits()).collect();
        let error = averager.finish_overlapped(average, &mut model).unwrap_err();
        assert!(matches!(error, Error::NonFinite { rank: 1, element: 3, .. }), "{error}");
        assert_eq!(error.tensors(), TensorState::Unchanged);
        assert!(model.iter().map(|x| x.to_bits()).eq(before), "unchanged");
        // The world lives.
        model[3] = 1.0;
        averager.average(&mut model).unwrap();
        let average = averager.start_overlapped(0, &mut model).unwrap();
        if rank == 1 {
            return; // and so does the average, which goes on without this thread
        }
        model[0] += 1.0;
        averager.finish_overlapped(average, &mut model).unwrap();
        assert_eq!(model[0], 2.0);
        let average = averager.start_overlapped(0, &mut model).unwrap();
        let error = averager.finish_overlapped(average, &mut model).unwrap_err();
        assert!(matches!(error, Error::PeerLost { rank: 1, .. }), "{error}");
        assert_eq!(error.tensors(), TensorState::Unchanged);
        assert_eq!(model[0], 2.0);
    });
}

#[test]
fn wrong_tensors_are_told_to_all_ranks_at_the_end() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![vec![1.0f32; 100]];
        let builder = ParamAverager::builder(communicator).overlap(Overlap::default().delay(1));
        let mut averager = builder.build(&mut model).unwrap();
        let mut wrong = vec![vec![1.0f32; 99]];
        let average = match rank {
            0 => averager.start_overlapped(0, &mut wrong),
            _ => averager.start_overlapped(0, &mut model),
        };
        let error = averager.finish_overlapped(average.unwrap(), &mut model).unwrap_err();
        assert!(matches!(error, Error::LayoutChanged { rank: 0, .. }), "{error}");
        // At the end, they are an error of this rank alone.
        let average = averager.start_overlapped(0, &mut model).unwrap();
        let ended = match rank {
            0 => averager.finish_overlapped(average, &mut wrong),
            _ => averager.finish_overlapped(average, &mut model),
        };
        if rank == 0 {
            let error = ended.unwrap_err();
            assert!(matches!(error, Error::LayoutChanged { rank: 0, .. }), "{error}");
            assert_eq!(error.tensors(), TensorState::Unchanged);
        } else {
            ended.unwrap();
        }
        averager.average(&mut model).unwrap();
    });
}

/// An average that was committed is added, whatever happens to the world before.
#[test]
fn a_failure_after_the_average_does_not_take_it_back() {
    let (added, waits) = channel();
    let waits = Mutex::new(waits);
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 100];
        let abort = communicator.abort_handle();
        let builder = ParamAverager::builder(communicator).start_from(Start::Own);
        let mut averager = builder.overlap(Overlap::default().delay(1)).build(&mut model).unwrap();
        let average = averager.start_overlapped(0, &mut model).unwrap();
        if rank == 0 {
            averager.finish_overlapped(average, &mut model).unwrap();
            abort.abort();
            added.send(()).unwrap();
        } else {
            waits.lock().unwrap().recv().unwrap();
            averager.finish_overlapped(average, &mut model).unwrap();
        }
        assert_eq!(model, [0.5; 100]);
        let error = averager.average(&mut model).unwrap_err();
        assert!(matches!(error, Error::Aborted { .. }), "{error}");
    });
}

/// Scalars and barriers do not wait for the end of an average of a copy.
#[test]
fn scalars_are_exchanged_while_an_average_is_under_way() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 100];
        let builder = ParamAverager::builder(communicator).start_from(Start::Own);
        let mut averager = builder.overlap(Overlap::default().delay(1)).build(&mut model).unwrap();
        let average = averager.start_overlapped(0, &mut model).unwrap();
        let average = match rank {
            0 => Some(average),
            _ => averager.finish_overlapped(average, &mut model).map(|_| None).unwrap(),
        };
        let mut loss = [rank as f64];
        averager.all_reduce_scalars(&mut loss, Reduction::Sum).unwrap();
        assert_eq!(loss, [1.0]);
        averager.barrier().unwrap();
        if let Some(average) = average {
            averager.finish_overlapped(average, &mut model).unwrap();
        }
        assert_eq!(model, [0.5; 100]);
    });
}

#[test]
fn an_average_whose_token_was_lost_can_be_dropped() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 100];
        let builder = ParamAverager::builder(communicator).start_from(Start::Own);
        let mut averager = builder.overlap(Overlap::default().delay(1)).build(&mut model).unwrap();
        drop(averager.start_overlapped(0, &mut model).unwrap());
        assert!(averager.average(&mut model).is_err());
        averager.drop_overlapped();
        assert_eq!(model, [rank as f32; 100]);
        averager.average(&mut model).unwrap();
        assert_eq!(model, [0.5; 100]);
    });
}

#[test]
fn calls_out_of_order_are_errors() {
    ranks(2, |communicator| {
        let mut model = vec![1.0f32; 100];
        let other = communicator.clone();
        let builder = ParamAverager::builder(communicator).overlap(Overlap::default().delay(1));
        let mut averager = builder.build(&mut model).unwrap();
        let mut plain = ParamAverager::builder(other).build(&mut model).unwrap();
        let refused = |result: Result<(), Error>, with: &str| match result {
            Err(error @ Error::InvalidOption { .. }) => {
                assert!(error.to_string().contains(with), "{error}")
            }
            other => panic!("{other:?}"),
        };
        refused(plain.start_overlapped(0, &mut model).map(drop), "a delay of 1 or more");
        refused(averager.start_overlapped(1, &mut model).map(drop), "1, of 1");
        let average = averager.start_overlapped(0, &mut model).unwrap();
        refused(averager.start_overlapped(0, &mut model).map(drop), "under way");
        refused(averager.average(&mut model).map(drop), "under way");
        refused(averager.broadcast(0, &mut model).map(drop), "under way");
        refused(averager.start(&mut model).map(drop), "under way");
        averager.finish_overlapped(average, &mut model).unwrap();
        let of_plain = averager.start_overlapped(0, &mut model).unwrap();
        refused(plain.finish_overlapped(of_plain, &mut model).map(drop), "of another averager");
    });
}

#[test]
fn options_that_do_not_fit_are_refused() {
    let refused = |n: usize, option: &dyn Fn(Builder) -> Builder, with: &str| {
        for error in ranks_of(n, option) {
            let is_option = matches!(error, Error::InvalidOption { .. });
            assert!(is_option && error.to_string().contains(with), "{error}");
        }
    };
    let with = |overlap: Overlap| move |builder: Builder| builder.overlap(overlap);
    refused(2, &with(Overlap::default().fragments(0)), "0 fragments");
    refused(2, &with(Overlap::default().fragments(65)), "65 fragments");
    refused(2, &with(Overlap::default().alpha(0.5)), "delay 0");
    refused(2, &with(Overlap::default().delay(1).alpha(1.0)), "alpha 1");
    refused(2, &with(Overlap::default().delay(1).alpha(f64::NAN)), "alpha NaN");
    let delay = Overlap::default().delay(1);
    refused(2, &|builder| builder.overlap(delay).telemetry(true), "telemetry");
    refused(2, &|builder| builder.overlap(delay).stage(|_| Ok(())), "stage");
    let outer = Outer::nesterov(0.7, 0.9).keeping(0.5);
    refused(2, &|builder| builder.overlap(delay).outer(outer), "keeps a share");
}

fn ranks_of(n: usize, option: &dyn Fn(Builder) -> Builder) -> Vec<Error> {
    let builders: Mutex<Vec<Option<Builder>>> = Mutex::new((0..n).map(|_| None).collect());
    let communicators =
        Communicator::from_devices(&vec![param_averager::Device::cpu(); n]).unwrap();
    for communicator in communicators {
        let rank = communicator.rank();
        builders.lock().unwrap()[rank] = Some(option(ParamAverager::builder(communicator)));
    }
    std::thread::scope(|scope| {
        let build = |builder: Builder| scope.spawn(|| builder.build(&mut vec![0.0f32; 10]));
        let builders = builders.into_inner().unwrap().into_iter().flatten();
        let threads: Vec<_> = builders.map(build).collect();
        threads.into_iter().map(|thread| thread.join().unwrap().unwrap_err()).collect()
    })
}
