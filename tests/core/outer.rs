//! Averages with an outer optimizer against a reference in f64: every rule, dtype, algorithm, world
//! and layout; and the drift of 16-bit models over many rounds.

use param_averager::__testing::{instruction_sets, Testing};
use param_averager::{Algorithm, Builder, Dtype, ParamAverager, Start};
use proptest::prelude::*;
use test_support::{count, format, layout, mean, ranks, ulp, Guarded, Random};

use crate::outer_reference::{Near, Rule, State};

#[derive(Clone, Debug)]
struct Case {
    world: usize,
    /// Dtype, elements, and how many elements after a 16-byte boundary each rank's begins.
    tensors: Vec<(Dtype, usize, Vec<usize>)>,
    algorithm: Algorithm,
    rule: Rule,
    keeps: f64,
    start: Start,
    narrow_wire: bool,
    reject_non_finite: bool,
    channels: u32,
    chunk_bytes: usize,
    weights: Option<Vec<f64>>,
    rounds: usize,
    seed: u64,
}

/// One rank's tensors.
struct Course {
    /// Values before `build`.
    initial: Vec<Guarded>,
    /// Values after `build`.
    begin: Vec<Guarded>,
    /// Values before and after each average.
    rounds: Vec<(Vec<Guarded>, Vec<Guarded>)>,
}

fn copy(model: &[Guarded]) -> Vec<Guarded> {
    model.iter().map(Guarded::copy).collect()
}

impl Case {
    fn builder(&self, builder: Builder, instruction_set: Option<&'static str>) -> Builder {
        builder
            .allow_unnamed()
            .outer(self.rule.outer().keeping(self.keeps))
            .start_from(self.start)
            .algorithm(self.algorithm)
            .narrow_wire(self.narrow_wire)
            .reject_non_finite(self.reject_non_finite)
            .channels(self.channels)
            .chunk_bytes(self.chunk_bytes)
            .testing(Testing { poison_slots: true, instruction_set, ..Testing::default() })
    }

    fn run(&self, instruction_set: Option<&'static str>) -> Vec<Course> {
        ranks(self.world, |communicator| {
            let rank = communicator.rank();
            let mut random = Random(self.seed + rank as u64);
            let mut model = layout::model(&self.tensors, rank);
            model.iter_mut().for_each(|tensor| tensor.fill_random(&mut random));
            let initial = copy(&model);
            let builder = ParamAverager::builder(communicator);
            let mut averager = self.builder(builder, instruction_set).build(&mut model).unwrap();
            let begin = copy(&model);
            let mut rounds = vec![];
            for _ in 0..self.rounds {
                for tensor in &mut model {
                    for i in 0..tensor.elements {
                        tensor.set(i, tensor.get(i) + random.value() / 4.0); // local steps
                    }
                }
                let before = copy(&model);
                match &self.weights {
                    Some(weights) => averager.average_weighted(&mut model, weights[rank]).unwrap(),
                    None => averager.average(&mut model).unwrap(),
                };
                let next = copy(&model); // pointers may change between calls
                rounds.push((before, std::mem::replace(&mut model, next)));
            }
            Course { initial, begin, rounds }
        })
    }

    /// Bound of the mean of these values in the type of sums, as tests/core/average.rs has it.
    fn mean(&self, dtype: Dtype, values: &[f64]) -> Near {
        if let [alone] = values {
            return Near::new(*alone, 0.0, dtype); // times 1, and divided by 1
        }
        let even = vec![1.0; self.world];
        let (mean, most) = mean(values, self.weights.as_ref().unwrap_or(&even));
        let (sums, n) = (sums(dtype), self.world as f64);
        let mut error = (n + if self.weights.is_some() { 3.0 } else { 0.0 }) * ulp(sums, most);
        if dtype.size() == 2 && self.algorithm == Algorithm::Ring && self.narrow_wire {
            error += (n - 2.0).max(0.0) * (0.5 * ulp(dtype, most) + 5.0 * ulp(sums, most));
        }
        Near::new(mean, error, dtype)
    }

