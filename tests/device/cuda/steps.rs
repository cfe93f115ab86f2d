//! Steps of `LocalSgd` on a trainer's own stream: enqueued, and their outcome asked for later.

use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use std::time::Duration;
use test_support::ranks_on;

use super::model::Model;
use super::scenarios::GPU;

const ELEMENTS: usize = 20_000;

/// A rank that trains: each of its steps fills its weights with one value.
struct Trainer {
    sgd: LocalSgd,
    model: Model,
    stream: std::sync::Arc<cudarc::driver::CudaStream>,
}

impl Trainer {
    fn new(communicator: Communicator, algorithm: Algorithm, rejects: bool) -> Self {
        Trainer::of(communicator, algorithm, rejects, Schedule::every(2))
    }

    fn of(
        communicator: Communicator,
        algorithm: Algorithm,
        rejects: bool,
        schedule: Schedule,
    ) -> Self {
        let mut model = Model::new(GPU, &[(Dtype::F32, ELEMENTS, 0)], 9);
        let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
        let builder = test_support::options(communicator).algorithm(algorithm).channels(2);
        let builder = builder.reject_non_finite(rejects).timeout(Duration::from_secs(60));
        // SAFETY: own memory and stream, which live until all is done.
        let mut params = unsafe { RawCudaParams::new(stream.cu_stream().cast(), &mut model) };
        let averager = builder.build(&mut params).unwrap();
        Trainer { sgd: LocalSgd::new(averager, schedule), model, stream }
    }

    /// Enqueues a step that fills the weights, and then whatever the schedule says.
    fn step(&mut self, value: f32) -> Result<Action> {
        let (weights, raw) = (self.model.tensor_address(0), self.stream.cu_stream());
        // SAFETY: as in `new`.
        unsafe {
            sys::cuMemsetD32Async(weights, value.to_bits(), ELEMENTS, raw).result().unwrap();
            self.sgd.step(&mut RawCudaParams::new(raw.cast(), &mut self.model))
        }
    }

    fn finish(&mut self) -> Result<Action> {
        let raw = self.stream.cu_stream();
        // SAFETY: as in `new`.
        unsafe { self.sgd.finish(&mut RawCudaParams::new(raw.cast(), &mut self.model)) }
    }

    fn done(&mut self) -> Result<Action> {
        let raw = self.stream.cu_stream();
        // SAFETY: as in `new`.
        unsafe { self.sgd.done(&mut RawCudaParams::new(raw.cast(), &mut self.model)) }
    }

    /// Value of all weights, behind the stream's work.
    fn value(&mut self) -> f32 {
        self.stream.synchronize().unwrap();
        self.model.download();
        let value = f32::from_ne_bytes(self.model.tensor(0)[..4].try_into().unwrap());
        assert!(self.model.tensor(0).chunks_exact(4).all(|x| x == value.to_ne_bytes()));
        value
    }
}

pub fn steps() {
    for algorithm in [Algorithm::Ring, Algorithm::Direct] {
        enqueued(algorithm);
        failing(algorithm);
        ends(algorithm);
        adapting(algorithm);
    }
}

/// Schedules that adapt decide one average later than where averages are waited for, whether a rank
/// has looked at the outcome of the last one or not.
fn adapting(algorithm: Algorithm) {
    // (0.2 / rate)² is 1 up to step 4, and 4 then: at step 6, whose rate all ranks know at step 8.
    let quadratic = (Schedule::quadratic(0.2, 2), &[2, 4, 6, 8, 12, 16][..]);
    // Two averages are timed and told in the 3rd; its values are known to all in the 4th.
    let overhead = (Schedule::overhead(1e6), &[10, 20, 30, 40, 49, 57][..]);
    for (schedule, expected) in [quadratic, overhead] {
        let seen = ranks_on(GPU, 3, |communicator| {
            let rank = communicator.rank();
            let mut trainer = Trainer::of(communicator, algorithm, false, schedule);
            let last = *expected.last().unwrap();
            let mut seen = vec![];
            for step in 1..=last {
                std::thread::sleep(Duration::from_millis(rank as u64));
                trainer.sgd.set_learning_rate(if step <= 4 { 0.2 } else { 0.1 });
                match trainer.step(rank as f32).unwrap() {
                    Action::Enqueued => seen.push(step),
                    action => assert!(matches!(action, Action::Counted { .. }), "{action:?}"),
                }
                if rank == 1 {
                    trainer.sgd.wait().unwrap();
                }
                // A state has what was agreed and is not used yet, but no times.
                if rank == 2 && schedule == quadratic.0 {
                    let state = trainer.sgd.save().unwrap();
                    trainer.sgd.load(&state).unwrap();
                }
            }
            trainer.finish().unwrap();
            (trainer, seen)
        });
        let seen: Vec<&Vec<u64>> = seen.iter().map(|(_, seen)| seen).collect();
        assert!(seen.iter().all(|of| **of == *expected), "{schedule}: {seen:?}");
    }
}

