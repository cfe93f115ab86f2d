//! Ranks in PID and user namespaces of their own, as in containers.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::common::skipped;
use super::crew::{command, name, spawn, Rank};

/// A PID and a user namespace of its own, whose processes end with unshare.
const CONTAINER: &[&str] = &["unshare", "-Urpf", "--mount-proc", "--kill-child"];
/// Only a PID namespace, which only root may make.
const PID: &[&str] = &["unshare", "-pf", "--mount-proc", "--kill-child"];
const NETWORK: &[&str] = &["unshare", "-Urn"];
/// Its user is mapped to none.
const NOBODY: &[&str] = &["unshare", "-U"];

/// True if the kernel lets this user have them.
fn is_possible(test: &str, unshare: &[&str]) -> bool {
    let mut tried = Command::new(unshare[0]);
    tried.args(&unshare[1..]).arg("true").stdout(Stdio::null()).stderr(Stdio::null());
    let possible = tried.status().is_ok_and(|status| status.success());
    if !possible {
        skipped(test, &format!("{} is not possible here", unshare.join(" ")));
    }
    possible
}

fn rank(
    before: &[&str],
    role: &str,
    name: &str,
    (rank, size): (usize, usize),
    more: &[(&str, &str)],
) -> Rank {
    let variables = [("PA_TEST_RANK", rank.to_string()), ("PA_TEST_WORLD", size.to_string())];
    let mut command = command(before, role, &variables);
    command.env("PA_TEST_NAME", name).envs(more.iter().copied());
    spawn(command)
}

/// One is killed, one joins, in containers and outside of them.
#[test]
fn ranks_in_containers_meet_die_and_join() {
    const TEST: &str = "ranks_in_containers_meet_die_and_join";
    for unshare in [CONTAINER, PID] {
        if !is_possible(TEST, unshare) {
            continue;
        }
        // All inside, or one outside; the rank that is killed is each of them in turn.
        let insides: [&[usize]; 4] = [&[0, 1, 2], &[1, 2], &[0, 2], &[0]];
        for (turn, inside) in insides.into_iter().enumerate() {
            let (name, dead) = (name(), turn % 3);
            let before = |rank: usize| if inside.contains(&rank) { unshare } else { &[] };
            let begin = |number: usize| {
                rank(before(number), "survive", &name, (number, 3), &[("PA_TEST_FINAL", "4")])
            };
            let mut ranks: Vec<Rank> = (0..3).map(begin).collect();
            ranks.iter_mut().for_each(|rank| drop(rank.hear("ready")));
            let mut killed = ranks.remove(dead);
            let _ = killed.child.kill();
            assert_eq!(killed.end(), None);
            ranks.iter_mut().for_each(|rank| drop(rank.hear("recovered")));
            for (number, before) in [unshare, &[]].into_iter().enumerate() {
                let origin = (3 + number).to_string();
                let more = [
                    ("PA_TEST_JOIN", "1"),
                    ("PA_TEST_ORIGIN", origin.as_str()),
                    ("PA_TEST_FINAL", "4"),
                ];
                ranks.push(rank(before, "survive", &name, (0, 3), &more));
            }
            for rank in &mut ranks {
                assert_eq!(rank.end(), Some(0), "{inside:?}: {:#?}", rank.heard);
                assert_eq!(rank.said("done").len(), 1);
            }
        }
    }
}

/// A second rank 0 of another namespace is told about the first, whose pid it may not see.
#[test]
fn a_name_is_held_across_namespaces() {
    if !is_possible("a_name_is_held_across_namespaces", CONTAINER) {
        return;
    }
    for (first, second) in [(CONTAINER, CONTAINER), (CONTAINER, &[]), (&[], CONTAINER)] {
        let name = name();
        let mut first = rank(first, "hold", &name, (0, 1), &[]);
        first.hear("ready");
        let begin = Instant::now();
        let mut second = rank(second, "hold", &name, (0, 1), &[]);
        assert_eq!(second.end(), Some(3), "{:#?}", second.heard);
        let error = &second.said("error")[0];
        assert!(
            error.contains("of another PID namespace") && error.contains("which began"),
            "{error}"
        );
        assert!(begin.elapsed() < Duration::from_secs(10));
    }
}

/// Where ranks can't meet, both sides are told what may be the cause.
#[test]
fn ranks_in_two_network_namespaces_are_told_so() {
    if !is_possible("ranks_in_two_network_namespaces_are_told_so", NETWORK) {
        return;
    }
    let (name, soon) = (name(), [("PA_TEST_MEET_MS", "700")]);
    let mut ranks =
        [rank(&[], "hold", &name, (0, 2), &soon), rank(NETWORK, "hold", &name, (1, 2), &soon)];
    let more = [("PA_TEST_JOIN", "1"), soon[0]];
    let mut late = rank(NETWORK, "hold", &name, (0, 2), &more);
    for rank in ranks.iter_mut().chain([&mut late]) {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.heard);
        let error = &rank.said("error")[0];
        assert!(
            error.contains("one network namespace") && error.contains("as one user"),
            "{error}"
        );
    }
}

/// All users that a namespace does not map look alike.
#[test]
fn users_that_are_not_mapped_are_refused() {
    if !is_possible("users_that_are_not_mapped_are_refused", NOBODY) {
        return;
    }
    let name = name();
    let begin = Instant::now();
    for number in [0, 1] {
        let mut rank = rank(NOBODY, "hold", &name, (number, 2), &[]);
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.heard);
        let error = &rank.said("error")[0];
        assert!(error.contains("runs as user 65534") && error.contains("uid_map"), "{error}");
    }
    let mut late = rank(NOBODY, "hold", &name, (0, 2), &[("PA_TEST_JOIN", "1")]);
    assert_eq!(late.end(), Some(3), "{:#?}", late.heard);
    assert!(late.said("error")[0].contains("runs as user 65534"), "{:#?}", late.heard);
    assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
}

/// One user, whom the container calls by another number.
#[test]
fn a_user_in_a_container_meets_itself_outside() {
    const TEST: &str = "a_user_in_a_container_meets_itself_outside";
    const USER: &[&str] = &["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"];
    const OTHER: &[&str] = &["setpriv", "--reuid=54322", "--regid=54322", "--clear-groups"];
    let inside = |user: &[&'static str]| [user, CONTAINER].concat();
    if !is_possible(TEST, &inside(USER)) {
        return;
    }
    for first_is_inside in [false, true] {
        let name = name();
        let (one, other) = (inside(USER), USER.to_vec());
        let (first, second) = if first_is_inside { (one, other) } else { (other, one) };
        let mut ranks =
            [rank(&first, "meet", &name, (0, 2), &[]), rank(&second, "meet", &name, (1, 2), &[])];
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.heard);
            assert_eq!(rank.said("averaged"), ["2"]);
        }
    }
    // Two users who are both root in their containers are two.
    let (name, soon) = (name(), [("PA_TEST_MEET_MS", "700")]);
    let first = inside(USER);
    let mut ranks = [
        rank(&first, "hold", &name, (0, 2), &soon),
        rank(&inside(OTHER), "hold", &name, (1, 2), &soon),
    ];
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.heard);
        assert!(rank.said("error")[0].contains("as one user"), "{:#?}", rank.heard);
    }
}
