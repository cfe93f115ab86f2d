//! A user's own stage in a world of processes that loses ranks, gets new ones and refuses averages:
//! no element is wrong, no tensor changes after a veto, and the stage is told of each new layout.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use param_averager::*;
use rustix::process::Signal;

use test_support::process::{start_all, start_and_join, RankProcess};
use test_support::rank::{builder, is_late, join, number, say};
use test_support::{count, note, seed, Random};

const SIZES: [usize; 3] = [3001, 7, 1500];

/// Values of a rank in a round: small integers, so that their sums are exact.
fn values(origin: u64, round: u64) -> Vec<Vec<f32>> {
    let mut random = Random(round << 8 | origin);
    SIZES.map(|size| (0..size).map(|_| random.below(64) as f32).collect()).into()
}

/// Result of the stage for a mean.
fn staged(mean: f32) -> f32 {
    mean * 2.0 + 1.0
}

/// True if the stage of a rank refuses the average of a round.
fn refuses(origin: u64, round: u64) -> bool {
    Random(origin << 32 | round).below(6) == 0
}

fn members(mask: u64) -> impl Iterator<Item = u64> {
    (0..64).filter(move |origin| mask >> origin & 1 == 1)
}

fn result(mask: u64, round: u64) -> Vec<f32> {
    let all: Vec<Vec<f32>> = members(mask).map(|origin| values(origin, round).concat()).collect();
    let mean = |i| all.iter().map(|values: &Vec<f32>| values[i]).sum::<f32>() / all.len() as f32;
    (0..all[0].len()).map(|i| staged(mean(i))).collect()
}

/// Observations of a stage.
#[derive(Default)]
struct Seen {
    layouts: Vec<u32>,
    /// Elements of the shard at the last call.
    elements: usize,
    /// True if the first call was one that sets values.
    begins: Option<bool>,
}

/// Role: averages with a stage that refuses some rounds, recovers and admits, and checks every
/// element, until `PA_TEST_ROUNDS` averages have had `PA_TEST_FINAL` ranks.
pub fn stage() -> i32 {
    let origin = number("PA_TEST_ORIGIN").unwrap();
    let (current, seen) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Seen::default())));
    let (round_now, saw) = (current.clone(), seen.clone());
    let function = move |shard: &mut Shard<'_>| {
        let mut seen = saw.lock().unwrap();
        seen.elements = shard.len();
        seen.begins.get_or_insert(shard.sets_values());
        if seen.layouts.last() != Some(&shard.layout()) {
            seen.layouts.push(shard.layout());
        }
        if shard.sets_values() {
            return Ok(());
        }
        for part in shard.parts() {
            let Values::F32(values) = part.values else { return Err(Veto::new("no f32")) };
            values.iter_mut().for_each(|x| *x = staged(*x));
        }
        match refuses(origin, round_now.load(Relaxed)) {
            true => Err(Veto::new("this round")),
            false => Ok(()),
        }
    };
    let mut model = values(63, 0);
    let built = join().and_then(|world| builder(world).stage(function).build(&mut model));
    let mut averager = match built {
        Ok(averager) => averager,
        Err(error) => {
            say(&format!("error {error}"));
            return 3;
        }
    };
    let left = number("PA_TEST_FINAL").unwrap() as usize;
    let (mut round, mut good, mut mask, mut vetoes, mut untold) = (0, 0, None, 0, 0);
    say("ready");
    while good <= number("PA_TEST_ROUNDS").unwrap_or(8) {
        let mut one_round = || -> Result<Option<Report>> {
            let all = match mask {
                Some(all) => all,
                None => {
                    let mut numbers = [(1u64 << origin) as f64];
                    averager.all_reduce_scalars(&mut numbers, Reduction::Sum)?;
                    let mut farthest = [round as f64];
                    averager.all_reduce_scalars(&mut farthest, Reduction::Max)?;
                    round = farthest[0] as u64;
                    *mask.insert(numbers[0] as u64)
                }
            };
            round += 1;
            current.store(round, Relaxed);
            let own = values(origin, round);
            model = own.clone();
            let refused = members(all).any(|origin| refuses(origin, round));
            match averager.average(&mut model) {
                Ok(report) => {
                    assert!(!refused, "round {round} of {all:b} was refused, and averaged");
                    assert!(model.concat() == result(all, round), "round {round} of {all:b}");
                    let mut elements = [seen.lock().unwrap().elements as f64];
                    averager.all_reduce_scalars(&mut elements, Reduction::Sum)?;
                    let size: usize = SIZES.iter().sum();
                    assert_eq!(elements[0], size as f64, "elements of all shards");
                    if report.join_pending {
                        averager.admit_joiner(&mut model)?;
                        mask = None;
                    }
                    Ok(Some(report))
                }
                Err(error) => {
                    let states = [own.concat(), result(all, round)];
                    let is_whole = error.tensors() == TensorState::Unchanged;
                    for (i, x) in model.iter().flatten().enumerate() {
                        let is_new = !refused && !is_whole && *x == states[1][i];
                        assert!(is_new || *x == states[0][i], "{error}: element {i} is {x}");
                    }
                    match error {
                        Error::StageVetoed { ref reason, .. } => {
                            assert!(refused, "round {round} of {all:b}: {error}");
                            // Or a rank was killed that had to tell its reason.
                            let is_told = reason == "this round";
                            assert!(is_told || reason.contains("own error"), "{error}");
                            untold += u32::from(!is_told);
                            Ok(None)
                        }
                        error => Err(error),
                    }
                }
            }
        };
        match one_round() {
            Ok(Some(report)) => good = if report.world_size == left { good + 1 } else { 0 },
            Ok(None) => vetoes += 1,
            Err(error) if error.is_fatal() => {
                say(&format!("failed {error:?}"));
                match averager.recover(&mut model) {
                    Ok(()) => mask = None,
                    Err(Error::Excluded { .. }) => return 5,
                    Err(error) => panic!("recover: {error}"),
                }
            }
            Err(error) => panic!("{error}"),
        }
    }
    let seen = seen.lock().unwrap();
    say(&format!("layouts {}", seen.layouts.len()));
    say(&format!("vetoes {vetoes}"));
    assert!(
        untold <= 1,
        "{untold} of {vetoes} vetoes without a reason, in a world that lost a rank"
    );
    assert!(seen.layouts.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", seen.layouts);
    assert_eq!(seen.begins, Some(is_late()), "the first call of a joiner gives it its values");
    say(&format!("done {round}"));
    0
}

