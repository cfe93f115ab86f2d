//! Waits that take long are told of through `tracing`, once, with the ranks that are waited for.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use param_averager::Algorithm;
use test_support::{notices, ranks};

static TOLD: Mutex<Vec<String>> = Mutex::new(vec![]);

/// Events of ranks whose averagers have this timeout. Other tests of this program have events, too.
fn told(timeout: Duration) -> Vec<String> {
    let mark = format!("{timeout:?}");
    TOLD.lock().unwrap().iter().filter(|text| text.contains(&mark)).cloned().collect()
}

/// Texts of this rank about its wait for rank 2, and perhaps others, in this call.
fn of_call(timeout: Duration, rank: usize, call: &str) -> usize {
    let is_it = |text: &&String| text.starts_with(&format!("{rank}: ")) && text.contains(call);
    let told = told(timeout);
    let all: Vec<&String> = told.iter().filter(is_it).collect();
    assert!(all.iter().all(|text| text.contains("2 to ")), "{all:#?}");
    all.len()
}

/// Rank 2 of 3 is late for `build`, for an average and for a barrier: it comes when the others have
/// told of it. All begin with values of their own.
#[test]
fn a_long_wait_is_told_of_once_with_the_rank_that_is_late() {
    const PATIENCE: Duration = Duration::from_millis(300);
    notices::listen(PATIENCE, |text| TOLD.lock().unwrap().push(text.to_owned()));
    for (algorithm, timeout) in [(Algorithm::Direct, 6101), (Algorithm::Ring, 6102)] {
        let timeout = Duration::from_secs(timeout);
        ranks(3, |communicator| {
            let rank = communicator.rank();
            // A second notice of an average comes after twice the time.
            let late_for = |call: &str, most: usize| {
                let told = |rank| of_call(timeout, rank, call);
                let begin = Instant::now();
                while rank == 2 && (0..2).any(|rank| told(rank) == 0) {
                    assert!(begin.elapsed() < Duration::from_secs(120), "{call}: none");
                    std::thread::sleep(PATIENCE / 10);
                }
                if rank == 2 {
                    std::thread::sleep(2 * PATIENCE); // time for more, which there is not
                    let all = [told(0), told(1)];
                    assert!(all.iter().all(|&told| told <= most), "{call}: {all:?}");
                }
            };
            let mut model = vec![rank as f32; 100];
            let builder = test_support::options(communicator).algorithm(algorithm);
            late_for("to build an averager", 1);
            let mut averager = builder.timeout(timeout).build(&mut model).unwrap();
            late_for("in an average for", usize::MAX);
            averager.average(&mut model).unwrap();
            averager.average(&mut model).unwrap();
            late_for("to call barrier,", 1);
            averager.barrier().unwrap();
            assert_eq!(model, [1.0; 100]);
        });
    }
    // A rank whose own stage takes long waits for nothing; its peer waits for it.
    const TIMEOUT: Duration = Duration::from_secs(6103);
    ranks(2, |communicator| {
        let rank = communicator.rank();
        let of_average = |rank: usize| {
            let is_it = |text: &&String| text.starts_with(&format!("{rank}: rank {rank} has"));
            told(TIMEOUT).iter().filter(is_it).count()
        };
        let mut model = vec![rank as f32; 100];
        let builder = test_support::options(communicator).timeout(TIMEOUT).stage(move |_| {
            if rank == 0 {
                std::thread::sleep(PATIENCE); // for a notice of what rank 0 has waited for before
                let (begin, before) = (Instant::now(), of_average(0));
                while of_average(1) == 0 {
                    assert!(begin.elapsed() < Duration::from_secs(120), "none");
                    std::thread::sleep(PATIENCE / 10);
                }
                std::thread::sleep(3 * PATIENCE);
                assert_eq!(of_average(0), before, "{:#?}", told(TIMEOUT));
            }
            Ok(())
        });
        builder.build(&mut model).unwrap().average(&mut model).unwrap();
        assert_eq!(model, [0.5; 100]);
    });
    let begins = "0: the ranks begin with different values: [1, 2] differ from rank 0";
    assert!(TOLD.lock().unwrap().iter().filter(|text| *text == begins).count() >= 2);
}
