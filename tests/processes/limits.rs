//! Limits of the system that one rank meets, at every place where a world or an averager takes
//! something: all ranks get a typed error that names the limit and the rank, soon, or nothing is
//! needed there and all goes on. No signal ends a process, and nothing aborts.

use std::sync::atomic::{AtomicU32, Ordering};

use test_support::process::{name, start, RankProcess};
use test_support::{count, note, partly};

/// A resource, the words of an error about it, and whether the limit does not bind root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    resource: &'static str,
    says: &'static str,
    not_root: bool,
}

const fn limit(resource: &'static str, says: &'static str, not_root: bool) -> Limit {
    Limit { resource, says, not_root }
}

const LIMITS: [Limit; 9] = [
    limit("memory", "ulimit -v", false),
    limit("data", "ulimit -d", false),
    limit("memfds", "seccomp", false),
    limit("file size", "ulimit -f", false),
    limit("descriptors", "ulimit -n", false),
    limit("threads", "ulimit -u", true),
    limit("pids", "pids.max", false),
    limit("locked memory", "ulimit -l", true),
    limit("mappings", "vm.max_map_count", false),
];

/// Stages at which the limit is set.
const STAGES: [&str; 4] = ["starting", "building", "averaging", "recovering"];
/// Number of ranks of a world; the last rank dies before the others recover.
pub const RANKS: usize = 3;
/// Maximum time until an error, in ms: a second, and more for a busy machine. Timeouts of these
/// worlds are a minute or more.
const SOON_MS: u64 = 20_000;
/// A user that has no other processes, for limits that do not bind root.
const USER: u32 = 54_321;

/// Variables that limit a process at `stage`.
fn variables(limit: Limit, stage: &str) -> Vec<(&'static str, String)> {
    vec![("PA_TEST_LIMIT", limit.resource.into()), ("PA_TEST_STAGE", stage.into())]
}

/// True if the limit is to be tried: `PA_TEST_LIMITS` lists resources; without it, `PA_TEST_SCALE`
/// decides between a few and all.
fn is_asked_for(limit: &Limit) -> bool {
    match std::env::var("PA_TEST_LIMITS") {
        Ok(all) => all.split(',').any(|one| one == limit.resource),
        Err(_) => {
            count(0, 1) > 0 || ["memory", "file size", "descriptors"].contains(&limit.resource)
        }
    }
}

/// True if the limit can be set here; if not, the last line of the program says so. Control groups
/// can be made by root alone, if at all.
fn can_be_set(limit: Limit) -> bool {
    let is_root = rustix::process::getuid().is_root();
    let can = match limit.resource {
        "pids" => {
            let group = group();
            let made = std::fs::create_dir(&group).is_ok()
                && std::fs::metadata(group.clone() + "/pids.max").is_ok();
            let _ = std::fs::remove_dir(group);
            made
        }
        _ => is_root || !limit.not_root,
    };
    if !can {
        partly(&format!("this user can't set a limit of {}", limit.resource));
    }
    can
}

/// A control group that no other process of these tests has.
fn group() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let all = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"];
    let all = all
        .into_iter()
        .find(|path| std::path::Path::new(path).exists())
        .unwrap_or("/sys/fs/cgroup");
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{all}/param-averager-test-{}-{number}", std::process::id())
}

