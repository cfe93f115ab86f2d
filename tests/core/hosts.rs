//! Averages over several hosts, each of which is a world of threads: the mean of all ranks, the
//! same bits on all of them, and all or nothing when a host fails, differs, vetoes or leaves.

use std::sync::Mutex;
use std::time::Duration;

use param_averager::{
    Builder, Communicator, Compression, Dtype, Error, Hierarchy, LocalSgd, Outer, Overlap,
    ParamAverager, Report, Schedule, Start, TensorState, ThreadHosts, Veto,
};
use proptest::prelude::*;
use test_support::{count, layout, mean, ranks, ulp, Guarded, Random};

/// Runs the ranks of several hosts, and returns their results by host and rank.
fn on_hosts<T: Send>(
    hosts: usize,
    each: usize,
    rank: impl Fn(usize, Communicator, ThreadHosts) -> T + Sync,
) -> Vec<Vec<T>> {
    std::thread::scope(|scope| {
        let links = ThreadHosts::new(hosts, each);
        let run = |(host, links): (usize, Vec<ThreadHosts>)| {
            let rank = &rank;
            let links: Vec<_> = links.into_iter().map(|link| Mutex::new(Some(link))).collect();
            scope.spawn(move || {
                ranks(each, |communicator| {
                    let link = links[communicator.rank()].lock().unwrap().take().unwrap();
                    rank(host, communicator, link)
                })
            })
        };
        let threads: Vec<_> = links.into_iter().enumerate().map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn builder(communicator: Communicator, link: ThreadHosts) -> Builder {
    let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
    builder.timeout(Duration::from_secs(60))
}

type Average = (Result<Report, Error>, Vec<f32>);

/// The first average of 2 hosts with 2 ranks, of a model with the values 0, 1, 2, 3, and the one
/// after it.
fn two_averages(
    first: impl Fn(usize, usize, &mut ParamAverager, &mut Vec<f32>) -> Result<Report, Error> + Sync,
) -> Vec<Vec<[Average; 2]>> {
    on_hosts(2, 2, |host, communicator, link| {
        let rank = communicator.rank();
        let mut model = vec![0.0f32; 1000];
        let mut averager = builder(communicator, link).build(&mut model).unwrap();
        model.fill((2 * host + rank) as f32);
        let failed = (first(host, rank, &mut averager, &mut model), model.clone());
        model.fill((2 * host + rank) as f32);
        let next = (averager.average(&mut model), model);
        [failed, next]
    })
}

/// What follows a failure that changes nothing: the tensors as they were, and a good average.
fn is_whole(averages: &[Vec<[Average; 2]>]) {
    for (host, ranks) in averages.iter().enumerate() {
        for (rank, [failed, next]) in ranks.iter().enumerate() {
            let error = failed.0.as_ref().unwrap_err();
            assert!(!error.is_fatal() && error.tensors() == TensorState::Unchanged, "{error}");
            assert_eq!(failed.1[1..], vec![(2 * host + rank) as f32; 1000][1..], "{error}");
            assert_eq!(next.0.as_ref().map(|report| report.hosts), Ok(2));
            assert_eq!(next.1, [1.5; 1000]);
        }
    }
}

#[derive(Clone, Debug)]
struct Case {
    hosts: usize,
    each: usize,
    layout: Vec<layout::Shape>,
    chunk_bytes: usize,
    weights: Option<Vec<f64>>,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    (1usize..=3, 1usize..=3).prop_flat_map(|(hosts, each)| {
        let all = hosts * each;
        let weight = prop::sample::select(vec![0.0, 0.3, 1.0, 7.0]);
        let weights = prop::option::of(prop::collection::vec(weight, all));
        let layout = prop::collection::vec(layout::shapes(all, 900), 1..4);
        (Just((hosts, each)), layout, layout::chunks(), weights, any::<u64>()).prop_map(
            |((hosts, each), layout, chunk_bytes, weights, seed)| Case {
                hosts,
                each,
                layout,
                chunk_bytes,
                weights,
                seed,
            },
        )
    })
}

impl Case {
    /// False where a host has no weight: its ranks have no mean of their own.
    fn is_accepted(&self) -> bool {
        let positive = |host: &[f64]| host.iter().any(|&weight| weight > 0.0);
        self.weights.iter().all(|weights| weights.chunks(self.each).all(positive))
    }

    fn check(&self) {
        let results = on_hosts(self.hosts, self.each, |host, communicator, link| {
            let rank = host * self.each + communicator.rank();
            let mut model = layout::model(&self.layout, rank);
            let mut averager = builder(communicator, link)
                .allow_unnamed()
                .chunk_bytes(self.chunk_bytes)
                .build(&mut model)
                .unwrap();
            let mut random = Random(self.seed.wrapping_add(rank as u64));
            model.iter_mut().for_each(|tensor| tensor.fill_random(&mut random));
            let values: Vec<Vec<f64>> = model.iter().map(values_of).collect();
            let report = match &self.weights {
                Some(weights) => averager.average_weighted(&mut model, weights[rank]),
                None => averager.average(&mut model),
            };
            assert_eq!(report.unwrap().hosts, self.hosts);
            assert!(model.iter().all(Guarded::guards_are_whole));
            (values, model.iter().map(values_of).collect::<Vec<_>>())
        });
        let all: Vec<_> = results.into_iter().flatten().collect();
        let weights = self.weights.clone().unwrap_or(vec![1.0; all.len()]);
        for (tensor, &(dtype, elements, _)) in self.layout.iter().enumerate() {
            for element in 0..elements {
                let values: Vec<f64> = all.iter().map(|(own, _)| own[tensor][element]).collect();
                let (expected, size) = mean(&values, &weights);
                let found = all[0].1[tensor][element];
                // The mean of a host has an error of its sum, in f32, and all have one rounding.
                let wide = if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
                let bound = ulp(dtype, expected.abs()) + (self.each + 2) as f64 * ulp(wide, size);
                assert!((found - expected).abs() <= bound, "{self:?}: {found}, not {expected}");
                let same = |(_, theirs): &(_, Vec<Vec<f64>>)| {
                    theirs[tensor][element].to_bits() == found.to_bits()
                };
                assert!(all.iter().all(same), "{self:?}: other bits, tensor {tensor}");
            }
        }
    }
}

fn values_of(tensor: &Guarded) -> Vec<f64> {
    (0..tensor.elements).map(|element| tensor.get(element)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(24, 300) as u32))]
    #[test]
    fn hosts_average_as_one_world(case in cases()) {
        prop_assume!(case.is_accepted());
        case.check();
    }
}

#[test]
fn all_ranks_begin_with_the_values_of_host_0() {
    let of = |start, each: usize| {
        on_hosts(2, each, |host, communicator, link| {
            let mut model = vec![(each * host + communicator.rank()) as f32; 100];
            let builder = builder(communicator, link).start_from(start);
            let mut averager = builder.build(&mut model).unwrap();
            let began = model[0];
            assert_eq!(model, [began; 100]);
            model.fill((each * host + averager.rank()) as f32);
            averager.broadcast(each - 1, &mut model).unwrap();
            assert_eq!(model, [(each - 1) as f32; 100]);
            began
        })
        .concat()
    };
    assert_eq!(of(Start::Rank(0), 2), [0.0; 4]);
    assert_eq!(of(Start::Rank(1), 2), [1.0; 4]);
    assert_eq!(of(Start::Mean, 2), [1.5; 4]);
    assert_eq!(of(Start::Rank(0), 1), [0.0; 2]);
    assert_eq!(of(Start::Mean, 1), [0.5; 2]);
}

#[test]
fn averages_between_those_of_all_hosts_are_of_one() {
    on_hosts(3, 2, |host, communicator, link| {
        let own = (2 * host + communicator.rank()) as f32;
        let mut model = vec![0.0f32; 100];
        let hierarchy = Hierarchy::Outer { every: 3 };
        let builder = ParamAverager::builder(communicator).hosts(link, hierarchy);
        let mut averager = builder.build(&mut model).unwrap();
        for round in 1..=6 {
            model.fill(own);
            let report = averager.average(&mut model).unwrap();
            let (hosts, mean) =
                if round % 3 == 0 { (3, 2.5) } else { (1, 2.0 * host as f32 + 0.5) };
            assert_eq!((report.hosts, model[0]), (hosts, mean));
        }
    });
}

#[test]
fn a_value_that_is_not_finite_stops_all_hosts() {
    let averages = two_averages(|host, rank, averager, model| {
        if (host, rank) == (1, 0) {
            model[0] = f32::NAN;
        }
        averager.average(model)
    });
    is_whole(&averages);
    let errors: Vec<_> =
        averages.iter().flatten().map(|each| each[0].0.clone().unwrap_err()).collect();
    // Rank 0 of host 0 exchanges with the rank that has the value in its part of the mean.
    assert_eq!(errors[0], Error::HostRefused { host: 1 });
    assert!(matches!(errors[1], Error::StageVetoed { rank: 0, .. }), "{errors:?}");
    assert!(errors[2..].iter().all(|error| matches!(error, Error::NonFinite { rank: 0, .. })));
}

#[test]
fn values_that_are_equal_on_all_hosts_stay_as_they_are() {
    let averages = two_averages(|_, _, averager, model| {
        model.fill(f32::MAX); // whose sum is too large
        model[1] = 0.1;
        averager.average(model)
    });
    for [made, _] in averages.iter().flatten() {
        assert!(made.0.is_ok() && made.1[0] == f32::MAX && made.1[1] == 0.1);
    }
}

#[test]
fn hosts_that_make_other_calls_are_told_so() {
    let averages = two_averages(|host, _, averager, model| match host {
        0 => averager.average(model),
        _ => averager.average_weighted(model, 2.0),
    });
    is_whole(&averages);
    let of = |calls: [&str; 2]| {
        let [expected, found] = calls.map(str::to_owned);
        Error::HostsDiffer { host: 1, found, expected }
    };
    let weighting = of(["an average without weights", "an average with weights"]);
    assert!(averages.iter().flatten().all(|each| each[0].0 == Err(weighting.clone())));
    let averages = two_averages(|host, _, averager, model| match host {
        0 => averager.average_weighted(model, 1.0),
        _ => averager.broadcast(0, model),
    });
    let error = averages[0][0][0].0.clone().unwrap_err();
    assert!(matches!(&error, Error::HostsDiffer { host: 1, .. }), "{error}");
}

#[test]
fn hosts_with_other_ranks_or_tensors_are_told_so() {
    let build = |elements: usize, communicator, link| {
        let mut model = vec![0.0f32; elements];
        builder(communicator, link).build(&mut model).map(drop)
    };
    let results = on_hosts(3, 1, |host, communicator, link| {
        build(if host == 2 { 9 } else { 10 }, communicator, link).unwrap_err()
    });
    for error in results.concat() {
        let Error::HostsDiffer { host: 2, found, expected } = &error else { panic!("{error}") };
        assert!(found.contains("tensors and options") && found != expected, "{error}");
    }
    // Rank 0 of both: host 1 has one rank more.
    let links = ThreadHosts::new(2, 1);
    let results: Vec<Vec<Error>> = std::thread::scope(|scope| {
        let run = |(host, links): (usize, Vec<ThreadHosts>)| {
            let links = Mutex::new(links);
            scope.spawn(move || {
                ranks(host + 1, |communicator| {
                    let own = links.lock().unwrap().pop();
                    let link = own.unwrap_or_else(|| ThreadHosts::new(2, 1).remove(1).remove(0));
                    let builder = builder(communicator, link).timeout(Duration::from_secs(4));
                    builder.build(&mut vec![0.0f32; 10]).map(drop).unwrap_err()
                })
            })
        };
        let threads: Vec<_> = links.into_iter().enumerate().map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let error = &results[0][0];
    let differs =
        Error::HostsDiffer { host: 1, found: "2 ranks".into(), expected: "1 ranks".into() };
    assert_eq!(*error, differs);
}

#[test]
fn a_host_that_leaves_or_is_late_is_named() {
    for leaves in [true, false] {
        let results = on_hosts(2, 2, |host, communicator, link| {
            let mut model = vec![1.0f32; 10];
            let builder = builder(communicator, link).timeout(Duration::from_secs(2));
            let mut averager = builder.build(&mut model).unwrap();
            if host == 1 {
                // Long after its peers have given up.
                std::thread::sleep(Duration::from_secs(if leaves { 0 } else { 4 }));
                return None;
            }
            let mut own = vec![3.0f32; 10];
            let errors = [averager.average(&mut own), averager.average(&mut own)];
            assert_eq!(own, [3.0; 10]);
            Some(errors.map(Result::unwrap_err))
        });
        for (rank, [first, second]) in results[0].iter().flatten().enumerate() {
            let named = |error: &Error| {
                let of = rank;
                matches!(error, Error::HostLost { rank, host: Some(1), .. } if *rank == of)
            };
            assert!(named(first) && named(second), "{first} {second}");
            assert!(first.tensors() == TensorState::Unchanged && !first.is_fatal());
            assert!(first.to_string().contains("restart all hosts from a checkpoint"), "{first}");
        }
    }
}

#[test]
fn a_veto_on_one_host_is_one_on_all() {
    let results = on_hosts(2, 2, |host, communicator, link| {
        let place = (host, communicator.rank());
        let mut model = vec![0.0f32; 1000];
        let mut calls = 0;
        let mut averager = builder(communicator, link)
            .stage(move |shard| {
                calls += 1;
                if calls == 2 && place == (1, 1) {
                    return Err(Veto::new("not this one"));
                }
                for part in shard.parts() {
                    let param_averager::Values::F32(values) = part.values else { unreachable!() };
                    // It has the mean of all hosts.
                    assert!(calls == 1 || values.iter().all(|&value| value == 1.5));
                }
                Ok(())
            })
            .build(&mut model)
            .unwrap();
        let own = (2 * place.0 + place.1) as f32;
        model.fill(own);
        let error = averager.average(&mut model).unwrap_err();
        assert_eq!(model, [own; 1000]);
        averager.average(&mut model).unwrap();
        assert_eq!(model, [1.5; 1000]);
        error
    });
    let vetoed = |error: &Error| matches!(error, Error::StageVetoed { rank: 1, .. });
    assert!(results[1].iter().all(vetoed), "{results:?}");
    assert_eq!(results[0][1], Error::HostRefused { host: 1 });
    assert!(vetoed(&results[0][0]), "{results:?}"); // its rank 1 has refused
}

#[test]
fn outer_steps_come_after_the_mean_of_all_hosts() {
    let train = |averager: ParamAverager, model: &mut Vec<f32>, place: usize| {
        let mut sgd = LocalSgd::new(averager, Schedule::every(4));
        for step in 0..18 {
            let gradient = |i: usize| ((i + 7 * place + 13 * step) % 11) as f32 * 0.01;
            model.iter_mut().enumerate().for_each(|(i, value)| *value -= gradient(i));
            sgd.step(model).unwrap();
        }
        sgd.finish(model).unwrap();
    };
    let of_hosts = on_hosts(2, 2, |host, communicator, link| {
        let place = 2 * host + communicator.rank();
        let mut model = vec![1.0f32; 1001];
        let builder = builder(communicator, link).outer(Outer::diloco());
        train(builder.build(&mut model).unwrap(), &mut model, place);
        model
    })
    .concat();
    let of_one = ranks(4, |communicator| {
        let place = communicator.rank();
        let mut model = vec![1.0f32; 1001];
        let builder = ParamAverager::builder(communicator).outer(Outer::diloco());
        train(builder.build(&mut model).unwrap(), &mut model, place);
        model
    });
    assert!(of_hosts.iter().all(|model| *model == of_hosts[0]));
    for (a, b) in of_hosts[0].iter().zip(&of_one[0]) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

#[test]
fn done_is_refused() {
    on_hosts(2, 1, |_, communicator, link| {
        let mut model = vec![1.0f32; 10];
        let averager = builder(communicator, link).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(4));
        let error = sgd.done(&mut model).unwrap_err().to_string();
        assert!(error.contains("`hosts`") && error.contains("LocalSgd::finish"), "{error}");
        sgd.finish(&mut model).unwrap();
    });
}

#[test]
fn options_that_do_not_fit_are_refused() {
    use param_averager::Algorithm::Direct;
    type With = fn(Builder) -> Builder;
    let refused: [(With, &str); 7] = [
        (|builder| builder.algorithm(Direct), "`algorithm` is Direct, with 2 hosts"),
        (|builder| builder.all_or_nothing(false), "`all_or_nothing` is false, with 2 hosts"),
        (|builder| builder.start_from(Start::Own), "`start_from` is Own, with 2 hosts"),
        (|builder| builder.compression(Compression::Int8), "`compression` is Int8, with 2 hosts"),
        (|builder| builder.overlap(Overlap::default().delay(1)), "`overlap` is"),
        (
            |builder| {
                let link = ThreadHosts::new(2, 1).remove(0).remove(0);
                builder.hosts(link, Hierarchy::Outer { every: 0 })
            },
            "`hosts` is Outer { every: 0 }: every: 1 or more",
        ),
        (
            |builder| {
                let link = ThreadHosts::new(2, 1).remove(0).remove(0);
                builder.hosts(link, Hierarchy::Outer { every: 2 }).outer(Outer::diloco())
            },
            "with 2 hosts: Outer::mean with Hierarchy::Outer",
        ),
    ];
    for (with, text) in refused {
        let error = ranks(2, |communicator| {
            let link = ThreadHosts::new(2, 1).remove(0).remove(0);
            let builder = with(builder(communicator, link));
            builder.build(&mut vec![0.0f32; 10]).map(drop).unwrap_err().to_string()
        });
        assert!(error[0].contains(text), "{}", error[0]);
    }
}

/// H from what each rank has measured: all hosts agree on it.
#[test]
fn schedules_that_adapt_decide_alike_on_all_hosts() {
    for (schedule, each) in [
        (Schedule::overhead(0.2), 1),
        (Schedule::overhead(0.2), 2),
        (Schedule::budget(1e5), 1),
        (Schedule::divergence(0.01), 2),
    ] {
        let results = on_hosts(2, each, |host, communicator, link| {
            let mut model = vec![0.0f32; 500];
            let mut random = Random(host as u64 + 7 * communicator.rank() as u64);
            let builder = builder(communicator, link).telemetry(true);
            let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), schedule);
            let mut steps = vec![];
            for step in 0..60 {
                // Unequal on all ranks.
                std::thread::sleep(Duration::from_micros(100 * host as u64 + 50));
                model.iter_mut().for_each(|value| *value += random.value() as f32);
                if sgd.step(&mut model).unwrap().report().is_some() {
                    steps.push(step);
                }
            }
            sgd.finish(&mut model).unwrap();
            (steps, model)
        })
        .concat();
        assert!(!results[0].0.is_empty() && results.iter().all(|result| *result == results[0]));
    }
}

#[test]
fn schedules_that_adapt_are_refused_where_hosts_average_alone() {
    on_hosts(2, 1, |_, communicator, link| {
        let mut model = vec![0.0f32; 10];
        let hierarchy = Hierarchy::Outer { every: 2 };
        let builder = ParamAverager::builder(communicator).hosts(link, hierarchy);
        let averager = builder.build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::overhead(0.05));
        let mut steps = (0..10).map(|_| sgd.step(&mut model));
        let error = steps.find_map(Result::err).expect("an error").to_string();
        assert!(error.contains("`hosts` is 2, Outer { every: 2 }, with "), "{error}");
    });
}

