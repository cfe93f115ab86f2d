//! Averages of cudarc's slices, ordered by cudarc's events.

use std::sync::Arc;
use std::time::Instant;

use cudarc::driver::{CudaStream, DriverError};

use super::{device, is_not_captured, CudaParams};
use crate::averager::{Builder, Call, Outcome, Plain, Tensors};
use crate::backend::cuda::is_of_capture;
use crate::backend::Unstarted;
use crate::local_sgd::Action;
use crate::{Error, LocalSgd, ParamAverager, Pending, Report, Result};

impl Builder {
    /// Builds the averager for cudarc's slices, as [`build`](Builder::build) does for others.
    /// Nothing is enqueued but waits.
    pub fn build_cudarc(self, params: &mut CudaParams<'_>) -> Result<ParamAverager> {
        ParamAverager::build(self, params)
    }
}

impl Tensors for CudaParams<'_> {
    fn assemble(&mut self, options: Builder) -> Result<ParamAverager> {
        let rank = options.rank();
        let ordered = self.order().map(|(tensors, _)| tensors);
        let mut tensors =
            ordered.map_err(|error| Error::DeviceFailed { rank, reason: reason(error) })?;
        Plain(&mut tensors).assemble(options)
    }

    fn average(&mut self, averager: &mut ParamAverager, call: Call) -> Result<Outcome> {
        averager.run_cudarc(self, call)
    }
}

impl ParamAverager {
    /// Replaces every tensor by its mean over all ranks, and returns when that is done. Collective,
    /// as [`average`](ParamAverager::average).
    ///
    /// The stream may be of any kind, the null stream included, and ordered behind it, the average
    /// runs on it or on one of the averager's own. Other than on the null stream, only one rank may
    /// average on it.
    pub fn average_cudarc(&mut self, params: &mut CudaParams<'_>) -> Result<Report> {
        self.run_cudarc(params, Call::by_hand(None)).map(averaged)
    }

    /// Replaces every tensor by its weighted mean, see
    /// [`average_weighted`](ParamAverager::average_weighted), and returns when that is done.
    pub fn average_weighted_cudarc(
        &mut self,
        params: &mut CudaParams<'_>,
        weight: f64,
    ) -> Result<Report> {
        self.run_cudarc(params, Call::by_hand(Some(weight))).map(averaged)
    }

    /// Enqueues an average on the stream of `params`, behind what it has been given and what other
    /// streams were given to do to the tensors, and returns at once. Collective. What is done later
    /// to the tensors through cudarc, on any stream, freeing them included, comes after it.
    ///
    /// The stream is as for [`average_on`](ParamAverager::average_on): of the rank's device, of the
    /// non-blocking kind, as `CudaContext::new_stream` makes them, not being captured, and no other
    /// rank averages on it. If the average fails, what comes later finds the tensors as they were:
    /// [`Pending::wait`] tells.
    pub fn enqueue_cudarc(&mut self, params: &mut CudaParams<'_>) -> Result<Pending<'_>> {
        self.start_cudarc(params, Call::by_hand(None), false)
    }

    /// Enqueues a weighted average, see [`enqueue_cudarc`](ParamAverager::enqueue_cudarc).
    pub fn enqueue_weighted_cudarc(
        &mut self,
        params: &mut CudaParams<'_>,
        weight: f64,
    ) -> Result<Pending<'_>> {
        self.start_cudarc(params, Call::by_hand(Some(weight)), false)
    }

    /// [`recover`](ParamAverager::recover) for cudarc's slices.
    pub fn recover_cudarc(&mut self, params: &mut CudaParams<'_>) -> Result<()> {
        self.recover_with(params)
    }

    /// [`admit`](ParamAverager::admit_joiner) for cudarc's slices.
    pub fn admit_joiner_cudarc(&mut self, params: &mut CudaParams<'_>) -> Result<Report> {
        self.admit_with(params)
    }

    fn run_cudarc(&mut self, params: &mut CudaParams<'_>, call: Call) -> Result<Outcome> {
        self.start_cudarc(params, call, true)?.outcome()
    }

