//! Programs as trainers write them: the default start, a joiner, uneven shards, and scalars.

use std::time::{Duration, Instant};

use param_averager::{
    Action, Algorithm, Communicator, Error, LocalSgd, ParamAverager, Phase, Reduction, Report,
    Schedule, Start, TensorState,
};
use test_support::process::{start_all, start_and_join};
use test_support::rank::{die, is_late, join, number, say};
use test_support::{fnv1a, Random};

/// Trains until a process has joined, meets, and ends with an uneven number of steps. All ranks run
/// this one program.
pub fn first_day() -> i32 {
    let communicator = join().unwrap();
    let origin = number("PA_TEST_ORIGIN").unwrap() as f64;
    let build = |communicator, model: &mut Vec<f64>| {
        let builder = ParamAverager::builder(communicator).timeout(Duration::from_secs(60));
        builder.build(model).unwrap()
    };
    let mut model = vec![origin; 1000];
    let averager = build(communicator, &mut model);
    say(&format!("starts {}", model[0]));
    let mut sgd = LocalSgd::new(averager, Schedule::every(2)).at(if is_late() { 7 } else { 100 });
    if !is_late() {
        say("ready");
        loop {
            std::thread::sleep(Duration::from_millis(2));
            model.iter_mut().for_each(|x| *x += 1.0);
            if let Action::Admitted { .. } = sgd.step(&mut model).unwrap() {
                break;
            }
        }
    }
    say(&format!("at {} {}", sgd.position(), model[0]));

    let mut sums = [1.0, sgd.rank() as f64];
    sgd.averager().all_reduce_scalars(&mut sums, Reduction::Sum).unwrap();
    sgd.averager().barrier().unwrap();
    say(&format!("sums {sums:?}"));
    // A model that none had before begins at rank 0's values, on the rank that joined, too.
    let mut other = vec![10.0 + sgd.rank() as f64; 10];
    let communicator = sgd.averager().communicator().clone();
    let _other = build(communicator, &mut other);
    say(&format!("other {}", other[9]));

    let (begin, rank) = (sgd.position(), sgd.rank() as u64);
    for _ in 0..3 + rank {
        model.iter_mut().for_each(|x| *x += 1.0);
        sgd.step_weighted(&mut model, 1.0).unwrap();
    }
    sgd.done(&mut model).unwrap();
    say(&format!("done {} {}", sgd.position() - begin, model[0]));
    0
}

pub fn every_process_begins_with_one_model_and_a_joiner_with_the_one_that_is_trained() {
    let mut ranks = start_and_join("first_day", 2, &[]);
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
    assert_eq!(ranks[0].said("starts"), ["0"]);
    assert_eq!(ranks[1].said("starts"), ["0"]); // not its own 1
    let at = ranks[0].said("at");
    let [position, value] = [0, 1].map(|part| at[0].split(' ').nth(part).unwrap().to_owned());
    assert_eq!(ranks[2].said("starts"), [value.as_str()]);
    // All have made the same steps from rank 0's model on, one each.
    assert_eq!(position.parse::<u64>().unwrap(), 100 + value.parse::<u64>().unwrap());
    // 3, 4 and 5 steps. After the 2nd all are at 2; after the 4th, ranks with 1, 2 and 2 samples
    // have made 1, 2 and 2 further steps, 1.8 in the mean; and one rank makes the last step.
    let done = ranks[0].said("done");
    let end: Vec<f64> = done[0].split(' ').map(|number| number.parse().unwrap()).collect();
    let expected = value.parse::<f64>().unwrap() + 2.0 + 1.8 + 1.0;
    assert!(end[0] == 5.0 && (end[1] - expected).abs() < 1e-9, "{done:?}, not {expected}");
    for rank in &ranks {
        assert_eq!(rank.said("at"), at);
        assert_eq!(rank.said("sums"), ["[3.0, 3.0]"]);
        assert_eq!(rank.said("other"), ["10"]);
        assert_eq!(rank.said("done"), done);
    }
}

/// Is done at once on rank 0, dies after some steps on rank 1, and goes on elsewhere.
pub fn done_beside_a_death() -> i32 {
    let communicator = join().unwrap();
    let first = communicator.rank();
    let mut model = vec![first as f64; 1000];
    let builder = ParamAverager::builder(communicator).timeout(Duration::from_secs(60));
    let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), Schedule::every(2));
    for step in 0..if first == 0 { 0 } else { 20 } {
        std::thread::sleep(Duration::from_millis(5));
        if (first, step) == (1, 7) {
            die();
        }
        if let Err(error) = sgd.step(&mut model) {
            say(&format!("lost {error}"));
            sgd.recover(&mut model).unwrap();
        }
    }
    while let Err(error) = sgd.done(&mut model) {
        say(&format!("lost {error}"));
        assert!(error.is_fatal());
        sgd.recover(&mut model).unwrap();
    }
    say(&format!("done {} of {} at {}: {}", first, sgd.world_size(), sgd.position(), model[0]));
    0
}

