//! A process joins ranks with an outer optimizer: with a state of many messages, and where ranks
//! keep a share of their own values, and so have no one model.

use param_averager::{Error, Outer, ParamAverager, Start};
use test_support::fnv1a;
use test_support::process::start_and_join;
use test_support::rank::{builder, is_late, join, number, say};

/// Role: averages until a process has joined, then once more, and checks the step.
pub fn keeps_a_share() -> i32 {
    let origin = number("PA_TEST_ORIGIN").unwrap() as f32;
    let mut model = vec![vec![1.0f32; 3001], vec![1.0; 7]];
    let outer = Outer::sgd(0.5).keeping(0.5);
    let options = |world| builder(world).start_from(Start::Rank(0)).outer(outer);
    let built: Result<_, Error> = join().and_then(|world| options(world).build(&mut model));
    let mut averager = built.unwrap();
    say("ready");
    while !is_late() {
        model.iter_mut().flatten().for_each(|x| *x += 8.0 * origin);
        if averager.average(&mut model).unwrap().join_pending {
            averager.admit_joiner(&mut model).unwrap();
            break;
        }
    }
    let begin = model.clone();
    say(&format!("model {:x}", fnv1a(model.iter().flatten().map(|x| x.to_bits().into()))));
    // Three ranks: the mean is θ + 8, and θ moves by half of that.
    model.iter_mut().flatten().for_each(|x| *x += 8.0 * origin);
    averager.average(&mut model).unwrap();
    for (x, anchor) in model.iter().flatten().zip(begin.iter().flatten()) {
        let want = anchor + 0.5 * (8.0 * origin) + 0.5 * 4.0;
        assert!((x - want).abs() <= 1e-5 * want.abs(), "{x} instead of {want}, from {anchor}");
    }
    say("done");
    0
}

/// Role: makes steps with a Δ of its own for each element until all velocities are 2 Δ and a
/// process has joined, and then one more.
pub fn has_large_state() -> i32 {
    let way = |i: usize| 1.0 + (i % 97) as f32;
    let mut model = vec![vec![0.0f32; 300_001], vec![0.0; 7], vec![0.0; 50_000]];
    let options = |world| {
        let builder = builder(world).start_from(Start::Rank(0)).outer(Outer::nesterov(0.5, 0.5));
        builder.channels(3).chunk_bytes(4096).slots(4)
    };
    let built: Result<_, Error> = join().and_then(|world| options(world).build(&mut model));
    let mut averager = built.unwrap();
    say("ready");
    let step = |averager: &mut ParamAverager, model: &mut Vec<Vec<f32>>| {
        model.iter_mut().flatten().for_each(|x| *x = 0.0);
        averager.broadcast(0, model).unwrap(); // θ
        model.iter_mut().flatten().enumerate().for_each(|(i, x)| *x = -way(i));
        averager.average(model).unwrap()
    };
    if !is_late() {
        let mut rounds = 0;
        while !step(&mut averager, &mut model).join_pending || rounds < 40 {
            rounds += 1;
        }
        averager.admit_joiner(&mut model).unwrap();
    }
    let report = step(&mut averager, &mut model);
    assert_eq!((report.world_size, report.lost_state), (3, 0.0));
    for (i, x) in model.iter().flatten().enumerate() {
        let want = -0.5 * (way(i) + 0.5 * 2.0 * way(i)); // v = 2 Δ / 2 + Δ = 2 Δ
        assert_eq!(*x, want, "element {i}");
    }
    say("done");
    0
}

/// A velocity of 700 KB on each of two ranks, which takes 43 messages.
pub fn a_joiner_takes_over_a_large_state() {
    for rank in &mut start_and_join("has_large_state", 2, &[]) {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("done").len(), 1, "{:#?}", rank.output);
    }
}

pub fn ranks_that_keep_a_share_and_a_joiner_begin_from_one_model() {
    let mut models = vec![];
    for rank in &mut start_and_join("keeps_a_share", 2, &[]) {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("done").len(), 1, "{:#?}", rank.output);
        models.extend(rank.said("model"));
    }
    assert!(models.len() == 3 && models.iter().all(|model| *model == models[0]), "{models:?}");
}