/// A rank that panics takes its host with it; the other host is told.
#[test]
fn a_rank_that_is_lost_ends_the_averages_of_all_hosts() {
    let results = on_hosts(2, 2, |host, communicator, link| {
        let rank = communicator.rank();
        let mut model = vec![1.0f32; 1000];
        let mut averager = builder(communicator, link).build(&mut model).unwrap();
        if (host, rank) == (1, 1) {
            return None;
        }
        model.fill(rank as f32);
        let error = averager.average(&mut model).unwrap_err();
        assert_eq!(model, [rank as f32; 1000]);
        Some(error)
    });
    assert!(matches!(results[1][0], Some(Error::PeerLost { rank: 1, .. })), "{results:?}");
    let lost = |error: &Option<Error>| {
        matches!(
            error,
            Some(Error::HostLost { host: Some(1), .. } | Error::HostRefused { host: 1 })
        )
    };
    assert!(results[0].iter().all(lost), "{results:?}");
}

/// Hosts that fail alone keep the beat of averages of all, and `finish` is one of them.
#[test]
fn hosts_keep_the_beat_and_finish_together() {
    let results = on_hosts(2, 2, |host, communicator, link| {
        let rank = communicator.rank();
        let mut model = vec![0.0f32; 100];
        let hierarchy = Hierarchy::Outer { every: 3 };
        let builder = ParamAverager::builder(communicator).hosts(link, hierarchy);
        let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), Schedule::every(1));
        let mut hosts = vec![];
        for step in 1..=8 {
            model.fill((2 * host + rank) as f32);
            if (host, rank, step) == (1, 0, 2) {
                model[7] = f32::NAN;
            }
            hosts.push(match sgd.step(&mut model) {
                Ok(action) => action.report().unwrap().hosts,
                Err(error) => {
                    assert!(matches!(error, Error::NonFinite { rank: 0, .. }), "{error}");
                    0
                }
            });
        }
        let before = model[0];
        let last = sgd.finish(&mut model).unwrap();
        (hosts, before, last.report().map(|report| report.hosts), model[0])
    });
    for (host, ranks) in results.iter().enumerate() {
        for (hosts, before, last, after) in ranks {
            let second = if host == 1 { 0 } else { 1 };
            assert_eq!(*hosts, [1, second, 2, 1, 1, 2, 1, 1]);
            // Two averages of one host have come since the last of all.
            assert_eq!((*before, *last, *after), (2.0 * host as f32 + 0.5, Some(2), 1.5));
        }
    }
}