/// Starts ranks of which one meets the limit at `stage`.
fn world(
    limit: Limit,
    stage: &str,
    limited: usize,
    group: &str,
    more: &[(&'static str, String)],
) -> Vec<RankProcess> {
    let name = name();
    let rank = |rank: usize| {
        let mut all = vec![
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", RANKS.to_string()),
            ("PA_TEST_NAME", name.clone()),
            ("PA_TEST_MEET_MS", "60000".into()),
            ("PA_TEST_TIMEOUT_MS", "60000".into()),
            ("PA_TEST_GROUP", group.to_owned()),
            ("PA_TEST_LAST", stage.into()),
        ];
        all.extend_from_slice(more);
        all.extend(limit.not_root.then(|| ("PA_TEST_USER", USER.to_string())));
        all.extend((rank == limited).then(|| variables(limit, stage)).into_iter().flatten());
        start("limited", &all)
    };
    (0..RANKS).map(rank).collect()
}

/// Error of a rank that failed: the time of its stage until then, in ms, and the text.
fn error(rank: &mut RankProcess, what: &str) -> Option<(u64, String)> {
    let code = rank.end();
    let errors = rank.said("error");
    match (code, &errors[..]) {
        (Some(0), []) => None,
        (Some(3), [error]) => {
            let (after, error) = error.split_once(' ').unwrap();
            Some((after.parse().unwrap(), error.to_owned()))
        }
        _ => panic!("{what}: it ended by {code:?}: {:#?}", rank.output),
    }
}

/// A cell of the table: the error of the rank that met the limit, if it was met.
fn cell(
    limit: Limit,
    stage: &str,
    limited: usize,
    more: &[(&'static str, String)],
) -> Option<String> {
    let what = format!("{} while {stage}, rank {limited} {more:?}", limit.resource);
    let group = group();
    let mut ranks = world(limit, stage, limited, &group, more);
    // All ranks have started when the first one begins.
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("starting")));
    ranks.iter_mut().for_each(|rank| STAGES.iter().for_each(|_| rank.ask_to_end()));
    let mut errors = vec![];
    for (rank, process) in ranks.iter_mut().enumerate() {
        let dies = rank + 1 == RANKS && process.end().is_none();
        errors.extend((!dies).then(|| error(process, &what)));
    }
    let _ = std::fs::remove_dir(group);
    if errors.iter().all(Option::is_none) {
        return None;
    }
    for (rank, error) in errors.iter().enumerate() {
        let (after, error) = error
            .as_ref()
            .unwrap_or_else(|| panic!("{what}: rank {rank} has no error: {errors:#?}"));
        let names = |rank: usize| error.contains(&format!("rank {rank} "));
        assert!(error.contains(limit.says) && names(limited), "{what}: rank {rank} says {error}");
        assert!(*after < SOON_MS, "{what}: rank {rank} failed after {after} ms: {error}");
    }
    let latest = errors.iter().flatten().map(|(after, _)| after).max();
    let said = errors[limited].as_ref().unwrap().1.clone();
    note!("{what}: {latest:?} ms: {said}");
    Some(said)
}

/// A line of the table.
fn limits_at(stage: &str, is_met: impl Fn(&str, usize) -> bool) {
    for limit in LIMITS.into_iter().filter(is_asked_for) {
        if !can_be_set(limit) {
            continue;
        }
        for limited in 0..2 {
            let met = cell(limit, stage, limited, &[]);
            assert_eq!(
                met.is_some(),
                is_met(limit.resource, limited),
                "{} while {stage}, rank {limited}",
                limit.resource
            );
        }
    }
}

/// Rank 0 alone makes a file, the memory that all of a world share.
pub fn limits_while_starting_are_named_on_all_ranks() {
    limits_at("starting", |resource, limited| {
        limited == 0 || !["memfds", "file size"].contains(&resource)
    });
}

pub fn limits_while_building_are_named_on_all_ranks() {
    limits_at("building", |_, _| true);
}

/// A rank with enough for its own memory, but not to open a peer's, is named.
pub fn limit_met_on_a_peers_memory_names_the_rank_that_met_it() {
    for (resource, rooms, says) in [
        ("descriptors", 1..10, "receiving the file descriptors of a message"),
        ("memory", 20..60, "opening memory of rank"),
    ] {
        let limit = LIMITS.into_iter().find(|limit| limit.resource == resource).unwrap();
        let mut opening = 0;
        for room in rooms.step_by(if resource == "memory" { 8 } else { 1 }) {
            for limited in 0..2 {
                let more =
                    [("PA_TEST_ROOM", room.to_string()), ("PA_TEST_CHUNK", (1 << 20).to_string())];
                let met = cell(limit, "building", limited, &more);
                opening += usize::from(met.is_some_and(|error| error.contains(says)));
            }
        }
        assert!(opening > 0, "{resource}: no rank was short where it opens a peer's");
    }
}

/// Averages need no resource of the system.
pub fn limits_while_averaging_are_not_met() {
    limits_at("averaging", |_, _| false);
}

pub fn limits_while_recovering_are_named_on_all_ranks() {
    limits_at("recovering", |_, _| true);
}

/// A joiner with the limits `own`, and two members that average, of which the second has `limits`.
/// The joiner fails soon, with `limit` named, and the members go on.
fn check_joiner(
    limit: Limit,
    what: &str,
    limits: Vec<(&'static str, String)>,
    own: Vec<(&'static str, String)>,
) {
    let (name, group) = (name(), group());
    let one = |more: &[(&'static str, String)]| {
        let mut all = vec![
            ("PA_TEST_NAME", name.clone()),
            ("PA_TEST_MEET_MS", "60000".into()),
            ("PA_TEST_TIMEOUT_MS", "60000".into()),
            ("PA_TEST_GROUP", group.to_owned()),
        ];
        all.extend(limit.not_root.then(|| ("PA_TEST_USER", USER.to_string())));
        all.extend_from_slice(more);
        start("limited", &all)
    };
    let member = |rank: usize| {
        let variables = [
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", "2".into()),
            ("PA_TEST_ADMITS", "1".into()),
        ];
        one(&[&variables[..], if rank == 1 { &limits } else { &[] }].concat())
    };
    let mut members: Vec<RankProcess> = (0..2).map(member).collect();
    members.iter_mut().for_each(|rank| STAGES[..3].iter().for_each(|_| rank.ask_to_end()));
    members.iter_mut().for_each(|rank| drop(rank.wait_for("averaged")));
    let mut late = one(&[own, vec![("PA_TEST_JOIN", "1".into())]].concat());
    STAGES.iter().for_each(|_| late.ask_to_end());
    let (after, error) = error(&mut late, what).unwrap_or_else(|| panic!("{what}: it was not met"));
    let _ = std::fs::remove_dir(&group);
    assert!(error.contains(limit.says), "{what}: {error}");
    assert!(after < SOON_MS, "{what}: it failed after {after} ms");
    note!("{what}: after {after} ms: {error}");
    members.iter_mut().for_each(|rank| rank.ask_to_end());
    for member in &mut members {
        assert_eq!(member.end(), Some(0), "{what}: {:#?}", member.output);
        assert_eq!(member.said("done"), ["2"], "{what}: {:#?}", member.output);
    }
}

/// A joiner that meets a limit leaves, and the members go on.
pub fn limits_while_joining_harm_no_member() {
    for limit in LIMITS {
        for stage in ["joining", "building"] {
            let what = format!("{}, {stage}", limit.resource);
            if !can_be_set(limit) {
                continue;
            }
            check_joiner(limit, &what, vec![], variables(limit, stage));
        }
    }
}

/// A member that meets a limit during a join reports it to the joiner, and all members go on.
pub fn limits_of_members_are_reported_to_joiners() {
    for limit in LIMITS.into_iter().filter(is_asked_for) {
        let what = format!("{} of a member", limit.resource);
        // Limits on what a member allocates for an averager with the joiner are in the table of
        // building; a socket that cannot be accepted is reported to no process.
        if !["memory", "data", "threads", "pids", "locked memory", "mappings"]
            .contains(&limit.resource)
        {
            continue;
        }
        if !can_be_set(limit) {
            continue;
        }
        check_joiner(limit, &what, variables(limit, "admitting"), vec![]);
    }
}

/// Ranks that are threads of one process meet its limits together. They share no files.
pub fn limits_of_ranks_that_are_threads_are_typed_errors() {
    for limit in LIMITS.into_iter().filter(is_asked_for) {
        for algorithm in ["ring", "direct"] {
            let what = format!("{}, {algorithm}", limit.resource);
            if !can_be_set(limit) {
                continue;
            }
            let group = group();
            let mut all = variables(limit, "building");
            all.extend([
                ("PA_TEST_GROUP", group.to_owned()),
                ("PA_TEST_ALGORITHM", algorithm.into()),
            ]);
            all.extend(limit.not_root.then(|| ("PA_TEST_USER", USER.to_string())));
            let mut process = start("limited_threads", &all);
            process.ask_to_end();
            let code = process.end();
            let _ = std::fs::remove_dir(&group);
            let errors = process.said("error");
            if ["memfds", "file size", "descriptors"].contains(&limit.resource) {
                assert_eq!((code, errors.len()), (Some(0), 0), "{what}: {:#?}", process.output);
                continue;
            }
            assert_eq!((code, errors.len()), (Some(0), 2), "{what}: {:#?}", process.output);
            assert!(errors[0] == errors[1] && errors[0].contains(limit.says), "{what}: {errors:?}");
            assert!(
                errors[0].starts_with("Memory { rank: ")
                    || errors[0].starts_with("Thread { rank: "),
                "{errors:?}"
            );
        }
    }
}

/// Ranks with ever less address space, or ever fewer mappings, average or fail by an error: none
/// aborts.
pub fn any_amount_of_memory_is_enough_or_an_error() {
    for limit in
        LIMITS.iter().filter(|limit| ["memory", "data", "mappings"].contains(&limit.resource))
    {
        let (mut good, mut bad) = (0, 0);
        for stage in ["starting", "building"] {
            // In units of half a MiB, or of two mappings.
            for room in ["0", "3", "6", "9", "12", "24", "40", "1000"] {
                let name = name();
                let rank = |rank: usize| {
                    let mut all = vec![
                        ("PA_TEST_RANK", rank.to_string()),
                        ("PA_TEST_WORLD", "2".into()),
                        ("PA_TEST_NAME", name.clone()),
                        ("PA_TEST_ROOM", room.into()),
                        ("PA_TEST_MEET_MS", "60000".into()),
                    ];
                    all.extend(variables(*limit, stage)); // on both
                    start("limited", &all)
                };
                let mut ranks: Vec<RankProcess> = (0..2).map(rank).collect();
                ranks.iter_mut().for_each(|rank| STAGES.iter().for_each(|_| rank.ask_to_end()));
                for rank in &mut ranks {
                    match error(rank, &format!("{} {room} {stage}", limit.resource)) {
                        None => good += 1,
                        Some((after, error)) => {
                            assert!(after < SOON_MS, "{room} {stage}: {after} ms: {error}");
                            bad += 1;
                        }
                    }
                }
            }
        }
        note!("{}: {good} ranks averaged, {bad} failed", limit.resource);
        assert!(good > 0 && bad > 0, "{}: {good} {bad}", limit.resource);
    }
}
