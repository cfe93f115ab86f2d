//! Coded averages of copies, and of fragments: the bits of the oracle, whatever averages of other
//! fragments, failures, drops and averages in full come between.

use std::ops::Range;

use param_averager::{
    Action, Builder, Communicator, Compression, Dtype, Error, LocalSgd, Outer, Overlap,
    ParamAverager, Schedule, Start, TensorState,
};
use proptest::prelude::*;
use test_support::{count, ranks, Guarded, Random};

use crate::compression::{padded, CODES};
use crate::compression_oracle::{Momentum, Oracle};
use crate::overlap::fragments;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// Average of a copy of a fragment, whose result is added.
    OfCopy,
    /// The same, dropped by rank 0 alone.
    Dropped,
    /// The same, of a fragment in which the last rank holds NaN.
    Fails,
    /// Average of all tensors, in place.
    Whole,
    /// The same, with NaN in one fragment.
    WholeFails,
    /// A copy of rank 1's values, in full.
    Copy,
}

#[derive(Clone, Debug)]
struct Case {
    code: Compression,
    world: usize,
    /// Elements, and how many elements after a 16-byte boundary each begins.
    tensors: Vec<(usize, usize)>,
    nesterov: bool,
    fragments: u32,
    alpha: f64,
    channels: u32,
    /// Each with its fragment.
    events: Vec<(Event, usize)>,
    seed: u64,
}

type Values = Vec<f32>;

/// A rank's values when an average began, before it ended, and after that.
struct Seen {
    begun: Values,
    before: Values,
    after: Values,
}

impl Case {
    fn model(&self) -> Vec<Guarded> {
        self.tensors.iter().map(|&(n, at)| Guarded::new(Dtype::F32, n, at)).collect()
    }

    fn ranges(&self) -> Vec<Range<usize>> {
        let bytes: Vec<usize> = self.tensors.iter().map(|(n, _)| 4 * n).collect();
        fragments(&bytes, self.fragments)
    }

    /// Elements of each fragment among all, with the padding of packs.
    fn elements(&self) -> Vec<Range<usize>> {
        let before = |tensor: usize| -> usize {
            self.tensors[..tensor].iter().map(|(n, _)| n.next_multiple_of(4)).sum()
        };
        self.ranges().iter().map(|range| before(range.start)..before(range.end)).collect()
    }

    fn builder(&self, communicator: Communicator) -> Builder {
        let outer = if self.nesterov { Outer::nesterov(0.7, 0.9) } else { Outer::mean() };
        ParamAverager::builder(communicator)
            .allow_unnamed()
            .compression(self.code)
            .overlap(Overlap::default().fragments(self.fragments).delay(1).alpha(self.alpha))
            .outer(outer)
            .channels(self.channels)
            .chunk_bytes(128) // the least, so that no layout makes it less
    }

    /// A tensor of the fragment, in which a value is made NaN.
    fn odd(&self, event: Event, fragment: usize) -> Option<usize> {
        let fails = matches!(event, Event::Fails | Event::WholeFails);
        self.ranges()[fragment].clone().next().filter(|_| fails)
    }

    fn train(model: &mut [Guarded], random: &mut Random) {
        for (t, tensor) in model.iter_mut().enumerate() {
            let size = [0.25, 1e-4, 0.0][t % 3];
            let n = tensor.elements;
            (0..n).for_each(|i| tensor.set(i, tensor.get(i) + random.value() * size));
        }
    }

    /// Each rank's first values, which are those of rank 0, and what it has seen of each event.
    fn run(&self) -> Vec<(Values, Vec<Seen>)> {
        ranks(self.world, |communicator| {
            let (rank, is_last) = (communicator.rank(), communicator.rank() + 1 == self.world);
            let mut random = Random(self.seed + rank as u64);
            let mut model = self.model();
            model.iter_mut().for_each(|tensor| tensor.fill_random(&mut random));
            let mut averager = self.builder(communicator).build(&mut model).unwrap();
            let first = padded(&model);
            let mut all = vec![];
            for &(event, fragment) in &self.events {
                Self::train(&mut model, &mut random);
                let odd = self.odd(event, fragment);
                if let Some(tensor) = odd.filter(|_| is_last) {
                    model[tensor].set(0, f64::NAN);
                }
                let begun = padded(&model);
                let made = match event {
                    Event::Whole | Event::WholeFails => averager.average(&mut model).map(Some),
                    Event::Copy => averager.broadcast(1, &mut model).map(Some),
                    _ => Ok(None),
                };
                let (made, before) = match made {
                    Ok(None) => {
                        let average = averager.start_overlapped(fragment, &mut model).unwrap();
                        Self::train(&mut model, &mut random);
                        let before = padded(&model);
                        let made = match event {
                            Event::Dropped if rank == 0 => {
                                averager.drop_overlapped();
                                Ok(None)
                            }
                            _ => averager.finish_overlapped(average, &mut model).map(Some),
                        };
                        (made, before)
                    }
                    made => (made, begun.clone()),
                };
                let after = padded(&model);
                match (made, odd) {
                    (Ok(report), None) => {
                        let code = if event == Event::Copy { Compression::None } else { self.code };
                        assert!(report.is_none_or(|report| report.compression == code));
                    }
                    (Err(error @ Error::NonFinite { .. }), Some(_)) => {
                        assert_eq!(error.tensors(), TensorState::Unchanged);
                    }
                    (made, odd) => panic!("{event:?} of {fragment}, {odd:?}: {made:?}"),
                }
                if let Some(tensor) = odd.filter(|_| is_last) {
                    model[tensor].set(0, 0.5);
                }
                assert!(model.iter().all(Guarded::guards_are_whole));
                all.push(Seen { begun, before, after });
            }
            (first, all)
        })
    }

