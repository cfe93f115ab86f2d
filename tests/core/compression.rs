//! Coded averages: the bits of the oracle for every world, layout, weight and instruction set, also
//! after one that has failed; and the bounds of their error.

use param_averager::__testing::{instruction_sets, Testing};
use param_averager::{
    Builder, Communicator, Compression, Dtype, Error, Outer, ParamAverager, TensorState,
};
use proptest::prelude::*;
use test_support::{count, ranks, Guarded, Random};

use crate::compression_oracle::{Momentum, Oracle};

pub const CODES: [Compression; 2] = [Compression::Bf16, Compression::Int8];

#[derive(Clone, Debug)]
struct Case {
    code: Compression,
    world: usize,
    /// Elements, and how many elements after a 16-byte boundary each rank's begin.
    tensors: Vec<(usize, Vec<usize>)>,
    nesterov: bool,
    channels: u32,
    chunk_bytes: usize,
    /// Of each average: the weights, or none. A rank of weight 0 holds NaN.
    rounds: Vec<Option<Vec<f64>>>,
    /// The average in which the last rank holds NaN, and which fails.
    fails_at: Option<usize>,
    seed: u64,
}

type Values = Vec<f32>;

impl Case {
    fn model(&self, rank: usize) -> Vec<Guarded> {
        self.tensors.iter().map(|(n, at)| Guarded::new(Dtype::F32, *n, at[rank])).collect()
    }

    fn builder(&self, communicator: Communicator, set: Option<&'static str>) -> Builder {
        let outer = if self.nesterov { Outer::nesterov(0.7, 0.9) } else { Outer::mean() };
        ParamAverager::builder(communicator)
            .allow_unnamed()
            .compression(self.code)
            .outer(outer)
            .channels(self.channels)
            .chunk_bytes(self.chunk_bytes)
            .testing(Testing { poison_slots: true, instruction_set: set, ..Testing::default() })
    }

    /// Each rank's values after `build`, and before and after each average, with the padding of
    /// packs.
    fn run(&self, set: Option<&'static str>) -> Vec<Vec<Values>> {
        ranks(self.world, |communicator| {
            let rank = communicator.rank();
            let mut random = Random(self.seed + rank as u64);
            let mut model = self.model(rank);
            model.iter_mut().for_each(|tensor| tensor.fill_random(&mut random));
            let mut averager = self.builder(communicator, set).build(&mut model).unwrap();
            let mut seen = vec![padded(&model)];
            for (round, weights) in self.rounds.iter().enumerate() {
                let weight = weights.as_ref().map(|weights| weights[rank]);
                let fails = self.fails_at == Some(round);
                let is_odd = fails && rank + 1 == self.world;
                // Differences of very different size, and none in one tensor of four.
                for (t, tensor) in model.iter_mut().enumerate() {
                    let size = [0.25, 0.0, 1e-4, 3e-38][t % 4];
                    for i in 0..tensor.elements {
                        let moved = tensor.get(i) + random.value() * size;
                        let is_nan = weight == Some(0.0) || (is_odd && t == 0 && i == 3);
                        tensor.set(i, if is_nan { f64::NAN } else { moved });
                    }
                }
                seen.push(padded(&model));
                let made = match weight {
                    Some(weight) => averager.average_weighted(&mut model, weight),
                    None => averager.average(&mut model),
                };
                match (made, fails) {
                    (Ok(report), false) => assert_eq!(report.compression, self.code),
                    (Err(error), true) => {
                        let Error::NonFinite { rank, element: 3, tensor } = &error else {
                            panic!("{error}")
                        };
                        assert_eq!(*rank + 1, self.world);
                        assert!(tensor.starts_with("tensor 0"), "{tensor}");
                        assert_eq!(error.tensors(), TensorState::Unchanged);
                        // The NaN stays, and would fail the next average.
                        if is_odd {
                            model[0].set(3, 0.5);
                        }
                    }
                    (made, _) => panic!("average {round}: {made:?}"),
                }
                assert!(model.iter().all(Guarded::guards_are_whole));
                seen.push(padded(&model));
            }
            seen
        })
    }

