//! Invariants 1, 2 and 3 against an f64 oracle: every element averaged once, the same bits on every
//! rank, and the accuracy.

use param_averager::__testing::instruction_sets;
use param_averager::__testing::Testing;
use param_averager::{Algorithm, Builder, Dtype};
use proptest::prelude::*;
use test_support::{count, layout, mean, ranks, ulp, Guarded, Random};

#[derive(Clone, Debug)]
struct Case {
    world: usize,
    /// Dtype, elements, and how many elements after a 16-byte boundary each rank's begins.
    tensors: Vec<(Dtype, usize, Vec<usize>)>,
    algorithm: Algorithm,
    all_or_nothing: bool,
    narrow_wire: bool,
    reject_non_finite: bool,
    channels: u32,
    slots: u32,
    chunk_bytes: usize,
    weights: Option<Vec<f64>>,
    counter: u32,
    averages: usize,
    seed: u64,
}

impl Case {
    fn build(&self, builder: Builder, instruction_set: Option<&'static str>) -> Builder {
        // Slots written past the caches, into them, and as this machine prefers.
        let remote_ns = [Some(0), Some(u32::MAX), None][(self.seed % 3) as usize];
        builder
            .algorithm(self.algorithm)
            .all_or_nothing(self.all_or_nothing)
            .narrow_wire(self.narrow_wire)
            .reject_non_finite(self.reject_non_finite)
            .channels(self.channels)
            .slots(self.slots)
            .chunk_bytes(self.chunk_bytes)
            .testing(Testing {
                counter: self.counter,
                poison_slots: true,
                remote_ns,
                // Every fourth case has delays, so that blocks arrive in other orders.
                delay_ns: if self.seed % 4 == 3 { 50_000 } else { 0 },
                instruction_set,
            })
    }

    /// All ranks' tensors before and after each average.
    fn run(&self, instruction_set: Option<&'static str>) -> Vec<Vec<(Vec<Guarded>, Vec<Guarded>)>> {
        ranks(self.world, |communicator| {
            let rank = communicator.rank();
            let mut model = layout::model(&self.tensors, rank);
            let builder = test_support::options(communicator);
            let mut averager = self.build(builder, instruction_set).build(&mut model).unwrap();
            (0..self.averages)
                .map(|round| {
                    let mut random = Random(self.seed + (round * 64 + rank) as u64);
                    // New memory each time: pointers may change between calls.
                    let mut before = layout::model(&self.tensors, rank);
                    before.iter_mut().for_each(|tensor| tensor.fill_random(&mut random));
                    let mut after: Vec<Guarded> = before.iter().map(Guarded::copy).collect();
                    match &self.weights {
                        Some(weights) => {
                            averager.average_weighted(&mut after, weights[rank]).unwrap()
                        }
                        None => averager.average(&mut after).unwrap(),
                    };
                    (before, after)
                })
                .collect()
        })
    }

    /// Checks a result, and describes the first wrong element.
    fn check(&self, result: &[Vec<(Vec<Guarded>, Vec<Guarded>)>]) -> Result<(), String> {
        let n = self.world as f64;
        let even = vec![1.0; self.world];
        let weights = self.weights.as_ref().unwrap_or(&even);
        for round in 0..self.averages {
            for (t, &(dtype, elements, _)) in self.tensors.iter().enumerate() {
                let at = |what: &str, rank: usize| {
                    format!("{what}: average {round}, rank {rank}, tensor {t}")
                };
                for (rank, averages) in result.iter().enumerate() {
                    let after = &averages[round].1[t];
                    if !after.guards_are_whole() {
                        return Err(at("wrote outside of the tensor", rank));
                    }
                    if after.bytes() != result[0][round].1[t].bytes() {
                        return Err(at("other bits than rank 0", rank));
                    }
                }
                for i in 0..elements {
                    let values: Vec<f64> =
                        result.iter().map(|averages| averages[round].0[t].get(i)).collect();
                    let (mean, most) = mean(&values, weights);
                    let sums = if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
                    // Bound of README. tests/core/accuracy.rs tests it for values and weights of
                    // every magnitude.
                    let mut bound =
                        (n + if self.weights.is_some() { 3.0 } else { 0.0 }) * ulp(sums, most);
                    if dtype.size() == 2 {
                        bound += 0.5 * ulp(dtype, mean.abs() + bound);
                        if self.algorithm == Algorithm::Ring && self.narrow_wire {
                            // Each hop but the first and the last rounds a partial mean.
                            bound += (n - 2.0).max(0.0)
                                * (0.5 * ulp(dtype, most) + 5.0 * ulp(sums, most));
                        }
                    }
                    let got = result[0][round].1[t].get(i);
                    let right = if self.world == 1 {
                        got == values[0]
                    } else {
                        (got - mean).abs() <= bound
                    };
                    if !right {
                        return Err(format!(
                            "{}, element {i}: {got:e} instead of {mean:e} of {values:?}, bound \
                             {bound:e}",
                            at("wrong mean", 0)
                        ));
                    }
                }
            }
        }
        Ok(())
    }
}

