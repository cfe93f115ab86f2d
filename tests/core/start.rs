//! Values that all ranks begin with, and copies of one rank's values.

use param_averager::{
    Algorithm, Communicator, Error, ParamAverager, Result, Start, TensorMut, TensorState,
};
use test_support::ranks;

/// A model of this rank's own: NaN, zeros of both signs and subnormal numbers in it.
fn model(rank: usize) -> (Vec<f32>, Vec<f64>) {
    let mut first: Vec<f32> = (0..2000).map(|i| (i * (rank + 1)) as f32 / 3.0).collect();
    if rank < 2 {
        first[..4].copy_from_slice(&[-0.0, f32::NAN, f32::MIN_POSITIVE / 4.0, f32::INFINITY]);
    }
    (first, vec![rank as f64 / 7.0; 33])
}

fn bits((first, second): &(Vec<f32>, Vec<f64>)) -> (Vec<u32>, Vec<u64>) {
    let first = first.iter().map(|x| x.to_bits()).collect();
    (first, second.iter().map(|x| x.to_bits()).collect())
}

/// Both ways to average, the ring with and without a commit.
const WAYS: [(Algorithm, bool); 3] =
    [(Algorithm::Direct, true), (Algorithm::Ring, true), (Algorithm::Ring, false)];

#[test]
fn all_ranks_begin_with_the_values_of_one() {
    for (algorithm, commits) in WAYS {
        for (start, root) in [(None, 0), (Some(Start::Rank(0)), 0), (Some(Start::Rank(2)), 2)] {
            let models = ranks(3, |communicator| {
                let mut own = model(communicator.rank());
                let builder = ParamAverager::builder(communicator).algorithm(algorithm);
                let builder = builder.all_or_nothing(commits).reject_non_finite(false);
                let builder = start.into_iter().fold(builder, |builder, s| builder.start_from(s));
                let averager = builder.build(&mut own).unwrap();
                assert!(averager.differing_ranks().is_empty());
                own
            });
            for own in models {
                assert_eq!(bits(&own), bits(&model(root)), "{algorithm:?} {commits} {start:?}");
            }
        }
    }
}

#[test]
fn all_ranks_can_begin_with_the_mean() {
    let models = ranks(4, |communicator| {
        let mut own = vec![communicator.rank() as f32; 100];
        let builder = ParamAverager::builder(communicator).start_from(Start::Mean);
        builder.build(&mut own).unwrap();
        own
    });
    assert_eq!(models, vec![vec![1.5f32; 100]; 4]);
}

#[test]
fn ranks_that_begin_with_their_own_values_know_which_differ() {
    for (values, expected) in [([0, 0, 0], vec![]), ([0, 1, 0], vec![1]), ([1, 0, 0], vec![1, 2])] {
        let found = ranks(3, |communicator| {
            let value = values[communicator.rank()];
            let mut own = model(value);
            let builder = ParamAverager::builder(communicator).start_from(Start::Own);
            let averager = builder.build(&mut own).unwrap();
            assert_eq!(bits(&own), bits(&model(value)));
            averager.differing_ranks()
        });
        assert_eq!(found, vec![expected; 3]);
    }
}

#[test]
fn different_starts_and_absent_roots_are_errors_on_all_ranks() {
    let starts = |starts: [Start; 2]| {
        let errors = ranks(2, |communicator| {
            let start = starts[communicator.rank()];
            let builder = ParamAverager::builder(communicator).start_from(start);
            builder.build(&mut vec![0.0f32; 10]).map(drop)
        });
        assert_eq!(errors[0], errors[1]);
        errors[0].clone().unwrap_err().to_string()
    };
    let text = starts([Start::Rank(0), Start::Rank(1)]);
    assert!(text.contains("start_from = Rank(1), rank 0 with start_from = Rank(0)"), "{text}");
    let absent = ranks(2, |communicator| {
        let builder = ParamAverager::builder(communicator).start_from(Start::Rank(2));
        builder.build(&mut vec![0.0f32; 10]).map(drop).unwrap_err().to_string()
    });
    for (rank, text) in absent.iter().enumerate() {
        let expected = format!("rank {rank}: the option `start_from` is Rank(2), in a world of 2");
        assert!(text.starts_with(&expected), "{text}");
    }
}

