//! Processes that join a world that has begun.

use std::collections::BTreeSet;
use std::time::Duration;

use rustix::process::Signal;

use test_support::process::{name, start, start_all, RankProcess};
use test_support::Random;
use test_support::{count, note, seed};

/// Starts one of the first ranks of the world `name`; `origin` determines its elements.
fn first(role: &str, name: &str, n: usize, origin: usize, more: &[(&str, String)]) -> RankProcess {
    let variables = [
        ("PA_TEST_RANK", origin.to_string()),
        ("PA_TEST_WORLD", n.to_string()),
        ("PA_TEST_NAME", name.to_owned()),
    ];
    start(role, &[&variables, more].concat())
}

/// Starts a joiner of the world `name`.
fn late(role: &str, name: &str, origin: usize, more: &[(&str, String)]) -> RankProcess {
    let variables = [
        ("PA_TEST_JOIN", "1".to_owned()),
        ("PA_TEST_ORIGIN", origin.to_string()),
        ("PA_TEST_NAME", name.to_owned()),
    ];
    start(role, &[&variables, more].concat())
}

pub fn processes_join_one_after_the_other_and_at_once() {
    for (begin, end) in [(1, 2), (3, 4), (2, 5)] {
        let (name, last) = (name(), [("PA_TEST_FINAL", end.to_string())]);
        let mut ranks: Vec<RankProcess> =
            (0..begin).map(|origin| first("survive", &name, begin, origin, &last)).collect();
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        ranks.extend((begin..end).map(|origin| late("survive", &name, origin, &last)));
        let mut done = vec![];
        for (rank, process) in ranks.iter_mut().enumerate() {
            assert_eq!(process.end(), Some(0), "rank {rank}: {:#?}", process.output);
            assert_eq!((process.said("failed").len(), process.said("recovered").len()), (0, 0));
            done.extend(process.said("done"));
        }
        let all: Vec<usize> = (0..end).collect();
        assert_eq!(done, vec![format!("{all:?}"); end]);
        // All first ranks have the same model after each admission; an admission may have failed.
        let admitted = ranks[0].said("admitted");
        for rank in &ranks[..begin] {
            assert_eq!(rank.said("admitted"), admitted);
        }
        let size = |line: &String| line.split(' ').next().unwrap().parse().unwrap();
        let sizes: BTreeSet<usize> =
            admitted.iter().map(size).filter(|&size| size > begin).collect();
        assert_eq!(sizes.len(), end - begin, "{admitted:?}");
    }
}

/// The joiner's NaNs reach no model; an abort handle from before the admission aborts the current
/// world.
pub fn a_process_joins_a_world_that_rejects_and_one_that_is_aborted() {
    for (variable, fails) in [("PA_TEST_REJECT", 0), ("PA_TEST_ABORT", 1)] {
        let (name, last) =
            (name(), [("PA_TEST_FINAL", "3".to_owned()), (variable, "1".to_owned())]);
        let mut ranks: Vec<RankProcess> =
            (0..2).map(|origin| first("survive", &name, 2, origin, &last)).collect();
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        ranks.push(late("survive", &name, 2, &last));
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            assert_eq!(rank.said("done"), ["[0, 1, 2]"]);
            let failed = rank.said("failed");
            // The joiner may have been joining at the time of the abort, and have joined again.
            let is_late = !rank.said("joined").is_empty();
            assert!(failed.len() == fails || is_late && failed.is_empty(), "{:#?}", rank.output);
            assert!(failed.iter().all(|error| error.contains("Aborted")), "{failed:?}");
        }
    }
}

pub fn a_process_joins_a_world_with_two_averagers() {
    for by_recover in [false, true] {
        let name = name();
        let mut more = vec![("PA_TEST_FINAL", "4".to_owned())];
        more.extend(by_recover.then(|| ("PA_TEST_BY_RECOVER", "1".to_owned())));
        let mut ranks: Vec<RankProcess> =
            (0..2).map(|origin| first("two_admit", &name, 2, origin, &more)).collect();
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        ranks.push(late("two_admit", &name, 2, &more));
        ranks[2].wait_for("ready");
        ranks.push(late("two_admit", &name, 3, &more));
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            assert_eq!(rank.said("two of"), ["4"]);
        }
    }
}

