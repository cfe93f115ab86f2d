//! Saved states: a world that saved, ended and loads goes on as one that ran through.

use param_averager::{Action, Communicator, Error, LocalSgd, Schedule, Start, StateError};
use test_support::{ranks, Random};

type Model = Vec<Vec<f64>>;

const STEPS: u64 = 60;

fn build(communicator: Communicator, model: &mut Model, schedule: Schedule) -> LocalSgd {
    // Each rank goes on with its own parameters.
    let builder = test_support::options(communicator).start_from(Start::Own);
    LocalSgd::new(builder.build(model).unwrap(), schedule)
}

/// One step of a rank: an optimizer's, or one that is left out, with its learning rate.
fn step(sgd: &mut LocalSgd, model: &mut Model, weighted: bool) -> u64 {
    let (rank, position) = (sgd.rank() as u64, sgd.position());
    let mut random = Random(rank << 32 | position);
    let skips = random.below(5) == 0;
    sgd.set_learning_rate(0.2 / (1.0 + position as f64 / 8.0));
    let action = if skips {
        sgd.skip(model)
    } else {
        model.iter_mut().flatten().for_each(|x| *x = 0.9 * *x + random.value());
        match weighted {
            true => sgd.step_weighted(model, 1.0 + random.below(9) as f64),
            false => sgd.step(model),
        }
    };
    u64::from(action.unwrap().report().is_some())
}

/// State of a rank at the end: parameters, position, H, steps and averages.
type End = (Model, u64, u64, u64, u64);

fn end(sgd: &mut LocalSgd, model: &mut Model) -> End {
    assert!(matches!(sgd.finish(model).unwrap(), Action::Averaged(_) | Action::Unneeded));
    (model.clone(), sgd.position(), sgd.local_steps(), sgd.steps(), sgd.averages())
}

/// Runs a world from its states, or from its beginning, up to a step. Returns each rank's state
/// there and, after an average, its end: what goes on from the same state must come to it, too.
fn run(
    n: usize,
    (schedule, weighted): (Schedule, bool),
    from: &[(Vec<u8>, Model)],
    to: u64,
) -> Vec<((Vec<u8>, Model), End)> {
    ranks(n, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![vec![rank as f64; 3]; 2];
        let loaded = from.get(rank);
        loaded.into_iter().for_each(|(_, loaded)| model = loaded.clone());
        let mut sgd = build(communicator, &mut model, schedule);
        if let Some((state, _)) = loaded {
            sgd.load(state).unwrap();
        }
        while sgd.position() < to {
            step(&mut sgd, &mut model, weighted);
        }
        let saved = (sgd.save().unwrap(), model.clone());
        (saved, end(&mut sgd, &mut model))
    })
}

#[test]
fn a_world_that_loads_goes_on_as_one_that_ran_through() {
    let schedules = [
        Schedule::every(7),
        Schedule::every(4).after_warmup(9),
        Schedule::quadratic(0.3, 2).after_warmup(3),
    ];
    for schedule in schedules {
        for weighted in [false, true] {
            let kind = (schedule, weighted);
            let through = run(3, kind, &[], STEPS);
            // Between averages, at one, just before and just after one, in the warm-up and at 0.
            for at in [0, 1, 2, 3, 6, 7, 8, 9, 10, 20, 21, 33] {
                let saved: Vec<_> =
                    run(3, kind, &[], at).into_iter().map(|(saved, _)| saved).collect();
                let resumed = run(3, kind, &saved, STEPS);
                for (rank, (a, b)) in through.iter().zip(&resumed).enumerate() {
                    assert_eq!(a.1, b.1, "{schedule}, rank {rank} from step {at}");
                    assert_eq!(a.0, b.0, "{schedule}, rank {rank} from step {at}: the state");
                }
            }
        }
    }
}