pub fn a_rank_that_is_done_survives_the_death_of_a_peer() {
    let mut ranks = start_all("done_beside_a_death", 3, |_| vec![]);
    for (rank, process) in ranks.iter_mut().enumerate() {
        let expected = if rank == 1 { None } else { Some(0) };
        assert_eq!(process.end(), expected, "{rank}: {:#?}", process.output);
    }
    for rank in [0, 2] {
        let lost = ranks[rank].said("lost");
        assert_eq!(lost.len(), 1, "{lost:?}");
        assert!(lost[0].contains("rank 1 has left the world"), "{lost:?}");
        assert_eq!(ranks[rank].said("done"), [format!("{rank} of 2 at 20: 0")]);
    }
}

/// Waits at a barrier for rank 1, which dies.
pub fn barrier_beside_a_death() -> i32 {
    let communicator = join().unwrap();
    let rank = communicator.rank();
    let mut model = vec![rank as f64; 1000];
    let builder = ParamAverager::builder(communicator).timeout(Duration::from_secs(60));
    let mut averager = builder.build(&mut model).unwrap();
    averager.barrier().unwrap();
    if rank == 1 {
        std::thread::sleep(Duration::from_millis(200));
        die();
    }
    let start = Instant::now();
    let error = averager.all_reduce_scalars(&mut [1.0], Reduction::Max).unwrap_err();
    let expected = Error::PeerLost { rank: 1, phase: Phase::Exchange, committed: false };
    assert_eq!((&error, error.tensors()), (&expected, TensorState::Unchanged));
    assert!(start.elapsed() < Duration::from_secs(50), "the timeout of 60 s, not the death");
    let poisoned = averager.barrier().unwrap_err();
    assert!(matches!(poisoned, Error::Poisoned { .. }), "{poisoned}");
    averager.recover(&mut model).unwrap();
    let mut ranks = [1.0];
    averager.all_reduce_scalars(&mut ranks, Reduction::Sum).unwrap();
    averager.average(&mut model).unwrap();
    say(&format!("ranks {}: {}", ranks[0], model[0]));
    0
}

pub fn a_barrier_ends_when_a_rank_dies_and_the_others_recover() {
    let mut ranks = start_all("barrier_beside_a_death", 3, |_| vec![]);
    for (rank, process) in ranks.iter_mut().enumerate() {
        let expected = if rank == 1 { None } else { Some(0) };
        assert_eq!(process.end(), expected, "{rank}: {:#?}", process.output);
    }
    for rank in [0, 2] {
        assert_eq!(ranks[rank].said("ranks"), ["2: 0"]);
    }
}

/// Digest of the mean of numbers that are the same in every run.
fn mean(communicator: Communicator, reproducible: bool) -> (u64, Report) {
    let rank = communicator.rank() as u64;
    let mut random = Random(rank);
    let mut value = || (random.next_u64() as f64 / 1e18).sin() as f32;
    let mut model: Vec<f32> = (0..200_000).map(|_| value()).collect();
    let mut averager =
        test_support::options(communicator).reproducible(reproducible).build(&mut model).unwrap();
    let report = averager.average(&mut model).unwrap();
    (fnv1a(model.iter().map(|x| u64::from(x.to_bits()))), report)
}

/// Averages on one core, where the default is one channel.
pub fn mean_on_one_core() -> i32 {
    let mut one = rustix::thread::CpuSet::new();
    one.set(0);
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    let (digest, report) = mean(join().unwrap(), true);
    assert_eq!(report.algorithm, Algorithm::Ring);
    say(&format!("mean {digest} {} {}", report.channels, report.chunk_bytes));
    0
}

pub fn reproducible_averages_have_the_same_bits_on_threads_and_processes() {
    let threads = test_support::ranks(3, |communicator| mean(communicator, true));
    let (digest, report) = threads[0].clone();
    let expected = format!("{digest} {} {}", report.channels, report.chunk_bytes);
    let mut ranks = start_all("mean_on_one_core", 3, |_| vec![]);
    for process in &mut ranks {
        assert_eq!(process.end(), Some(0), "{:#?}", process.output);
        assert_eq!(process.said("mean"), [expected.as_str()]);
    }
    // By default, threads of one process average directly, which sums in another order.
    let direct = test_support::ranks(3, |communicator| mean(communicator, false));
    assert_eq!((direct[0].1.algorithm, direct[0].1.chunk_bytes), (Algorithm::Direct, 0));
    assert_ne!(direct[0].0, digest);
}

