//! Role of a rank that averages, checks every element, and recovers when a peer is lost.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use param_averager::{Error, TensorState};

use super::worker::{builder, device, die, is_late, join, now_us, number, say, Used};
use super::Model;

/// Set by lines on the standard input: `end` and `go`.
static END_REQUESTED: AtomicBool = AtomicBool::new(false);
static MAY_GO: AtomicBool = AtomicBool::new(false);

/// Averages, and recovers when a peer was lost, until four averages have had `PA_TEST_FINAL` ranks,
/// or until a line `end` on the standard input. With `PA_TEST_HOLD`, begins at a line `go`.
pub fn survive() -> i32 {
    std::thread::spawn(|| {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            let word = if line == "go" { &MAY_GO } else { &END_REQUESTED };
            word.store(true, Ordering::Relaxed);
        }
    });
    let mut model = Model::new(0, device());
    if is_late() {
        model.spoil(); // a joiner's own values must reach no model
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
            // a peer was lost while joining: join again
            Err(error) => assert!(is_late() && error.is_fatal(), "{error}"),
        }
    };
    let origin = number("PA_TEST_ORIGIN").map_or(communicator.rank(), |origin| origin as usize);
    model.origin = origin;
    // The ranks that take part, where they are known.
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
    // Resources by the number of ranks.
    let used = BTreeMap::from([(averager.world_size(), Used::now(model.device_bytes_used()))]);
    say("ready");
    while number("PA_TEST_HOLD").is_some() && !MAY_GO.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let (mut rounds, mut good) = (0, 0);
    loop {
        if END_REQUESTED.load(Ordering::Relaxed) {
            say(&format!("ended {rounds}"));
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
                    model.fill(); // own values, not the mean, when it admits a process
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
        // An average makes the ranks equal again where the failed one wrote half.
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
