//! Averages over several hosts whose means travel in code: the same bits on all ranks, within a
//! bound of the mean; nothing that a code rounds away is lost, nor kept by an average that fails.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Duration;

use param_averager::{
    Communicator, Compression, Dtype, Error, Hierarchy, Hosts, HostsError, HostsLimit, LocalSgd,
    Outer, ParamAverager, Schedule, Start, TensorState, ThreadHosts, Values, Veto,
};
use proptest::prelude::*;
use test_support::{count, layout, mean, ranks, Guarded, Random};

use crate::hosts::{builder, on_hosts};

const CODES: [Compression; 2] = [Compression::Bf16, Compression::Int8];

#[derive(Clone, Debug)]
struct Case {
    hosts: usize,
    each: usize,
    code: Compression,
    layout: Vec<layout::Shape>,
    weighted: bool,
    every: u32,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    (1usize..=3, 1usize..=3).prop_flat_map(|(hosts, each)| {
        let layout = prop::collection::vec(layout::shapes(hosts * each, 900), 1..4);
        let code = prop::sample::select(CODES.to_vec());
        (layout, code, any::<bool>(), 1u32..3, any::<u64>()).prop_map(
            move |(layout, code, weighted, every, seed)| Case {
                hosts,
                each,
                code,
                layout,
                weighted,
                every,
                seed,
            },
        )
    })
}

/// Values of a rank's tensors: the last result, what it averages, and the result.
struct Round {
    last: Vec<Vec<f64>>,
    own: Vec<Vec<f64>>,
    found: Vec<Vec<f64>>,
}

fn values_of(tensor: &Guarded) -> Vec<f64> {
    (0..tensor.elements).map(|element| tensor.get(element)).collect()
}

impl Case {
    /// Averages of models that move on from the last result. Each is off from the mean by what two
    /// codes round now, and what they have rounded before: of the largest difference from the last
    /// result, for a whole block.
    fn check(&self) {
        const ROUNDS: usize = 4;
        let results = on_hosts(self.hosts, self.each, |host, communicator, link| {
            let rank = host * self.each + communicator.rank();
            let mut model = layout::model(&self.layout, 0);
            let hierarchy = Hierarchy::Outer { every: self.every };
            let builder = ParamAverager::builder(communicator).hosts(link, hierarchy);
            let builder = builder.hosts_compression(self.code).allow_unnamed();
            let mut averager = builder.timeout(Duration::from_secs(60)).build(&mut model).unwrap();
            let mut random = Random(self.seed.wrapping_add(rank as u64));
            let mut rounds = vec![];
            for round in 0..ROUNDS * self.every as usize {
                let last: Vec<Vec<f64>> = model.iter().map(values_of).collect();
                model.iter_mut().for_each(|tensor| tensor.fill_random(&mut random));
                let own: Vec<Vec<f64>> = model.iter().map(values_of).collect();
                let report = match self.weighted {
                    true => averager.average_weighted(&mut model, (rank + 1) as f64),
                    false => averager.average(&mut model),
                };
                let is_of_all = (round + 1) % self.every as usize == 0;
                assert_eq!(report.unwrap().hosts, if is_of_all { self.hosts } else { 1 });
                assert!(model.iter().all(Guarded::guards_are_whole));
                if is_of_all {
                    let found: Vec<Vec<f64>> = model.iter().map(values_of).collect();
                    rounds.push(Round { last, own, found });
                }
            }
            rounds
        });
        let all: Vec<_> = results.into_iter().flatten().collect();
        let weights: Vec<f64> =
            (1..=all.len()).map(|weight| if self.weighted { weight as f64 } else { 1.0 }).collect();
        for round in 0..ROUNDS {
            let found = &all[0][round].found;
            assert!(all.iter().all(|rank| rank[round].found == *found), "{self:?}: ranks differ");
            if self.every > 1 {
                continue; // values of one host alone have been averaged before, too
            }
            for (tensor, &(dtype, elements, _)) in self.layout.iter().enumerate() {
                for element in 0..elements {
                    let values: Vec<f64> =
                        all.iter().map(|rank| rank[round].own[tensor][element]).collect();
                    let (expected, size) = mean(&values, &weights);
                    let found = found[tensor][element];
                    let most = all.iter().map(|rank| largest(&rank[round])).fold(0.0, f64::max);
                    let coded = match (dtype, self.code) {
                        (Dtype::F64, _) => 0.0,
                        _ => 4.2 * most / 254.0 + 1e-30,
                    };
                    let rounds = (self.each + 4) as f64 * test_support::ulp(dtype, size.max(most));
                    let off = (found - expected).abs();
                    assert!(off <= coded + rounds, "{self:?}: {found}, not {expected}: {most}");
                }
            }
        }
    }
}

