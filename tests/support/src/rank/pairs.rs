//! Roles of a rank with several averagers.

use param_averager::{LocalSgd, ParamAverager, Schedule};

use super::worker::{builder, is_late, join, number, say};

/// Two averagers, in turn, until one fails; then both recover.
pub fn two() -> i32 {
    let communicator = join().unwrap();
    let mut models = [vec![vec![1.0f32; 3000]], vec![vec![2.0f32; 30]]];
    let mut build = |index: usize| builder(communicator.clone()).build(&mut models[index]).unwrap();
    let mut averagers = [build(0), build(1)];
    say("ready");
    while averagers
        .iter_mut()
        .zip(&mut models)
        .all(|(averager, model)| averager.average(model).is_ok())
    {}
    for (averager, model) in averagers.iter_mut().zip(&mut models) {
        if averager.average(model).is_ok() {
            return 7; // a rank is gone, so it can't be
        }
        averager.recover(model).unwrap();
    }
    for (averager, model) in averagers.iter_mut().zip(&mut models) {
        averager.average(model).unwrap();
    }
    assert!(models[0][0].iter().all(|&x| x == 1.0) && models[1][0].iter().all(|&x| x == 2.0));
    say(&format!("two of {}", averagers[1].world_size()));
    0
}

/// Two averagers, in turn, that admit joiners until the world has `PA_TEST_FINAL` ranks. Each has a
/// value of its own.
pub fn two_admit() -> i32 {
    let communicator = join().unwrap();
    let own = if is_late() { [f32::NAN; 2] } else { [1.0, 2.0] };
    let mut models = own.map(|own| vec![vec![own; 3000]]);
    let mut averagers: Vec<ParamAverager> = models
        .iter_mut()
        .map(|model| builder(communicator.clone()).build(model).unwrap())
        .collect();
    say("ready");
    let (mut rounds, mut is_behind) = (0, !is_late());
    while rounds < 5 {
        // A joiner goes on where the members are: after the admission.
        let behind = std::mem::replace(&mut is_behind, true);
        if behind && averagers[0].average(&mut models[0]).unwrap().join_pending {
            averagers[0].admit_joiner(&mut models[0]).unwrap();
            if number("PA_TEST_BY_RECOVER").is_none() {
                averagers[1].admit_joiner(&mut models[1]).unwrap();
            } else if averagers[1].average(&mut models[1]).is_ok() {
                return 7; // its world is another one by now
            } else {
                averagers[1].recover(&mut models[1]).unwrap();
            }
        }
        averagers[1].average(&mut models[1]).unwrap();
        for (model, value) in models.iter().zip([1.0, 2.0]) {
            assert!(model[0].iter().all(|&x| x == value), "{} is not {value}", model[0][0]);
        }
        rounds +=
            usize::from(averagers[1].world_size() == number("PA_TEST_FINAL").unwrap() as usize);
    }
    let communicator = averagers[1].communicator();
    assert_eq!(communicator.world_size(), averagers[0].world_size());
    say(&format!("two of {}", communicator.world_size()));
    0
}

/// Several averagers, in turn. When one fails, all are recovered, in an order of this rank's own;
/// until `PA_TEST_FINAL` ranks are left and three rounds have succeeded.
pub fn many_recover() -> i32 {
    let communicator = join().unwrap();
    let origin = communicator.rank();
    let count = number("PA_TEST_AVERAGERS").unwrap() as usize;
    let mut models: Vec<_> = (0..count).map(|index| vec![vec![index as f32 + 1.0; 2000]]).collect();
    let mut averagers: Vec<ParamAverager> = models
        .iter_mut()
        .map(|model| builder(communicator.clone()).build(model).unwrap())
        .collect();
    drop(communicator);
    let left = number("PA_TEST_FINAL").unwrap() as usize;
    say("ready");
    let mut good = 0;
    while good < 3 {
        let all = averagers.iter_mut().zip(&mut models);
        let failed = all.map(|(averager, model)| averager.average(model)).find_map(Result::err);
        for (model, value) in models.iter().zip(1..) {
            assert!(model[0].iter().all(|&x| x == value as f32), "{} is not {value}", model[0][0]);
        }
        let Some(error) = failed else {
            good = if averagers[0].world_size() == left { good + 1 } else { 0 };
            continue;
        };
        assert!(error.is_fatal(), "{error}");
        say(&format!("failed {error}"));
        // The first averager to be recovered differs between ranks, and every second rank goes
        // backwards.
        let mut order: Vec<usize> = (0..count).collect();
        order.rotate_left(origin % count);
        if origin % 2 == 1 {
            order.reverse();
        }
        for index in order {
            averagers[index].recover(&mut models[index]).unwrap();
        }
        say(&format!("recovered {}", averagers[0].world_size()));
    }
    assert!(averagers.iter().all(|averager| averager.world_size() == left));
    say(&format!("many of {left}"));
    0
}

/// Two `LocalSgd`s that this rank recovers first in an order of its own, and then in the common
/// order.
pub fn two_sgd() -> i32 {
    let communicator = join().unwrap();
    let origin = communicator.rank();
    let mut models = [vec![vec![1.0f32; 3000]], vec![vec![2.0f32; 30]]];
    let mut build = |index: usize| {
        LocalSgd::new(
            builder(communicator.clone()).build(&mut models[index]).unwrap(),
            Schedule::every(1),
        )
    };
    let mut all = [build(0), build(1)];
    say("ready");
    while all.iter_mut().zip(&mut models).all(|(sgd, model)| sgd.step(model).is_ok()) {}
    let error = all[origin % 2].recover(&mut models[origin % 2]).unwrap_err();
    say(&format!("error {error}"));
    for (sgd, model) in all.iter_mut().zip(&mut models) {
        sgd.recover(model).unwrap();
        sgd.step(model).unwrap();
    }
    say(&format!("two of {}", all[1].averager().world_size()));
    0
}

/// Two averagers, of which rank 1 drops the second before rank 2 dies.
pub fn one_dropped() -> i32 {
    let communicator = join().unwrap();
    let mut models = [vec![vec![1.0f32; 3000]], vec![vec![2.0f32; 30]]];
    let mut averagers: Vec<ParamAverager> = models
        .iter_mut()
        .map(|model| builder(communicator.clone()).build(model).unwrap())
        .collect();
    if communicator.rank() == 1 {
        averagers.pop();
    }
    say("ready");
    while averagers[0].average(&mut models[0]).is_ok() {}
    if let Some(second) = averagers.get_mut(1) {
        let error = second.recover(&mut models[1]).unwrap_err();
        say(&format!("error {error}"));
    }
    averagers[0].recover(&mut models[0]).unwrap();
    averagers[0].average(&mut models[0]).unwrap();
    say(&format!("one of {}", averagers[0].world_size()));
    0
}