/// Hosts without a step since the last average: none needs one, or they are told of the others'.
#[test]
fn hosts_without_steps_need_no_average() {
    let results = on_hosts(2, 2, |host, communicator, link| {
        let mut model = vec![1.0f32; 100];
        let builder = builder(communicator, link).outer(Outer::diloco());
        let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), Schedule::every(2));
        for step in 0..4 {
            model.iter_mut().for_each(|value| *value += (host + step) as f32);
            sgd.step(&mut model).unwrap();
        }
        let trained = model.clone();
        // No outer step is made once more.
        assert!(matches!(sgd.finish(&mut model), Ok(param_averager::Action::Unneeded)));
        assert_eq!(model, trained);
        if host == 0 {
            sgd.step(&mut model).unwrap();
        }
        sgd.finish(&mut model).unwrap_err()
    });
    let told = Error::HostsDiffer {
        host: 1,
        found: "made no step since its last average".into(),
        expected: "made steps".into(),
    };
    assert!(results.iter().flatten().all(|error| *error == told), "{results:?}");
}

#[test]
fn an_abort_ends_the_waits_for_other_hosts() {
    let results = on_hosts(2, 2, |host, communicator, link| {
        let mut model = vec![1.0f32; 100];
        let rank = communicator.rank();
        let mut averager = builder(communicator, link).build(&mut model).unwrap();
        let start = std::time::Instant::now();
        if host == 1 {
            std::thread::sleep(Duration::from_millis(1500));
        } else if rank == 0 {
            let handle = averager.abort_handle();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                handle.abort();
            });
        }
        let error = averager.average(&mut model).unwrap_err();
        (error, start.elapsed())
    });
    for (error, waited) in &results[0] {
        assert!(matches!(error, Error::Aborted { .. }), "{error}");
        assert!(*waited < Duration::from_millis(1400), "{waited:?}");
    }
    let lost = |(error, _): &(Error, Duration)| matches!(error, Error::HostLost { .. });
    assert!(results[1].iter().all(lost), "{results:?}");
}