    /// Checks all values of all ranks. Returns the largest bound in ulp of the type of sums at the
    /// largest input, where the anchor is seen after each round (f32 and f64, nothing kept).
    fn check(&self, courses: &[Course]) -> Result<f64, String> {
        let mut loosest = 0.0f64;
        for (t, &(dtype, elements, _)) in self.tensors.iter().enumerate() {
            for (rank, Course { begin, rounds, .. }) in courses.iter().enumerate() {
                let same = match self.start {
                    Start::Rank(root) => &courses[root].initial[t],
                    _ => &courses[0].begin[t],
                };
                if begin[t].bytes() != same.bytes() {
                    return Err(format!("rank {rank} begins with other bits, tensor {t}"));
                }
                for (round, (_, after)) in rounds.iter().enumerate() {
                    let at = format!("rank {rank}, average {round}, tensor {t}");
                    if !after[t].guards_are_whole() {
                        return Err(format!("wrote outside of the tensor: {at}"));
                    }
                    if self.keeps == 0.0
                        && after[t].bytes() != courses[0].rounds[round].1[t].bytes()
                    {
                        return Err(format!("other bits than rank 0: {at}"));
                    }
                }
            }
            let is_seen = dtype.size() > 2 && self.keeps == 0.0;
            for i in 0..elements {
                let begin = courses[0].begin[t].get(i);
                if self.start == Start::Mean {
                    let all: Vec<f64> =
                        courses.iter().map(|course| course.initial[t].get(i)).collect();
                    let plain = Case { weights: None, ..self.clone() };
                    if !plain.mean(dtype, &all).narrowed().allows(begin) {
                        return Err(format!("begins with {begin}, no mean of {all:?}, tensor {t}"));
                    }
                }
                let mut state = State::new(begin, dtype);
                let mut most = begin.abs();
                for round in 0..self.rounds {
                    let before: Vec<f64> =
                        courses.iter().map(|course| course.rounds[round].0[t].get(i)).collect();
                    most = before.iter().fold(most, |most, x| most.max(x.abs()));
                    let anchor = state.step(&self.rule, self.mean(dtype, &before));
                    for (rank, own) in before.iter().enumerate() {
                        let got = courses[rank].rounds[round].1[t].get(i);
                        let want = match self.keeps {
                            0.0 => anchor.narrowed(),
                            keeps => anchor.narrowed().mixed_into(*own, keeps).narrowed(),
                        };
                        if !want.allows(got) {
                            return Err(format!(
                                "wrong value: rank {rank}, average {round}, tensor {t}, element \
                                 {i}: {got:e} instead of {want:?} from {before:?}"
                            ));
                        }
                    }
                    if is_seen {
                        let sums = sums(dtype);
                        loosest = loosest.max(anchor.error / ulp(sums, most));
                        state.anchor = Near::new(courses[0].rounds[round].1[t].get(i), 0.0, dtype);
                    }
                }
            }
        }
        Ok(loosest)
    }
}

fn sums(dtype: Dtype) -> Dtype {
    if dtype == Dtype::F64 {
        Dtype::F64
    } else {
        Dtype::F32
    }
}

fn rules() -> impl Strategy<Value = Rule> {
    prop_oneof![
        Just(Rule::Mean),
        Just(Rule::Sgd(0.5)),
        Just(Rule::Sgd(1.0)),
        Just(Rule::Momentum(0.4, 0.9)),
        Just(Rule::Nesterov(0.7, 0.9)),
        Just(Rule::Nesterov(0.3, 0.9)),
        Just(Rule::SlowMomentum(1.0, 0.5)),
        Just(Rule::Adam(0.1, 0.9, 0.99, 1e-3)),
    ]
}

