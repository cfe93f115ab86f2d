//! Waits of all ranks in every rank's telemetry, of ranks that are processes.

use std::time::Duration;

use param_averager::Report;
use test_support::process::start_all;
use test_support::rank::{builder, die, join, say};

/// Time by which rank 1 comes late, and for a tenth of which, at least, the others wait.
const LATE: Duration = Duration::from_secs(1);

/// Role: averages, the first time late as rank 1. Then rank 0 dies, and the others go on.
pub fn waits() -> i32 {
    let communicator = join().unwrap();
    let rank = communicator.rank();
    let mut model = vec![rank as f32; 5000];
    let mut averager = builder(communicator).telemetry(true).build(&mut model).unwrap();
    averager.barrier().unwrap();
    if rank == 1 {
        std::thread::sleep(LATE);
    }
    let nanoseconds = |report: &Report| -> Vec<u128> {
        report.telemetry.unwrap().waits().iter().map(Duration::as_nanos).collect()
    };
    for _ in 0..3 {
        let report = averager.average(&mut model).unwrap();
        say(&format!("own {}", report.waited.as_nanos()));
        say(&format!("all {:?}", nanoseconds(&report)));
    }
    averager.barrier().unwrap();
    if rank == 0 {
        die();
    }
    averager.average(&mut model).unwrap_err();
    averager.recover(&mut model).unwrap();
    say(&format!("left {:?}", nanoseconds(&averager.average(&mut model).unwrap())));
    0
}

pub fn every_rank_tells_how_long_all_have_waited() {
    let mut ranks = start_all("waits", 3, |_| vec![]);
    for (rank, process) in ranks.iter_mut().enumerate() {
        let code = if rank == 0 { None } else { Some(0) };
        assert_eq!(process.end(), code, "{rank}: {:#?}", process.output);
    }
    let numbers = |text: &str| -> Vec<u128> {
        let list = text.trim_matches(['[', ']']);
        list.split(", ").map(|number| number.parse().unwrap()).collect()
    };
    let own: Vec<Vec<u128>> = ranks
        .iter()
        .map(|rank| rank.said("own").iter().map(|own| own.parse().unwrap()).collect())
        .collect();
    for rank in &ranks {
        let all: Vec<Vec<u128>> = rank.said("all").iter().map(|all| numbers(all)).collect();
        assert_eq!((all.len(), &all[0][..]), (3, &[0, 0, 0][..]));
        for average in [1, 2] {
            let before: Vec<u128> = own.iter().map(|own| own[average - 1]).collect();
            assert_eq!(all[average], before, "{average}");
        }
        assert!([0, 2].iter().all(|&rank| all[1][rank] > LATE.as_nanos() / 10), "{all:?}");
        assert!(all[1][1] < all[1][0].max(all[1][2]), "{all:?}");
    }
    // In the view without rank 0 nothing is known yet.
    assert!(ranks[1..].iter().all(|rank| rank.said("left") == ["[0, 0]"]));
}
