//! A user's own stage on the ranks' shards of the mean: what it sees, and what ranks get of what it
//! leaves.

use std::sync::{Arc, Mutex};

use param_averager::{
    Algorithm, Builder, Communicator, Dtype, Error, Outer, ParamAverager, Part, Shard, Start,
    Values, Veto,
};
use proptest::prelude::*;
use test_support::{bits, count, layout, options, ranks, Guarded, Random};

/// Tensors of a model: dtype and elements.
pub type Layout = Vec<(Dtype, usize)>;

pub fn model(layout: &Layout, seed: u64) -> Vec<Guarded> {
    let mut random = Random(seed);
    let tensor = |&(dtype, elements): &_| Guarded::random(dtype, elements, 0, &mut random);
    layout.iter().map(tensor).collect()
}

/// Calls `f(tensor, element, value)` for each value of a shard.
pub fn each(shard: &mut Shard<'_>, mut f: impl FnMut(usize, usize, &mut dyn Number)) {
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

pub trait Number {
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
    let layout = prop::collection::vec((layout::dtypes(), layout::elements(3000)), 1..8);
    let chunk = layout::chunks();
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
        prop_assert!(plain == staged);
        let mut seen = std::mem::take(&mut *seen.lock().unwrap());
        seen.sort_by(|a, b| a.partial_cmp(b).unwrap());
        let all = case.layout.iter().enumerate();
        let all = all.flat_map(|(tensor, &(_, n))| (0..n).map(move |element| (tensor, element)));
        let places: Vec<_> = seen.iter().map(|&(tensor, element, _)| (tensor, element)).collect();
        let want: Vec<_> = all.flat_map(|place| [place; 3]).collect();
        prop_assert_eq!(places, want);
    }

    /// Values that a stage leaves are those of every rank's tensors there, rounded once.
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

#[test]
fn ranks_with_and_without_a_stage_differ() {
    for with in 0..2 {
        ranks(2, |communicator| {
            let has_one = communicator.rank() == with;
            let builder = options(communicator).algorithm(Algorithm::Ring);
            let builder = if has_one { builder.stage(|_| Ok(())) } else { builder };
            let error = builder.build(&mut vec![vec![0.0f32; 100], vec![0.0; 7]]).unwrap_err();
            let Error::OptionsDiffer { rank: 1, found, expected } = &error else {
                panic!("{error}")
            };
            let texts = ["stage = a function", "stage = none"];
            let want = if with == 1 { texts } else { [texts[1], texts[0]] };
            assert_eq!([found, expected], want);
        });
    }
}

/// A stage for devices has addresses that CPUs have not.
#[test]
fn a_stage_for_devices_is_refused_on_cpus() {
    for world in [1, 2] {
        ranks(world, |communicator| {
            // SAFETY: the function enqueues nothing.
            let builder = unsafe { options(communicator).device_stage(|_| Ok(())) };
            let error = builder.build(&mut vec![vec![0.0f32; 100], vec![0.0; 7]]).unwrap_err();
            let Error::InvalidOption { option: "device_stage", expected, .. } = &error else {
                panic!("{error}")
            };
            assert!(expected.contains("Builder::stage"), "{error}");
        });
    }
}

#[test]
fn options_that_contradict_a_stage_are_refused() {
    for world in [1, 2] {
        let refusal = |with: fn(Builder) -> Builder| {
            let errors = ranks(world, |communicator| {
                let builder = with(options(communicator)).stage(|_| Ok(()));
                match builder.build(&mut vec![vec![0.0f32; 100], vec![0.0; 7]]).unwrap_err() {
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
            let averager = builder.build(&mut vec![vec![0.0f32; 100], vec![0.0; 7]]).unwrap();
            assert_eq!(averager.algorithm(), Algorithm::Ring);
        });
    }
}
