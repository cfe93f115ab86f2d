//! Averages over several hosts that fail: all or nothing when a host fails, differs, vetoes, leaves
//! or is late; and what is refused.

use std::sync::atomic::AtomicUsize;
use std::sync::Mutex;
use std::time::Duration;

use param_averager::{
    Error, Hierarchy, LocalSgd, ParamAverager, Schedule, TensorState, ThreadHosts, Veto,
};
use test_support::ranks;

use crate::hosts::{builder, meet, on_hosts, two_averages, Average};

/// Checks a failure that changes nothing: tensors are as they were, and the next average is good.
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
                    let builder = builder(communicator, link).timeout(Duration::from_secs(10));
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
        let given_up = &AtomicUsize::new(0);
        let results = on_hosts(2, 2, |host, communicator, link| {
            let mut model = vec![1.0f32; 10];
            let builder = builder(communicator, link).timeout(Duration::from_secs(6));
            let mut averager = builder.build(&mut model).unwrap();
            if host == 1 {
                if !leaves {
                    meet(given_up, 4);
                }
                return None;
            }
            let mut own = vec![3.0f32; 10];
            let errors = [averager.average(&mut own), averager.average(&mut own)];
            if !leaves {
                meet(given_up, 4);
            }
            assert_eq!(own, [3.0; 10]);
            Some(errors.map(Result::unwrap_err))
        });
        for (rank, [first, second]) in results[0].iter().flatten().enumerate() {
            let named = |error: &Error| {
                let of = rank;
                matches!(error, Error::HostLost { rank, host: Some(1), .. } if *rank == of)
            };
            let Error::Poisoned { cause } = second else { panic!("{second}") };
            assert!(named(first) && named(cause), "{first} {second}");
            assert!(first.tensors() == TensorState::Unchanged && first.is_fatal());
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

/// A rank that leaves takes its host with it; the other host is told.
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
fn an_abort_ends_the_waits_for_other_hosts() {
    for wait in [0, 10, 100] {
        // Host 1 comes when both ranks of host 0 have returned.
        let returned = &AtomicUsize::new(0);
        let errors = on_hosts(2, 2, |host, communicator, link| {
            let mut model = vec![1.0f32; 100];
            let rank = communicator.rank();
            let mut averager = builder(communicator, link).build(&mut model).unwrap();
            if host == 1 {
                meet(returned, 4);
                let first = averager.average(&mut model).unwrap_err();
                // A rank of host 0 may have come to say that its sum has failed.
                return match first {
                    Error::HostRefused { host: 0 } => averager.average(&mut model).unwrap_err(),
                    lost => lost,
                };
            }
            let handle = averager.abort_handle();
            std::thread::scope(|scope| {
                if rank == 0 {
                    scope.spawn(move || {
                        std::thread::sleep(Duration::from_millis(wait));
                        handle.abort();
                    });
                }
                let averaged = averager.average(&mut model);
                meet(returned, 4);
                averaged.unwrap_err()
            })
        });
        let is_aborted = |error: &Error| matches!(error, Error::Aborted { .. });
        assert!(errors[0].iter().all(is_aborted), "{errors:?}");
        // The first rank that loses its link may leave before the other meets it.
        let is_lost =
            |error: &Error| matches!(error, Error::HostLost { .. } | Error::PeerLost { .. });
        assert!(errors[1].iter().all(is_lost), "{errors:?}");
    }
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

/// Hosts that have averaged alone agree at the next average of all, also without further steps, and
/// if that fails at the one after it.
#[test]
fn hosts_that_are_apart_agree_without_further_steps() {
    for fails in [false, true] {
        let results = on_hosts(2, 2, |host, communicator, link| {
            let rank = communicator.rank();
            let mut model = vec![0.0f32; 100];
            let hierarchy = Hierarchy::Outer { every: if fails { 3 } else { 2 } };
            let builder = ParamAverager::builder(communicator).hosts(link, hierarchy);
            let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), Schedule::every(1));
            model.fill((2 * host + rank) as f32);
            sgd.step(&mut model).unwrap();
            assert_eq!(model[0], 2.0 * host as f32 + 0.5);
            if fails {
                if (host, rank) == (0, 1) {
                    model[3] = f32::INFINITY;
                }
                sgd.finish(&mut model).unwrap_err();
                model[3] = model[0];
            } else {
                sgd.skip(&mut model).unwrap(); // the second average, of all hosts
            }
            sgd.finish(&mut model).unwrap();
            model
        });
        assert_eq!(results.concat(), vec![vec![1.5; 100]; 4]);
    }
}

#[test]
fn a_stage_that_is_too_slow_is_a_veto() {
    let results = on_hosts(2, 1, |host, communicator, link| {
        let mut model = vec![0.0f32; 100];
        let mut calls = 0;
        let builder = ParamAverager::builder(communicator).timeout(Duration::from_secs(8));
        let mut averager = builder
            .hosts(link, Hierarchy::Every)
            .stage(move |_| {
                calls += 1;
                std::thread::sleep(Duration::from_millis(if calls == 2 { 6200 } else { 0 }));
                Ok(())
            })
            .build(&mut model)
            .unwrap();
        model.fill(host as f32);
        let error = averager.average(&mut model).unwrap_err();
        assert_eq!(model, [host as f32; 100]);
        averager.average(&mut model).unwrap();
        assert_eq!(model, [0.5; 100]);
        error
    });
    let slow = |error: &Error| {
        matches!(error, Error::StageVetoed { reason, .. } if reason.contains("raise it"))
            || matches!(error, Error::HostRefused { .. })
    };
    assert!(results.iter().flatten().all(slow), "{results:?}");
}
