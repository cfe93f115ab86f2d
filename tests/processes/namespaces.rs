//! Ranks in PID and user namespaces of their own, as in containers.

use std::time::{Duration, Instant};

use test_support::process::{command, name, spawn, RankProcess};
use test_support::{tool, Skip};

/// A PID and a user namespace of its own; its processes end with unshare.
const CONTAINER: &[&str] = &["unshare", "-Urpf", "--mount-proc", "--kill-child"];
/// A PID namespace alone, which only root may make.
const PID: &[&str] = &["unshare", "-pf", "--mount-proc", "--kill-child"];
const NETWORK: &[&str] = &["unshare", "-Urn"];
/// Another user than root.
const USER: &[&str] = &["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"];
/// A user namespace that maps no user.
const UNMAPPED: &[&str] = &["unshare", "-U"];

/// Skips where the kernel does not let this user make them.
fn possible(unshare: &[&str]) -> Skip {
    tool(unshare[0], &[&unshare[1..], &["true"]].concat())
}

pub fn containers() -> Skip {
    possible(CONTAINER)
}

pub fn pid_namespaces() -> Skip {
    possible(PID)
}

pub fn network_namespaces() -> Skip {
    possible(NETWORK)
}

pub fn unmapped_users() -> Skip {
    possible(UNMAPPED)
}

pub fn containers_of_another_user() -> Skip {
    possible(&[USER, CONTAINER].concat())
}

fn rank(
    before: &[&str],
    role: &str,
    name: &str,
    (rank, size): (usize, usize),
    more: &[(&str, &str)],
) -> RankProcess {
    let variables = [("PA_TEST_RANK", rank.to_string()), ("PA_TEST_WORLD", size.to_string())];
    let mut command = command(before, role, &variables);
    command.env("PA_TEST_NAME", name).envs(more.iter().copied());
    spawn(command)
}

pub fn ranks_in_containers_meet_die_and_join() {
    meet_die_and_join(CONTAINER);
}

pub fn ranks_in_pid_namespaces_meet_die_and_join() {
    meet_die_and_join(PID);
}

/// One rank is killed, two join, inside and outside.
fn meet_die_and_join(unshare: &[&str]) {
    // All inside, or one outside; the rank that is killed is each of them in turn.
    let insides: [&[usize]; 4] = [&[0, 1, 2], &[1, 2], &[0, 2], &[0]];
    for (turn, inside) in insides.into_iter().enumerate() {
        let (name, dead) = (name(), turn % 3);
        let before = |rank: usize| if inside.contains(&rank) { unshare } else { &[] };
        let begin = |number: usize| {
            rank(before(number), "survive", &name, (number, 3), &[("PA_TEST_FINAL", "4")])
        };
        let mut ranks: Vec<RankProcess> = (0..3).map(begin).collect();
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        let mut killed = ranks.remove(dead);
        let _ = killed.child.kill();
        assert_eq!(killed.end(), None);
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("recovered")));
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
            assert_eq!(rank.end(), Some(0), "{inside:?}: {:#?}", rank.output);
            assert_eq!(rank.said("done").len(), 1);
        }
    }
}

/// The error of a second rank 0 in another namespace names the first one, although its pid may be
/// invisible.
pub fn a_name_is_held_across_namespaces() {
    for (first, second) in [(CONTAINER, CONTAINER), (CONTAINER, &[]), (&[], CONTAINER)] {
        let name = name();
        let mut first = rank(first, "hold", &name, (0, 1), &[]);
        first.wait_for("ready");
        let begin = Instant::now();
        let mut second = rank(second, "hold", &name, (0, 1), &[]);
        assert_eq!(second.end(), Some(3), "{:#?}", second.output);
        let error = &second.said("error")[0];
        assert!(
            error.contains("of another PID namespace") && error.contains("which began"),
            "{error}"
        );
        assert!(begin.elapsed() < Duration::from_secs(19)); // and not the timeout of 20 s
    }
}

/// The errors of both sides name the possible cause.
pub fn ranks_in_two_network_namespaces_are_an_error() {
    let (name, soon) = (name(), [("PA_TEST_MEET_MS", "700")]);
    let mut ranks =
        [rank(&[], "hold", &name, (0, 2), &soon), rank(NETWORK, "hold", &name, (1, 2), &soon)];
    let more = [("PA_TEST_JOIN", "1"), soon[0]];
    let mut late = rank(NETWORK, "hold", &name, (0, 2), &more);
    for rank in ranks.iter_mut().chain([&mut late]) {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
        let error = &rank.said("error")[0];
        assert!(
            error.contains("one network namespace") && error.contains("as one user"),
            "{error}"
        );
    }
}

/// All users that a namespace does not map look alike.
pub fn users_that_are_not_mapped_are_refused() {
    let name = name();
    let begin = Instant::now();
    for number in [0, 1] {
        let mut rank = rank(UNMAPPED, "hold", &name, (number, 2), &[]);
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
        let error = &rank.said("error")[0];
        assert!(error.contains("runs as user 65534") && error.contains("uid_map"), "{error}");
    }
    let mut late = rank(UNMAPPED, "hold", &name, (0, 2), &[("PA_TEST_JOIN", "1")]);
    assert_eq!(late.end(), Some(3), "{:#?}", late.output);
    assert!(late.said("error")[0].contains("runs as user 65534"), "{:#?}", late.output);
    assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
}

/// A user with another number in the container.
pub fn a_user_in_a_container_meets_itself_outside() {
    const OTHER: &[&str] = &["setpriv", "--reuid=54322", "--regid=54322", "--clear-groups"];
    let inside = |user: &[&'static str]| [user, CONTAINER].concat();
    for first_is_inside in [false, true] {
        let name = name();
        let (one, other) = (inside(USER), USER.to_vec());
        let (first, second) = if first_is_inside { (one, other) } else { (other, one) };
        let mut ranks =
            [rank(&first, "meet", &name, (0, 2), &[]), rank(&second, "meet", &name, (1, 2), &[])];
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            assert_eq!(rank.said("averaged"), ["2"]);
        }
    }
    // Two users that are both root in their containers are two users.
    let (name, soon) = (name(), [("PA_TEST_MEET_MS", "700")]);
    let first = inside(USER);
    let mut ranks = [
        rank(&first, "hold", &name, (0, 2), &soon),
        rank(&inside(OTHER), "hold", &name, (1, 2), &soon),
    ];
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
        assert!(rank.said("error")[0].contains("as one user"), "{:#?}", rank.output);
    }
}