    /// `waits`: the caller lets nobody touch the tensors until it has waited for the average.
    fn start_cudarc(
        &mut self,
        params: &mut CudaParams<'_>,
        call: Call,
        waits: bool,
    ) -> Result<Pending<'_>> {
        let start = Instant::now();
        let stream = params.stream;
        let blocking = self.check_cudarc(stream, waits)?;
        let (mut tensors, events) = match params.order() {
            Ok(ordered) => ordered,
            Err(error) => return Err(self.not_beside_a_capture(error)),
        };
        let null = stream.context().default_stream();
        // Tensors that are refused are not used, so that nothing need wait for them.
        if blocking && *stream != null && tensors.iter().all(|tensor| tensor.refusal().is_none()) {
            if let Err(error) = null.join(stream) {
                return Err(self.not_beside_a_capture(error));
            }
        }
        let on = (!blocking).then(|| stream.cu_stream().cast());
        // SAFETY: the stream is one of the primary context of this rank's device, which was
        // checked, and the averager keeps it. It, or the null stream behind it, waits for what was
        // done to the tensors, which was checked for each; those that are not so ordered are
        // refused. What is done later waits for the events that are recorded below, or is given to
        // the same stream; or, without a stream, comes after the caller has waited.
        let pending = unsafe { self.enqueue(&mut tensors, call, on, start) }?;
        let recorded = events.iter().try_for_each(|event| event.record(stream));
        pending.keep(stream, recorded.map_err(reason))
    }

    /// Whether the stream is of the blocking kind, if it can be averaged on.
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
            let expected =
                "a stream that CudaContext::new(ordinal) made, with the ordinal of this rank's \
                 device";
            return refuse(
                rank,
                format!("one of {on}{kind}, where the rank is on {}", self.device()),
                expected,
            );
        }
        // It may be that a use of a tensor could not be recorded.
        if let Err(error) = context.check_err() {
            let expected = "one whose context has no error left: see what failed, then call again";
            return refuse(
                rank,
                format!("one whose context holds an error, {}", reason(error)),
                expected,
            );
        }
        // A graph that was replayed later would use the tensors when nobody has lent them.
        if !is_not_captured(stream).map_err(|error| self.not_beside_a_capture(error))? {
            return refuse(
                rank,
                "one that is being captured".into(),
                "one that is not; or average_on, which is unsafe",
            );
        }
        if waits {
            // SAFETY: a stream of the primary context of this rank's device.
            return Ok(unsafe { self.refusal(stream.cu_stream().cast()) }?.is_some());
        }
        // SAFETY: as above.
        unsafe { self.check_stream(stream.cu_stream().cast()) }.map(|()| false)
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

impl LocalSgd {
    /// [`step`](LocalSgd::step) for cudarc's slices: an average that is due is made by
    /// [`average_cudarc`](ParamAverager::average_cudarc).
    pub fn step_cudarc(&mut self, params: &mut CudaParams<'_>) -> Result<Action> {
        self.step_with(params)
    }

    /// [`skip`](LocalSgd::skip) for cudarc's slices.
    pub fn skip_cudarc(&mut self, params: &mut CudaParams<'_>) -> Result<Action> {
        self.skip_with(params)
    }

    /// [`finish`](LocalSgd::finish) for cudarc's slices.
    pub fn finish_cudarc(&mut self, params: &mut CudaParams<'_>) -> Result<Action> {
        self.finish_with(params)
    }

    /// [`recover`](LocalSgd::recover) for cudarc's slices.
    pub fn recover_cudarc(&mut self, params: &mut CudaParams<'_>) -> Result<Action> {
        self.recover_with(params)
    }
}

fn averaged(outcome: Outcome) -> Report {
    match outcome {
        Outcome::Averaged(report) => report,
        Outcome::Unneeded => unreachable!("this rank needs it"),
    }
}

/// cudarc's word for it. A stream is there, so a driver is.
fn reason(error: DriverError) -> String {
    error.to_string()
}
