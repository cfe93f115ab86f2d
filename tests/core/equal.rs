//! Averages of equal values change nothing: bit for bit by the direct average; by the ring for f16
//! and bf16; within a stated bound by the ring for f32 and f64.

use param_averager::{Algorithm, Device, Dtype, Parameters, TensorMut};
use proptest::prelude::*;
use test_support::{bits, count, ranks, Guarded, Random};

/// Raw bits of a tensor of each dtype.
#[derive(Clone)]
struct Bits {
    halves: Vec<u16>,
    f32: Vec<u32>,
    f64: Vec<u64>,
}

impl Bits {
    /// Every bit pattern of f16 and of bf16, and `count` of f32 and f64: of any class, subnormal,
    /// infinite and NaN included.
    fn all(count: usize, seed: u64) -> Bits {
        let mut random = Random(seed);
        let mut f32 = vec![
            0,
            1,
            1 << 31,
            f32::MAX.to_bits(),
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0xffa0_0001,
        ];
        let mut f64 = vec![
            0,
            1,
            1 << 63,
            f64::MAX.to_bits(),
            0x7ff0 << 48,
            0xfff0 << 48,
            0x7ff4_0000_0000_0001,
        ];
        while f32.len() < count {
            let bits = random.next_u64();
            let is_small = bits.is_multiple_of(6); // subnormal
            f32.push(bits as u32 & if is_small { 0x807f_ffff } else { u32::MAX });
            f64.push(random.next_u64() & if is_small { 0x800f_ffff_ffff_ffff } else { u64::MAX });
        }
        Bits { halves: (0..=u16::MAX).collect(), f32, f64 }
    }

    /// Replaces the values of rank `rank`, which has weight 0.
    fn disturb(&mut self, rank: usize) {
        self.halves
            .iter_mut()
            .for_each(|bits| *bits = bits.wrapping_mul(7).wrapping_add(rank as u16));
        self.f32.fill(f32::NAN.to_bits() + rank as u32);
        self.f64.iter_mut().for_each(|bits| *bits = bits.wrapping_mul(5));
    }
}

/// A model of `Bits`, with `halves` as f16 and again as bf16.
struct Model {
    f16: Vec<u16>,
    bf16: Vec<u16>,
    bits: Bits,
}

impl Model {
    fn of(bits: &Bits) -> Model {
        Model { f16: bits.halves.clone(), bf16: bits.halves.clone(), bits: bits.clone() }
    }
}

impl Parameters for Model {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        let mut one = |address: *mut u8, elements: usize, dtype: Dtype| {
            // SAFETY: own memory, borrowed for as long; any bits are a value of any of these
            // dtypes.
            visit(unsafe { TensorMut::from_raw_parts(address, elements, dtype, Device::cpu()) });
        };
        one(self.f16.as_mut_ptr().cast(), self.f16.len(), Dtype::F16);
        one(self.bits.f32.as_mut_ptr().cast(), self.bits.f32.len(), Dtype::F32);
        one(self.bf16.as_mut_ptr().cast(), self.bf16.len(), Dtype::Bf16);
        one(self.bits.f64.as_mut_ptr().cast(), self.bits.f64.len(), Dtype::F64);
    }
}

/// Numbers of ranks: all that are supported, or some.
fn worlds() -> Vec<usize> {
    match count(0, 1) {
        0 => vec![2, 3, 5, 16],
        _ => (2..=16).collect(),
    }
}

/// Weights of `world` ranks. `None`: a plain mean.
fn weightings(world: usize) -> Vec<Option<Vec<f64>>> {
    let of = |weight: &dyn Fn(usize) -> f64| Some((0..world).map(weight).collect());
    vec![
        None,
        of(&|rank| if rank == 0 { 1.0 } else { 10.0 }),
        of(&|rank| if rank % 2 == 0 { 1000.0 } else { 1.0 }),
        of(&|rank| if rank == 1 { 1e30 } else { 1e-30 }),
        // Ranks of weight 0 hold other values.
        of(&|rank| if rank % 3 == 0 { 0.0 } else { 0.1 + rank as f64 }),
        of(&|rank| if rank == world - 1 { 3.0 } else { 0.0 }),
    ]
}

