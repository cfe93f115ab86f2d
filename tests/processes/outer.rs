//! Outer optimizers in a world that loses ranks and gets new ones.

use std::time::Duration;

use test_support::process::{check_velocity, start_and_join, start_and_kill};
use test_support::{count, note, seed, Random};

/// Random kills: every element after each step is that of one history of steps, the same for all
/// elements, but for those that a lost rank had.
pub fn kills_advance_the_velocity_of_all_ranks_or_of_none() {
    let runs = count(6, 400);
    let mut chance = Random(seed());
    let (mut kills, mut lost_most) = (0, 0.0f64);
    for _ in 0..runs {
        let (n, pause) = (3 + chance.below(2) as usize, Duration::from_millis(20));
        let (mut ranks, alive) = start_and_kill("outer", n, &mut chance, pause, |_| vec![]);
        kills += n - alive.len();
        lost_most = lost_most.max(check_velocity(&mut ranks, &alive));
    }
    assert!(lost_most > 0.2, "a third of the state at least is lost with one of three ranks");
    note!("{kills} kills in {runs} worlds: every element of one history");
}

/// The same while averages of copies are under way: what has changed is in the parameters of all
/// ranks that are left, or of none, and so is the step that was made.
pub fn kills_while_averages_are_under_way_lose_no_step() {
    let runs = count(10, 500);
    let mut chance = Random(seed());
    let mut kills = 0;
    for _ in 0..runs {
        let (n, pause) = (3 + chance.below(2) as usize, Duration::from_millis(20));
        let train = chance.below(2000).to_string();
        let variables =
            |_| vec![("PA_TEST_OVERLAP", "1".to_owned()), ("PA_TEST_TRAIN_US", train.clone())];
        let (mut ranks, alive) = start_and_kill("outer", n, &mut chance, pause, variables);
        kills += n - alive.len();
        check_velocity(&mut ranks, &alive);
    }
    note!("{kills} kills in {runs} worlds: every element of one history");
}

/// The same where states outlive their ranks: nothing is lost, unless a rank and the next one of
/// the ring are.
pub fn kills_lose_nothing_of_shared_states() {
    let runs = count(10, 800);
    let mut chance = Random(seed());
    let (mut kills, mut of_neighbours) = (0, 0);
    for run in 0..runs {
        let (n, pause) = (3 + chance.below(2) as usize, Duration::from_millis(20));
        let all = [("PA_TEST_SHARES", "1".to_owned()), ("PA_TEST_OVERLAP", "1".to_owned())];
        let variables = |_| all[..1 + run % 2].to_vec();
        let (mut ranks, alive) = start_and_kill("outer", n, &mut chance, pause, variables);
        kills += n - alive.len();
        let lost = check_velocity(&mut ranks, &alive);
        let is_dead = |rank: usize| !alive.contains(&(rank % n));
        match (0..n).any(|rank| is_dead(rank) && is_dead(rank + 1)) {
            true => of_neighbours += 1,
            false => assert_eq!(lost, 0.0, "{alive:?} of {n}"),
        }
    }
    note!("{kills} kills in {runs} worlds, {of_neighbours} of two neighbours: nothing was lost");
}

/// A process that joins gets its share of the velocity, and nothing is lost.
pub fn a_joiner_takes_over_its_shard_of_the_velocity() {
    joins(&[]);
}

/// The same where averages are of copies.
pub fn a_process_joins_ranks_whose_averages_are_under_way() {
    joins(&[("PA_TEST_OVERLAP", "1".to_owned())]);
}

/// The same where states outlive their ranks.
pub fn a_process_joins_ranks_that_share_their_states() {
    joins(&[("PA_TEST_SHARES", "1".to_owned())]);
}

fn joins(more: &[(&'static str, String)]) {
    let own = [("PA_TEST_FINAL", "3".to_owned()), ("PA_TEST_ROUNDS", "5".to_owned())];
    let mut ranks = start_and_join("outer", 2, &[&own[..], more].concat());
    let mut done = vec![];
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        done.extend(rank.said("done"));
        assert!(rank.said("lost").iter().all(|lost| lost == "0"), "{:#?}", rank.output);
    }
    assert!(done.windows(2).all(|pair| pair[0] == pair[1]) && done.len() == 3, "{done:#?}");
}
