//! After construction, averaging allocates nothing and makes no system call, waiting aside. Memory
//! beside the parameters is within its bounds, and so is that of a state that is loaded.

mod crafted_states;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Barrier;

use param_averager::{Algorithm, Compression, LocalSgd, Schedule};
use test_support::{ranks, tests, tool};

struct Counting;
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
thread_local! {
    /// True on threads of ranks: the threads of the test harness also allocate.
    static COUNTED: Cell<bool> = const { Cell::new(false) };
    /// Bytes that this thread has allocated and not freed, and the most of them since `peak_of`.
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    if COUNTED.get() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        LIVE.set(LIVE.get() + bytes);
        PEAK.set(PEAK.get().max(LIVE.get()));
    }
}

/// Calls `f`, and returns the most bytes that this thread had allocated meanwhile.
fn peak_of<T>(f: impl FnOnce() -> T) -> (T, i64) {
    COUNTED.set(true);
    let before = LIVE.get();
    PEAK.set(before);
    let value = f();
    COUNTED.set(false);
    (value, PEAK.get() - before)
}

// SAFETY: the system's allocator, counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }
}
#[global_allocator]
static COUNTING: Counting = Counting;

/// Algorithm, `all_or_nothing`, `reject_non_finite`, whether there is a stage, and the code.
const WAYS: [(Algorithm, bool, bool, bool, Compression); 7] = [
    (Algorithm::Direct, true, false, false, Compression::None),
    (Algorithm::Direct, true, true, false, Compression::None),
    (Algorithm::Ring, true, false, false, Compression::None),
    (Algorithm::Ring, true, true, false, Compression::None),
    (Algorithm::Ring, false, true, false, Compression::None),
    (Algorithm::Ring, true, true, true, Compression::None),
    (Algorithm::Ring, true, true, false, Compression::Int8),
];

/// Averages a model many times on two ranks, between two calls of `mark`; nothing else runs at the
/// time.
fn average_between(mark: impl Fn(&str) + Sync) {
    for (algorithm, all_or_nothing, reject, has_stage, code) in WAYS {
        let barrier = Barrier::new(2);
        ranks(2, |communicator| {
            COUNTED.set(true);
            let rank = communicator.rank();
            let mut model: Vec<Vec<f32>> = (0..100).map(|i| vec![rank as f32; i * 7]).collect();
            let builder = test_support::options(communicator)
                .algorithm(algorithm)
                .all_or_nothing(all_or_nothing)
                .reject_non_finite(reject)
                .channels(1)
                .compression(code)
                .telemetry(true);
            let builder = match has_stage {
                true => builder.stage(|shard| {
                    shard.parts().for_each(|part| assert!(!part.values.is_empty()));
                    Ok(())
                }),
                false => builder,
            };
            let averager = builder.build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(2));
            barrier.wait();
            if rank == 0 {
                mark("begin");
            }
            barrier.wait();
            for _ in 0..20 {
                sgd.step(&mut model).unwrap();
            }
            sgd.averager().average_weighted(&mut model, 1.0 + rank as f64).unwrap();
            barrier.wait();
            if rank == 0 {
                mark("end");
            }
            barrier.wait();
        });
    }
}

const UNDER_STRACE: &str = "UNDER_STRACE";

fn main() -> ExitCode {
    if std::env::var_os(UNDER_STRACE).is_some() {
        // A system call that strace shows and nothing else makes.
        average_between(|what| drop(std::fs::read(format!("/nonexistent/{what}"))));
        return ExitCode::SUCCESS;
    }
    let strace = tool("strace", &["-V"]).or_else(|| tool("strace", &["-f", "true"]));
    // One test at a time: the counter is global.
    test_support::main_with_threads(
        1,
        tests![
            averaging_allocates_nothing,
            averaging_makes_no_system_call: strace,
            memory_overhead_is_bounded,
            crafted_states::refused_states_allocate_no_more_than_their_size,
            crafted_states::any_state_with_a_right_checksum_is_loaded_or_refused,
        ],
    )
}

fn averaging_allocates_nothing() {
    let at_begin = AtomicU64::new(0);
    average_between(|what| {
        let now = ALLOCATIONS.load(Ordering::Relaxed);
        match what {
            "begin" => at_begin.store(now, Ordering::Relaxed),
            _ => assert_eq!(now, at_begin.load(Ordering::Relaxed), "allocations while averaging"),
        }
    });
    // The counter counts.
    let counts = std::thread::spawn(|| {
        COUNTED.set(true);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        drop(std::hint::black_box(Box::new(1)));
        ALLOCATIONS.load(Ordering::Relaxed) - before
    });
    assert_eq!(counts.join().unwrap(), 2);
}

fn memory_overhead_is_bounded() {
    let extra = |algorithm: Algorithm, n: usize, megabytes: usize| {
        ranks(n, |communicator| {
            let mut model = vec![vec![0f32; megabytes << 16]; 4];
            let averager =
                test_support::options(communicator).algorithm(algorithm).build(&mut model).unwrap();
            averager.memory_overhead()
        })[0]
    };
    for n in [2, 4, 8] {
        for megabytes in [1, 16] {
            let ring = extra(Algorithm::Ring, n, megabytes);
            assert!(
                ring <= (megabytes << 20) / n + (4 << 20),
                "ring, {n} ranks, {megabytes} MiB: {ring} bytes"
            );
            let direct = extra(Algorithm::Direct, n, megabytes);
            assert!(direct <= 1 << 20, "direct, {n} ranks, {megabytes} MiB: {direct} bytes");
        }
    }
}

fn averaging_makes_no_system_call() {
    let log = format!("{}/strace.log", env!("CARGO_TARGET_TMPDIR"));
    let mut traced = Command::new("strace");
    traced.args(["-f", "-o", &log]).arg(std::env::current_exe().unwrap()).env(UNDER_STRACE, "1");
    let traced = traced.output().unwrap();
    assert!(traced.status.success(), "{}", String::from_utf8_lossy(&traced.stderr));
    let log = std::fs::read_to_string(log).unwrap();
    let (mut inside, mut spans, mut seen) = (false, 0, vec![]);
    for line in log.lines() {
        if line.contains("/nonexistent/begin") {
            (inside, spans) = (true, spans + 1);
        } else if line.contains("/nonexistent/end") {
            inside = false;
        } else if inside {
            seen.push(line);
        }
    }
    assert_eq!(spans, WAYS.len(), "averages that strace saw");
    // Calls that wait, for the other rank and in the harness's own threads, and restarts of
    // interrupted calls.
    let waiting = [
        "futex(",
        "sched_yield(",
        "<... futex resumed>",
        "<... sched_yield resumed>",
        "+++ exited",
    ];
    // The end of the call that marks the begin.
    let expected = |line: &str| {
        waiting.iter().any(|call| line.contains(call)) || line.contains("openat resumed>) ")
    };
    let others: Vec<_> = seen.iter().filter(|line| !expected(line)).collect();
    assert!(others.is_empty(), "system calls while averaging: {others:#?}");
    assert!(log.contains("mmap("), "strace shows system calls elsewhere");
}