fn cases(most_elements: usize) -> impl Strategy<Value = Case> {
    let tensors = prop::collection::vec(layout::shapes(4, most_elements), 1..8);
    let weight = prop_oneof![1 => Just(0.0), 4 => (1..1000u32).prop_map(f64::from)];
    let weights = prop::option::of(prop::collection::vec(weight, 4));
    let keeps = prop_oneof![2 => Just(0.0), 1 => prop_oneof![Just(0.5), Just(0.1)]];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let chunk = layout::chunks();
    ((1..=4usize, tensors, rules(), keeps), flags, (1..4u32, chunk, weights, any::<u32>()))
        .prop_map(|((world, tensors, rule, keeps), flags, rest)| {
            let (channels, chunk_bytes, weights, seed) = rest;
            let weights = weights.map(|mut weights: Vec<f64>| {
                weights.truncate(world);
                weights[world - 1] = weights[world - 1].max(1.0); // one rank counts at least
                weights
            });
            Case {
                world,
                tensors,
                algorithm: if flags.0 { Algorithm::Ring } else { Algorithm::Direct },
                rule,
                keeps,
                start: if flags.1 { Start::Mean } else { Start::Rank(world - 1) },
                narrow_wire: flags.2,
                reject_non_finite: flags.3,
                channels,
                chunk_bytes,
                weights,
                rounds: 3,
                seed: seed.into(),
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(64, 256) as u32))]

    /// The bound is worked out for each element, see `Near`. For the rules with a velocity it is at
    /// most 48 ulp of the type of sums: the mean has n + 3 (7 for 4 ranks), and Nesterov's step
    /// multiplies an error in Δ by lr (1 + μ + μ² + μ³) (3.44 · 0.7) in the third round. Adam
    /// divides by the root of its second moment, so that its bound has no such limit.
    #[test]
    fn every_rule_gives_what_the_reference_gives(case in cases(3000)) {
        let loosest = case.check(&case.run(None)).map_err(TestCaseError::fail)?;
        let is_adam = matches!(case.rule, Rule::Adam(..));
        prop_assert!(is_adam || loosest <= 48.0, "a bound of {loosest} ulp tells nothing");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(12, 32) as u32))]

    #[test]
    fn every_instruction_set_gives_the_same_bits(case in cases(2000)) {
        let best = case.run(None);
        for set in instruction_sets() {
            for (a, b) in best.iter().zip(case.run(Some(set))) {
                for (x, y) in a.rounds.iter().zip(&b.rounds) {
                    for (x, y) in x.1.iter().zip(&y.1) {
                        prop_assert_eq!(x.bytes(), y.bytes(), "{} differs", set);
                    }
                }
            }
        }
    }
}

/// The checker itself: values that are off by a little, and ranks that differ, are seen.
#[test]
fn the_reference_sees_a_wrong_element() {
    for algorithm in [Algorithm::Ring, Algorithm::Direct] {
        let case = Case {
            world: 3,
            tensors: vec![(Dtype::F32, 1000, vec![0; 3]), (Dtype::Bf16, 77, vec![1; 3])],
            algorithm,
            rule: Rule::Nesterov(0.7, 0.9),
            keeps: 0.0,
            start: Start::Rank(0),
            narrow_wire: false,
            reject_non_finite: false,
            channels: 2,
            chunk_bytes: 128,
            weights: None,
            rounds: 3,
            seed: 7,
        };
        let mut courses = case.run(None);
        case.check(&courses).unwrap();
        for (tensor, element, off) in [(0, 999, 1e-5), (1, 76, 0.02)] {
            let right = courses[0].rounds[2].1[tensor].get(element);
            for course in &mut courses {
                course.rounds[2].1[tensor].set(element, right + off);
            }
            assert!(case.check(&courses).unwrap_err().starts_with("wrong value"));
            for course in &mut courses {
                course.rounds[2].1[tensor].set(element, right);
            }
        }
        courses[2].rounds[2].1[0].set(5, 0.25);
        assert!(case.check(&courses).unwrap_err().starts_with("other bits"));
    }
}

