//! Ranks as threads that end together.

use std::any::Any;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::Mutex;

use super::communicator::Communicator;
use crate::error::ErrorKind;
use crate::sync::lock;
use crate::{Device, Error};

impl Communicator {
    /// Runs one rank for each device, each on a thread of its own, and returns their results by
    /// rank when all have ended. For ranks that are threads of this process; the devices are those
    /// of [`from_devices`](Self::from_devices).
    ///
    /// # Errors
    /// The first error in time. An [`Error`] that only says that a peer has left or is late follows
    /// from that peer's own failure, so it is returned only if there is no other. The errors of
    /// [`from_devices`](Self::from_devices) come before any rank begins.
    ///
    /// # Panics
    /// If a rank panics, unless another one had failed before, with its panic, after all ranks have
    /// ended.
    ///
    /// ```
    /// use param_averager::{Communicator, Device, ParamAverager, Result};
    ///
    /// let means = Communicator::run(&[Device::cpu(); 2], |communicator| -> Result<f32> {
    ///     let mut model = vec![0.0f32; 1000];
    ///     let mut averager = ParamAverager::builder(communicator).build(&mut model)?;
    ///     model.fill(averager.rank() as f32);
    ///     averager.average(&mut model)?;
    ///     Ok(model[0])
    /// })?;
    /// assert_eq!(means, [0.5, 0.5]);
    /// # Ok::<(), param_averager::Error>(())
    /// ```
    pub fn run<T: Send, E: From<Error> + Send + 'static>(
        devices: &[Device],
        rank: impl Fn(Communicator) -> Result<T, E> + Sync,
    ) -> Result<Vec<T>, E> {
        let world = Communicator::from_devices(devices)?;
        let failed: Mutex<Option<Failure<E>>> = Mutex::new(None);
        let results: Vec<Option<T>> = std::thread::scope(|scope| {
            let begin = |communicator| {
                let (rank, failed) = (&rank, &failed);
                scope.spawn(move || {
                    let failure = match catch_unwind(AssertUnwindSafe(|| rank(communicator))) {
                        Ok(Ok(result)) => return Some(result),
                        Ok(Err(error)) => Failure::Error(error),
                        Err(panic) => Failure::Panic(panic),
                    };
                    let mut first = lock(failed);
                    let follows = |failure: &Failure<E>| failure.follows_from_another();
                    if first.as_ref().is_none_or(|first| follows(first) && !follows(&failure)) {
                        *first = Some(failure);
                    }
                    None
                })
            };
            let threads: Vec<_> = world.into_iter().map(begin).collect();
            threads.into_iter().map(|thread| thread.join().expect("it catches panics")).collect()
        });
        let failed = lock(&failed).take();
        match failed {
            None => Ok(results.into_iter().flatten().collect()),
            Some(Failure::Error(error)) => Err(error),
            Some(Failure::Panic(panic)) => resume_unwind(panic),
        }
    }
}

enum Failure<E> {
    Error(E),
    Panic(Box<dyn Any + Send>),
}

impl<E: 'static> Failure<E> {
    /// True if a peer's failure must be the reason.
    fn follows_from_another(&self) -> bool {
        let Failure::Error(error) = self else { return false };
        type Boxed = Box<dyn std::error::Error + Send + Sync>;
        let error = error as &dyn Any;
        let boxed = || error.downcast_ref::<Boxed>()?.downcast_ref::<Error>();
        error
            .downcast_ref::<Error>()
            .or_else(boxed)
            .is_some_and(|error| error.kind() == ErrorKind::Peer)
    }
}
