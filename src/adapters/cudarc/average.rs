//! Averages of cudarc's slices, ordered by cudarc's events.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::{CudaStream, DriverError};

use super::{device, is_not_captured, CudaParams};
use crate::averager::{Call, Loan, Ordered, Outcome};
use crate::backend::cuda::is_of_capture;
use crate::backend::{Order, Unstarted};
use crate::{Error, Lend, LendError, ParamAverager, Parameters, Result};

impl Lend for CudaParams<'_> {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> std::result::Result<(), LendError> {
        average(Loan::ordered(self));
        Ok(())
    }
}

impl Ordered for CudaParams<'_> {
    /// Makes the stream wait for earlier uses, and enqueues nothing else.
    fn with_tensors(
        &mut self,
        rank: usize,
        with: &mut dyn FnMut(&mut dyn Parameters),
    ) -> Result<()> {
        let (mut tensors, _) = self.order().map_err(|error| match failure(error) {
            Unstarted::Refused { found, expected } => {
                Error::InvalidOption { rank, option: "stream", found, expected }
            }
            Unstarted::Failed(reason) => Error::DeviceFailed { rank, source: reason.into() },
            Unstarted::Ended(_) | Unstarted::Halted(_) => unreachable!("nothing was started"),
        })?;
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
        averager.check_cudarc(stream)?;
        let raw = stream.cu_stream().cast();
        let (mut tensors, events) = match self.order() {
            Ok(ordered) => ordered,
            Err(error) => return Err(averager.unstarted(failure(error))),
        };
        let order = if waits { Order::Behind(raw) } else { Order::Within(raw) };
        // SAFETY: the stream belongs to the primary context of this rank's device, which was
        // checked, and the averager keeps it alive. It waits for earlier uses of the tensors, which
        // was checked for each; tensors that are not so ordered are refused. Later uses wait for
        // the events that are recorded below, or are enqueued on the same stream, which waits for
        // the average; or, if this call or its caller `waits`, come after that.
        let outcome = unsafe { averager.begin(&mut tensors, call, order, start) }?;
        if outcome.is_none() {
            // cudarc stops ordering uses in a context whose last stream was dropped.
            averager.keep(stream.clone());
        }
        if let Err(error) = events.iter().try_for_each(|event| event.record(stream)) {
            // Later uses would not wait for the average, so it is waited for here; and peers learn
            // that this rank has completed it, before they learn that it departs.
            if outcome.is_none() {
                let _ = averager.end(start);
            }
            return Err(averager.device_failed(reason(error)));
        }
        Ok(outcome)
    }
}

impl ParamAverager {
    /// Refuses a stream that can't take an average.
    fn check_cudarc(&mut self, stream: &Arc<CudaStream>) -> Result<()> {
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
            let found = format!("a stream of {on}{kind}, where the rank is on {}", self.device());
            return refuse(rank, found, expected);
        }
        // With an error left, a use of a tensor may not have been recorded.
        if let Err(error) = context.check_err() {
            let expected =
                "a stream whose context has no error left: see what failed, then call again";
            let found = format!("a stream whose context holds an error, {}", reason(error));
            return refuse(rank, found, expected);
        }
        // A later replay of the graph would use the tensors outside of their loan.
        if !is_not_captured(stream).map_err(|error| self.unstarted(failure(error)))? {
            let expected = "a stream that is not captured, or RawCudaParams, which is unsafe";
            return refuse(rank, "a stream that is being captured".into(), expected);
        }
        Ok(())
    }
}

/// Failure of the driver at what orders a stream, which a capture may forbid.
fn failure(error: DriverError) -> Unstarted {
    match is_of_capture(error.0) {
        true => Unstarted::beside_a_capture(&reason(error)),
        false => Unstarted::Failed(reason(error)),
    }
}

/// Text of cudarc for an error. There is a stream, so the driver is loaded.
fn reason(error: DriverError) -> String {
    error.to_string()
}
