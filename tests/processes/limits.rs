//! Limits of the system that one rank meets, at every place where a world or an averager takes something: all ranks get a typed error
//! that names the limit and the rank, soon, or nothing is needed there and all goes on. No signal ends a process, and nothing aborts.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use param_averager::{Error, ParamAverager};
use rustix::mm::{MapFlags, MlockAllFlags, MprotectFlags, ProtFlags};
use rustix::process::{getpid, getrlimit, kill_process, setrlimit, Resource, Rlimit, Signal};

use super::common::skipped;
use super::crew::{name, start, Rank};
use super::worker::{builder, is_late, join, number, say};

/// A resource: what an error about it says, and whether root is not bound by the limit.
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

/// When the limit is set.
const STAGES: [&str; 4] = ["starting", "building", "averaging", "recovering"];
/// The ranks of a world, of which the last one dies before the others recover.
const RANKS: usize = 3;
/// A second, and more where this machine is busy with other things; no timeout of these worlds is below a minute.
const SOON_MS: u64 = 5000;
/// A user that has no other processes, for limits that do not bind root.
const USER: u32 = 54_321;

/// What limits a process at `stage`.
fn variables(limit: Limit, stage: &str) -> Vec<(&'static str, String)> {
    vec![("PA_TEST_LIMIT", limit.resource.into()), ("PA_TEST_STAGE", stage.into())]
}

/// PA_TEST_LIMITS, where it is set, is a list of resources to try.
fn is_asked_for(limit: &Limit) -> bool {
    std::env::var("PA_TEST_LIMITS").map_or(true, |all| all.split(',').any(|one| one == limit.resource))
}

/// Whether the limit can be set here. Control groups can be made by root alone, if at all.
fn can_be_set(limit: Limit) -> bool {
    let is_root = rustix::process::getuid().is_root();
    match limit.resource {
        "pids" => {
            let group = group(0);
            let made =
                std::fs::create_dir(&group).is_ok() && std::fs::metadata(group.clone() + "/pids.max").is_ok();
            let _ = std::fs::remove_dir(group);
            made
        }
        _ => is_root || !limit.not_root,
    }
}

/// The control group of a process of these tests.
fn group(process: u32) -> String {
    let first = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"]
        .into_iter()
        .find(|path| std::path::Path::new(path).exists());
    format!("{}/param-averager-test-{}-{process}", first.unwrap_or("/sys/fs/cgroup"), std::process::id())
}

/// Starts ranks of which one meets the limit at `stage`.
fn world(limit: Limit, stage: &str, limited: usize) -> Vec<Rank> {
    let name = name();
    let rank = |rank: usize| {
        let mut all = vec![
            ("PA_TEST_RANK", rank.to_string()),
            ("PA_TEST_WORLD", RANKS.to_string()),
            ("PA_TEST_NAME", name.clone()),
            ("PA_TEST_MEET_MS", "60000".into()),
            ("PA_TEST_TIMEOUT_MS", "60000".into()),
            ("PA_TEST_GROUP", group(1 + rank as u32)),
            ("PA_TEST_LAST", stage.into()),
        ];
        all.extend(limit.not_root.then(|| ("PA_TEST_USER", USER.to_string())));
        all.extend((rank == limited).then(|| variables(limit, stage)).into_iter().flatten());
        start("limited", &all)
    };
    (0..RANKS).map(rank).collect()
}

/// Its error, if that is how it ended: when it came, and what it says.
fn error(rank: &mut Rank, what: &str) -> Option<(u64, String)> {
    let code = rank.end();
    let errors = rank.said("error");
    match (code, &errors[..]) {
        (Some(0), []) => None,
        (Some(3), [error]) => {
            let (after, error) = error.split_once(' ').unwrap();
            Some((after.parse().unwrap(), error.to_owned()))
        }
        _ => panic!("{what}: it ended by {code:?}: {:#?}", rank.heard),
    }
}

