//! What a rank does: averages until a failure, checks every element, recovers, and says what it saw
//! in lines that begin with @.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use param_averager::{
    Algorithm, Builder, Communicator, Device, Error, Link, LocalSgd, ParamAverager, Schedule,
    TensorState,
};

use super::Model;
use super::{pairs, roles};

pub fn say(line: &str) {
    // Behind whatever the test harness has written.
    let _ = std::io::stdout().write_all(format!("\n@{line}\n").as_bytes());
    let _ = std::io::stdout().flush();
}

pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

/// In ms, or the longest that there is; else 20 s.
fn duration(name: &str) -> Duration {
    match std::env::var(name) {
        Ok(longest) if longest == "longest" => Duration::MAX,
        _ => Duration::from_millis(number(name).unwrap_or(20_000)),
    }
}

pub fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()
}

/// Ends as a killed process does: nothing is dropped or flushed.
fn die() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    unreachable!()
}

/// Does what this role is, and returns the process's exit code.
pub fn run(role: &str) -> i32 {
    match role {
        "meet" => meet(),
        "restart" => restart(),
        "stages" => stages(),
        "survive" => survive(),
        "train" => train(),
        "two" => pairs::two(),
        "two_admit" => pairs::two_admit(),
        "many_recover" => pairs::many_recover(),
        "two_sgd" => pairs::two_sgd(),
        "one_dropped" => pairs::one_dropped(),
        "job" => roles::job(),
        "hold" => roles::hold(),
        "fork" => roles::fork(),
        "let_in" => roles::let_in(),
        "launched" => roles::launched(),
        "try" => roles::try_to_join(),
        other => panic!("no role {other}"),
    }
}

/// Whether this process comes late.
pub fn is_late() -> bool {
    number("PA_TEST_JOIN").is_some()
}

/// That of this ordinal, or the CPU.
pub fn device() -> Device {
    number("PA_TEST_DEVICE").map_or(Device::cpu(), |ordinal| Device::cuda(ordinal as usize))
}

pub fn join() -> Result<Communicator, Error> {
    let timeout = duration("PA_TEST_MEET_MS");
    if is_late() {
        let world = Communicator::builder().rendezvous(std::env::var("PA_TEST_NAME").unwrap());
        return world.device(device()).timeout(timeout).join();
    }
    match number("PA_TEST_RANK") {
        None => Communicator::builder().device(device()).timeout(timeout).from_env()?.build(),
        Some(rank) => {
            let world = Communicator::builder()
                .rank(rank as usize)
                .world_size(number("PA_TEST_WORLD").unwrap() as usize)
                .rendezvous(std::env::var("PA_TEST_NAME").unwrap())
                .device(device())
                .timeout(timeout);
            match std::env::var("PA_TEST_JOB_NAME") {
                Ok(job) => world.job(job).build(),
                Err(_) => world.build(),
            }
        }
    }
}

pub fn builder(communicator: Communicator) -> Builder {
    let timeout = duration("PA_TEST_TIMEOUT_MS");
    let link = match std::env::var("PA_TEST_LINK").as_deref() {
        Ok("peer") => Link::Peer,
        Ok("host") => Link::Host,
        _ => Link::Auto,
    };
    let builder = match device() == Device::cpu() {
        true => ParamAverager::builder(communicator),
        false => ParamAverager::builder(communicator)
            .channels(number("PA_TEST_CHANNELS").unwrap_or(2) as u32),
    };
    builder
        .link(link)
        .timeout(timeout)
        .all_or_nothing(number("PA_TEST_ALL_OR_NOTHING") != Some(0))
        .reject_non_finite(number("PA_TEST_REJECT") == Some(1))
        .chunk_bytes(1 << 10)
}

/// Finds the others, averages once, says what happened.
fn meet() -> i32 {
    if let Some(most) = number("PA_TEST_FILES") {
        let limit = rustix::process::Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    }
    let mut model =
        vec![vec![0.0f32; number("PA_TEST_ELEMENTS").unwrap_or(1000) as usize], vec![1.0; 10]];
    let result = join().and_then(|communicator| {
        let rank = communicator.rank();
        model[0].fill(rank as f32);
        let mut builder = builder(communicator);
        if let Some(slots) = number("PA_TEST_SLOTS") {
            builder = builder.slots(slots as u32);
        }
        let mut averager = builder.build(&mut model)?;
        assert_eq!(averager.algorithm(), Algorithm::Ring);
        if is_late() {
            return Err(Error::WorldSize { found: 0 }); // this rank was to be refused
        }
        averager.average(&mut model)?;
        Ok(averager.world_size())
    });
    match result {
        Ok(size) => {
            let mean = (size as f32 - 1.0) / 2.0;
            assert!(model[0].iter().all(|&x| x == mean), "{:?}", &model[0][..10]);
            assert!(model[1].iter().all(|&x| x == 1.0));
            say(&format!("averaged {size}"));
            0
        }
        Err(error) => {
            say(&format!("error {error}"));
            3
        }
    }
}