    /// Checks all values of all ranks, bit for bit: with an oracle for each fragment.
    fn check(&self, all: &[(Values, Vec<Seen>)]) -> Result<(), String> {
        let outer = Momentum { lr: 0.7, a: 1.0, b: 0.9, mu: 0.9 };
        let outer = self.nesterov.then_some(outer);
        let (cut, parts) = ((self.channels as usize, 128), self.elements());
        let oracle = |part: &Range<usize>| {
            Oracle::new(self.code, self.world, cut, outer, all[0].0[part.clone()].into())
        };
        let mut oracles: Vec<Oracle> = parts.iter().map(oracle).collect();
        let share = 1.0 - self.alpha as f32;
        for (at, &(event, fragment)) in self.events.iter().enumerate() {
            let of = |rank: usize| &all[rank].1[at];
            let values = |part: &Range<usize>| -> Vec<Values> {
                (0..self.world).map(|rank| of(rank).begun[part.clone()].to_vec()).collect()
            };
            let fails = self.odd(event, fragment).is_some();
            let is_whole = matches!(event, Event::Whole | Event::WholeFails | Event::Copy);
            let mut want: Vec<Values> = (0..self.world).map(|r| of(r).before.clone()).collect();
            for (index, (oracle, part)) in oracles.iter_mut().zip(&parts).enumerate() {
                match event {
                    _ if !is_whole && index != fragment => continue,
                    _ if fails => {
                        oracle.forget();
                        continue;
                    }
                    Event::Copy => oracle.restart(of(1).begun[part.clone()].into()),
                    _ => oracle.average(&values(part), None),
                }
                for (rank, want) in want.iter_mut().enumerate() {
                    let own = &mut want[part.clone()];
                    if is_whole {
                        own.copy_from_slice(&oracle.reference);
                    } else if event != Event::Dropped || rank != 0 {
                        let begun = &of(rank).begun[part.clone()];
                        for ((x, s), a) in own.iter_mut().zip(begun).zip(&oracle.reference) {
                            *x += (a - s) * share;
                        }
                    }
                }
            }
            for (rank, want) in want.iter().enumerate() {
                for (i, (got, want)) in of(rank).after.iter().zip(want).enumerate() {
                    let is_same =
                        got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
                    if !is_same {
                        return Err(format!(
                            "rank {rank}, event {at}, {event:?} of {fragment}, element {i}: \
                             {got:e}, not {want:e}"
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let tensor = (1..1200usize, prop_oneof![3 => Just(0), 1 => 0..4usize]);
    let event = prop_oneof![
        6 => Just(Event::OfCopy),
        1 => Just(Event::Dropped),
        2 => Just(Event::Fails),
        1 => Just(Event::Whole),
        1 => Just(Event::WholeFails),
        1 => Just(Event::Copy),
    ];
    (
        (0..2usize, 2..=4usize, prop::collection::vec(tensor, 1..7), any::<bool>(), 1..5u32),
        (prop::sample::select(vec![0.0, 0.5]), 1..3u32, any::<u32>()),
        prop::collection::vec((event, 0..4usize), 1..10),
    )
        .prop_map(|((code, world, tensors, nesterov, fragments), rest, mut events)| {
            let (alpha, channels, seed) = rest;
            events.iter_mut().for_each(|(_, fragment)| *fragment %= fragments as usize);
            Case {
                code: CODES[code],
                world,
                tensors,
                nesterov,
                fragments,
                alpha,
                channels,
                events,
                seed: seed.into(),
            }
        })
}

#[test]
fn every_fragment_has_the_bits_of_its_oracle() {
    let config = ProptestConfig::with_cases(count(64, 600) as u32);
    proptest!(config, |(case in cases())| {
        case.check(&case.run()).map_err(TestCaseError::fail)?;
    });
}

/// The failure of one fragment leaves the residuals of the others, and another fragment's average
/// does not make good what a failed one has left.
#[test]
fn a_failure_is_its_own_fragments() {
    use Event::*;
    for code in CODES {
        for nesterov in [false, true] {
            let events = [OfCopy, Fails, OfCopy, OfCopy, WholeFails, OfCopy, OfCopy, Whole, OfCopy]
                .into_iter()
                .zip([0, 1, 0, 1, 0, 1, 0, 0, 1]);
            let case = Case {
                code,
                world: 3,
                tensors: vec![(700, 0), (700, 1)],
                nesterov,
                fragments: 2,
                alpha: 0.0,
                channels: 2,
                events: events.collect(),
                seed: 11,
            };
            let mut all = case.run();
            case.check(&all).unwrap();
            // The checker itself.
            let value = &mut all[1].1[7].after[900];
            *value = f32::from_bits(value.to_bits() ^ 1);
            assert!(case.check(&all).unwrap_err().starts_with("rank 1, event 7, Whole of 0"));
        }
    }
}

/// Each rank's loss has its minimum at its own number: all ranks end with one model, near the
/// minimum of their mean.
#[test]
fn streaming_diloco_learns_in_code() {
    for (fragments, delay, alpha) in
        [(1, 0, 0.0), (1, 2, 0.0), (2, 0, 0.0), (4, 1, 0.0), (2, 2, 0.5)]
    {
        for code in CODES {
            let ends = ranks(3, |communicator| {
                let rank = communicator.rank() as f32;
                let mut model = vec![vec![8.0f32; 50]; 4];
                let averager = ParamAverager::builder(communicator)
                    .allow_unnamed()
                    .outer(Outer::diloco())
                    .compression(code)
                    .overlap(Overlap::default().fragments(fragments).delay(delay).alpha(alpha))
                    .build(&mut model)
                    .unwrap();
                let mut sgd = LocalSgd::new(averager, Schedule::every(4));
                for _ in 0..400 {
                    model.iter_mut().flatten().for_each(|x| *x -= 0.05 * (*x - rank));
                    sgd.step(&mut model).unwrap();
                }
                sgd.finish(&mut model).unwrap();
                model.concat()
            });
            let what = format!("{code:?}, fragments {fragments}, delay {delay}, alpha {alpha}");
            assert!(ends.iter().all(|end| *end == ends[0]), "{what}");
            assert!(ends[0].iter().all(|x| (x - 1.0).abs() < 0.05), "{what}: {:?}", ends[0]);
        }
    }
}

/// Without a reference a due average is of the whole model and in full, and training waits for it.
#[test]
fn the_first_average_of_own_values_is_whole() {
    for delay in [0, 1] {
        let models = ranks(2, |communicator| {
            let rank = communicator.rank();
            let mut model = vec![vec![rank as f32; 50]; 2];
            let averager = ParamAverager::builder(communicator)
                .allow_unnamed()
                .start_from(Start::Own)
                .compression(Compression::Int8)
                .overlap(Overlap::default().fragments(2).delay(delay))
                .build(&mut model)
                .unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(4));
            if delay > 0 {
                let error = sgd.averager().start_overlapped(0, &mut model).unwrap_err();
                assert!(error.to_string().contains("compression codes"), "{error}");
            }
            let mut seen = vec![];
            for _ in 0..8 {
                model.iter_mut().flatten().for_each(|x| *x += 1.0);
                match sgd.step(&mut model).unwrap() {
                    Action::Averaged(report) => seen.push((report.bytes, report.compression)),
                    Action::Started { ends_in } => assert_eq!(ends_in, delay),
                    action => assert!(matches!(action, Action::Counted { .. }), "{action:?}"),
                }
            }
            let part = (200, Compression::Int8);
            let expected = [(400, Compression::None), part, part, part];
            assert_eq!(seen, expected[..if delay == 0 { 4 } else { 3 }]);
            sgd.finish(&mut model).unwrap();
            model
        });
        assert_eq!(models[0], models[1]);
        assert!(models[0].iter().flatten().all(|x| (x - 8.5).abs() < 0.05), "{:?}", models[0]);
    }
}

/// The copy of the largest fragment, and what compression takes, are all that both need.
#[test]
fn both_need_what_each_needs() {
    const N: usize = 1 << 12;
    let of = |code, fragments| {
        ranks(2, move |communicator| {
            let builder = ParamAverager::builder(communicator).compression(code).allow_unnamed();
            let builder = builder.algorithm(param_averager::Algorithm::Ring).channels(2);
            let builder = builder.overlap(Overlap::default().fragments(fragments).delay(1));
            builder.build(&mut vec![vec![0.0f32; N]; 4]).unwrap().memory_overhead()
        })[0]
    };
    for fragments in [1, 4] {
        let words = 2 * 4 * fragments as usize; // of each channel and fragment
        let (with, without) = (of(Compression::Int8, fragments), of(Compression::None, fragments));
        assert_eq!(with - without, 8 * 4 * N + words);
    }
}