/// One cell of the table: whether the limit was met.
fn cell(limit: Limit, stage: &str, limited: usize) -> bool {
    let what = format!("{} while {stage}, rank {limited}", limit.resource);
    let mut ranks = world(limit, stage, limited);
    // All have begun when the first is told to.
    ranks.iter_mut().for_each(|rank| drop(rank.hear("starting")));
    ranks.iter_mut().for_each(|rank| STAGES.iter().for_each(|_| rank.enough()));
    let mut errors = vec![];
    for (rank, process) in ranks.iter_mut().enumerate() {
        let dies = rank + 1 == RANKS && process.end().is_none();
        errors.extend((!dies).then(|| error(process, &what)));
    }
    let _ = std::fs::remove_dir(group(1 + limited as u32));
    if errors.iter().all(Option::is_none) {
        return false;
    }
    for (rank, error) in errors.iter().enumerate() {
        let (after, error) =
            error.as_ref().unwrap_or_else(|| panic!("{what}: rank {rank} is not told: {errors:#?}"));
        let names = |rank: usize| error.contains(&format!("rank {rank} "));
        assert!(error.contains(limit.says) && names(limited), "{what}: rank {rank} says {error}");
        assert!(*after < SOON_MS, "{what}: rank {rank} was told after {after} ms: {error}");
    }
    let latest = errors.iter().flatten().map(|(after, _)| after).max();
    println!("{what}: {latest:?} ms: {}", errors[limited].as_ref().unwrap().1);
    true
}

/// The table, for one of its lines.
fn limits_at(stage: &str, is_met: impl Fn(&str, usize) -> bool) {
    for limit in LIMITS.into_iter().filter(is_asked_for) {
        if !can_be_set(limit) {
            skipped(&format!("limits while {stage}, {}", limit.resource), "this user can't set that limit");
            continue;
        }
        for limited in 0..2 {
            let met = cell(limit, stage, limited);
            assert_eq!(
                met,
                is_met(limit.resource, limited),
                "{} while {stage}, rank {limited}",
                limit.resource
            );
        }
    }
}

/// Rank 0 alone makes a file, the memory that all of a world share.
#[test]
fn limits_while_starting_are_named_on_all_ranks() {
    limits_at("starting", |resource, limited| limited == 0 || !["memfds", "file size"].contains(&resource));
}

#[test]
fn limits_while_building_are_named_on_all_ranks() {
    limits_at("building", |_, _| true);
}

/// Averages take nothing of the system.
#[test]
fn limits_while_averaging_are_not_met() {
    limits_at("averaging", |_, _| false);
}

#[test]
fn limits_while_recovering_are_named_on_all_ranks() {
    limits_at("recovering", |_, _| true);
}