/// Under torchrun, which starts all ranks again when one fails: rank 1 does, while the others wait
/// for it.
fn restart() -> i32 {
    let is = |name, what| std::env::var(name).is_ok_and(|value| value == what);
    if is("TORCHELASTIC_RESTART_COUNT", "0") && is("RANK", "1") {
        say("failing");
        return 9;
    }
    meet()
}

/// Stops, if this is the place to do so for the first time.
fn stop_at(place: &str) {
    static STOPPED: AtomicBool = AtomicBool::new(false);
    let is_here = std::env::var("PA_TEST_STOP_AT").is_ok_and(|at| at == place);
    if is_here && !STOPPED.swap(true, Ordering::Relaxed) {
        say("stopping");
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
        // another thread may have got the signal, which stops all soon
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Finds the others, builds, recovers and builds again until there is an averager, averages, and
/// waits until it is told to end. On the way it stops where it is told to, or aborts.
fn stages() -> i32 {
    let timeout = duration("PA_TEST_TIMEOUT_MS");
    let failed = |error: Error| {
        say(&format!("error {error}"));
        3
    };
    stop_at("join");
    let mut communicator = match join() {
        Ok(communicator) => communicator,
        Err(error) => return failed(error),
    };
    loop {
        stop_at("build");
        if std::env::var("PA_TEST_STOP_AT").is_ok_and(|at| at == "abort") {
            stop_at("abort");
            communicator.abort_handle().abort();
        }
        say("building");
        let mut model = vec![vec![communicator.rank() as f32; 100]];
        let built = builder(communicator.clone()).build(&mut model);
        match built.and_then(|mut averager| averager.average(&mut model).map(|_| averager)) {
            Ok(averager) => {
                say(&format!("averaged {}", averager.world_size()));
                let _ = std::io::stdin().read_line(&mut String::new());
                return 0;
            }
            Err(error) if matches!(error, Error::Aborted { .. }) => return failed(error),
            Err(error) => say(&format!("failed {error}")),
        }
        stop_at("recover");
        say("recovering");
        communicator = match communicator.recover(timeout) {
            Ok(communicator) => communicator,
            Err(error) => return failed(error),
        };
    }
}

/// Set by a line on the standard input: enough.
static ENOUGH: AtomicBool = AtomicBool::new(false);

/// Averages, and recovers where somebody was lost, until it was done three times with no more than
/// `PA_TEST_FINAL` ranks, or until it is told to end.
fn survive() -> i32 {
    std::thread::spawn(|| {
        if std::io::stdin().read_line(&mut String::new()).is_ok_and(|bytes| bytes > 0) {
            ENOUGH.store(true, Ordering::Relaxed);
        }
    });
    let mut model = Model::new(0, device());
    if is_late() {
        model.spoil(); // what it has of its own is nothing to anybody
    }
    let (communicator, mut averager) = loop {
        let communicator = match join() {
            Ok(communicator) => communicator,
            Err(error) => {
                say(&format!("error {error}"));
                return 3;
            }
        };
        match builder(communicator.clone()).build(&mut model) {
            Ok(averager) => break (communicator, averager),
            // a peer was lost on the way: once more
            Err(error) => assert!(is_late() && error.is_fatal(), "{error}"),
        }
    };
    let origin = number("PA_TEST_ORIGIN").map_or(communicator.rank(), |origin| origin as usize);
    model.origin = origin;
    // Who takes part, where that is known.
    let mut all = (!is_late()).then(|| (0..communicator.world_size()).collect::<Vec<usize>>());
    drop(communicator);
    let left = number("PA_TEST_FINAL").unwrap_or(0) as usize;
    if is_late() {
        model.download();
        let ranks = model.check();
        assert!(!ranks.is_empty() && !ranks.contains(&origin), "{ranks:?}");
        say(&format!("joined {ranks:?}"));
    }
    let (handle, mut aborted) = (averager.abort_handle(), false);
    // By the number of ranks.
    let used = BTreeMap::from([(averager.world_size(), Used::now(model.device_bytes_used()))]);
    say("ready");
    let (mut rounds, mut good) = (0, 0);
    loop {
        if ENOUGH.load(Ordering::Relaxed) {
            say(&format!("enough {rounds}"));
            return 0;
        }
        model.fill();
        rounds += 1;
        if let Some(pause) = number("PA_TEST_PAUSE_MS") {
            say("pausing");
            std::thread::sleep(Duration::from_millis(pause));
        }
        let doomed = number("PA_TEST_DIE_AT").filter(|_| rounds == 3);
        if let Some(step) = doomed {
            // SAFETY: processes average by the ring: no peer touches the tensors.
            unsafe { averager.leave_before_step(step as u32) };
        }
        let result = averager.average(&mut model);
        model.download();
        let averaged = result.is_ok();
        if let Some(step) = doomed {
            if result.is_err() {
                die();
            }
            say(&format!("no step {step}: it has {}", averager.steps()));
            return 4;
        }
        let error = match result {
            Ok(report) => {
                let ranks = model.check();
                assert_eq!(report.world_size, ranks.len());
                assert!(ranks.contains(&origin) && all.is_none_or(|all| all == ranks), "{ranks:?}");
                good = if ranks.len() == left { good + 1 } else { 0 };
                if good > 3 {
                    let now = Used::now(model.device_bytes_used());
                    if let Some(before) = used.get(&ranks.len()) {
                        assert!(now.is_no_more_than(before), "{now:?}, there were {before:?}");
                    }
                    say(&format!("done {ranks:?}"));
                    return 0;
                }
                all = Some(ranks);
                if !report.join_pending {
                    continue;
                }
                all = None;
                let refills = number("PA_TEST_REFILL").is_some();
                if refills {
                    model.fill(); // of another rank's own when it lets a process in
                }
                match averager.admit_joiner(&mut model) {
                    Ok(report) => {
                        model.download();
                        if refills && !model.is_own() {
                            model.check();
                        }
                        say(&format!("admitted {} {:x}", report.world_size, model.digest()));
                        if number("PA_TEST_ABORT").is_some()
                            && origin == 0
                            && !std::mem::replace(&mut aborted, true)
                        {
                            handle.abort(); // taken in another generation of the world
                        }
                        continue;
                    }
                    Err(Error::Excluded { .. }) => {
                        say("left out");
                        return 5;
                    }
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        say(&format!("failed {} {error:?}", now_us()));
        assert!(error.is_fatal(), "{error}");
        if !averaged {
            model.check_failed(error.tensors() == TensorState::Unchanged, all.as_deref());
        }
        let start = now_us();
        match averager.recover(&mut model) {
            Ok(()) => {}
            Err(Error::Excluded { .. }) => {
                say("left out");
                return 5;
            }
            Err(error) => panic!("recover: {error}"),
        }
        say(&format!("recovered {} {}", now_us() - start, averager.world_size()));
        // What some have half written is made one again.
        match averager.average(&mut model) {
            Ok(_) => {
                model.download();
                say(&format!("agreed {:x}", model.digest()));
            }
            Err(error) => assert!(error.is_fatal(), "{error}"), // a further rank was lost
        }
        all = None;
    }
}

/// What a world takes of its process.
#[derive(Debug)]
pub struct Used {
    files: usize,
    /// Of memory that has a file, such as that which processes share.
    mappings: usize,
    /// Of the device.
    bytes: usize,
}

impl Used {
    pub fn now(bytes: usize) -> Used {
        let mappings = std::fs::read_to_string("/proc/self/maps").unwrap();
        Used {
            files: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            mappings: mappings.matches("/memfd:").count(),
            bytes,
        }
    }

    pub fn is_no_more_than(&self, before: &Used) -> bool {
        // a launch of the simulator's keeps a little for a while; a mailbox is larger
        const SLACK: usize = 64 << 10;
        self.files <= before.files
            && self.mappings <= before.mappings
            && self.bytes <= before.bytes + SLACK
    }
}

/// Minimises Σ (x - target)² with noise of each rank's own; rank 1 of 4 panics half way.
fn train() -> i32 {
    let communicator = join().unwrap();
    let origin = number("PA_TEST_ORIGIN").unwrap_or(communicator.rank() as u64);
    let (dies, pause) = (number("PA_TEST_PANIC"), number("PA_TEST_STEP_US"));
    let target: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut x = vec![vec![0.0f32; 100]];
    let averager = builder(communicator).build(&mut x).unwrap();
    let mut sgd = LocalSgd::new(averager, Schedule::every(8));
    let mut seed = origin + 1;
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        say(&format!("begins at {}", sgd.position()));
        for step in sgd.position()..400 {
            pause.into_iter().for_each(|pause| std::thread::sleep(Duration::from_micros(pause)));
            for (x, target) in x[0].iter_mut().zip(&target) {
                seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let noise = (seed >> 33) as f32 / (1u64 << 31) as f32 - 0.5;
                *x -= 0.05 * (*x - target + noise);
            }
            assert!(dies != Some(step), "as it should");
            if let Err(error) = sgd.step(&mut x) {
                say(&format!("failed {error:?}"));
                sgd.recover(&mut x).unwrap();
            }
        }
        sgd.finish(&mut x).unwrap();
        let loss: f32 = x[0].iter().zip(&target).map(|(x, target)| (x - target).powi(2)).sum();
        let bits = x[0].iter().fold(0u64, |hash, x| hash.rotate_left(7) ^ u64::from(x.to_bits()));
        say(&format!("trained {} {loss} {bits:x}", sgd.averager().world_size()));
    }));
    if result.is_err() {
        std::thread::sleep(Duration::from_millis(200)); // alive, but out of the world
        return 6;
    }
    0
}
