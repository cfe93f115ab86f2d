//! Waits of all ranks in every rank's report, one average later.

use std::time::Duration;

use param_averager::{Builder, Error, Outer, ParamAverager, Report, Start};
use test_support::ranks;

use super::telemetry::WAYS;

/// Waits of the average in which one rank came late, as the reports of the next one tell them.
fn waits_for_a_late_rank(n: usize, late: usize, options: impl Fn(Builder) -> Builder + Sync) {
    let all = ranks(n, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![rank as f32; 5000];
        let builder = options(ParamAverager::builder(communicator)).telemetry(true);
        let mut averager = builder.build(&mut model).unwrap();
        averager.barrier().unwrap();
        if rank == late {
            std::thread::sleep(LATE);
        }
        let of_late = averager.average(&mut model).unwrap();
        let next = averager.average(&mut model).unwrap();
        let after = averager.average(&mut model).unwrap();
        (of_late, next, after)
    });
    let of = |report: &Report| report.telemetry.unwrap().waits().to_vec();
    for (of_late, next, after) in &all {
        // One number for each rank, that rank's own, and the same on all.
        let own = |report: fn(&Reports) -> &Report| -> Vec<Duration> {
            all.iter().map(|reports| report(reports).waited).collect()
        };
        assert_eq!(of(next), own(|reports| &reports.0));
        assert_eq!(of(after), own(|reports| &reports.1));
        assert_eq!(of(of_late), of(&all[0].0));
        let waits = of(next);
        let mut others = (0..n).filter(|&rank| rank != late);
        assert!(others.all(|rank| waits[rank] > LATE / 10), "{waits:?}");
        assert!(waits.iter().any(|wait| *wait > waits[late]), "{waits:?}");
    }
}

/// Time by which a rank comes late, and for a tenth of which, at least, the others wait.
const LATE: Duration = Duration::from_secs(1);

type Reports = (Report, Report, Report);

#[test]
fn every_rank_tells_how_long_all_have_waited() {
    for ((algorithm, all_or_nothing), (n, late)) in WAYS.into_iter().zip([(2, 1), (4, 0), (2, 0)]) {
        waits_for_a_late_rank(n, late, |builder| {
            builder.algorithm(algorithm).all_or_nothing(all_or_nothing).channels(2)
        });
    }
    waits_for_a_late_rank(3, 2, |builder| builder.outer(Outer::diloco()));
}

/// Nothing is known before the first average.
#[test]
fn waits_begin_at_zero() {
    let waits = |n: usize, start: Start, outer: Outer| {
        ranks(n, |communicator| {
            let mut model = vec![communicator.rank() as f32; 100];
            let builder = ParamAverager::builder(communicator).telemetry(true).outer(outer);
            let mut averager = builder.start_from(start).build(&mut model).unwrap();
            let told = averager.average(&mut model).unwrap().telemetry.unwrap();
            told.waits().to_vec()
        })
    };
    assert_eq!(waits(3, Start::Own, Outer::mean()), vec![vec![Duration::ZERO; 3]; 3]);
    // A rank alone is listed, too, after the average that `build` makes.
    assert_eq!(waits(1, Start::Rank(0), Outer::diloco())[0].len(), 1);
}

/// The wait in an average that fails is told by the next one.
#[test]
fn waits_in_an_average_that_fails_are_told() {
    let all = ranks(2, |communicator| {
        let rank = communicator.rank();
        let mut model = vec![1.0f32; 100];
        let builder = ParamAverager::builder(communicator).telemetry(true);
        let mut averager = builder.reject_non_finite(true).build(&mut model).unwrap();
        averager.barrier().unwrap();
        if rank == 1 {
            std::thread::sleep(LATE);
            model[7] = f32::NAN;
        }
        assert!(matches!(averager.average(&mut model), Err(Error::NonFinite { rank: 1, .. })));
        model[7] = 1.0;
        averager.average(&mut model).unwrap().telemetry.unwrap()
    });
    for told in &all {
        let waits = told.waits();
        assert!(waits[0] > LATE / 10 && waits[1] < waits[0], "{waits:?}");
        assert_eq!(waits, all[0].waits());
    }
}
