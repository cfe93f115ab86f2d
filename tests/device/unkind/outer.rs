//! Outer optimizers of a scenario, and the values that their steps give on CPUs.

use param_averager::*;
use test_support::ranks;

use crate::cuda::outers;

/// Value of all elements when an averager is built: the anchor of its first step.
pub const BEGIN: f32 = 64.0;

/// Value of all elements of a rank before an average.
pub fn value(rank: usize, round: usize) -> f32 {
    (10 * round + 2 * rank) as f32
}

/// The optimizers that a scenario names: one, or `all`, one averager after the other.
pub fn named(name: &str) -> Vec<Outer> {
    let [nesterov, adam, keeping] = outers();
    match name {
        "nesterov" => vec![nesterov],
        "adam" => vec![adam],
        "keeping" => vec![keeping],
        "all" => vec![nesterov, adam, keeping],
        other => panic!("no outer optimizer {other}"),
    }
}

/// Value of all elements of a rank after each of some averages.
pub fn expected(outer: Outer, rank: usize, world: usize, rounds: usize) -> Vec<f32> {
    let mean = |round| (0..world).map(|rank| value(rank, round)).sum::<f32>() / world as f32;
    let means: Vec<f32> = (0..rounds).map(mean).collect();
    if outer == Outer::mean() {
        return means;
    }
    let found = ranks(world, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![BEGIN; 5];
        let builder = test_support::options(communicator).start_from(Start::Rank(0)).outer(outer);
        let mut averager = builder.build(&mut model).unwrap();
        let mut average = |round| {
            model.fill(value(rank, round));
            averager.average(&mut model).unwrap();
            model[0]
        };
        (0..rounds).map(&mut average).collect::<Vec<f32>>()
    });
    // Or a step that is not made would pass.
    assert!(found[rank].iter().zip(&means).all(|(step, mean)| step != mean), "{outer}: {found:?}");
    found[rank].clone()
}