/// Joiners that are stopped for a while, or for ever.
pub fn joiners_may_be_stopped_at_any_time() {
    let rounds = count(1, 6);
    let mut chance = Random(seed());
    let name = name();
    let timeout = [("PA_TEST_TIMEOUT_MS", "3000".to_owned())];
    let mut ranks: Vec<RankProcess> =
        (0..3).map(|origin| first("survive", &name, 3, origin, &timeout)).collect();
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    for _ in 0..rounds {
        let mut joiner = late("survive", &name, 3, &timeout);
        std::thread::sleep(Duration::from_micros(chance.below(40_000)));
        joiner.signal(Signal::STOP);
        std::thread::sleep(Duration::from_millis(chance.below(5000)));
        if chance.below(2) == 0 {
            joiner.signal(Signal::CONT);
            std::thread::sleep(Duration::from_millis(chance.below(300)));
        }
        if joiner.child.try_wait().unwrap().is_none() {
            joiner.signal(Signal::KILL);
        }
        // The joiner was admitted and then lost; or it was excluded; or it was never admitted.
        let code = joiner.end();
        assert!([None, Some(3), Some(5)].contains(&code), "{code:?} {:#?}", joiner.output);
    }
    ranks.iter_mut().for_each(|rank| rank.ask_to_end());
    let codes: Vec<_> = ranks.iter_mut().map(RankProcess::end).collect();
    // On a busy machine a member may itself be late.
    assert!(
        codes.contains(&Some(0)) && codes.iter().all(|code| [Some(0), Some(5)].contains(code)),
        "{codes:?}"
    );
}

/// Joins, and kills of members and of joiners, in a random order.
pub fn joins_and_kills_at_any_time() {
    let rounds = count(4, 30);
    let mut chance = Random(seed());
    let (name, n) = (name(), 3);
    let mut ranks: Vec<(usize, RankProcess)> =
        (0..n).map(|origin| (origin, first("survive", &name, n, origin, &[]))).collect();
    ranks.iter_mut().for_each(|(_, rank)| drop(rank.wait_for("ready")));
    let (mut joins, mut kills) = (0, 0);
    for _ in 0..rounds {
        let origin = (0..16).find(|origin| ranks.iter().all(|(other, _)| other != origin)).unwrap();
        let mut rank = late("survive", &name, origin, &[]);
        if chance.below(2) == 0 {
            // it may have joined by then, or not
            std::thread::sleep(Duration::from_micros(chance.below(40_000)));
            rank.signal(Signal::KILL);
            assert_eq!(rank.end(), None, "{:#?}", rank.output);
        } else {
            if chance.below(2) == 0 && ranks.len() > 2 {
                std::thread::sleep(Duration::from_micros(chance.below(40_000)));
                let (_, mut dead) = ranks.remove(chance.below(ranks.len() as u64) as usize);
                dead.signal(Signal::KILL);
                assert_eq!(dead.end(), None, "{:#?}", dead.output);
                kills += 1;
            }
            rank.wait_for("joined");
            joins += 1;
            ranks.push((origin, rank));
        }
        while ranks.len() > 5 {
            let (_, mut dead) = ranks.remove(chance.below(ranks.len() as u64) as usize);
            dead.signal(Signal::KILL);
            assert_eq!(dead.end(), None, "{:#?}", dead.output);
            kills += 1;
        }
    }
    ranks.iter_mut().for_each(|(_, rank)| rank.ask_to_end());
    for (origin, rank) in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{origin}: {:#?}", rank.output);
    }
    note!("{joins} joins of {rounds}, {kills} kills besides: no element wrong, no hang");
}

/// The member that the joiner asks last is stopped for longer than a member may be silent.
pub fn a_process_joins_when_a_member_that_was_stopped_goes_on() {
    let (name, last) = (name(), [("PA_TEST_FINAL", "3".to_owned())]);
    let mut ranks: Vec<RankProcess> =
        (0..2).map(|origin| first("survive", &name, 2, origin, &last)).collect();
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks[1].signal(Signal::STOP);
    ranks.push(late("survive", &name, 2, &last));
    std::thread::sleep(Duration::from_secs(5));
    ranks[1].signal(Signal::CONT);
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        assert_eq!(rank.said("done"), ["[0, 1, 2]"]);
    }
}