/// A process that joins and meets a limit leaves, and the others go on.
#[test]
fn limits_while_joining_harm_nobody_else() {
    for limit in LIMITS {
        for stage in ["joining", "building"] {
            let what = format!("{}, {stage}", limit.resource);
            if !can_be_set(limit) {
                skipped(&format!("limits while joining, {what}"), "this user can't set that limit");
                continue;
            }
            let name = name();
            let one = |more: &[(&'static str, String)]| {
                let mut all = vec![
                    ("PA_TEST_NAME", name.clone()),
                    ("PA_TEST_MEET_MS", "60000".into()),
                    ("PA_TEST_TIMEOUT_MS", "60000".into()),
                    ("PA_TEST_GROUP", group(1)),
                ];
                all.extend(limit.not_root.then(|| ("PA_TEST_USER", USER.to_string())));
                all.extend_from_slice(more);
                start("limited", &all)
            };
            let member = |rank: usize| {
                let variables = [
                    ("PA_TEST_RANK", rank.to_string()),
                    ("PA_TEST_WORLD", "2".into()),
                    ("PA_TEST_LETS_IN", "1".into()),
                ];
                one(&variables)
            };
            let mut members: Vec<Rank> = (0..2).map(member).collect();
            members.iter_mut().for_each(|rank| STAGES[..2].iter().for_each(|_| rank.enough()));
            members.iter_mut().for_each(|rank| drop(rank.hear("averaged")));
            let mut late = one(&[variables(limit, stage), vec![("PA_TEST_JOIN", "1".into())]].concat());
            STAGES.iter().for_each(|_| late.enough());
            let (after, error) = error(&mut late, &what).unwrap_or_else(|| panic!("{what}: it was not met"));
            let _ = std::fs::remove_dir(group(1));
            assert!(error.contains(limit.says), "{what}: {error}");
            assert!(after < SOON_MS, "{what}: it was told after {after} ms");
            println!("{what}: after {after} ms: {error}");
            members.iter_mut().for_each(|rank| rank.enough());
            for member in &mut members {
                assert_eq!(member.end(), Some(0), "{what}: {:#?}", member.heard);
                assert_eq!(member.said("done"), ["2"], "{what}: {:#?}", member.heard);
            }
        }
    }
}

/// With ever less address space, or ever fewer mappings, ranks meet and average, or are told: nothing between aborts.
#[test]
fn any_amount_of_memory_is_enough_or_an_error() {
    for limit in LIMITS.iter().filter(|limit| ["memory", "data", "mappings"].contains(&limit.resource)) {
        let (mut good, mut bad) = (0, 0);
        for stage in ["starting", "building"] {
            // In half MiB, or in two mappings.
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
                let mut ranks: Vec<Rank> = (0..2).map(rank).collect();
                ranks.iter_mut().for_each(|rank| STAGES.iter().for_each(|_| rank.enough()));
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
        println!("{}: {good} ranks averaged, {bad} were told", limit.resource);
        assert!(good > 0 && bad > 0, "{}: {good} {bad}", limit.resource);
    }
}

/// The longest timeouts that can be written are timeouts like others: for meeting, building, recovering and joining.
#[test]
fn the_longest_timeouts_are_timeouts() {
    let longest = [
        ("PA_TEST_MEET_MS", "longest".to_owned()),
        ("PA_TEST_TIMEOUT_MS", "longest".into()),
        ("PA_TEST_FINAL", "3".into()),
    ];
    let name = name();
    let one = |more: &[(&'static str, String)]| {
        start("survive", &[&longest[..], &[("PA_TEST_NAME", name.clone())], more].concat())
    };
    let first = |rank: usize| one(&[("PA_TEST_RANK", rank.to_string()), ("PA_TEST_WORLD", "3".into())]);
    let mut ranks: Vec<Rank> = (0..3).map(first).collect();
    ranks.iter_mut().for_each(|rank| drop(rank.hear("ready")));
    ranks[1].signal(Signal::KILL);
    ranks[0].hear("recovered");
    ranks[1] = one(&[("PA_TEST_JOIN", "1".into()), ("PA_TEST_ORIGIN", "3".into())]);
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.heard);
        assert_eq!(rank.said("done"), ["[0, 2, 3]"], "{:#?}", rank.heard);
    }
}

// ---- what a rank does ------------------------------------------------------------------------------------------------

/// Comes to a stage: takes its limit, if it is that of this stage, and goes on when it is told to.
fn come_to(stage: &str) -> Instant {
    if std::env::var("PA_TEST_STAGE").is_ok_and(|limited| limited == stage) {
        std::thread::sleep(Duration::from_millis(20)); // threads that were started have what they take by then
        take_limit(&std::env::var("PA_TEST_LIMIT").unwrap());
    }
    say(stage);
    let _ = std::io::stdin().read_line(&mut String::with_capacity(80));
    Instant::now()
}

static ENOUGH: AtomicBool = AtomicBool::new(false);

/// Meets, builds, averages and recovers; says of the first error how long after its stage began it came.
pub fn limited() -> i32 {
    if let Some(user) = number("PA_TEST_USER") {
        // SAFETY: no pointer is passed.
        assert_eq!(unsafe { libc::setuid(user as u32) }, 0);
    }
    let rank = number("PA_TEST_RANK").unwrap_or(2);
    // 24 MiB: its shard is of 8 or 12 MiB, which malloc maps.
    let mut model = vec![vec![rank as f32; 6 << 20], vec![1.0; 100]];
    let result = stages(&mut model);
    match result {
        Ok(ranks) => {
            say(&format!("done {ranks}"));
            0
        }
        Err((after, error)) => {
            say(&format!("error {after} {error}"));
            3
        }
    }
}

fn stages(model: &mut Vec<Vec<f32>>) -> Result<usize, (u128, Error)> {
    let begin = come_to(if is_late() { "joining" } else { "starting" });
    let failed = |begin: Instant| move |error| (begin.elapsed().as_millis(), error);
    let communicator = join().map_err(failed(begin))?;
    let is_last = |stage| std::env::var("PA_TEST_LAST").is_ok_and(|last| last == stage);
    if is_last("starting") {
        return Ok(communicator.world_size());
    }
    let begin = come_to("building");
    let mut averager: ParamAverager =
        builder(communicator).channels(2).chunk_bytes(64 << 10).build(model).map_err(failed(begin))?;
    if number("PA_TEST_LETS_IN").is_some() {
        std::thread::spawn(|| {
            let _ = std::io::stdin().read_line(&mut String::new());
            ENOUGH.store(true, Ordering::Relaxed);
        });
        loop {
            // Both end after the same average.
            let begin = Instant::now();
            let enough = vec![f32::from(u8::from(ENOUGH.load(Ordering::Relaxed)))];
            model[1][..1].copy_from_slice(&enough);
            let report = averager.average(model).map_err(failed(begin))?;
            if model[1][0] != 0.0 {
                return Ok(averager.world_size());
            }
            say("averaged");
            if report.joiner_waits {
                averager.admit(model).map_err(failed(begin))?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let begin = come_to("averaging");
    for _ in 0..3 {
        averager.average(model).map_err(failed(begin))?;
        averager.average_weighted(model, 2.0).map_err(failed(begin))?;
    }
    if averager.world_size() < RANKS || is_last("averaging") {
        return Ok(averager.world_size());
    }
    let begin = come_to("recovering");
    if averager.rank() + 1 == RANKS {
        let _ = kill_process(getpid(), Signal::KILL);
    }
    let lost = averager.average(model).expect_err("a rank has died");
    assert!(lost.is_fatal(), "{lost}");
    averager.recover(model).map_err(failed(begin))?;
    averager.average(model).map_err(failed(begin))?;
    Ok(averager.world_size())
}

fn set(resource: Resource, most: u64) {
    // The hard limit stays, where it can: a rank may raise its own again.
    setrlimit(resource, Rlimit { current: Some(most), ..getrlimit(resource) }).unwrap();
}

/// Of this process, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

/// Takes what is left of a resource, but for a little that small things need.
fn take_limit(resource: &str) {
    let stage = std::env::var("PA_TEST_STAGE").unwrap();
    let room = number("PA_TEST_ROOM");
    // What meets it is larger than this; what can't fail is smaller.
    let bytes = room.map_or(if stage == "averaging" { 0 } else { 1 << 20 }, |room| room << 20 >> 1);
    match resource {
        "memory" => set(Resource::As, status("VmSize:") + bytes),
        "data" => set(Resource::Data, status("VmData:") + bytes),
        "memfds" => forbid_memfds(),
        "file size" => set(Resource::Fsize, 0),
        "descriptors" => {
            let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 - 1;
            // A rank that has no socket can't say so.
            set(Resource::Nofile, open + if stage == "starting" { 3 } else { 0 });
        }
        "threads" => set(Resource::Nproc, 1),
        "pids" => {
            let group = std::env::var("PA_TEST_GROUP").unwrap();
            std::fs::create_dir(&group).unwrap();
            std::fs::write(group.clone() + "/cgroup.procs", std::process::id().to_string()).unwrap();
            let threads = std::fs::read_dir("/proc/self/task").unwrap().count();
            std::fs::write(group + "/pids.max", threads.to_string()).unwrap();
        }
        "locked memory" => {
            set(Resource::Memlock, 1 << 20);
            rustix::mm::mlockall(MlockAllFlags::FUTURE).unwrap();
        }
        "mappings" => take_mappings(room.map_or(if stage == "averaging" { 0 } else { 4 }, |room| room * 2)),
        other => panic!("no limit {other}"),
    }
}

/// Leaves this process so many mappings.
fn take_mappings(left: u64) {
    const PAGE: usize = 4096;
    const MOST: usize = 1 << 20;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping, wherever the system puts it; nobody uses it.
    let start =
        unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), MOST * PAGE, ProtFlags::empty(), flags) };
    let start = start.unwrap();
    // Each page of another protection than its neighbours is two mappings more.
    let protect = |page: usize, flags| {
        // SAFETY: inside of the mapping.
        unsafe { rustix::mm::mprotect(start.byte_add((2 * page + 1) * PAGE), PAGE, flags) }
    };
    let pages = (0..MOST / 2 - 1).find(|&page| protect(page, MprotectFlags::READ).is_err()).expect("a limit");
    for page in 0..left.div_ceil(2) as usize {
        protect(pages - 1 - page, MprotectFlags::empty()).unwrap();
    }
}

/// As sandboxes do it: memfd_create is answered by EPERM, on this thread and those that it starts.
fn forbid_memfds() {
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut filter = [
        // The number of the system call is the first word.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_memfd_create as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, REFUSE),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program lives until the calls have returned.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program), 0);
    }
}