/// Largest difference of a rank's values from the last result.
fn largest(round: &Round) -> f64 {
    let differences = round.last.iter().flatten().zip(round.own.iter().flatten());
    differences.map(|(last, own)| (own - last).abs()).fold(0.0, f64::max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(24, 200) as u32))]
    #[test]
    fn all_ranks_get_the_same_bits_near_the_mean(case in cases()) {
        case.check();
    }
}

/// Link that counts what it sends.
struct Counted(ThreadHosts, Arc<AtomicUsize>);

impl Hosts for Counted {
    fn hosts(&self) -> usize {
        self.0.hosts()
    }
    fn host(&self) -> usize {
        self.0.host()
    }
    fn all_to_all(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        self.1.fetch_add(send.len() - send.len() / self.hosts(), Ordering::Relaxed);
        self.0.all_to_all(send, receive, limit)
    }
    fn all_gather(
        &mut self,
        send: &[u8],
        receive: &mut [u8],
        limit: &HostsLimit<'_>,
    ) -> Result<(), HostsError> {
        self.1.fetch_add(send.len() * (self.hosts() - 1), Ordering::Relaxed);
        self.0.all_gather(send, receive, limit)
    }
    fn abort(&mut self) {
        self.0.abort();
    }
}

#[test]
fn links_carry_codes_and_memory_holds_state() {
    const ELEMENTS: usize = 1 << 20;
    let mut without = 0;
    for code in [Compression::None, Compression::Bf16, Compression::Int8] {
        let used = on_hosts(2, 2, |_, communicator, link| {
            let sent = Arc::new(AtomicUsize::new(0));
            let mut model = vec![1.0f32; ELEMENTS];
            let builder = ParamAverager::builder(communicator);
            let builder = builder.hosts(Counted(link, sent.clone()), Hierarchy::Every);
            let builder = builder.hosts_compression(code);
            let mut averager = builder.build(&mut model).unwrap();
            let before = sent.swap(0, Ordering::Relaxed);
            assert!(before > 4 * ELEMENTS / 2, "the values to begin with travel in full: {before}");
            averager.average(&mut model).unwrap();
            (sent.load(Ordering::Relaxed), averager.memory_overhead())
        });
        let beside = used[0][0].1;
        match code {
            Compression::None => without = beside,
            _ => {
                // 16 + 8/2 bytes for each element of the rank's half, and less than 15 MiB.
                let (more, state) = (beside - without, 20 * ELEMENTS / 2);
                assert!((state..state + (15 << 20)).contains(&more), "{code:?}: {more}");
            }
        }
        // Half of a rank's half, twice, and 13 words before it and one behind.
        let bytes = (4 * ELEMENTS / 2) as f64 * code.ratio() + 8.0 * 14.0;
        for (sent, _) in used.iter().flatten() {
            assert!((*sent as f64 / bytes - 1.0).abs() < 1e-4, "{code:?}: {sent}, not {bytes}");
        }
    }
}