#[test]
fn a_model_that_is_not_finite_is_no_start_where_that_is_rejected() {
    let errors = ranks(2, |communicator| {
        let mut own = model(communicator.rank());
        let builder = ParamAverager::builder(communicator).reject_non_finite(true);
        builder.build(&mut own).map(drop).unwrap_err()
    });
    assert_eq!(errors[0], errors[1]);
    assert!(matches!(errors[0], Error::NonFinite { rank: 0, .. }), "{}", errors[0]);
}

fn averager(communicator: Communicator, own: &mut Vec<f32>) -> Result<ParamAverager> {
    let builder = ParamAverager::builder(communicator).start_from(Start::Own);
    builder.algorithm(Algorithm::Ring).build(own)
}

#[test]
fn broadcast_copies_any_rank() {
    for root in 0..3 {
        let models = ranks(3, |communicator| {
            let mut own = vec![communicator.rank() as f32; 1000];
            let mut averager = averager(communicator, &mut own).unwrap();
            assert_eq!(averager.broadcast(root, &mut own).unwrap().world_size, 3);
            own
        });
        assert_eq!(models, vec![vec![root as f32; 1000]; 3]);
    }
    let alone = ranks(1, |communicator| {
        let mut own = vec![1.0; 10];
        let mut averager = averager(communicator, &mut own).unwrap();
        averager.broadcast(0, &mut own).unwrap();
        averager.broadcast(1, &mut own).unwrap_err()
    });
    assert!(matches!(alone[0], Error::InvalidOption { option: "root", .. }), "{}", alone[0]);
}

#[test]
fn broadcasts_that_differ_change_nothing() {
    type Call = fn(&mut ParamAverager, &mut Vec<f32>) -> Error;
    fn copy<const ROOT: usize>(averager: &mut ParamAverager, own: &mut Vec<f32>) -> Error {
        averager.broadcast(ROOT, own).unwrap_err()
    }
    let mean: Call = |averager, own| averager.average(own).unwrap_err();
    let cases: [([Call; 2], &str); 4] = [
        (
            [copy::<0>, copy::<1>],
            "rank 1 calls broadcast from rank 1, rank 0 broadcast from rank 0",
        ),
        ([copy::<1>, mean], "rank 1 calls average, rank 0 broadcast from rank 1"),
        (
            [copy::<0>, copy::<7>],
            "rank 1 calls broadcast from rank 7, rank 0 broadcast from rank 0",
        ),
        ([copy::<7>, copy::<7>], "`root` is 7, in a world of 2"),
    ];
    for (calls, expected) in cases {
        let errors = ranks(2, |communicator| {
            let rank = communicator.rank();
            let mut own = vec![rank as f32; 100];
            let mut averager = averager(communicator, &mut own).unwrap();
            let error = calls[rank](&mut averager, &mut own);
            assert_eq!((&own, error.tensors()), (&vec![rank as f32; 100], TensorState::Unchanged));
            averager.average(&mut own).unwrap();
            assert_eq!(own, [0.5; 100]);
            error.to_string()
        });
        assert!(errors.iter().all(|text| text.contains(expected)), "{errors:?}");
    }
}

#[test]
fn a_start_that_fails_on_one_rank_fails_on_all() {
    use param_averager::{Lend, LendError, Loan};
    /// Lends once: when the averager looks at its tensors.
    struct Once(Option<Vec<f32>>);
    impl Lend for Once {
        fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
            let mut own = self.0.take().ok_or_else(|| LendError::new("it is lent already"))?;
            average(Loan::new(&mut TensorMut::from(&mut own)));
            Ok(())
        }
    }
    let errors = ranks(2, |communicator| {
        let mut own = vec![1.0f32; 10];
        let builder = ParamAverager::builder(communicator.clone());
        match communicator.rank() {
            0 => builder.build(&mut own).unwrap_err(),
            _ => builder.build(&mut Once(Some(own))).unwrap_err(),
        }
    });
    assert!(errors.iter().all(|error| matches!(error, Error::LendFailed { rank: 1, .. })));
    assert!(errors[1].to_string().contains("it is lent already"), "{}", errors[1]);
}