/// The anchor of a model in 16 bits is in f32, so that roundings of the tensors do not add up. The
/// error of θ and v follows the rule itself, e ← M e + (what one step rounds), which is linear: so
/// after k rounds it is at most Σ |Mʲ| times the largest rounding. The tensor is θ rounded once,
/// within 1 ulp of the rounded reference.
#[test]
fn models_of_16_bits_do_not_drift() {
    const ROUNDS: usize = 20;
    const N: f64 = 3.0;
    let (lr, mu) = (0.7, 0.9);
    for (algorithm, dtype) in [
        (Algorithm::Ring, Dtype::F16),
        (Algorithm::Ring, Dtype::Bf16),
        (Algorithm::Direct, Dtype::F16),
        (Algorithm::Direct, Dtype::Bf16),
    ] {
        let case = Case {
            world: 3,
            tensors: vec![(dtype, 2001, vec![0, 1, 0])],
            algorithm,
            rule: Rule::Nesterov(lr, mu),
            keeps: 0.0,
            start: Start::Rank(0),
            narrow_wire: false,
            reject_non_finite: true,
            channels: 2,
            chunk_bytes: 128,
            weights: None,
            rounds: ROUNDS,
            seed: 20,
        };
        let courses = case.run(None);
        // (θ, v) ← M (θ, v) + …: v ← θ + μ v, θ ← θ - lr (θ + μ (θ + μ v)).
        let m = [[1.0 - lr * (1.0 + mu), -lr * mu * mu], [1.0, mu]];
        let (mut power, mut sum) = ([[1.0, 0.0], [0.0, 1.0]], [0.0f64; 2]);
        for _ in 0..ROUNDS {
            for (sum, of) in sum.iter_mut().zip([0, 1]) {
                *sum += f64::abs(power[0][of]);
            }
            power = std::array::from_fn(|i| {
                std::array::from_fn(|j| m[i][0] * power[0][j] + m[i][1] * power[1][j])
            });
        }
        let mut worst = 0.0f64;
        for i in 0..2001 {
            let (mut theta, mut v, mut most) = (courses[0].begin[0].get(i), 0.0f64, 0.0f64);
            for round in 0..ROUNDS {
                let before: Vec<f64> =
                    courses.iter().map(|c| c.rounds[round].0[0].get(i)).collect();
                let delta = theta - mean(&before, &[1.0; 3]).0;
                v = mu * v + delta;
                let way = lr * (delta + mu * v);
                theta -= way;
                let size = before.iter().fold(theta.abs(), |most, x| most.max(x.abs()));
                most = most.max(size).max(v.abs()).max(way.abs()).max(delta.abs());
                // Roundings of one step, in ulp of the largest number so far. Of v: n of the mean,
                // and half for Δ, μ v, μ and the sum. Of θ: lr (1 + μ) times as many, and its own.
                let unit = ulp(Dtype::F32, most);
                let (of_v, of_theta) =
                    ((N + 2.0) * unit, (lr * (1.0 + mu) * (N + 2.0) + 3.0) * unit);
                let error = sum[0] * of_theta + sum[1] * of_v;
                let got = courses[0].rounds[round].1[0].get(i);
                let bound = 0.5 * ulp(dtype, theta.abs() + error) + error;
                assert!((got - theta).abs() <= bound, "{dtype} {i}, {round}: {got} not {theta}");
                let least = f64::from(format(dtype).1).exp2();
                if theta.abs() > least && most < 8.0 * theta.abs() {
                    worst = worst.max(bound / ulp(dtype, theta.abs()));
                }
            }
        }
        assert!(worst > 0.4 && worst < 1.0, "{dtype}: a bound of {worst} ulp");
    }
}