/// Rounds of averages of the same values, coarse ones beside fine ones: the sum of all results is
/// that of the means, but for what the last codes have rounded away.
#[test]
fn what_codes_round_away_is_sent_later() {
    const ROUNDS: usize = 64;
    // Weights of host 1, of which some are too small for it to send what it owes.
    const WEIGHTS: [f64; 5] = [1.0, 0.01, 0.0, 1e-6, 3.0];
    for (code, is_weighted) in CODES.into_iter().flat_map(|code| [(code, false), (code, true)]) {
        let weight = |round: usize| if is_weighted { WEIGHTS[round % 5] } else { 1.0 };
        let value = |host: usize, round: usize, element: usize| match element % 128 {
            0 => [100.0, -60.0][(host + round) % 2],
            of => 0.01 * of as f32 * (host + 1) as f32,
        };
        let sums = on_hosts(2, 1, |host, communicator, link| {
            let mut model = vec![0.0f32; 300];
            let builder = builder(communicator, link).hosts_compression(code);
            let mut averager = builder.build(&mut model).unwrap();
            let mut sums = vec![0.0f64; model.len()];
            for round in 0..ROUNDS {
                for (element, at) in model.iter_mut().enumerate() {
                    *at = value(host, round, element);
                }
                let own = if host == 0 { 1.0 } else { weight(round) };
                let made = match is_weighted {
                    true => averager.average_weighted(&mut model, own),
                    false => averager.average(&mut model),
                };
                assert_eq!(made.unwrap().hosts, 2);
                sums.iter_mut().zip(&model).for_each(|(sum, at)| *sum += f64::from(*at));
            }
            sums
        });
        for (element, sum) in sums[0][0].iter().enumerate() {
            let of = |host, round| f64::from(value(host, round, element));
            let mean = |round| {
                let weight = weight(round);
                (of(0, round) + weight * of(1, round)) / (1.0 + weight)
            };
            let expected: f64 = (0..ROUNDS).map(mean).sum();
            let off = (sum - expected).abs();
            // A step of the block is 160 / 127, of which half is owed twice. Without what is owed,
            // each of the results would be off by as much as 1.
            let bound = 2.0 * 160.0 / 127.0;
            assert!(off < bound, "{code:?}, {is_weighted}, element {element}: {off}");
        }
    }
}