/// Role: steps with a stage that adds 1, until a rank is lost; then recovers.
pub fn stage_sgd() -> i32 {
    let calls = Arc::new(Mutex::new(vec![]));
    let saw = calls.clone();
    let function = move |shard: &mut Shard<'_>| {
        saw.lock().unwrap().push((shard.layout(), shard.sets_values()));
        let way = if shard.sets_values() { 0.0 } else { 1.0 };
        for part in shard.parts() {
            let Values::F32(values) = part.values else { return Err(Veto::new("no f32")) };
            values.iter_mut().for_each(|x| *x += way);
        }
        Ok(())
    };
    let mut model = vec![vec![0.0f32; 1000]];
    let averager = builder(join().unwrap()).stage(function).build(&mut model).unwrap();
    let mut sgd = LocalSgd::new(averager, Schedule::every(1));
    say("ready");
    let error = loop {
        match sgd.step(&mut model) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(error.is_fatal(), "{error}");
    calls.lock().unwrap().clear();
    sgd.recover(&mut model).unwrap();
    // The ranks' values are the same but for an average that not all of them have completed.
    let begin = model[0][0];
    assert!(model[0].iter().all(|x| *x == begin || (*x - begin).abs() <= 1.0));
    let recovered = calls.lock().unwrap().clone();
    let (layout, _) = *recovered.last().unwrap();
    assert_eq!(recovered, [(layout, true)], "{error}");
    let before: Vec<f32> = model.concat();
    sgd.step(&mut model).unwrap();
    assert!(model.concat().iter().zip(before).all(|(x, before)| *x == before + 1.0));
    assert_eq!(*calls.lock().unwrap(), [(layout, true), (layout, false)]);
    say("done");
    0
}

/// The average of `LocalSgd::recover` gives the ranks values to begin with, and its stage is told.
pub fn stages_are_told_of_a_recovery() {
    let mut ranks = start_all("stage_sgd", 3, |_| vec![]);
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks.remove(1).signal(Signal::KILL);
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("done").len(), 1, "{:#?}", rank.output);
    }
}

fn ended(rank: &mut RankProcess) -> (u64, u64) {
    assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    assert_eq!(rank.said("done").len(), 1, "{:#?}", rank.output);
    let number = |what| rank.said(what)[0].parse().unwrap();
    (number("layouts"), number("vetoes"))
}

/// Ranks are killed at any time, also while a stage refuses: those that are left recover, and their
/// stages get the elements of those that were lost.
pub fn vetoes_and_kills_at_any_time() {
    let (mut chance, mut kills, mut vetoes) = (Random(seed()), 0, 0);
    for _ in 0..count(5, 300) {
        let n = 2 + chance.below(3) as usize;
        let mut ranks = start_all("stage", n, |rank| {
            let left = [("PA_TEST_FINAL", (n - 1).to_string())];
            [&left[..], &[("PA_TEST_ORIGIN", rank.to_string())]].concat()
        });
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        std::thread::sleep(Duration::from_micros(chance.below(20_000)));
        ranks.swap_remove(chance.below(n as u64) as usize).signal(Signal::KILL);
        kills += 1;
        for rank in &mut ranks {
            let (layouts, refused) = ended(rank);
            // One, if no average had summed before the kill.
            assert!((1..=2).contains(&layouts), "{:#?}", rank.output);
            vetoes += refused;
        }
    }
    assert!(vetoes > 0);
    note!("{kills} kills, {vetoes} vetoes: no wrong element");
}

/// A process joins: its stage and those of the members get parts of a new layout, and it is called
/// with the values that all ranks begin with.
pub fn stages_are_told_of_a_process_that_joins() {
    let mut ranks = start_and_join("stage", 2, &[("PA_TEST_FINAL", "3".to_owned())]);
    let layouts: Vec<u64> = ranks.iter_mut().map(|rank| ended(rank).0).collect();
    assert_eq!(layouts, [2, 2, 1]);
}