/// A host of one rank whose tensors can't be lent takes part to say so.
#[test]
fn a_failed_loan_on_a_host_of_one_rank_is_told() {
    struct Fails(Vec<f32>, bool);
    impl param_averager::Lend for Fails {
        fn lend(
            &mut self,
            average: &mut dyn FnMut(param_averager::Loan<'_>),
        ) -> Result<(), param_averager::LendError> {
            if std::mem::take(&mut self.1) {
                return Err(param_averager::LendError::new("locked elsewhere"));
            }
            average(param_averager::Loan::new(&mut self.0));
            Ok(())
        }
    }
    let results = on_hosts(2, 1, |host, communicator, link| {
        let mut model = Fails(vec![host as f32; 10], false);
        let mut averager = builder(communicator, link).build(&mut model).unwrap();
        model = Fails(vec![host as f32; 10], host == 1);
        let error = averager.average(&mut model).unwrap_err();
        averager.average(&mut model).unwrap();
        assert_eq!(model.0, [0.5; 10]);
        error
    });
    assert_eq!(results[0][0], Error::HostRefused { host: 1 });
    assert!(matches!(results[1][0], Error::LendFailed { rank: 0, .. }), "{:?}", results[1][0]);
}

/// Values of another host than 0 do not count where all begin with those of host 0.
#[test]
fn a_broadcast_mends_a_host_with_values_that_are_not_finite() {
    on_hosts(2, 2, |host, communicator, link| {
        let start = if host == 1 { f32::NAN } else { 3.0 };
        let mut model = vec![start; 100];
        let mut averager = builder(communicator, link).build(&mut model).unwrap();
        assert_eq!(model, [3.0; 100]);
        model.fill(start);
        averager.broadcast(1, &mut model).unwrap();
        assert_eq!(model, [3.0; 100]);
    });
}

#[test]
fn ranks_that_recover_are_refused() {
    on_hosts(2, 1, |_, communicator, link| {
        let mut model = vec![0.0f32; 10];
        let mut averager = builder(communicator, link).build(&mut model).unwrap();
        let error = averager.admit_joiner(&mut model).unwrap_err().to_string();
        assert!(error.contains("restart all hosts from a checkpoint"), "{error}");
    });
}
