//! Saved states of worlds with an outer optimizer: each rank's shard, and other numbers of ranks.

use param_averager::*;
use test_support::{ranks_of, Random};

const OUTER: Outer = Outer::nesterov(0.5, 0.75);

/// Values of all ranks in a round: small integers, so that their mean is exact for any number of
/// ranks.
fn values(round: u64) -> Vec<Vec<f32>> {
    let mut random = Random(round);
    [5000usize, 3, 700].map(|size| (0..size).map(|_| random.below(64) as f32).collect()).into()
}

type Model = Vec<Vec<f32>>;

fn build(communicator: Communicator, algorithm: Algorithm, outer: Outer) -> (LocalSgd, Model) {
    let mut model = values(0);
    let options = test_support::options(communicator).start_from(Start::Rank(0));
    let options = options.algorithm(algorithm).channels(2).chunk_bytes(1 << 10).outer(outer);
    let averager = options.build(&mut model).unwrap();
    (LocalSgd::new(averager, Schedule::every(1)), model)
}

fn train(sgd: &mut LocalSgd, model: &mut Model, rounds: std::ops::Range<u64>) {
    for round in rounds {
        *model = values(round);
        let action = sgd.step(model).unwrap();
        assert!(matches!(action, Action::Averaged(_)), "{action:?}");
    }
}

fn world<R: Send>(n: usize, f: impl Fn(Communicator) -> R + Sync) -> Vec<R> {
    ranks_of(&vec![Device::cpu(); n], f)
}

/// Models at the end of a world that ran through, and the states of all ranks on the way.
fn reference(n: usize, algorithm: Algorithm) -> (Model, Vec<Vec<u8>>, Model) {
    let all = world(n, |communicator| {
        let (mut sgd, mut model) = build(communicator, algorithm, OUTER);
        train(&mut sgd, &mut model, 1..5);
        let (saved, at) = (sgd.save().unwrap(), model.clone());
        train(&mut sgd, &mut model, 5..9);
        (model, saved, at)
    });
    let states = all.iter().map(|(_, saved, _)| saved.clone()).collect();
    let (end, _, at) = all.into_iter().next().unwrap();
    (end, states, at)
}

fn cause(error: Error) -> StateError {
    let Error::InvalidState { cause, .. } = error else { panic!("{error}") };
    cause
}

#[test]
fn any_number_of_ranks_goes_on_from_the_shards_of_another() {
    for (before, algorithm) in
        [(2, Algorithm::Direct), (3, Algorithm::Direct), (2, Algorithm::Ring), (4, Algorithm::Ring)]
    {
        let (end, states, at) = reference(before, algorithm);
        for (after, algorithm) in [
            (1, Algorithm::Direct),
            (2, Algorithm::Ring),
            (3, Algorithm::Ring),
            (4, Algorithm::Direct),
        ] {
            world(after, |communicator| {
                let (mut sgd, mut model) = build(communicator, algorithm, OUTER);
                model.clone_from(&at);
                sgd.load_all(&states).unwrap();
                assert_eq!((sgd.position(), sgd.averages()), (4, 4));
                train(&mut sgd, &mut model, 5..9);
                assert!(model == end, "{before} ranks saved, {after} went on");
            });
        }
        world(before, |communicator| {
            let rank = communicator.rank();
            let (mut sgd, mut model) = build(communicator, algorithm, OUTER);
            sgd.load(&states[rank]).unwrap();
            train(&mut sgd, &mut model, 5..9);
            assert!(model == end, "each of {before} ranks from its own state");
        });
    }
}

#[test]
fn states_of_other_optimizers_and_some_shards_are_refused() {
    let (_, states, _) = reference(2, Algorithm::Direct);
    let later = world(2, |communicator| {
        let (mut sgd, mut model) = build(communicator, Algorithm::Direct, OUTER);
        train(&mut sgd, &mut model, 1..3);
        sgd.save().unwrap()
    });
    let plain = world(1, |communicator| {
        let mut model = values(0);
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        LocalSgd::new(averager, Schedule::every(1)).save().unwrap()
    });
    world(1, |communicator| {
        let (mut sgd, mut model) = build(communicator.clone(), Algorithm::Direct, OUTER);
        let refused = |sgd: &mut LocalSgd, states: &[&Vec<u8>]| {
            let error = sgd.load_all(states).unwrap_err();
            assert_eq!((sgd.position(), error.is_fatal()), (0, false), "{error}");
            cause(error)
        };
        let StateError::MissingShards { found: 1, lacks, of } = refused(&mut sgd, &[&states[1]])
        else {
            panic!()
        };
        assert!(lacks > 0 && lacks < of, "{lacks} of {of}");
        assert_eq!(
            refused(&mut sgd, &[&states[0], &later[1]]),
            StateError::OtherStep { found: 2, expected: 4 }
        );
        assert_eq!(
            refused(&mut sgd, &[&plain[0]]),
            StateError::MissingSection { tag: "outer".into() }
        );
        assert_eq!(refused(&mut sgd, &[]), StateError::NotAState);
        // Nothing of the refused states is left: the next step is that of a new world.
        train(&mut sgd, &mut model, 1..2);
        let fresh = world(1, |communicator| {
            let (mut sgd, mut model) = build(communicator, Algorithm::Direct, OUTER);
            train(&mut sgd, &mut model, 1..2);
            model
        });
        assert!(model == fresh[0]);
        let (mut other, _) = build(communicator.clone(), Algorithm::Direct, Outer::diloco());
        let StateError::OtherOuter { found, expected } = refused(&mut other, &[&states[0]]) else {
            panic!()
        };
        assert_eq!((&*found, &*expected), ("nesterov(0.5, 0.75)", "nesterov(0.7, 0.9)"));
        let mut model = values(0);
        let averager = test_support::options(communicator).build(&mut model).unwrap();
        let mut none = LocalSgd::new(averager, Schedule::every(1));
        assert_eq!(
            cause(none.load(&states[0]).unwrap_err()),
            StateError::UnknownSection { tag: "outer".into() }
        );
    });
}
