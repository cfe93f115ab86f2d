//! Accuracy of the mean, as README promises it, against an exact mean: for values of any magnitude,
//! subnormal and huge ones, and weights from 1e-30 to 1e30.

use num_bigint::{BigInt, Sign};
use param_averager::{Algorithm, Dtype};
use proptest::prelude::*;
use test_support::{count, format, ranks, ulp, Guarded, Random};

#[derive(Clone, Debug)]
struct Case {
    dtype: Dtype,
    algorithm: Algorithm,
    all_or_nothing: bool,
    narrow_wire: bool,
    /// Weights by rank.
    weights: Vec<f64>,
    /// Distribution of the values.
    class: Class,
    seed: u64,
}

#[derive(Clone, Copy, Debug)]
enum Class {
    /// Any bits that are a finite number.
    Any,
    /// All ranks' values of one magnitude: their exponent lies at this fraction of the dtype's
    /// range.
    Near(f64),
    /// Subnormal numbers, and a little above.
    Subnormal,
    /// The largest numbers.
    Huge,
}

const ELEMENTS: usize = 300;

fn power(exponent: i32) -> f64 {
    f64::from(exponent).exp2()
}

impl Case {
    fn value(&self, random: &mut Random) -> f64 {
        let (mantissa, least, most) = format(self.dtype);
        let one = 1.0 + (random.next_u64() >> 12) as f64 * power(-52); // 1 … 2
        let sign = if random.below(2) == 0 { 1.0 } else { -1.0 };
        let exponent = match self.class {
            Class::Any => least - mantissa + random.below((most - least + mantissa) as u64) as i32,
            Class::Near(part) => {
                least + ((most - 2 - least) as f64 * part) as i32 + random.below(2) as i32
            }
            Class::Subnormal => least - mantissa + random.below(mantissa as u64 + 6) as i32,
            Class::Huge => most,
        };
        let magnitude = match self.class {
            // Within n + 3 ulp of the largest number, means of f32 and f64 may be infinite.
            Class::Huge if self.dtype.size() > 2 => {
                (2.0 - power(-16) - one.fract() / 256.0) * power(exponent)
            }
            Class::Huge => (2.0 - power(-mantissa) - one.fract() / 16.0) * power(exponent),
            _ => one * power(exponent),
        };
        sign * magnitude
    }

    fn run(&self) -> (Vec<Guarded>, Vec<Guarded>) {
        let results = ranks(self.weights.len(), |communicator| {
            let rank = communicator.rank();
            let mut random = Random(self.seed ^ (rank as u64) << 32);
            let mut before = Guarded::new(self.dtype, ELEMENTS, rank % 2);
            for i in 0..ELEMENTS {
                before.set(i, self.value(&mut random));
            }
            let mut after = before.copy();
            let mut averager = test_support::options(communicator)
                .algorithm(self.algorithm)
                .all_or_nothing(self.all_or_nothing)
                .narrow_wire(self.narrow_wire)
                .channels(1)
                .chunk_bytes(256)
                .build(&mut after)
                .unwrap();
            averager.average_weighted(&mut after, self.weights[rank]).unwrap();
            (before, after)
        });
        results.into_iter().unzip()
    }

    /// Error bound of README, for a mean of about `mean` of values up to `most`.
    fn bound(&self, mean: f64, most: f64) -> f64 {
        let counting: Vec<f64> =
            self.weights.iter().copied().filter(|&weight| weight > 0.0).collect();
        let n = counting.len() as f64;
        if counting.len() == 1 {
            return 0.0;
        }
        let equal = counting.iter().all(|&weight| weight == counting[0]);
        let (sums, least) =
            if self.dtype == Dtype::F64 { (Dtype::F64, -1017) } else { (Dtype::F32, -121) };
        let of_sums = ulp(sums, most.max(power(least)));
        let sum = if equal { n } else { n + 3.0 } * of_sums;
        if self.dtype.size() > 2 {
            return sum;
        }
        let world = self.weights.len() as f64;
        let hops =
            if self.algorithm == Algorithm::Ring && self.narrow_wire { world - 2.0 } else { 0.0 };
        sum + 0.5 * ulp(self.dtype, mean.abs() + sum)
            + hops * (0.5 * ulp(self.dtype, most) + 5.0 * of_sums)
    }

    fn check(&self) -> Result<(), String> {
        let (before, after) = self.run();
        let total: BigInt = self.weights.iter().map(|&weight| exact(weight)).sum();
        for i in 0..ELEMENTS {
            let values = || {
                before
                    .iter()
                    .zip(&self.weights)
                    .filter(|(_, &w)| w > 0.0)
                    .map(|(t, &w)| (t.get(i), w))
            };
            let sum: BigInt = values().map(|(x, w)| exact(x) * exact(w)).sum();
            let most = values().map(|(x, _)| x.abs()).fold(0.0, f64::max);
            let got = after[0].get(i);
            // An approximation, to determine the mean's ulp.
            let largest = self.weights.iter().copied().fold(0.0, f64::max);
            let near = values().map(|(x, w)| x * (w / largest)).sum::<f64>()
                / values().map(|(_, w)| w / largest).sum::<f64>();
            let bound = self.bound(near, most);
            if !got.is_finite() || magnitude(exact(got) * &total - sum) > exact(bound) * &total {
                let values: Vec<_> = values().collect();
                return Err(format!("{got:e} for about {near:e}, ± {bound:e}: {values:?}"));
            }
            if let Some(rank) = after.iter().position(|other| other.bytes() != after[0].bytes()) {
                return Err(format!("rank {rank} has other bits than rank 0"));
            }
        }
        Ok(())
    }
}