fn cases(most_ranks: usize, most_elements: usize) -> impl Strategy<Value = Case> {
    let tensor = layout::shapes(16, most_elements);
    let tensors = prop_oneof![
        9 => prop::collection::vec(tensor.clone(), 0..12),
        1 => prop::collection::vec(tensor.prop_map(|(d, e, at)| (d, e.min(70), at)), 200..400),
    ];
    let weight = prop_oneof![1 => Just(0.0), 4 => (1..1000u32).prop_map(f64::from), 1 => 1e-3..1e6];
    let weights = prop::option::of(prop::collection::vec(weight, 16));
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let counter = prop_oneof![
        Just(0u32),
        Just(u32::MAX - 3),
        Just(u32::MAX),
        Just(0x7fff_fffe),
        any::<u32>()
    ];
    let chunk = prop_oneof![Just(128usize), Just(256), Just(1000), Just(4096), Just(1 << 16)];
    (
        (1..=most_ranks, tensors, flags, 1..5u32, 1..4u32),
        (chunk, weights, counter, 1..4usize, any::<u32>()),
    )
        .prop_map(
            |(
                (world, tensors, flags, channels, slots),
                (chunk_bytes, weights, counter, averages, seed),
            )| {
                Case {
                    world,
                    tensors,
                    algorithm: if flags.0 { Algorithm::Ring } else { Algorithm::Direct },
                    all_or_nothing: flags.1,
                    narrow_wire: flags.2,
                    reject_non_finite: flags.3,
                    channels,
                    slots: 1 << slots,
                    chunk_bytes,
                    weights: weights.map(|mut weights| {
                        weights.truncate(world);
                        if weights.iter().all(|&w| w == 0.0) {
                            weights[world - 1] = 1.0;
                        }
                        weights
                    }),
                    counter,
                    averages,
                    seed: seed.into(),
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(40, 192) as u32))]

    #[test]
    fn every_element_is_averaged_once_and_nothing_else(case in cases(5, 9000)) {
        let result = case.run(None);
        case.check(&result).map_err(TestCaseError::fail)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(8, 24) as u32))]

    #[test]
    fn worlds_up_to_16(case in cases(16, 3000)) {
        let result = case.run(None);
        case.check(&result).map_err(TestCaseError::fail)?;
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits(case in cases(4, 3000)) {
        let best = case.run(None);
        for set in instruction_sets() {
            let other = case.run(Some(set));
            for (a, b) in best.iter().flatten().zip(other.iter().flatten()) {
                for (x, y) in a.1.iter().zip(&b.1) {
                    prop_assert_eq!(x.bytes(), y.bytes(), "{} differs", set);
                }
            }
        }
    }
}

/// The checker itself: one element that is off by a little more than allowed is seen, as is a byte
/// beside a tensor.
#[test]
fn the_oracle_sees_a_wrong_element() {
    for algorithm in [Algorithm::Ring, Algorithm::Direct] {
        let tensors = vec![(Dtype::F32, 1000, vec![0; 3]), (Dtype::Bf16, 77, vec![1; 3])];
        let case = Case {
            world: 3,
            tensors,
            algorithm,
            all_or_nothing: true,
            narrow_wire: false,
            reject_non_finite: false,
            channels: 2,
            slots: 2,
            chunk_bytes: 128,
            weights: None,
            counter: 0,
            averages: 1,
            seed: 7,
        };
        let mut result = case.run(None);
        case.check(&result).unwrap();
        for (tensor, element) in [(0, 999), (1, 76)] {
            let right = result[0][0].1[tensor].get(element);
            for rank in &mut result {
                rank[0].1[tensor].set(element, right + 0.1);
            }
            assert!(case.check(&result).unwrap_err().starts_with("wrong mean"));
            result.iter_mut().for_each(|rank| rank[0].1[tensor].set(element, right));
        }
        result[2][0].1[0].set(5, 0.25);
        assert!(case.check(&result).unwrap_err().starts_with("other bits"));
    }
}

/// Values near the top of the range do not overflow on the way. (What is the same everywhere is
/// tests/core/equal.rs's.)
#[test]
fn means_of_extreme_values() {
    let extremes = [
        (Dtype::F32, f32::MAX as f64),
        (Dtype::F64, f64::MAX),
        (Dtype::F16, 65504.0),
        (Dtype::Bf16, half::bf16::MAX.to_f64()),
        (Dtype::F32, f32::from_bits(1).into()),
        (Dtype::F64, f64::from_bits(2)),
    ];
    for algorithm in [Algorithm::Ring, Algorithm::Direct] {
        for world in [2, 4, 8] {
            for (dtype, value) in extremes {
                let results = ranks(world, |communicator| {
                    let mut tensor = Guarded::new(dtype, 100, 0);
                    (0..100).for_each(|i| tensor.set(i, if i % 2 == 0 { value } else { -value }));
                    let before = tensor.bytes().to_vec();
                    let mut averager = test_support::options(communicator)
                        .algorithm(algorithm)
                        .build(&mut tensor)
                        .unwrap();
                    averager.average(&mut tensor).unwrap();
                    // The smallest numbers lose bits when scaled; they stay within n ulp.
                    let exact = value > 1e-30;
                    let near = (0..100).all(|i| {
                        let want = if i % 2 == 0 { value } else { -value };
                        (tensor.get(i) - want).abs() <= world as f64 * ulp(dtype, value)
                    });
                    near && (!exact || tensor.bytes() == before)
                });
                assert_eq!(
                    results,
                    vec![true; world],
                    "{algorithm:?}, {world} ranks, {dtype} {value:e}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Ranks that are threads build and average with every timeout that is longer than they take.
    #[test]
    fn any_long_timeout_averages(
        seconds in prop_oneof![
            60u64..100,
            any::<u64>().prop_map(|x| x.max(60)),
            Just(u64::MAX),
        ],
        nanoseconds in 0u32..1_000_000_000,
    ) {
        let timeout = std::time::Duration::new(seconds, nanoseconds);
        ranks(2, |communicator| {
            let mut model = vec![vec![communicator.rank() as f32; 100]];
            let builder = test_support::options(communicator)
                .algorithm(Algorithm::Ring)
                .timeout(timeout);
            builder.build(&mut model).unwrap().average(&mut model).unwrap();
            assert_eq!(model[0], [0.5; 100]);
        });
    }
}
