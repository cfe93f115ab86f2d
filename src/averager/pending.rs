//! Averages that are enqueued behind a trainer's work on a CUDA stream.

#[cfg(feature = "cuda")]
use std::any::Any;
use std::ffi::c_void;
#[cfg(feature = "cuda")]
use std::sync::Arc;
use std::time::Instant;

use super::{Call, Lend, Outcome, ParamAverager, Report};
use crate::abi::PA_OPEN;
use crate::{Error, Result};

/// An average that has been enqueued: wait for it to get its report or its error.
///
/// Dropping it waits, too. A fatal error is then the cause of the next call's
/// [`Error::Poisoned`](crate::Error::Poisoned); any other is lost.
#[derive(Debug)]
#[must_use = "wait for it: its error is lost otherwise"]
pub struct Pending<'a> {
    averager: &'a mut ParamAverager,
    start: Instant,
    /// Nothing was enqueued, or it has been waited for.
    over: Option<Result<Outcome>>,
}

impl ParamAverager {
    /// Starts an average and returns: on a CUDA stream it is enqueued, behind what the stream has
    /// been given, and what the stream is given later finds the mean. Collective, as
    /// [`average`](ParamAverager::average).
    ///
    /// It is enqueued if the parameters are used on a stream, as [`RawCudaParams`] and cudarc's
    /// slices are. Any other parameters hold the mean when this returns.
    ///
    /// If the stream is being captured, the average becomes a part of the graph, with the tensors
    /// where they are now: nothing runs, and there is nothing to wait for. Every rank captures one
    /// in a graph of its own and replays it as often as the others, each replay is one average, and
    /// [`graph_outcome`](ParamAverager::graph_outcome) tells how it ended. Wrong tensors or a wrong
    /// weight are this rank's error alone then, at once, and nothing is captured.
    ///
    /// If the average fails, what the stream is given later runs all the same, on tensors as they
    /// were: [`Pending::wait`] tells.
    ///
    /// [`RawCudaParams`]: crate::RawCudaParams
    pub fn start<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Pending<'_>> {
        self.start_call(params, Call::by_hand(None))
    }

    /// Starts a weighted average; see [`start`](ParamAverager::start) and
    /// [`average_weighted`](ParamAverager::average_weighted).
    pub fn start_weighted<P: Lend + ?Sized>(
        &mut self,
        params: &mut P,
        weight: f64,
    ) -> Result<Pending<'_>> {
        self.start_call(params, Call::by_hand(Some(weight)))
    }

    fn start_call<P: Lend + ?Sized>(&mut self, params: &mut P, call: Call) -> Result<Pending<'_>> {
        let start = Instant::now();
        let over = self.average_lent(params, call, false, start)?.map(Ok);
        Ok(Pending { averager: self, start, over })
    }

    /// Waits for a stream on which a graph with an average in it has been launched, and tells what
    /// the last replay did. A failure that ended the world ends every later replay at once.
    /// `elapsed` of the report is 0: nobody looked at a clock.
    ///
    /// # Safety
    /// The stream is one of the device's primary context, and no replay is under way on another.
    /// While a replay is under way, this averager makes no other average.
    pub unsafe fn graph_outcome(&mut self, stream: *mut c_void) -> Result<Report> {
        if let Some(cause) = &self.failed {
            return Err(Error::Poisoned { cause: Box::new(cause.clone()) });
        }
        // SAFETY: the caller's promise.
        unsafe { self.own.engine.wait_for(stream) }.map_err(|unwaited| self.unstarted(unwaited))?;
        if self.world_size() == 1 {
            return Ok(self.report(None));
        }
        let none = Error::InvalidOption {
            rank: self.rank(),
            option: "stream",
            found: "one on which no captured average has been replayed".into(),
            expected: "one that a graph with this averager's average was launched on",
        };
        // No block has begun an average yet, or the last one was none.
        if self.args.fault_step == 0 && self.ended().any(|status| status.outcome == PA_OPEN) {
            return Err(none);
        }
        match self.outcome(None)? {
            Outcome::Averaged(report) => Ok(report),
            Outcome::Unneeded => Err(none),
        }
    }

    /// Refuses a stream that an average can't be enqueued on, or, if the caller `waits`, not be
    /// waited for.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(crate) unsafe fn check_stream(&mut self, stream: *mut c_void, waits: bool) -> Result<()> {
        let refuse = |rank, found: String, expected| {
            Err(Error::InvalidOption { rank, option: "stream", found, expected })
        };
        // SAFETY: the caller's promise.
        let refusal = unsafe { self.refusal(stream) }?;
        if let (Some(found), true) = (refusal, self.world_size() > 1) {
            let expected = "a stream of this rank's own that was made with CU_STREAM_NON_BLOCKING";
            return refuse(self.rank(), found.into(), expected);
        }
        // SAFETY: the caller's promise.
        if waits && unsafe { self.is_capturing(stream) }? {
            let expected = "one that is not, or ParamAverager::start";
            return refuse(self.rank(), "one that is being captured".into(), expected);
        }
        Ok(())
    }

    /// True if the stream is being captured.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(super) unsafe fn is_capturing(&mut self, stream: *mut c_void) -> Result<bool> {
        // SAFETY: the caller's promise.
        unsafe { self.own.engine.is_capturing(stream) }.map_err(|reason| self.device_failed(reason))
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn device(&self) -> crate::Device {
        self.communicator.device()
    }

    /// Why an average can't be enqueued on this stream.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(crate) unsafe fn refusal(&mut self, stream: *mut c_void) -> Result<Option<&'static str>> {
        // SAFETY: the caller's promise.
        unsafe { self.own.engine.refuses(stream) }.map_err(|reason| self.device_failed(reason))
    }

    /// Keeps a stream alive until the next average has begun, by when this one is done, also if
    /// its `Pending` is forgotten.
    #[cfg(feature = "cuda")]
    pub(crate) fn keep(&mut self, stream: Arc<dyn Any + Send + Sync>) {
        self.stream = Some(stream);
    }
}

impl Pending<'_> {
    /// True if `wait` returns at once.
    pub fn is_done(&self) -> bool {
        self.over.is_some() || self.averager.own.engine.is_done()
    }

    /// Waits until the average is done. `elapsed` of the report is the time from the call to this
    /// return. One that was captured has not run, which is an error.
    pub fn wait(mut self) -> Result<Report> {
        self.end().map(Outcome::report)
    }

    fn end(&mut self) -> Result<Outcome> {
        let (averager, start) = (&mut *self.averager, self.start);
        self.over.get_or_insert_with(|| averager.end(start)).clone()
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let _ = self.end();
    }
}
