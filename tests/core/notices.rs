//! Waits that take long are told of through `tracing`, once, with the ranks that are waited for.

use std::sync::Mutex;
use std::time::Duration;

use param_averager::Algorithm;
use test_support::{notices, ranks};

static TOLD: Mutex<Vec<String>> = Mutex::new(vec![]);

/// Events of ranks whose averagers have this timeout. Other tests of this program have events, too.
fn told(timeout: Duration) -> Vec<String> {
    let mark = format!("{timeout:?}");
    TOLD.lock().unwrap().iter().filter(|text| text.contains(&mark)).cloned().collect()
}

/// Rank 2 of 3 is late for `build`, for an average and for a barrier. All begin with values of
/// their own.
#[test]
fn a_long_wait_is_told_of_once_with_the_rank_that_is_late() {
    const PATIENCE: Duration = Duration::from_millis(300);
    notices::listen(PATIENCE, |text| TOLD.lock().unwrap().push(text.to_owned()));
    for (algorithm, timeout) in [(Algorithm::Direct, 6101), (Algorithm::Ring, 6102)] {
        let timeout = Duration::from_secs(timeout);
        ranks(3, |communicator| {
            let rank = communicator.rank();
            let late = || std::thread::sleep(if rank == 2 { 4 * PATIENCE } else { PATIENCE / 10 });
            let mut model = vec![rank as f32; 100];
            late();
            let builder = test_support::options(communicator).algorithm(algorithm);
            let mut averager = builder.timeout(timeout).build(&mut model).unwrap();
            late();
            averager.average(&mut model).unwrap();
            averager.average(&mut model).unwrap();
            late();
            averager.barrier().unwrap();
            assert_eq!(model, [1.0; 100]);
        });
        let told = told(timeout);
        for rank in [0, 1] {
            let has = |text: String| told.iter().filter(|told| told.starts_with(&text)).count();
            let build = format!("{rank}: after 300ms, rank {rank} waits for rank 2 to build an");
            assert_eq!(has(build), 1, "{told:#?}");
            let barrier =
                format!("{rank}: after 300ms, rank {rank} waits for rank 2 to call barrier,");
            assert_eq!(has(barrier), 1, "{told:#?}");
            let average = format!("{rank}: rank {rank} has waited for ");
            // A second notice comes after twice the time.
            assert!([1, 2].contains(&has(average)), "{told:#?}");
        }
        let late = "in an average for rank 2 to call it, too:";
        let waits = ["to build", "to call barrier", late];
        assert!(told.iter().all(|text| waits.iter().any(|wait| text.contains(wait))), "{told:#?}");
        assert!(told.iter().all(|text| !text.starts_with('2')), "{told:#?}");
    }
    let begins = "0: the ranks begin with different values: [1, 2] differ from rank 0";
    assert!(TOLD.lock().unwrap().iter().filter(|text| *text == begins).count() >= 2);
}
