//! Ranks that are killed or stopped, at every step and at any time: no rank hangs, no element is
//! wrong, the others go on.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use test_support::process::{check_survivors, name, start, start_all, start_and_kill, RankProcess};
use test_support::rank::now_us;
use test_support::{count, note, seed, Random};

/// Kills every rank before every `stride`th step, with another first step for each rank.
/// `all_or_nothing`: 1 or 0.
fn die_at_every_step(n: usize, all_or_nothing: u32, stride: usize) {
    let mut steps = 0;
    for dead in 0..n {
        for step in (1 + dead % stride..).step_by(stride) {
            let mut ranks = start_all("survive", n, |rank| {
                let mut variables = vec![
                    ("PA_TEST_FINAL", (n - 1).to_string()),
                    ("PA_TEST_ALL_OR_NOTHING", all_or_nothing.to_string()),
                ];
                if rank == dead {
                    variables.push(("PA_TEST_DIE_AT", step.to_string()));
                }
                variables
            });
            let code = ranks[dead].end();
            if code == Some(4) {
                break; // there is no such step
            }
            assert_eq!(code, None, "{:#?}", ranks[dead].output);
            check_survivors(&mut ranks, dead);
            steps += 1;
        }
    }
    assert!(steps >= 8 * n / stride, "only {steps} steps");
    note!("{n} ranks: killed at {steps} steps, {stride} apart");
}

pub fn kill_at_any_step_of_3_ranks() {
    die_at_every_step(3, 1, (7 / count(1, 7)).max(1));
}

pub fn kill_at_some_steps_of_4_and_8_ranks() {
    let stride = (9 / count(1, 1)).max(1);
    die_at_every_step(4, 1, stride);
    die_at_every_step(8, 1, stride);
}

pub fn kill_at_any_step_of_2_ranks() {
    let stride = (5 / count(1, 5)).max(1);
    die_at_every_step(2, 1, stride);
    die_at_every_step(2, 0, stride);
}