/// The steps before the save belong to the next average, with their learning rate, though no
/// further step is applied.
#[test]
fn steps_before_the_save_are_averaged_after_the_load() {
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let schedule = Schedule::quadratic(0.2, 4);
        let mut model = vec![vec![rank as f64; 3]];
        let mut sgd = build(communicator.clone(), &mut model, schedule);
        sgd.step_with(&mut model, 0.05).unwrap();
        let state = sgd.save().unwrap();
        drop(sgd);
        let mut sgd = build(communicator, &mut model, schedule);
        sgd.load(&state).unwrap();
        let made: Vec<bool> =
            (0..3).map(|_| sgd.skip(&mut model).unwrap().report().is_some()).collect();
        assert_eq!((made, &model[0]), (vec![false, false, true], &vec![0.5; 3]));
        assert_eq!(sgd.local_steps(), 16);
    });
}

/// H that comes from times is where it was, though the times themselves are measured anew.
#[test]
fn a_measured_h_is_saved() {
    let found = ranks(2, |communicator| {
        let mut model = vec![vec![1.0; 3]];
        let mut sgd = build(communicator.clone(), &mut model, Schedule::overhead(1e6));
        for _ in 0..55 {
            sgd.step(&mut model).unwrap();
        }
        let state = sgd.save().unwrap();
        assert_eq!((sgd.position(), sgd.local_steps()), (55, 6));
        drop(sgd);
        let mut sgd = build(communicator, &mut model, Schedule::overhead(1e6));
        sgd.load(&state).unwrap();
        assert_eq!((sgd.position(), sgd.local_steps()), (55, 6));
        let steps: Vec<u64> = (56..=75)
            .filter(|_| {
                let due = sgd.is_next_due();
                sgd.step(&mut model).unwrap();
                due
            })
            .collect();
        steps
    });
    // 54 was the last average: 60, 66 and 72, whose times are the first ones that decide.
    assert_eq!(found, [[60, 66, 72], [60, 66, 72]]);
}

/// One state fits all ranks after `sync`, and any number of ranks.
#[test]
fn a_state_of_rank_0_after_sync_fits_any_number_of_ranks() {
    let schedule = Schedule::every(8);
    let saved = ranks(3, |communicator| {
        let mut model = vec![vec![0.0; 3]];
        let mut sgd = build(communicator, &mut model, schedule);
        for _ in 0..13 {
            sgd.step(&mut model).unwrap();
        }
        let between = sgd.save().unwrap();
        sgd.sync(&mut model).unwrap();
        (between, sgd.save().unwrap())
    });
    ranks(4, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![vec![0.0; 3]];
        let mut sgd = build(communicator, &mut model, schedule);
        // Another rank's steps since an average are not this one's.
        let cause = StateError::OtherRank { found: 0, world_size: 3, steps: 5 };
        let refused = sgd.load(&saved[0].0).unwrap_err();
        assert_eq!(refused, Error::InvalidState { rank, cause });
        assert_eq!(sgd.position(), 0);
        sgd.load(&saved[0].1).unwrap();
        assert_eq!((sgd.position(), sgd.steps(), sgd.averages()), (13, 13, 2));
        let due: Vec<bool> =
            (0..4).map(|_| sgd.step(&mut model).unwrap().report().is_some()).collect();
        assert_eq!(due, [false, false, true, false]);
    });
}

fn state(model: &mut Model, schedule: Schedule) -> Vec<u8> {
    let state = ranks(1, |communicator| {
        let mut model = model.clone();
        let mut sgd = build(communicator, &mut model, schedule);
        sgd.step(&mut model).unwrap();
        sgd.save().unwrap()
    });
    state[0].clone()
}

fn refused(state: &[u8], model: &Model, schedule: Schedule) -> String {
    let texts = ranks(1, |communicator| {
        let mut model = model.clone();
        let mut sgd = build(communicator, &mut model, schedule);
        let error = sgd.load(state).unwrap_err();
        assert!(matches!(error, Error::InvalidState { rank: 0, .. }) && !error.is_fatal());
        assert_eq!((sgd.position(), sgd.steps()), (0, 0));
        error.to_string()
    });
    texts[0].clone()
}