/// The mean is there for later work of the stream, though the host waits once, at the end.
fn enqueued(algorithm: Algorithm) {
    ranks_on(GPU, 3, |communicator| {
        let rank = communicator.rank();
        let mut copies: Vec<Model> =
            (0..6).map(|_| Model::new(GPU, &[(Dtype::F32, ELEMENTS, 0)], 10)).collect();
        let mut trainer = Trainer::new(communicator, algorithm, false);
        for (step, copy) in copies.iter_mut().enumerate() {
            let made = trainer.step((10 * step + rank) as f32).unwrap();
            let expected = match step % 2 {
                0 => Action::Counted { until_next: 1 },
                _ => Action::Enqueued,
            };
            assert_eq!(made, expected);
            let (from, to) = (trainer.model.tensor_address(0), copy.tensor_address(0));
            let raw = trainer.stream.cu_stream();
            // SAFETY: own memory and stream, which live until all is done.
            unsafe { result::memcpy_dtod_async(to, from, 4 * ELEMENTS, raw) }.unwrap();
        }
        let report = trainer.sgd.wait().unwrap().expect("an average was enqueued");
        assert_eq!((report.world_size, report.bytes), (3, 4 * ELEMENTS as u64));
        assert_eq!((trainer.sgd.wait().unwrap(), trainer.sgd.averages()), (None, 3));
        trainer.stream.synchronize().unwrap();
        for (step, copy) in copies.iter_mut().enumerate() {
            copy.download();
            let expected = (10 * step + if step % 2 == 0 { rank } else { 1 }) as f32;
            assert!(copy.tensor(0).chunks_exact(4).all(|x| x == expected.to_ne_bytes()), "{step}");
        }
        assert_eq!(trainer.finish().unwrap(), Action::Unneeded);
        trainer // ranks leave together
    });
}

/// A failure that is not fatal: the next average is made all the same, on ranks that know of the
/// failure already, and on those that learn of it there.
fn failing(algorithm: Algorithm) {
    ranks_on(GPU, 3, |communicator| {
        let rank = communicator.rank();
        let mut trainer = Trainer::new(communicator, algorithm, true);
        let bad = |error: &Error| matches!(error, Error::NonFinite { rank: 1, .. });
        trainer.step(0.0).unwrap();
        let value = if rank == 1 { f32::NAN } else { 5.0 };
        assert_eq!(trainer.step(value).unwrap(), Action::Enqueued);
        if rank == 0 {
            let error = trainer.sgd.wait().unwrap_err();
            assert!(bad(&error), "{error}");
        }
        trainer.step(1.0).unwrap();
        let made = trainer.step(rank as f32);
        match rank {
            0 => assert_eq!(made.unwrap(), Action::Enqueued),
            _ => assert!(bad(made.as_ref().unwrap_err()), "{made:?}"),
        }
        assert_eq!(trainer.value(), 1.0);
        // Found by the last average, which is waited for.
        trainer.step(1.0).unwrap();
        assert_eq!(trainer.step(value).unwrap(), Action::Enqueued);
        let raw = trainer.stream.cu_stream();
        let weights = trainer.model.tensor_address(0);
        let own = (2.0 * rank as f32).to_bits();
        // SAFETY: own memory and stream, which live until all is done.
        unsafe { sys::cuMemsetD32Async(weights, own, ELEMENTS, raw) }.result().unwrap();
        if rank == 2 {
            trainer.sgd.averager(); // waits for it, and keeps its error
        }
        let error = trainer.finish().unwrap_err();
        assert!(matches!(&error, Error::AfterAverage { averaged: Some(_), cause } if bad(cause)));
        assert_eq!((error.tensors(), trainer.value()), (TensorState::Averaged, 2.0));
        assert_eq!(trainer.finish().unwrap(), Action::Unneeded);
        // Found by `done`, before the rank takes part; one rank knows of it already.
        trainer.step(1.0).unwrap();
        assert_eq!(trainer.step(value).unwrap(), Action::Enqueued);
        if rank == 0 {
            assert!(bad(&trainer.sgd.wait().unwrap_err()));
        } else {
            let error = trainer.done().unwrap_err();
            assert!(bad(&error), "{error}");
        }
        trainer.stream.synchronize().unwrap();
        // SAFETY: as above.
        unsafe { sys::cuMemsetD32Async(weights, own, ELEMENTS, raw) }.result().unwrap();
        trainer.done().unwrap();
        assert_eq!((trainer.value(), trainer.sgd.position()), (2.0, 8));
        trainer
    });
}

/// A rank that leaves ends the average that waits for it, and every later one.
fn ends(algorithm: Algorithm) {
    ranks_on(GPU, 2, |communicator| {
        let rank = communicator.rank();
        let mut trainer = Trainer::new(communicator, algorithm, false);
        trainer.step(0.0).unwrap();
        if rank == 1 {
            return; // leaves before its average
        }
        let error = trainer.step(7.0).unwrap_err();
        assert!(matches!(error, Error::PeerLost { rank: 1, committed: false, .. }), "{error}");
        assert_eq!(trainer.value(), 7.0);
        trainer.step(8.0).unwrap();
        let error = trainer.step(9.0).unwrap_err();
        assert!(matches!(error, Error::Poisoned { .. }), "{error}");
    });
}
