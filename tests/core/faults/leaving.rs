//! A rank that leaves at one step of an average, and the tensors of each survivor afterwards.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use param_averager::{Algorithm, Error, TensorState};
use test_support::{bits, ranks, Guarded};

use super::{builder, model, GRACE, TIMEOUT};

/// Has rank 1 leave before this step of its second average. Survivors build a new world and agree
/// again.
pub fn leave_at(n: usize, way: (Algorithm, bool), step: u32) {
    let leaver = 1;
    let returned = AtomicUsize::new(0);
    let context = format!("{way:?}, {n} ranks, step {step}");
    let outcomes = ranks(n, |communicator| {
        let rank = communicator.rank();
        let mut model = model(rank);
        let mut averager = builder(communicator, way).build(&mut model).unwrap();
        averager.average(&mut model).unwrap();
        model = super::model(rank + 100);
        let held = bits(&model);
        if rank == leaver {
            // SAFETY: `model` is returned to the test, which drops it when all ranks have returned.
            unsafe { averager.leave_before_step(step) };
        }
        let start = Instant::now();
        let result = averager.average(&mut model);
        let elapsed = start.elapsed();
        returned.fetch_add(1, Ordering::Relaxed);
        while rank == leaver && returned.load(Ordering::Relaxed) < n {
            std::thread::sleep(Duration::from_millis(20)); // silent, and not yet gone
        }
        (result, held, model, elapsed)
    });
    let mean: Vec<Vec<f64>> = (0..outcomes[0].2.len())
        .map(|t| {
            let originals: Vec<Vec<Guarded>> =
                (0..n).map(|rank| super::model(rank + 100)).collect();
            let count = originals[0][t].elements;
            (0..count)
                .map(|i| originals.iter().map(|m| m[t].get(i)).sum::<f64>() / n as f64)
                .collect()
        })
        .collect();
    let before_commit: Vec<bool> = outcomes
        .iter()
        .enumerate()
        .filter(|(rank, _)| *rank != leaver)
        .map(|(rank, (result, held, model, elapsed))| {
            assert!(*elapsed < 2 * TIMEOUT + GRACE, "{context}: rank {rank} took {elapsed:?}");
            assert!(model.iter().all(Guarded::guards_are_whole), "{context}: rank {rank}");
            let Err(error) = result else { return false };
            let named = match error {
                Error::Timeout { rank, .. } | Error::PeerLost { rank, .. } => *rank,
                other => panic!("{context}: rank {rank} got {other}"),
            };
            assert_eq!(named, leaver, "{context}: rank {rank} says {error}");
            if error.tensors() == TensorState::Unchanged {
                assert_eq!(&bits(model), held, "{context}: rank {rank} says {error}");
            } else {
                // Each element is the rank's own or the mean.
                let original = super::model(rank + 100);
                for (t, tensor) in model.iter().enumerate() {
                    for (i, &mean) in mean[t].iter().enumerate() {
                        let (now, own) = (tensor.get(i), original[t].get(i));
                        let near = 0.02 * (1.0 + own.abs());
                        assert!(
                            now == own || (now - mean).abs() < near,
                            "{context}: rank {rank}, tensor {t}, element {i}: {now} is neither \
                             {own} nor {mean}"
                        );
                    }
                }
            }
            error.tensors() == TensorState::Unchanged
        })
        .collect();
    // Either all survivors failed before the commit or none did, and then they all say the same.
    assert!(
        before_commit.windows(2).all(|pair| pair[0] == pair[1]),
        "{context}: {before_commit:?}"
    );
    let errors: Vec<_> = outcomes
        .iter()
        .enumerate()
        .filter(|(r, _)| *r != leaver)
        .map(|(_, o)| o.0.clone())
        .collect();
    if before_commit[0] {
        assert!(errors.windows(2).all(|pair| pair[0] == pair[1]), "{context}: {errors:?}");
    }
    // A later average among the survivors makes them agree.
    let survivors: Vec<_> = outcomes
        .into_iter()
        .enumerate()
        .filter(|(rank, _)| *rank != leaver)
        .map(|(_, o)| std::sync::Mutex::new(o.2))
        .collect();
    let after = ranks(n - 1, |communicator| {
        let mut model = survivors[communicator.rank()].lock().unwrap();
        let mut averager = builder(communicator, way).build(&mut *model).unwrap();
        averager.average(&mut *model).unwrap();
        bits(&model)
    });
    assert!(after.windows(2).all(|pair| pair[0] == pair[1]), "{context}: survivors differ");
}
