//! Coded averages in a world that loses ranks and gets new ones.

use std::time::Duration;

use test_support::process::{name, start, start_all, start_and_kill, RankProcess};
use test_support::{count, note, seed, Random};

/// Asserts that these ranks are done, with the same bits.
fn check_done(ranks: &mut [RankProcess], alive: &[usize]) {
    let mut done = vec![];
    for &rank in alive {
        assert_eq!(ranks[rank].end(), Some(0), "rank {rank}: {:#?}", ranks[rank].output);
        done.extend(ranks[rank].said("done"));
    }
    assert!(
        done.windows(2).all(|pair| pair[0] == pair[1]) && done.len() == alive.len(),
        "{done:?}"
    );
}

/// Random kills: the others go on from equal values, and every element is within its bound.
pub fn kills_leave_equal_values_within_their_bound() {
    kills(&[]);
}

/// The same where every other average is of a copy.
pub fn kills_in_averages_of_copies_leave_values_within_their_bound() {
    kills(&COPIES);
}

/// Variable of a role whose averages are of copies in part.
const COPIES: [(&str, &str); 1] = [("PA_TEST_COPIES", "1")];

fn kills(more: &[(&'static str, &str)]) {
    let more: Vec<_> = more.iter().map(|&(name, value)| (name, value.to_owned())).collect();
    let runs = count(4, 400);
    let mut chance = Random(seed());
    let mut kills = 0;
    for _ in 0..runs {
        let (n, pause) = (3 + chance.below(2) as usize, Duration::from_millis(20));
        let (mut ranks, alive) = start_and_kill("coded", n, &mut chance, pause, |_| more.clone());
        kills += n - alive.len();
        check_done(&mut ranks, &alive);
    }
    note!("{kills} kills in {runs} worlds");
}

/// Kills before the steps of a coded average, `stride` apart.
pub fn kill_at_any_step_of_a_coded_average() {
    kill_at_any_step(&[]);
}

/// The same of a copy: no tensor of a survivor has changed, which the role asserts.
pub fn kill_at_any_step_of_a_coded_average_of_a_copy() {
    kill_at_any_step(&COPIES);
}

fn kill_at_any_step(more: &[(&'static str, &str)]) {
    let (n, stride) = (3, (7 / count(1, 7)).max(1));
    let mut steps = 0;
    for dead in 0..n {
        for step in (1 + dead % stride..).step_by(stride) {
            let mut ranks = start_all("coded", n, |rank| {
                let dies = (rank == dead).then(|| ("PA_TEST_DIE_AT", step.to_string()));
                let last = ("PA_TEST_FINAL", (n - 1).to_string());
                let more = more.iter().map(|&(name, value)| (name, value.to_owned()));
                dies.into_iter().chain([last]).chain(more).collect()
            });
            if ranks[dead].end() == Some(4) {
                break; // there is no such step
            }
            let alive: Vec<usize> = (0..n).filter(|&rank| rank != dead).collect();
            check_done(&mut ranks, &alive);
            for &rank in &alive {
                let lost = ranks[rank].said("failed");
                assert!(lost.iter().any(|error| error.contains("PeerLost")), "{lost:?}");
            }
            steps += 1;
        }
    }
    assert!(steps >= 8 * n / stride, "only {steps} steps");
    note!("{n} ranks: killed at {steps} steps, {stride} apart");
}

/// A process that joins begins with the model of the others, and the first average with it is made
/// in full, which the role asserts.
pub fn a_joiner_counts_from_the_values_of_the_others() {
    let name = name();
    let rank = |origin: usize, more: &[(&'static str, String)]| {
        let own = [
            ("PA_TEST_NAME", name.clone()),
            ("PA_TEST_ORIGIN", origin.to_string()),
            ("PA_TEST_FINAL", "3".to_owned()),
        ];
        start("coded", &[&own[..], more].concat())
    };
    let member = |origin: usize| {
        rank(origin, &[("PA_TEST_RANK", origin.to_string()), ("PA_TEST_WORLD", "2".to_owned())])
    };
    let mut ranks: Vec<RankProcess> = (0..2).map(member).collect();
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    ranks.push(rank(2, &[("PA_TEST_JOIN", "1".to_owned())]));
    check_done(&mut ranks, &[0, 1, 2]);
}
