//! Role of a rank that meets a limit of the system at one of its stages.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use param_averager::{Algorithm, Communicator, Device, Error, ParamAverager};
use rustix::mm::{MapFlags, MlockAllFlags, MprotectFlags, ProtFlags};
use rustix::process::{getpid, getrlimit, kill_process, setrlimit, Resource, Rlimit, Signal};

use super::limits::RANKS;
use test_support::rank::{builder, is_late, join, number, say};

/// Enters a stage: sets the limit, if it belongs to this stage, and waits for a line on the
/// standard input.
fn come_to(stage: &str) -> Instant {
    be_limited(stage);
    say(stage);
    let _ = std::io::stdin().read_line(&mut String::with_capacity(80));
    Instant::now()
}

fn be_limited(stage: &str) {
    if std::env::var("PA_TEST_STAGE").is_ok_and(|limited| limited == stage) {
        // by then threads that were started have allocated what they need
        std::thread::sleep(Duration::from_millis(20));
        take_limit(&std::env::var("PA_TEST_LIMIT").unwrap());
    }
}

static END_REQUESTED: AtomicBool = AtomicBool::new(false);

/// Meets, builds, averages and recovers; prints the first error with the time since its stage
/// began.
pub fn limited() -> i32 {
    if let Some(user) = number("PA_TEST_USER") {
        // SAFETY: no pointer is passed.
        assert_eq!(unsafe { libc::setuid(user as u32) }, 0);
    }
    let rank = number("PA_TEST_RANK").unwrap_or(2);
    // 24 MiB: its shard has 8 or 12 MiB, which malloc maps.
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

/// Two ranks that are threads build and average.
pub fn limited_threads() -> i32 {
    if let Some(user) = number("PA_TEST_USER") {
        // SAFETY: no pointer is passed.
        assert_eq!(unsafe { libc::setuid(user as u32) }, 0);
    }
    let direct = std::env::var("PA_TEST_ALGORITHM").is_ok_and(|algorithm| algorithm == "direct");
    let algorithm = if direct { Algorithm::Direct } else { Algorithm::Ring };
    let (at_limit, limited) = (Barrier::new(3), Barrier::new(3));
    std::thread::scope(|scope| {
        for communicator in Communicator::from_devices(&[Device::cpu(); 2]).unwrap() {
            let (at_limit, limited) = (&at_limit, &limited);
            scope.spawn(move || {
                let mut model = vec![vec![1.0f32; 6 << 20]];
                at_limit.wait();
                limited.wait();
                let builder = test_support::options(communicator).algorithm(algorithm).channels(2);
                let built = builder.build(&mut model);
                match built.and_then(|mut averager| averager.average(&mut model)) {
                    Ok(_) => say("averaged"),
                    Err(error) => say(&format!("error {error:?}")),
                }
            });
        }
        at_limit.wait();
        come_to("building");
        limited.wait();
    });
    0
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
    let chunk = number("PA_TEST_CHUNK").unwrap_or(64 << 10) as usize;
    let mut averager: ParamAverager =
        builder(communicator).channels(2).chunk_bytes(chunk).build(model).map_err(failed(begin))?;
    let begin = come_to("averaging");
    if number("PA_TEST_ADMITS").is_some() {
        std::thread::spawn(|| {
            let _ = std::io::stdin().read_line(&mut String::new());
            END_REQUESTED.store(true, Ordering::Relaxed);
        });
        be_limited("admitting");
        loop {
            // Both members end after the same average.
            let begin = Instant::now();
            let ends = vec![f32::from(u8::from(END_REQUESTED.load(Ordering::Relaxed)))];
            model[1][..1].copy_from_slice(&ends);
            let report = averager.average(model).map_err(failed(begin))?;
            if model[1][0] != 0.0 {
                return Ok(averager.world_size());
            }
            say("averaged");
            if report.join_pending {
                averager.admit_joiner(model).map_err(failed(begin))?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
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

/// A value of `/proc/self/status`, in bytes.
fn status(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

/// Leaves of a resource only what small allocations need.
fn take_limit(resource: &str) {
    let stage = std::env::var("PA_TEST_STAGE").unwrap();
    let room = number("PA_TEST_ROOM");
    // Allocations that meet the limit are larger than this; allocations that cannot fail are
    // smaller.
    let bytes = room.map_or(if stage == "averaging" { 0 } else { 1 << 20 }, |room| room << 20 >> 1);
    match resource {
        "memory" => set(Resource::As, status("VmSize:") + bytes),
        "data" => set(Resource::Data, status("VmData:") + bytes),
        "memfds" => forbid_memfds(),
        "file size" => set(Resource::Fsize, 0),
        "descriptors" => {
            let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64 - 1;
            // A rank without a socket cannot report its error.
            set(Resource::Nofile, open + room.unwrap_or(if stage == "starting" { 3 } else { 0 }));
        }
        "threads" => set(Resource::Nproc, 1),
        "pids" => {
            let group = std::env::var("PA_TEST_GROUP").unwrap();
            std::fs::create_dir(&group).unwrap();
            std::fs::write(group.clone() + "/cgroup.procs", std::process::id().to_string())
                .unwrap();
            // Below the current number, since a thread may end: none can be started.
            std::fs::write(group + "/pids.max", "1").unwrap();
        }
        "locked memory" => {
            set(Resource::Memlock, 1 << 20);
            rustix::mm::mlockall(MlockAllFlags::FUTURE).unwrap();
        }
        "mappings" => {
            take_mappings(room.map_or(if stage == "averaging" { 0 } else { 4 }, |room| room * 2))
        }
        other => panic!("no limit {other}"),
    }
}

/// Leaves this process so many mappings.
fn take_mappings(left: u64) {
    const PAGE: usize = 4096;
    const MOST: usize = 1 << 20;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping, at an address of the system's choice; nothing uses it.
    let start = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), MOST * PAGE, ProtFlags::empty(), flags)
    };
    let start = start.unwrap();
    // Each page of another protection than its neighbours is two mappings more.
    let protect = |page: usize, flags| {
        // SAFETY: inside of the mapping.
        unsafe { rustix::mm::mprotect(start.byte_add((2 * page + 1) * PAGE), PAGE, flags) }
    };
    let pages = (0..MOST / 2 - 1)
        .find(|&page| protect(page, MprotectFlags::READ).is_err())
        .expect("a limit");
    for page in 0..left.div_ceil(2) as usize {
        protect(pages - 1 - page, MprotectFlags::empty()).unwrap();
    }
}

/// Makes memfd_create fail with EPERM, on this thread and on those that it starts, as sandboxes do.
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