pub fn refusal_names_the_reason_and_harms_no_member() {
    let soon = [("PA_TEST_MEET_MS", "1500".to_owned())];
    let mut nowhere = late("meet", &name(), 1, &soon);
    assert_eq!(nowhere.end(), Some(3));
    let error = &nowhere.said("error")[0];
    assert!(error.contains("no world of this name was found on this host within 1.5s"), "{error}");

    // No rank averages meanwhile.
    let soon = [("PA_TEST_MEET_MS", "6000".to_owned())];
    let name = name();
    let held = || -> Vec<RankProcess> {
        let held = [("PA_TEST_HOLD", "1".into())];
        let mut ranks: Vec<RankProcess> =
            (0..2).map(|origin| first("survive", &name, 2, origin, &held)).collect();
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        ranks
    };
    let mut pausing = held();
    let mut early = late("meet", &name, 2, &soon);
    assert_eq!(early.end(), Some(3));
    let error = &early.said("error")[0];
    assert!(error.contains("its 2 ranks admitted no process within 6s"), "{error}");
    pausing[1].signal(Signal::STOP);
    let mut silent = late("meet", &name, 2, &soon);
    assert_eq!(silent.end(), Some(3));
    let error = &silent.said("error")[0];
    assert!(error.contains("its rank 1 did not answer"), "{error}");
    pausing[1].signal(Signal::CONT);

    // Another model: the joiner finds out while it builds, and leaves. The members go on.
    let mut other = late("meet", &name, 2, &[]);
    pausing.iter_mut().for_each(|rank| rank.tell("go"));
    assert_eq!(other.end(), Some(3), "{:#?}", other.output);
    let error = &other.said("error")[0];
    assert!(error.contains("rank 2 builds its averager with"), "{error}");
    for rank in &mut pausing {
        assert!(rank.wait_for("admitted").starts_with("2 "), "{:#?}", rank.output);
        assert_eq!(rank.said("failed").len(), 0, "{:#?}", rank.output);
    }
    drop(pausing);

    // The world ends while a joiner waits.
    let pausing = held();
    let mut waiting = late("meet", &name, 2, &[("PA_TEST_PATIENCE_MS", "1500".into())]);
    let notice = waiting.wait_for("notice");
    pausing.iter().for_each(|rank| rank.signal(Signal::KILL));
    assert_eq!(waiting.end(), Some(3));
    let error = &waiting.said("error")[0];
    // On a busy machine it may have looked for the world for that long.
    let found_none = notice.contains("looks for") && error.contains("no world of this name");
    assert!(error.contains("the world has ended") || found_none, "{error}");
}

/// A joiner takes the place of one of four ranks, which has panicked.
pub fn training_goes_on_with_a_process_that_joins() {
    // Training goes on until the process has joined.
    let more = [("PA_TEST_STEP_US", "8000".to_owned()), ("PA_TEST_FINAL", "4".to_owned())];
    let trained = |ranks: &mut [RankProcess]| -> f64 {
        let mut said = vec![];
        for rank in ranks {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            said.extend(rank.said("trained"));
        }
        assert_eq!(said.len(), 4);
        assert!(said.iter().all(|line| *line == said[0] && line.starts_with("4 ")), "{said:?}");
        said[0].split(' ').nth(1).unwrap().parse().unwrap()
    };
    let undisturbed = trained(&mut start_all("train", 4, |_| vec![]));
    let name = name();
    let mut ranks: Vec<RankProcess> = (0..4)
        .map(|origin| {
            let dies = (origin == 1).then(|| ("PA_TEST_PANIC", "103".to_owned()));
            let more: Vec<_> = more.iter().cloned().chain(dies).collect();
            first("train", &name, 4, origin, &more)
        })
        .collect();
    assert_eq!(ranks[1].end(), Some(6));
    assert!(ranks[0].wait_for("failed").contains("PeerLost { rank: 1"));
    ranks[1] = late("train", &name, 4, &more);
    let disturbed = trained(&mut ranks);
    let began: u64 = ranks[1].said("begins at")[0].parse().unwrap();
    assert!(began > 103 && began.is_multiple_of(8), "{began}");
    note!(
        "loss {undisturbed} undisturbed, {disturbed} with a rank that was replaced at step {began}"
    );
    assert!(disturbed < 2.0 * undisturbed + 0.05 && undisturbed < 1.0, "{undisturbed} {disturbed}");
}

/// Failed attempts to join use up no resource of a world.
pub fn failed_attempts_by_the_thousand_use_up_no_ids() {
    let tries = count(4200, 4200);
    let name = name();
    let mut world: Vec<RankProcess> =
        (0..2).map(|origin| first("admit_one", &name, 2, origin, &[])).collect();
    world.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    let more = [("PA_TEST_TRIES", tries.to_string()), ("PA_TEST_TRY_MS", "12".to_owned())];
    let mut late = late("try", &name, 2, &more);
    let withdrawn: usize =
        late.wait_for_within("withdrawn", Duration::from_secs(300)).parse().unwrap();
    world.iter_mut().for_each(|rank| rank.ask_to_end());
    assert_eq!(late.end(), Some(0), "{:#?}", late.output);
    assert_eq!(late.said("joined"), ["3 0.5"]);
    for rank in &mut world {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
    assert!(withdrawn >= tries);
}

pub fn joiners_learn_the_world_id() {
    let name = name();
    let mut world = first("survive", &name, 1, 0, &[]);
    world.wait_for("ready");
    let mut late = late("hold", &name, 1, &[]);
    let world_id = late.wait_for("in");
    let process = format!(
        "the world {name:?} that process {} (started by process {}, ",
        world.child.id(),
        std::process::id()
    );
    assert!(world_id.starts_with(&process) && world_id.ends_with(" s ago"), "{world_id}");
}