/// A finite number times 2^1100: every f64, and halves of them, are integers then.
fn exact(x: f64) -> BigInt {
    if x == 0.0 {
        return BigInt::from(0);
    }
    let bits = x.to_bits();
    let (exponent, fraction) = (bits >> 52 & 0x7ff, bits & ((1 << 52) - 1));
    let (mantissa, exponent) =
        if exponent == 0 { (fraction, 1) } else { (fraction | 1 << 52, exponent) };
    let integer = BigInt::from(mantissa) << (exponent as usize + 1100 - 1075);
    if x < 0.0 {
        -integer
    } else {
        integer
    }
}

fn magnitude(x: BigInt) -> BigInt {
    if x.sign() == Sign::Minus {
        -x
    } else {
        x
    }
}

fn cases() -> impl Strategy<Value = Case> {
    let weight = prop_oneof![
        1 => Just(0.0),
        3 => Just(1.0),
        3 => (1..1000u32).prop_map(f64::from),
        4 => (-30.0..30.0f64).prop_map(|exponent| 10f64.powf(exponent)),
        1 => Just(1e-30),
        1 => Just(1e30),
    ];
    let weights = prop_oneof![
        2 => prop::collection::vec(weight, 2..=16),
        1 => (2..=16usize).prop_map(|world| vec![1.0; world]),
        // Ratios 1 : 10 and 1 : 1,000.
        1 => (2..=16usize, prop_oneof![Just(10.0), Just(1000.0)])
            .prop_map(|(world, other)| {
                (0..world).map(|rank| if rank == 0 { 1.0 } else { other }).collect()
            }),
    ];
    let class = prop_oneof![
        2 => Just(Class::Any),
        2 => (0.0..1.0f64).prop_map(Class::Near),
        2 => Just(Class::Subnormal),
        1 => Just(Class::Huge),
    ];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (0..4usize, flags, weights, class, any::<u64>()).prop_map(
        |(dtype, flags, mut weights, class, seed)| {
            if weights.iter().all(|&weight| weight == 0.0) {
                weights[1] = 1.0;
            }
            Case {
                dtype: Dtype::ALL[dtype],
                algorithm: if flags.0 { Algorithm::Ring } else { Algorithm::Direct },
                all_or_nothing: flags.1,
                narrow_wire: flags.2,
                weights,
                class,
                seed,
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(60, 400) as u32))]

    #[test]
    fn the_mean_is_as_exact_as_promised(case in cases()) {
        case.check().map_err(TestCaseError::fail)?;
    }
}

/// Small f16 values and unequal weights, by the ring.
#[test]
fn small_halves_and_unequal_weights_by_the_ring() {
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let worlds: &[usize] = if count(0, 1) == 0 { &[2, 3, 16] } else { &[2, 3, 4, 5, 9, 16] };
        for &world in worlds {
            for other in [1.0, 10.0, 1000.0, 1e-30, 1e30] {
                for exponent in [-24, -17, -14, -11, -4] {
                    let part = f64::from(exponent - format(dtype).1)
                        / f64::from(format(dtype).2 - 2 - format(dtype).1);
                    let case = Case {
                        dtype,
                        algorithm: Algorithm::Ring,
                        all_or_nothing: exponent % 2 == 0,
                        narrow_wire: false,
                        weights: (0..world)
                            .map(|rank| if rank == 0 { 1.0 } else { other })
                            .collect(),
                        class: if part < 0.0 { Class::Subnormal } else { Class::Near(part) },
                        seed: world as u64,
                    };
                    case.check().unwrap_or_else(|error| panic!("{case:?}: {error}"));
                }
            }
        }
    }
}

/// The oracle itself: a step of the dtype beside the mean is seen.
#[test]
fn the_oracle_sees_a_step() {
    let (x, y) = (exact(1.5), exact(-1.5));
    assert!(x > y && magnitude(y) == x && exact(f64::from_bits(1)) * 2 == exact(f64::from_bits(2)));
    let case = Case {
        dtype: Dtype::Bf16,
        algorithm: Algorithm::Ring,
        all_or_nothing: true,
        narrow_wire: false,
        weights: vec![1.0; 3],
        class: Class::Near(0.5),
        seed: 1,
    };
    case.check().unwrap();
    let bound = case.bound(1.5, 2.0);
    assert!(bound < 0.51 * power(-7), "rounded once: {bound:e}");
}