/// A rank's model after one average of `bits`.
fn averaged(
    world: usize,
    weights: &Option<Vec<f64>>,
    bits: &Bits,
    algorithm: Algorithm,
    all_or_nothing: bool,
    narrow_wire: bool,
    then: impl Fn(Model) + Sync,
) {
    ranks(world, |communicator| {
        let rank = communicator.rank();
        let mut model = Model::of(bits);
        if weights.as_ref().is_some_and(|weights| weights[rank] == 0.0) {
            model.bits.disturb(rank);
            (model.f16, model.bf16) = (model.bits.halves.clone(), model.bits.halves.clone());
        }
        let mut averager = test_support::options(communicator)
            .algorithm(algorithm)
            .all_or_nothing(all_or_nothing)
            .narrow_wire(narrow_wire)
            .channels(1)
            .reject_non_finite(false)
            .build(&mut model)
            .unwrap();
        match weights {
            Some(weights) => averager.average_weighted(&mut model, weights[rank]).unwrap(),
            None => averager.average(&mut model).unwrap(),
        };
        then(model);
    });
}

fn is_nan_f16(bits: u16) -> bool {
    half::f16::from_bits(bits).is_nan()
}
fn is_nan_bf16(bits: u16) -> bool {
    half::bf16::from_bits(bits).is_nan()
}

/// The first element that `same` says no to.
fn check<T: Copy + std::fmt::LowerHex>(
    what: &str,
    got: &[T],
    want: &[T],
    same: impl Fn(T, T) -> bool,
) {
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        assert!(same(got, want), "{what}, element {i}: {want:#x} has become {got:#x}");
    }
}

#[test]
fn the_direct_average_keeps_every_bit_of_every_dtype() {
    let bits = Bits::all(1 << 12, 1);
    for world in worlds() {
        for weights in weightings(world) {
            let what = format!("{world} ranks, weights {weights:?}");
            averaged(world, &weights, &bits, Algorithm::Direct, true, false, |model| {
                assert!(model.f16 == bits.halves && model.bf16 == bits.halves, "halves, {what}");
                assert!(model.bits.f32 == bits.f32, "f32, {what}");
                assert!(model.bits.f64 == bits.f64, "f64, {what}");
            });
        }
    }
}

/// A million values of f32 and of f64.
#[test]
fn the_direct_average_keeps_a_million_values() {
    let bits = Bits::all(1_000_000, 2);
    for (world, which) in [(2, 0), (3, 1), (4, 4), (5, 3), (16, 2)] {
        averaged(
            world,
            &weightings(world)[which],
            &bits,
            Algorithm::Direct,
            true,
            false,
            |model| {
                assert!(model.bits.f32 == bits.f32 && model.bits.f64 == bits.f64, "{world} ranks");
            },
        );
    }
}

/// Rings with either wire keep every value of 16 bits.
#[test]
fn the_ring_keeps_every_value_of_f16_and_bf16() {
    let bits = Bits::all(64, 3);
    for world in worlds() {
        for (i, weights) in weightings(world).into_iter().enumerate() {
            let what = |dtype| format!("{dtype}, {world} ranks, weights {weights:?}");
            averaged(
                world,
                &weights,
                &bits,
                Algorithm::Ring,
                i % 2 == 0,
                (i + world) % 3 == 0,
                |model| {
                    let want = &bits.halves;
                    // A NaN stays a NaN; narrowing gives the same NaN for all.
                    check(&what("f16"), &model.f16, want, |got, want| {
                        got == want || is_nan_f16(got) && is_nan_f16(want)
                    });
                    check(&what("bf16"), &model.bf16, want, |got, want| {
                        got == want || is_nan_bf16(got) && is_nan_bf16(want)
                    });
                },
            );
        }
    }
}

/// f32 and f64 by the ring: by the number of ranks that count, in ulp, where sums neither overflow
/// nor are subnormal. Infinities stay, NaNs stay NaN, and where one rank counts every bit does.
#[test]
fn the_ring_keeps_f32_and_f64_within_the_stated_bound() {
    let bits = Bits::all(1 << 14, 4);
    for world in worlds() {
        for (i, weights) in weightings(world).into_iter().enumerate() {
            let counting =
                weights.as_ref().map_or(world, |w| w.iter().filter(|&&w| w > 0.0).count()) as u64;
            let bound = match (counting, &weights) {
                (1, _) => 0,
                (2 | 4, None) => 0,
                (n, None) => n.div_ceil(4),
                (n, Some(_)) => n + 2,
            };
            let what = format!("{world} ranks, weights {weights:?}");
            averaged(world, &weights, &bits, Algorithm::Ring, i % 2 == 1, false, |model| {
                check(&what, &model.bits.f32, &bits.f32, |got, want| {
                    let (x, y) = (f32::from_bits(got), f32::from_bits(want));
                    let usual = (2f32.powi(-121)..f32::MAX / 1.00001).contains(&y.abs());
                    got == want
                        || counting > 1
                            && (x.is_nan() && y.is_nan()
                                || usual && u64::from(got.abs_diff(want)) <= bound)
                        // its bound is that of tests/core/accuracy.rs
                        || counting > 1 && !usual && y.is_finite()
                });
                check(&what, &model.bits.f64, &bits.f64, |got, want| {
                    let (x, y) = (f64::from_bits(got), f64::from_bits(want));
                    let usual = (2f64.powi(-1017)..f64::MAX / 1.000_000_000_1).contains(&y.abs());
                    got == want
                        || counting > 1
                            && (x.is_nan() && y.is_nan() || usual && got.abs_diff(want) <= bound)
                        || counting > 1 && !usual && y.is_finite()
                });
            });
        }
    }
}