#[test]
fn states_of_other_models_and_schedules_are_refused() {
    let mut model = vec![vec![1.0; 3], vec![2.0; 4]];
    let schedule = Schedule::overhead(0.05);
    let saved = state(&mut model, schedule);
    for other in [vec![vec![1.0; 3]], vec![vec![1.0; 4], vec![2.0; 3]], vec![vec![1.0; 7]]] {
        let text = refused(&saved, &other, schedule);
        assert!(text.contains("saved for 2 tensors of 56 bytes"), "{text}");
        assert!(text.contains("this model has"), "{text}");
    }
    for other in [
        Schedule::overhead(0.06),
        Schedule::overhead(0.05).after_warmup(1),
        Schedule::overhead(0.05).at_most(100),
        Schedule::every(10),
    ] {
        let text = refused(&saved, &model, other);
        assert!(text.contains("saved with the schedule overhead(0.05).at_most(200)"), "{text}");
        assert!(text.contains(&format!("this one is {other}")), "{text}");
    }
}

#[test]
fn bytes_that_have_changed_are_refused() {
    let mut model = vec![vec![1.0; 3]];
    let schedule = Schedule::quadratic(0.2, 4);
    let saved = state(&mut model, schedule);
    ranks(1, |communicator| {
        let mut model = model.clone();
        let mut sgd = build(communicator, &mut model, schedule);
        for at in 0..saved.len() {
            for flip in [1, 0x80, 0xff] {
                let mut changed = saved.clone();
                changed[at] ^= flip;
                assert!(matches!(sgd.load(&changed), Err(Error::InvalidState { .. })), "{at}");
            }
            assert!(matches!(sgd.load(&saved[..at]), Err(Error::InvalidState { .. })), "{at}");
        }
        assert_eq!(sgd.position(), 0);
        sgd.load(&saved).unwrap();
        assert_eq!(sgd.position(), 1);
    });
    for (bytes, says) in [
        (&[][..], "no saved state"),
        (b"a file of another kind", "no saved state"),
        (&saved[..10], "cut off after 10 bytes: take another copy"),
        (&saved[..saved.len() - 1], "cut off after"),
    ] {
        let text = refused(bytes, &model, schedule);
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn ranks_that_load_states_of_different_steps_get_an_error() {
    let schedule = Schedule::every(4);
    let errors = ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![vec![0.0; 3]];
        let mut sgd = build(communicator.clone(), &mut model, schedule);
        let mut states = vec![];
        for _ in 0..10 {
            sgd.step(&mut model).unwrap();
            states.push(sgd.save().unwrap());
        }
        drop(sgd);
        let mut sgd = build(communicator, &mut model, schedule);
        sgd.load(&states[if rank == 0 { 9 } else { 4 }]).unwrap();
        (0..4).find_map(|_| sgd.step(&mut model).err()).unwrap()
    });
    for error in errors {
        let says = "rank 1 averages after step 8 of every(4), rank 0 after step 12 of every(4)";
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[test]
fn states_are_fields_of_checkpoints() {
    use param_averager::SavedState;

    let mut model = vec![vec![1.0; 3]];
    let saved = state(&mut model, Schedule::every(8));
    let field = SavedState::try_from(saved.clone()).unwrap();
    let json = serde_json::to_string(&(1, &field)).unwrap();
    let (_, read): (i32, SavedState) = serde_json::from_str(&json).unwrap();
    assert_eq!(read, field);
    assert_eq!(Vec::from(read), saved);
    let mut numbers: Vec<u8> = saved.clone();
    numbers[30] ^= 1;
    let changed = serde_json::to_string(&numbers).unwrap();
    let error = serde_json::from_str::<SavedState>(&changed).unwrap_err();
    assert!(error.to_string().contains("have changed since they were saved"), "{error}");
    assert!(serde_json::from_str::<SavedState>("\"text\"").is_err());
    assert_eq!(SavedState::try_from(numbers), Err(StateError::Corrupt));
}
