//! What a rank does: averages until a failure, checks every element, recovers, and says what it saw in lines that begin with @.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use param_averager::{
    Algorithm, Builder, Communicator, Device, Error, Link, LocalSgd, ParamAverager, Schedule, World,
};

use super::model::Model;

pub fn say(line: &str) {
    // Behind whatever the test harness has written.
    let _ = std::io::stdout().write_all(format!("\n@{line}\n").as_bytes());
    let _ = std::io::stdout().flush();
}

pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap())
}

pub fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()
}

/// Ends as a killed process does: nothing is dropped or flushed.
fn die() -> ! {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    unreachable!()
}

pub fn run(role: &str) {
    let code = match role {
        "meet" => meet(),
        "survive" => survive(),
        "train" => train(),
        "two" => two(),
        other => panic!("no role {other}"),
    };
    std::process::exit(code);
}

/// That of this ordinal, or the CPU.
pub fn device() -> Device {
    number("PA_TEST_DEVICE").map_or(Device::cpu(), |ordinal| Device::cuda(ordinal as usize))
}

pub fn join() -> Result<Communicator, Error> {
    let timeout = Duration::from_millis(number("PA_TEST_MEET_MS").unwrap_or(20_000));
    match number("PA_TEST_RANK") {
        None => World::from_env(device()),
        Some(rank) => World::builder()
            .rank(rank as usize)
            .world_size(number("PA_TEST_WORLD").unwrap() as usize)
            .rendezvous(std::env::var("PA_TEST_NAME").unwrap())
            .device(device())
            .timeout(timeout)
            .join(),
    }
}

pub fn builder(communicator: Communicator) -> Builder {
    let timeout = Duration::from_millis(number("PA_TEST_TIMEOUT_MS").unwrap_or(20_000));
    let link = match std::env::var("PA_TEST_LINK").as_deref() {
        Ok("peer") => Link::Peer,
        Ok("host") => Link::Host,
        _ => Link::Auto,
    };
    let builder = match device() == Device::cpu() {
        true => ParamAverager::builder(communicator),
        false => {
            ParamAverager::builder(communicator).channels(number("PA_TEST_CHANNELS").unwrap_or(2) as u32)
        }
    };
    builder
        .link(link)
        .timeout(timeout)
        .all_or_nothing(number("PA_TEST_ALL_OR_NOTHING") != Some(0))
        .chunk_bytes(1 << 10)
}

/// Finds the others, averages once, says what happened.
fn meet() -> i32 {
    if let Some(most) = number("PA_TEST_FILES") {
        let limit = rustix::process::Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
    }
    let mut model = vec![vec![0.0f32; number("PA_TEST_ELEMENTS").unwrap_or(1000) as usize], vec![1.0; 10]];
    let result = join().and_then(|communicator| {
        let rank = communicator.rank();
        model[0].fill(rank as f32);
        let mut builder = builder(communicator);
        if number("PA_TEST_SLOTS").is_some() {
            builder = builder.slots(8);
        }
        let mut averager = builder.build(&mut model)?;
        assert_eq!(averager.algorithm(), Algorithm::Ring);
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

/// Set by a line on the standard input: enough.
static ENOUGH: AtomicBool = AtomicBool::new(false);

/// Averages, and recovers where somebody was lost, until it was done three times with no more than `PA_TEST_FINAL` ranks, or
/// until it is told to end.
fn survive() -> i32 {
    std::thread::spawn(|| {
        if std::io::stdin().read_line(&mut String::new()).is_ok_and(|bytes| bytes > 0) {
            ENOUGH.store(true, Ordering::Relaxed);
        }
    });
    let communicator = join().unwrap();
    let origin = communicator.rank();
    // Who takes part, where that is known.
    let mut all = Some((0..communicator.world_size()).collect::<Vec<usize>>());
    let mut model = Model::new(origin, device());
    let mut averager = builder(communicator).build(&mut model).unwrap();
    let left = number("PA_TEST_FINAL").unwrap_or(0) as usize;
    let before = Used::now(model.device_bytes_used());
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
            averager.leave_before_step(step as u32);
        }
        let result = averager.average(&mut model);
        model.download();
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
                    assert!(now.is_no_more_than(&before), "{now:?}, there were {before:?}");
                    say(&format!("done {ranks:?}"));
                    return 0;
                }
                all = Some(ranks);
                continue;
            }
            Err(error) => error,
        };
        say(&format!("failed {} {error:?}", now_us()));
        assert!(error.is_fatal(), "{error}");
        model.check_failed(error.tensors_unchanged(), all.as_deref());
        let start = now_us();
        match averager.recover(&mut model) {
            Ok(()) => {}
            Err(Error::LeftOut { .. }) => {
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

/// Two averagers, in turn, until one fails; then both recover.
fn two() -> i32 {
    let communicator = join().unwrap();
    let mut models = [vec![vec![1.0f32; 3000]], vec![vec![2.0f32; 30]]];
    let mut build = |index: usize| builder(communicator.clone()).build(&mut models[index]).unwrap();
    let mut averagers = [build(0), build(1)];
    say("ready");
    while averagers.iter_mut().zip(&mut models).all(|(averager, model)| averager.average(model).is_ok()) {}
    for (averager, model) in averagers.iter_mut().zip(&mut models) {
        if averager.average(model).is_ok() {
            return 7; // a rank is gone, so it can't be
        }
        averager.recover(model).unwrap();
    }
    for (averager, model) in averagers.iter_mut().zip(&mut models) {
        averager.average(model).unwrap();
    }
    assert!(models[0][0].iter().all(|&x| x == 1.0) && models[1][0].iter().all(|&x| x == 2.0));
    say(&format!("two of {}", averagers[1].world_size()));
    0
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
        const SLACK: usize = 64 << 10; // a launch of the simulator's keeps a little for a while; a mailbox is larger
        self.files <= before.files && self.mappings <= before.mappings && self.bytes <= before.bytes + SLACK
    }
}

/// Minimises Σ (x - target)² with noise of each rank's own; rank 1 of 4 panics half way.
fn train() -> i32 {
    let communicator = join().unwrap();
    let (origin, dies) = (communicator.rank() as u64, number("PA_TEST_PANIC"));
    let target: Vec<f32> = (0..100).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut x = vec![vec![0.0f32; 100]];
    let averager = builder(communicator).build(&mut x).unwrap();
    let mut sgd = LocalSgd::new(averager, Schedule::every(8));
    let mut seed = origin + 1;
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        for step in 0..400u64 {
            for (x, target) in x[0].iter_mut().zip(&target) {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
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