/// A trainer's thread that rounds upwards and flushes subnormal numbers to zero does not change
/// averages on it.
#[cfg(target_arch = "x86_64")]
#[test]
fn rounding_mode_of_the_trainer_does_not_matter() {
    let control = |new: Option<u32>| -> u32 {
        let mut now = 0u32;
        // SAFETY: reads and, if asked to, writes this thread's MXCSR, with its exceptions masked.
        unsafe {
            std::arch::asm!("stmxcsr [{}]", in(reg) &mut now, options(nostack));
            if let Some(new) = new {
                std::arch::asm!("ldmxcsr [{}]", in(reg) &new, options(nostack));
            }
        }
        now
    };
    let tiny: Vec<u16> = (0..0x80).chain(0x8000..0x8080).collect(); // all subnormals of bf16
    ranks(3, |communicator| {
        let mut values: Vec<half::bf16> =
            tiny.iter().map(|&bits| half::bf16::from_bits(bits)).collect();
        let mut averager = test_support::options(communicator)
            .algorithm(Algorithm::Ring)
            .channels(1)
            .reject_non_finite(false)
            .build(&mut values)
            .unwrap();
        const UPWARDS_AND_FLUSHED: u32 = 0x1f80 | 0x4000 | 0x8000 | 0x40;
        let before = control(Some(UPWARDS_AND_FLUSHED));
        averager.average(&mut values).unwrap();
        let during = control(Some(before));
        assert_eq!(
            during & 0xe040,
            UPWARDS_AND_FLUSHED & 0xe040,
            "the thread has its own way back"
        );
        assert!(values.iter().map(|value| value.to_bits()).eq(tiny.iter().copied()));
    });
}

/// Ranks; dtype, elements and place of each tensor; channels, bytes of a chunk; direct, all or
/// nothing; seed; weights.
type Case = (usize, Vec<(usize, usize, usize)>, u32, usize, bool, bool, u64, usize);

fn case() -> impl Strategy<Value = Case> {
    let tensor = (0..4usize, 0..700usize, 0..8usize);
    (
        2..=16usize,
        prop::collection::vec(tensor, 1..12),
        1..4u32,
        prop_oneof![Just(128usize), Just(256), Just(4096)],
        any::<bool>(),
        any::<bool>(),
        any::<u64>(),
        0..6usize,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(24, 64) as u32))]

    /// Tensors of any size, anywhere in memory, averaged ten times.
    #[test]
    fn averaging_what_is_the_same_everywhere_changes_nothing(
        (world, tensors, channels, chunk, direct, all_or_nothing, seed, weighting) in case()
    ) {
        let weights = weightings(world).swap_remove(weighting);
        let result = ranks(world, |communicator| {
            let rank = communicator.rank();
            let mut random = Random(seed);
            let mut model: Vec<Guarded> = tensors.iter().map(|&(dtype, elements, at)| {
                // f32 and f64 have another promise by the ring.
                let dtype = match direct {
                    true => Dtype::ALL[dtype],
                    false => [Dtype::F16, Dtype::Bf16][dtype % 2],
                };
                let mut tensor = Guarded::new(dtype, elements, (at + rank) % 8);
                for byte in tensor.bytes_mut() {
                    *byte = random.next_u64() as u8;
                }
                for i in 0..elements {
                    if !direct && tensor.get(i).is_nan() {
                        tensor.set(i, -0.0);
                    }
                }
                tensor
            }).collect();
            let before = bits(&model);
            let algorithm = if direct { Algorithm::Direct } else { Algorithm::Ring };
            let mut averager = test_support::options(communicator)
                .algorithm(algorithm)
                .all_or_nothing(all_or_nothing)
                .channels(channels)
                .reject_non_finite(false)
                .chunk_bytes(chunk)
                .narrow_wire(seed % 4 == 0)
                .build(&mut model).unwrap();
            for _ in 0..10 {
                match &weights {
                    Some(weights) => averager.average_weighted(&mut model, weights[rank]).unwrap(),
                    None => averager.average(&mut model).unwrap(),
                };
            }
            model.iter().zip(before).all(|(tensor, before)| {
                tensor.bytes() == before && tensor.guards_are_whole()
            })
        });
        prop_assert_eq!(result, vec![true; world]);
    }
}