/// Meeting, building, averaging, recovering and joining with a timeout that no clock can add to.
pub fn longest_timeouts_work() {
    let timeouts =
        [("PA_TEST_TIMEOUT_MS", "longest".to_owned()), ("PA_TEST_MEET_MS", "longest".to_owned())];
    let name = name();
    let start = |rank: usize, more: &[(&'static str, String)]| {
        let mut variables = vec![("PA_TEST_NAME", name.clone())];
        variables.extend_from_slice(&timeouts);
        variables.extend_from_slice(more);
        variables.push(("PA_TEST_ORIGIN", rank.to_string()));
        start("survive", &variables)
    };
    let member = |rank: usize| {
        start(rank, &[("PA_TEST_RANK", rank.to_string()), ("PA_TEST_WORLD", "3".to_owned())])
    };
    let mut ranks: Vec<RankProcess> = (0..3).map(member).collect();
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks[1].signal(Signal::KILL);
    ranks[0].wait_for("recovered");
    ranks[1] = start(3, &[("PA_TEST_JOIN", "1".to_owned())]);
    assert_eq!(ranks[1].wait_for("joined"), "[0, 2]");
    assert_eq!(ranks[0].wait_for("admitted"), ranks[2].wait_for("admitted"));
    ranks[1].wait_for("ready");
    for rank in &mut ranks {
        rank.ask_to_end();
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
}

/// Times from the kill to the error and from the error to the new world, of the slowest survivor.
pub fn kill_is_noticed_at_once() {
    let n = 4;
    let mut ranks = start_all("survive", n, |_| vec![("PA_TEST_FINAL", (n - 1).to_string())]);
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    std::thread::sleep(Duration::from_millis(50));
    let killed = now_us();
    ranks[0].signal(Signal::KILL);
    check_survivors(&mut ranks, 0);
    let first = |rank: &RankProcess| -> u128 {
        rank.said("failed")[0].split(' ').next().unwrap().parse().unwrap()
    };
    let noticed = ranks[1..].iter().map(first).max().unwrap() - killed;
    let recovered = |rank: &RankProcess| -> u128 {
        rank.said("recovered")[0].split(' ').next().unwrap().parse().unwrap()
    };
    let recovered = ranks[1..].iter().map(recovered).max().unwrap();
    note!("from the kill to the last error {noticed} us; recovery {recovered} us");
    // benches/processes.rs measures it
    assert!(noticed < 20_000_000, "the timeout, not the death, ended it");
}

/// Starts n ranks, of which `pauses` pauses before every average while the others wait for it.
fn start_with_a_pause(
    n: usize,
    pauses: Option<usize>,
    pause: Duration,
    left: usize,
    timeout: Duration,
) -> Vec<RankProcess> {
    let mut ranks = start_all("survive", n, |rank| {
        let mut variables = vec![
            ("PA_TEST_FINAL", left.to_string()),
            ("PA_TEST_TIMEOUT_MS", timeout.as_millis().to_string()),
        ];
        if pauses == Some(rank) {
            variables.push(("PA_TEST_PAUSE_MS", pause.as_millis().to_string()));
        }
        variables
    });
    match pauses {
        Some(rank) => drop(ranks[rank].wait_for("pausing")),
        None => ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready"))),
    }
    ranks
}

/// Timeout of tests in which it passes: longer than a busy machine delays a rank.
const LATE: Duration = Duration::from_secs(10);

/// Stops a rank before an average, while it waits for a pausing rank, or while all average.
fn stop_one(n: usize, pauses: Option<usize>, stopped: usize) {
    let pause = Duration::from_millis(600);
    let mut ranks = start_with_a_pause(n, pauses, pause, n - 1, LATE);
    std::thread::sleep(Duration::from_millis(if pauses.is_some() { 150 } else { 20 }));
    ranks[stopped].signal(Signal::STOP);
    let others: Vec<usize> = (0..n).filter(|&rank| rank != stopped).collect();
    for &rank in &others {
        assert_eq!(ranks[rank].end(), Some(0), "{:#?}", ranks[rank].output);
        let failed = ranks[rank].said("failed");
        let late = format!("Timeout {{ rank: {stopped},");
        assert!(
            failed[0].contains(&late),
            "{n} ranks, {pauses:?} pauses, {stopped} is stopped: {failed:?}"
        );
        assert_eq!(ranks[rank].said("done"), [format!("{others:?}")]);
    }
    ranks[stopped].signal(Signal::CONT);
    assert_eq!(ranks[stopped].end(), Some(5), "{:#?}", ranks[stopped].output);
}

pub fn stopped_rank_is_late_and_excluded() {
    let of_3 = [(Some(1), 1), (Some(0), 1), (Some(2), 1), (None, 2)];
    let of_4 = [(Some(3), 3), (Some(0), 2), (Some(2), 0), (None, 1)];
    std::thread::scope(|scope| {
        for (n, stops) in [(3, of_3), (4, of_4)] {
            for (pauses, stopped) in stops {
                scope.spawn(move || stop_one(n, pauses, stopped));
            }
        }
    });
}

/// Kills a rank while the others wait for a stopped one: they report the kill long before the
/// timeout of the stopped rank.
fn kill_beside_a_stop(n: usize, stopped: usize, dead: usize) {
    const TIMEOUT: Duration = Duration::from_secs(20);
    // Stopped in its pause.
    let mut ranks = start_with_a_pause(n, Some(stopped), LATE, n - 2, TIMEOUT);
    ranks[stopped].signal(Signal::STOP);
    std::thread::sleep(Duration::from_millis(100)); // on most machines the others wait by now
    let killed = now_us();
    ranks[dead].signal(Signal::KILL);
    let others: Vec<usize> = (0..n).filter(|&rank| rank != stopped && rank != dead).collect();
    let mut noticed = 0;
    for &rank in &others {
        assert_eq!(ranks[rank].end(), Some(0), "{:#?}", ranks[rank].output);
        let failed = ranks[rank].said("failed");
        let lost = format!("PeerLost {{ rank: {dead}, phase: Meet, committed: false");
        assert!(
            failed[0].contains(&lost),
            "{n} ranks, {stopped} is stopped, {dead} killed: {failed:?}"
        );
        noticed =
            noticed.max(failed[0].split(' ').next().unwrap().parse::<u128>().unwrap() - killed);
        assert_eq!(ranks[rank].said("done"), [format!("{others:?}")]);
    }
    note!(
        "{n} ranks, {stopped} is stopped, {dead} killed: the others report it after {noticed} us"
    );
    assert!(
        noticed < TIMEOUT.as_micros() * 3 / 4,
        "the stop, not the death, ended it: {noticed} us"
    );
    ranks[stopped].signal(Signal::CONT);
    assert_eq!(ranks[stopped].end(), Some(5), "{:#?}", ranks[stopped].output);
}

pub fn kill_is_noticed_at_once_beside_a_stopped_rank() {
    std::thread::scope(|scope| {
        for (n, stopped, dead) in [(3, 0, 2), (3, 1, 0), (4, 0, 3), (4, 2, 0)] {
            scope.spawn(move || kill_beside_a_stop(n, stopped, dead));
        }
    });
}

/// Kills of several ranks at any time, the second often while the others recover from the first.
pub fn kills_at_any_time() {
    let runs = count(10, 200);
    let mut chance = Random(seed());
    let start = Instant::now();
    let mut kills = 0;
    for _ in 0..runs {
        let (n, pause) = (3 + chance.below(2) as usize, Duration::from_millis(20));
        let (mut ranks, alive) = start_and_kill("survive", n, &mut chance, pause, |_| vec![]);
        kills += n - alive.len();
        for &rank in &alive {
            assert_eq!(ranks[rank].end(), Some(0), "rank {rank}: {:#?}", ranks[rank].output);
            assert_eq!(ranks[rank].said("done"), [format!("{alive:?}")]);
        }
    }
    note!("{kills} kills in {runs} worlds, {:?}: no element wrong, no hang", start.elapsed());
}

/// Ranks that are stopped for about as long as the timeout, and some of them killed. A late rank is
/// excluded, or is in time for the recovery, or for the average.
pub fn stops_and_kills_at_any_time() {
    let runs = count(1, 6);
    let mut chance = Random(seed());
    let (mut stops, mut left_out) = (0, 0);
    let start = Instant::now();
    for _ in 0..runs {
        let n = 3 + chance.below(2) as usize;
        let mut ranks = start_all("survive", n, |_| vec![("PA_TEST_TIMEOUT_MS", "400".to_owned())]);
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        let mut dead = vec![false; n];
        for _ in 0..3 {
            std::thread::sleep(Duration::from_micros(chance.below(20_000)));
            let one = chance.below(n as u64) as usize;
            if dead[one] || ranks[one].child.try_wait().unwrap().is_some() {
                continue;
            }
            ranks[one].signal(Signal::STOP);
            stops += 1;
            std::thread::sleep(Duration::from_millis(chance.below(1200)));
            dead[one] = chance.below(4) == 0;
            ranks[one].signal(if dead[one] { Signal::KILL } else { Signal::CONT });
        }
        ranks.iter_mut().for_each(|rank| rank.ask_to_end());
        for (rank, process) in ranks.iter_mut().enumerate() {
            match process.end() {
                None => assert!(dead[rank], "{:#?}", process.output),
                Some(0) => assert_eq!(process.said("ended").len(), 1),
                Some(5) => left_out += 1,
                code => panic!("rank {rank} ended with {code:?}: {:#?}", process.output),
            }
        }
    }
    note!(
        "{stops} stops in {runs} worlds, {left_out} ranks left out, {:?}: no element wrong, no \
         hang",
        start.elapsed()
    );
}

pub fn training_goes_on_without_a_rank_that_panics() {
    let loss = |ranks: &mut Vec<RankProcess>, but: Option<usize>| -> f64 {
        let mut said = vec![];
        for (rank, process) in ranks.iter_mut().enumerate() {
            let expected = if but == Some(rank) { 6 } else { 0 };
            assert_eq!(process.end(), Some(expected), "rank {rank}: {:#?}", process.output);
            said.extend(process.said("trained"));
        }
        assert!(said.windows(2).all(|pair| pair[0] == pair[1]), "{said:?}");
        assert_eq!(said.len(), if but.is_some() { 3 } else { 4 });
        said[0].split(' ').nth(1).unwrap().parse().unwrap()
    };
    let undisturbed = loss(&mut start_all("train", 4, |_| vec![]), None);
    let panics = |rank| if rank == 1 { vec![("PA_TEST_PANIC", "203".to_owned())] } else { vec![] };
    let disturbed = loss(&mut start_all("train", 4, panics), Some(1));
    // Noise of variance σ² leaves a loss of about σ² · lr / (2 n) an element, so a quarter or a
    // third of σ² · lr / 2.
    note!("loss {undisturbed} undisturbed, {disturbed} with 3 of 4 ranks");
    assert!(disturbed < 2.0 * undisturbed + 0.05 && undisturbed < 1.0, "{undisturbed} {disturbed}");
}

/// Ranks are killed while they still wait for one another, and while they average.
pub fn killed_world_leaves_no_socket_and_no_file() {
    let name = name();
    let sockets = || std::fs::read_to_string("/proc/net/unix").unwrap().matches(&name).count();
    let files = || -> Vec<_> {
        let all = ["/dev/shm", "/tmp"]
            .into_iter()
            .filter_map(|folder| std::fs::read_dir(folder).ok())
            .flatten();
        all.map(|file| file.unwrap().file_name())
            .filter(|file| file.to_string_lossy().contains(&name))
            .collect()
    };
    let rank = |rank: usize| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "3".into()),
            ("PA_TEST_NAME", name.clone()),
        ];
        start("survive", &variables)
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut waiting = [rank(0), rank(1)];
    while sockets() == 0 {
        assert!(Instant::now() < deadline, "rank 0 does not listen");
        std::thread::sleep(Duration::from_millis(1));
    }
    waiting.iter_mut().for_each(|rank| rank.signal(Signal::KILL));
    waiting.iter_mut().for_each(|rank| assert_eq!(rank.end(), None));
    assert_eq!((sockets(), files()), (0, vec![]));
    // The name is free again at once.
    let mut ranks: Vec<RankProcess> = (0..3).map(rank).collect();
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks.iter().for_each(|rank| rank.signal(Signal::KILL));
    ranks.iter_mut().for_each(|rank| assert_eq!(rank.end(), None));
    assert_eq!((sockets(), files()), (0, vec![]));
}
