//! Weights of hosts in averages over several hosts, and hosts without weight or steps.

use param_averager::{Error, Hierarchy, LocalSgd, Outer, ParamAverager, Schedule};

use crate::hosts::{builder, on_hosts};

/// A host counts by the weights of all its rounds since the last average of all hosts, but for
/// those that have failed.
#[test]
fn weights_of_rounds_between_averages_of_all_hosts_add_up() {
    // Weights of both ranks of each host in each round; the second round of host 1 fails.
    let weights = [[1.0, 5.0, 2.0], [3.0, 100.0, 4.0]];
    on_hosts(2, 2, |host, communicator, link| {
        let rank = communicator.rank();
        let mut model = vec![0.0f32; 100];
        let hierarchy = Hierarchy::Outer { every: 3 };
        let builder = ParamAverager::builder(communicator).hosts(link, hierarchy);
        let mut averager = builder.build(&mut model).unwrap();
        for turn in 0..2 {
            for (round, weight) in weights[host].into_iter().enumerate() {
                model.fill(host as f32);
                let fails = (host, round) == (1, 1);
                model[7] = if fails && rank == 1 { f32::NAN } else { model[7] };
                let made = averager.average_weighted(&mut model, weight);
                assert_eq!(made.is_err(), fails, "{made:?}");
            }
            // 2 · (1 + 5 + 2) for host 0, 2 · (3 + 4) for host 1.
            assert_eq!(model, [7.0 / 15.0; 100], "{turn}");
        }
        // Without weights, hosts count by their ranks.
        for _ in 0..3 {
            model.fill(host as f32);
            averager.average(&mut model).unwrap();
        }
        assert_eq!(model, [0.5; 100]);
    });
}

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
        for is_whole in [true, false, true] {
            // Nor is any value looked at.
            if (host, sgd.rank()) == (1, 0) {
                model[0] = if is_whole { trained[0] } else { f32::NAN };
            }
            assert!(matches!(sgd.finish(&mut model), Ok(param_averager::Action::Unneeded)));
            assert!(!is_whole || model == trained);
        }
        if host == 0 {
            model.iter_mut().for_each(|value| *value += 8.0);
            sgd.step(&mut model).unwrap();
        }
        assert_eq!(sgd.finish(&mut model).unwrap().report().unwrap().hosts, 2);
        (trained, model)
    });
    let (trained, model) = &results[0][0];
    assert!(results.iter().flatten().all(|(_, of)| of == model));
    assert!(model[0] - trained[0] > 1.0, "host 1 has counted, and host 0's steps are in it");
}

/// In one world, too, ranks without weight only receive.
#[test]
fn a_host_without_weight_only_receives() {
    on_hosts(3, 2, |host, communicator, link| {
        let rank = communicator.rank();
        let mut model = vec![1.0f32; 1000];
        let averager = builder(communicator, link).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        for samples in [[3.0, 0.0, 1.0], [0.0, 0.0, 2.0], [5.0, 0.0, 0.0]] {
            model.fill(10.0 * host as f32 + rank as f32);
            if samples[host] == 0.0 {
                model[rank..].fill(f32::NAN);
            }
            sgd.step_weighted(&mut model, samples[host]).unwrap();
            let total: f64 = samples.iter().sum();
            let of = |host: usize| samples[host] / total * (10.0 * host as f64 + 0.5);
            let mean = (0..3).map(of).sum::<f64>() as f32;
            let is_mean = |found: &f32| (found - mean).abs() < 1e-5 * mean;
            assert!(model.iter().all(is_mean), "{} {mean}", model[0]);
        }
        // A host that has not stepped since, and so passes no weight.
        model.fill(10.0 * host as f32);
        if host == 2 {
            sgd.skip(&mut model).unwrap();
        } else {
            sgd.step_weighted(&mut model, 1.0).unwrap();
        }
        assert_eq!(model[0], 5.0);
        model.fill(host as f32);
        let made = sgd.step_weighted(&mut model, 0.0).unwrap();
        assert!(matches!(made, param_averager::Action::Unneeded), "{made:?}");
        assert_eq!(model, [host as f32; 1000]);
        let error = sgd.averager().average_weighted(&mut model, 0.0).unwrap_err();
        assert_eq!(error, Error::AllWeightsZero);
        assert_eq!(model, [host as f32; 1000]);
        // Hosts that no longer make the same calls are told so, with news or without.
        let error = match host {
            0 => sgd.finish(&mut model).unwrap_err(),
            _ => sgd.skip(&mut model).unwrap_err(),
        };
        assert!(matches!(error, Error::HostsDiffer { host: 1, .. }), "{error}");
    });
}

/// A host whose ranks have not stepped yet passes no weights, and takes part all the same.
#[test]
fn a_host_that_has_not_stepped_takes_part_in_averages_of_all() {
    for every in [1, 2] {
        on_hosts(2, 2, |host, communicator, link| {
            let mut model = vec![1.0f32; 100];
            let builder = ParamAverager::builder(communicator);
            let builder = builder.hosts(link, Hierarchy::Outer { every });
            let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), Schedule::every(1));
            for step in 1..=4 {
                model.fill(if host == 0 { 5.0 } else { f32::from(step as u8) });
                match host {
                    0 => sgd.step_weighted(&mut model, 2.0).unwrap(),
                    _ => sgd.skip(&mut model).unwrap(),
                };
                let is_of_all = step % every == 0;
                assert!(!is_of_all || model == [5.0; 100], "{every}, {step}: {}", model[0]);
            }
        });
    }
}
