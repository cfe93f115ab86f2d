//! What a rank with two averagers does.

use param_averager::ParamAverager;

use super::worker::{builder, is_late, join, number, say};

/// Two averagers, in turn, until one fails; then both recover.
pub fn two() -> i32 {
    let communicator = join().unwrap();
    let mut models = [vec![vec![1.0f32; 3000]], vec![vec![2.0f32; 30]]];
    let mut build = |index: usize| builder(communicator.clone()).build(&mut models[index]).unwrap();
    let mut averagers = [build(0), build(1)];
    say("ready");
    while averagers.iter_mut().zip(&mut models).all(|(averager, model)| averager.average(model).is_ok()) {}
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

/// Two averagers, in turn, that let in who comes, until there are so many ranks as there are to be. Each has a value of its own.
pub fn two_admit() -> i32 {
    let communicator = join().unwrap();
    let own = if is_late() { [f32::NAN; 2] } else { [1.0, 2.0] };
    let mut models = own.map(|own| vec![vec![own; 3000]]);
    let mut averagers: Vec<ParamAverager> =
        models.iter_mut().map(|model| builder(communicator.clone()).build(model).unwrap()).collect();
    say("ready");
    let (mut rounds, mut is_behind) = (0, !is_late());
    while rounds < 5 {
        // Who joins goes on where the others are: behind their admission.
        let behind = std::mem::replace(&mut is_behind, true);
        if behind && averagers[0].average(&mut models[0]).unwrap().joiner_waits {
            averagers[0].admit(&mut models[0]).unwrap();
            if number("PA_TEST_BY_RECOVER").is_none() {
                averagers[1].admit(&mut models[1]).unwrap();
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
        rounds += usize::from(averagers[1].world_size() == number("PA_TEST_FINAL").unwrap() as usize);
    }
    let communicator = averagers[1].communicator();
    assert_eq!(communicator.world_size(), averagers[0].world_size());
    say(&format!("two of {}", communicator.world_size()));
    0
}
