//! Averages of cudarc's slices, ordered by cudarc's events.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::{CudaStream, DriverError};

use super::{device, is_not_captured, CudaParams};
use crate::averager::{Call, Loan, Ordered, Outcome};
use crate::backend::cuda::is_of_capture;
use crate::backend::Unstarted;
use crate::{Error, Lend, LendError, ParamAverager, Parameters, Result};

impl Lend for CudaParams<'_> {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError> {
        average(Loan::ordered(self));
        Ok(())
    }
}

impl Ordered for CudaParams<'_> {
    /// The stream waits for earlier uses; nothing else is enqueued.
    fn with_tensors(
        &mut self,
        with: &mut dyn FnMut(&mut dyn Parameters),
    ) -> std::result::Result<(), String> {
        let (mut tensors, _) = self.order().map_err(reason)?;
        with(&mut tensors);
        Ok(())
    }

    fn begin(
        &mut self,
        averager: &mut ParamAverager,
        call: Call,
        waits: bool,
        start: Instant,
    ) -> Result<Option<Outcome>> {
        let stream = self.stream;
        let is_blocking = averager.check_cudarc(stream, waits)?;
        let (mut tensors, events) = match self.order() {
            Ok(ordered) => ordered,
            Err(error) => return Err(averager.not_beside_a_capture(error)),
        };
        let null = stream.context().default_stream();
        // Tensors that are refused are not used, so nothing need wait for them.
        let none_refused = || tensors.iter().all(|tensor| tensor.refusal().is_none());
        if is_blocking && *stream != null && none_refused() {
            if let Err(error) = null.join(stream) {
                return Err(averager.not_beside_a_capture(error));
            }
        }
        let on = (!is_blocking).then(|| stream.cu_stream().cast());
        // SAFETY: the stream is one of the primary context of this rank's device, which was
        // checked, and the averager keeps it. It, or the null stream behind it, waits for what was
        // done to the tensors, which was checked for each; those that are not so ordered are
        // refused. What is done later waits for the events that are recorded below, or is given to
        // the same stream; or, on a blocking stream, comes after the caller has waited.
        let outcome = unsafe { averager.begin(&mut tensors, call, on, start) }?;
        if outcome.is_none() {
            // To cudarc, a context whose last stream is gone has no need to order uses any more.
            averager.keep(stream.clone());
        }
        if let Err(error) = events.iter().try_for_each(|event| event.record(stream)) {
            // Later uses would not wait for the average, so it is waited for here.
            return Err(averager.device_failed(reason(error)));
        }
        Ok(outcome)
    }
}

impl ParamAverager {
    /// True if the stream is of the blocking kind. An error if it can't be averaged on; `waits`: if
    /// it can't be averaged on by a caller that waits.
    fn check_cudarc(&mut self, stream: &Arc<CudaStream>, waits: bool) -> Result<bool> {
        let refuse = |rank, found: String, expected| {
            Err(Error::InvalidOption { rank, option: "stream", found, expected })
        };
        let (rank, on, context) = (self.rank(), device(stream), stream.context());
        if self.device() != on || !context.is_primary() {
            let kind = if context.is_primary() {
                ""
            } else {
                ", in a context that is not its primary one"
            };
            let expected = "a stream that CudaContext::new(ordinal) made, with the ordinal of \
                            this rank's device";
            let found = format!("one of {on}{kind}, where the rank is on {}", self.device());
            return refuse(rank, found, expected);
        }
        // It may be that a use of a tensor could not be recorded.
        if let Err(error) = context.check_err() {
            let expected = "one whose context has no error left: see what failed, then call again";
            let found = format!("one whose context holds an error, {}", reason(error));
            return refuse(rank, found, expected);
        }
        // A graph that was replayed later would use the tensors when they are not lent.
        if !is_not_captured(stream).map_err(|error| self.not_beside_a_capture(error))? {
            let expected = "one that is not; or RawCudaParams, which is unsafe";
            return refuse(rank, "one that is being captured".into(), expected);
        }
        let raw = stream.cu_stream().cast();
        if waits {
            // SAFETY: a stream of the primary context of this rank's device.
            return Ok(unsafe { self.refusal(raw) }?.is_some());
        }
        // SAFETY: as above.
        unsafe { self.check_stream(raw, waits) }.map(|()| false)
    }

    /// The driver failed with what was to order the null stream, or on it.
    fn not_beside_a_capture(&mut self, error: DriverError) -> Error {
        let failure = reason(error);
        self.unstarted(match is_of_capture(error.0) {
            true => Unstarted::beside_a_capture(&failure),
            false => Unstarted::Failed(failure),
        })
    }
}

/// cudarc's text for an error. There is a stream, so there is a driver.
fn reason(error: DriverError) -> String {
    error.to_string()
}