    /// Checks all values of all ranks, bit for bit.
    fn check(&self, all: &[Vec<Values>]) -> Result<(), String> {
        let outer = Momentum { lr: 0.7, a: 1.0, b: 0.9, mu: 0.9 };
        let outer = self.nesterov.then_some(outer);
        let cut = (self.channels as usize, self.chunk_bytes);
        let mut oracle = Oracle::new(self.code, self.world, cut, outer, all[0][0].clone());
        for (round, weights) in self.rounds.iter().enumerate() {
            let before: Vec<Values> = all.iter().map(|seen| seen[2 * round + 1].clone()).collect();
            let fails = self.fails_at == Some(round);
            match fails {
                true => oracle.forget(),
                false => oracle.average(&before, weights.as_deref()),
            }
            for (rank, seen) in all.iter().enumerate() {
                let mut want = oracle.reference.clone();
                if fails {
                    want.clone_from(&before[rank]);
                    if rank + 1 == self.world {
                        want[3] = 0.5;
                    }
                }
                let got = &seen[2 * round + 2];
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    if got.to_bits() != want.to_bits() {
                        return Err(format!(
                            "rank {rank}, average {round}, element {i}: {got:e}, not {want:e}"
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

/// All values, and zeros where a pack has no element.
pub fn padded(model: &[Guarded]) -> Values {
    let of = |tensor: &Guarded| {
        let mut values: Values = (0..tensor.elements).map(|i| tensor.get(i) as f32).collect();
        values.resize(values.len().next_multiple_of(4), 0.0);
        values
    };
    model.iter().flat_map(of).collect()
}

fn cases(most_elements: usize) -> impl Strategy<Value = Case> {
    let elements = prop_oneof![Just(4usize), 4..40usize, 4..most_elements];
    let at = prop::collection::vec(prop_oneof![3 => Just(0), 1 => 0..4usize], 4);
    let tensors = prop::collection::vec((elements, at), 1..8);
    let weight = prop_oneof![1 => Just(0.0), 4 => (1..1000u32).prop_map(f64::from)];
    let weights = prop::option::of(prop::collection::vec(weight, 4));
    let rounds = prop::collection::vec(weights, 1..5);
    let chunk = prop_oneof![Just(128usize), Just(256), Just(4096), Just(65536)];
    let fails = prop::option::of(0usize..4);
    ((0..2usize, 2..=4usize, tensors, any::<bool>()), (1..4u32, chunk, rounds, fails, any::<u32>()))
        .prop_map(|((code, world, tensors, nesterov), rest)| {
            let (channels, chunk_bytes, mut rounds, fails_at, seed) = rest;
            for (round, weights) in rounds.iter_mut().enumerate() {
                if fails_at == Some(round) {
                    *weights = None;
                }
                if let Some(weights) = weights {
                    weights.truncate(world);
                    weights[world - 1] = weights[world - 1].max(1.0); // one rank counts at least
                }
            }
            Case {
                code: CODES[code],
                world,
                tensors,
                nesterov,
                channels,
                chunk_bytes,
                rounds,
                fails_at,
                seed: seed.into(),
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(64, 256) as u32))]

    #[test]
    fn every_rank_has_the_bits_of_the_oracle(case in cases(3000), set in 0usize..3) {
        let sets = instruction_sets();
        case.check(&case.run(Some(sets[set % sets.len()]))).map_err(TestCaseError::fail)?;
    }
}

fn plain_case(code: Compression, world: usize) -> Case {
    Case {
        code,
        world,
        tensors: vec![(1000, vec![0; 4]), (77, vec![1, 0, 2, 3])],
        nesterov: false,
        channels: 2,
        chunk_bytes: 128,
        rounds: vec![None; 3],
        fails_at: None,
        seed: 7,
    }
}

/// The checker itself: one element that is off by its last bit is seen.
#[test]
fn the_oracle_sees_a_wrong_bit() {
    for code in CODES {
        let case = plain_case(code, 3);
        let mut all = case.run(None);
        case.check(&all).unwrap();
        all[2][6][1070] = f32::from_bits(all[2][6][1070].to_bits() ^ 1);
        assert!(case.check(&all).unwrap_err().starts_with("rank 2, average 2, element 1070"));
    }
}

/// Models whose ranks move by the same way in each round, as a constant gradient would move them.
/// Returns the largest error after the last average, relative to the largest way of one round.
fn drift(code: Compression, world: usize, rounds: usize, is_fed_back: bool) -> f64 {
    const N: usize = 1024;
    let ways: Vec<Values> = (0..world)
        .map(|rank| {
            let mut random = Random(rank as u64 + 1);
            (0..N).map(|_| random.value() as f32).collect()
        })
        .collect();
    let largest = ways.iter().flatten().fold(0.0f32, |most, x| most.max(x.abs()));
    let values = match is_fed_back {
        true => {
            let moved = ranks(world, |communicator| {
                let way = &ways[communicator.rank()];
                let mut model = vec![0.0f32; N];
                let builder = ParamAverager::builder(communicator).compression(code);
                let mut averager = builder.chunk_bytes(512).build(&mut model).unwrap();
                for _ in 0..rounds {
                    model.iter_mut().zip(way).for_each(|(x, way)| *x += way);
                    averager.average(&mut model).unwrap();
                }
                model
            });
            moved.into_iter().next().unwrap()
        }
        false => {
            let mut oracle = Oracle::new(code, world, (1, 512), None, vec![0.0; N]);
            oracle.feeds_back = false;
            for _ in 0..rounds {
                let add = |way: &Values| {
                    oracle.reference.iter().zip(way).map(|(x, way)| x + way).collect()
                };
                let values: Vec<Values> = ways.iter().map(add).collect();
                oracle.average(&values, None);
            }
            oracle.reference
        }
    };
    let mean = |i: usize| ways.iter().map(|way| f64::from(way[i])).sum::<f64>() / world as f64;
    let error = |i: usize| (f64::from(values[i]) - rounds as f64 * mean(i)).abs();
    (0..N).map(error).fold(0.0, f64::max) / f64::from(largest)
}

/// Errors are in the next average, so that they do not add up: after any number of averages the
/// error is that of one. Without the feedback they do.
#[test]
fn errors_do_not_add_up() {
    for (code, bound) in [(Compression::Int8, 1.0 / 254.0), (Compression::Bf16, 1.0 / 256.0)] {
        for world in [2, 3] {
            // n codes lie between a value and the ranks; 2: residuals make the values larger; and
            // what f32 rounds in so many steps.
            let bound = 2.0 * bound * world as f64 + 100.0 * 100.0 * f64::from(f32::EPSILON);
            let with = drift(code, world, 100, true);
            assert!(with <= bound, "{code:?}, {world} ranks: {with}");
            let without = drift(code, world, 100, false);
            assert!(without > 4.0 * bound, "{code:?}, {world} ranks: {without} without feedback");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(32, 128) as u32))]

    /// One average from a reference: n codes, each off by 1/254 of the largest difference, or 2⁻⁸
    /// of it, and what f32 rounds.
    #[test]
    fn one_average_is_within_the_bound(
        world in 2usize..=4, code in 0usize..2, size in -60i32..60, n in 1usize..2000, seed: u32,
    ) {
        let (code, size) = (CODES[code], 2f64.powi(size));
        let values = ranks(world, |communicator| {
            let mut random = Random(u64::from(seed) + communicator.rank() as u64);
            let mut model = vec![0.0f32; n];
            let builder = ParamAverager::builder(communicator).compression(code);
            let mut averager = builder.build(&mut model).unwrap();
            model.iter_mut().for_each(|x| *x = (random.value() * size) as f32);
            let before = model.clone();
            averager.average(&mut model).unwrap();
            (before, model)
        });
        let all = || values.iter().flat_map(|(before, _)| before);
        let largest = f64::from(all().fold(0.0f32, |most, x| most.max(x.abs())));
        let each = if code == Compression::Int8 { 1.0 / 254.0 } else { 1.0 / 256.0 };
        let bound = largest * world as f64 * (each + 4.0 * f64::from(f32::EPSILON));
        for i in 0..n {
            let mean = values.iter().map(|(before, _)| f64::from(before[i])).sum::<f64>();
            let mean = mean / world as f64;
            for (_, after) in &values {
                let error = (f64::from(after[i]) - mean).abs();
                prop_assert!(error <= bound, "{error:e} > {bound:e}, largest {largest:e}");
            }
        }
    }
}
