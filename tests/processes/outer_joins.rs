//! A process joins ranks that keep a share of their own values, and so have no one model.

use param_averager::{Error, Outer, Start};
use test_support::fnv1a;
use test_support::process::{name, start, RankProcess};
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

pub fn ranks_that_keep_a_share_and_a_joiner_begin_from_one_model() {
    let name = name();
    let rank = |origin: usize, more: &[(&'static str, String)]| {
        let variables = [("PA_TEST_NAME", name.clone()), ("PA_TEST_ORIGIN", origin.to_string())];
        start("keeps_a_share", &[&variables, more].concat())
    };
    let first = |origin: usize| {
        let own = [("PA_TEST_RANK", origin.to_string()), ("PA_TEST_WORLD", "2".to_owned())];
        rank(origin, &own)
    };
    let mut ranks: Vec<RankProcess> = (0..2).map(first).collect();
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks.push(rank(2, &[("PA_TEST_JOIN", "1".to_owned())]));
    let mut models = vec![];
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("done").len(), 1, "{:#?}", rank.output);
        models.extend(rank.said("model"));
    }
    assert!(models.len() == 3 && models.iter().all(|model| *model == models[0]), "{models:?}");
}