/// Starts from rank 2, which dies; the others recover, also to one rank.
pub fn starts_from_a_rank_that_dies() -> i32 {
    let communicator = join().unwrap();
    let rank = communicator.rank();
    let mut model = vec![rank as f64; 1000];
    let builder = ParamAverager::builder(communicator).timeout(Duration::from_secs(60));
    let averager = builder.start_from(Start::Rank(2)).build(&mut model).unwrap();
    say(&format!("starts {}", model[0]));
    let mut sgd = LocalSgd::new(averager, Schedule::every(1));
    let until = [usize::MAX, 6, 3][rank];
    for step in 0.. {
        if step == until {
            die();
        }
        model.iter_mut().for_each(|x| *x += 1.0);
        if let Err(error) = sgd.step(&mut model) {
            assert!(error.is_fatal(), "{error}");
            sgd.recover(&mut model).unwrap();
        }
        if sgd.world_size() == 1 {
            break;
        }
    }
    say("alone");
    0
}

pub fn a_rank_that_all_began_from_may_die() {
    let mut ranks = start_all("starts_from_a_rank_that_dies", 3, |_| vec![]);
    for (rank, process) in ranks.iter_mut().enumerate() {
        let expected = if rank == 0 { Some(0) } else { None };
        assert_eq!(process.end(), expected, "{rank}: {:#?}", process.output);
        assert_eq!(process.said("starts"), ["2"]);
    }
    assert_eq!(ranks[0].said("alone").len(), 1);
}

/// Recovers an averager, builds another one in the same view, and uses the barriers of both.
pub fn two_averagers_of_one_view() -> i32 {
    let communicator = join().unwrap();
    let rank = communicator.rank();
    let mut model = vec![rank as f64; 1000];
    let build = |communicator, model: &mut Vec<f64>| {
        let builder = ParamAverager::builder(communicator).timeout(Duration::from_secs(20));
        builder.build(model).unwrap()
    };
    let mut first = build(communicator, &mut model);
    if rank == 2 {
        die();
    }
    first.barrier().unwrap_err();
    first.recover(&mut model).unwrap();
    let mut second = build(first.communicator().clone(), &mut vec![0.0; 10]);
    for round in 0..300 {
        for (which, averager) in [&mut first, &mut second].into_iter().enumerate() {
            let mut sum = [round as f64 + 1000.0 * which as f64];
            averager.all_reduce_scalars(&mut sum, Reduction::Sum).unwrap();
            assert_eq!(sum, [2.0 * (round as f64 + 1000.0 * which as f64)]);
        }
    }
    say("exchanged");
    0
}

pub fn averagers_that_were_built_again_exchange_on_their_own() {
    let mut ranks = start_all("two_averagers_of_one_view", 3, |_| vec![]);
    for (rank, process) in ranks.iter_mut().enumerate() {
        let expected = if rank == 2 { None } else { Some(0) };
        assert_eq!(process.end(), expected, "{rank}: {:#?}", process.output);
    }
}

/// The last rank reaches each barrier when the others look for ranks that have left, and then
/// leaves.
pub fn last_barriers() -> i32 {
    let communicator = join().unwrap();
    let rank = communicator.rank();
    for round in 0..number("PA_TEST_ROUNDS").unwrap() {
        let mut model = vec![0.0f32; 10];
        let builder = ParamAverager::builder(communicator.clone());
        let builder = builder.timeout(Duration::from_secs(20)).channels(1);
        let mut averager = builder.build(&mut model).unwrap();
        if rank == 0 {
            std::thread::sleep(Duration::from_micros(48_000 + round * 4_000 / 40 % 4_000));
        }
        if let Err(error) = averager.barrier() {
            say(&format!("failed in round {round}: {error}"));
            return 1;
        }
    }
    0
}

pub fn a_rank_that_leaves_after_a_barrier_is_not_lost() {
    let rounds = test_support::count(40, 400).to_string();
    let mut ranks = start_all("last_barriers", 4, |_| vec![("PA_TEST_ROUNDS", rounds.clone())]);
    for (rank, process) in ranks.iter_mut().enumerate() {
        assert_eq!(process.end(), Some(0), "{rank}: {:#?}", process.output);
    }
}