/// Averages that fail leave no trace in those that follow.
#[test]
fn an_average_that_fails_keeps_what_is_owed() {
    let run = |code, fails: bool| {
        on_hosts(2, 2, |host, communicator, link| {
            let rank = 2 * host + communicator.rank();
            let mut model = vec![0.0f32; 5000];
            let refuses = Arc::new(AtomicBool::new(false));
            let asked = refuses.clone();
            let builder = builder(communicator, link).hosts_compression(code);
            let mut averager = builder
                .stage(move |shard| match asked.load(Ordering::Relaxed) {
                    true => Err(Veto::new("not this one")),
                    false => shard.parts().try_for_each(|part| match part.values {
                        Values::F32(_) => Ok(()),
                        other => panic!("{other:?}"),
                    }),
                })
                .build(&mut model)
                .unwrap();
            let mut results = vec![];
            for round in 0..6 {
                let value = |i: usize| ((7 * i + 31 * rank + 11 * round) % 1009) as f32 / 7.0;
                let mut average = |averager: &mut ParamAverager, bad: bool| {
                    model.iter_mut().enumerate().for_each(|(i, at)| *at = value(i));
                    if bad {
                        model[3] = f32::NAN;
                    }
                    let made = averager.average(&mut model);
                    made.map(|_| model.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
                };
                if fails && round == 2 {
                    let error = average(&mut averager, rank == 0).unwrap_err();
                    assert_eq!(error.tensors(), TensorState::Unchanged);
                }
                if fails && round == 3 {
                    refuses.store(rank == 3, Ordering::Relaxed);
                    let error = average(&mut averager, false).unwrap_err();
                    assert!(!error.is_fatal(), "{error}");
                    refuses.store(false, Ordering::Relaxed);
                }
                results.push(average(&mut averager, false).unwrap());
            }
            results
        })
    };
    for code in CODES {
        let [with, without] = [true, false].map(|fails| run(code, fails).concat());
        assert!(with == without, "{code:?}");
        assert!(with.iter().all(|results| *results == with[0]));
    }
}

/// A difference that f32 does not hold is refused, and the next average is good.
#[test]
fn a_difference_without_a_code_changes_nothing() {
    for code in CODES {
        on_hosts(2, 2, |host, communicator, link| {
            let mut model = vec![-3e38f32; 1000];
            let builder = builder(communicator, link).hosts_compression(code);
            let mut averager = builder.build(&mut model).unwrap();
            let value = if host == 1 { 3e38 } else { -3e38 };
            // Without weight it does not count, and nothing is owed.
            model[500] = value;
            let weight = if host == 1 { 0.0 } else { 1.0 };
            averager.average_weighted(&mut model, weight).unwrap();
            assert_eq!(model[500], -3e38);
            model[500] = value;
            let error = averager.average(&mut model).unwrap_err();
            let is_fit = matches!(error, Error::StageVetoed { .. } | Error::HostRefused { .. });
            assert!(is_fit && !error.is_fatal(), "{error}");
            assert_eq!(model[500], value);
            model.fill(-2e38);
            averager.average_weighted(&mut model, f64::MAX / 2.0).unwrap();
            assert!(model.iter().all(|x| (x / -2e38 - 1.0).abs() < 0.01), "{code:?}");
        });
    }
}

/// Steps of DiLoCo from means in code: near those from exact means, and the same on all ranks.
#[test]
fn outer_steps_are_made_from_coded_means() {
    let run = |code, outer: Outer| {
        on_hosts(2, 2, |host, communicator, link| {
            let rank = 2 * host + communicator.rank();
            let mut model = vec![10.0f32; 3000];
            let builder = builder(communicator, link).outer(outer).hosts_compression(code);
            let averager = builder.build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(4));
            for step in 0..80 {
                // Towards targets of the ranks' own, whose mean is 0.
                for (i, x) in model.iter_mut().enumerate() {
                    let target = (rank as f32 - 1.5) * ((i + step) % 7) as f32 * 0.1;
                    *x -= 0.05 * (*x - target);
                }
                sgd.step(&mut model).unwrap();
            }
            sgd.finish(&mut model).unwrap();
            model
        })
        .concat()
    };
    for outer in [Outer::diloco(), Outer::adam(0.1, 0.9, 0.99, 1e-3)] {
        let exact = run(Compression::None, outer);
        for code in CODES {
            let found = run(code, outer);
            assert!(found.iter().all(|model| *model == found[0]), "{code:?}: ranks differ");
            let off = found[0].iter().zip(&exact[0]).map(|(a, b)| (a - b).abs());
            let off = off.fold(0.0, f32::max);
            assert!(off > 0.0 && off < 0.05, "{outer} {code:?}: {off}");
        }
    }
}

#[test]
fn codes_that_do_not_fit_are_refused() {
    let code = Compression::Int8;
    let refused = |result: Result<ParamAverager, Error>, option: &str| {
        let error = result.map(drop).unwrap_err();
        let found =
            matches!(&error, Error::InvalidOption { option: found, .. } if *found == option);
        assert!(found, "{error}");
    };
    ranks(2, |communicator: Communicator| {
        let builder = ParamAverager::builder(communicator).hosts_compression(code);
        refused(builder.build(&mut vec![0.0f32; 10]), "hosts_compression");
    });
    on_hosts(2, 1, |_, communicator, link| {
        let builder = builder(communicator, link).hosts_compression(code);
        let builder = builder.reject_non_finite(false);
        refused(builder.build(&mut vec![0.0f32; 10]), "reject_non_finite");
    });
    let errors = on_hosts(2, 1, |host, communicator, link| {
        let builder = builder(communicator, link).start_from(Start::Mean);
        let builder = if host == 1 { builder.hosts_compression(code) } else { builder };
        builder.build(&mut vec![0.0f32; 10]).map(drop).unwrap_err()
    });
    for error in errors.concat() {
        assert!(matches!(error, Error::HostsDiffer { host: 1, .. }), "{error}");
    }
}
