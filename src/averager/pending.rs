//! Averages that are enqueued behind a trainer's work on a CUDA stream.

use std::ffi::c_void;
use std::time::Instant;

use super::{Call, Outcome, ParamAverager, Report};
use crate::abi::PA_OPEN;
use crate::{Error, Parameters, Result};

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
    /// Enqueues an average on a CUDA stream, behind what it has been given, and returns at once:
    /// what it is given later sees the mean. Collective, as [`average`](ParamAverager::average).
    ///
    /// `stream` is a `CUstream` (a `cudaStream_t` is the same) of the device's primary context. It
    /// is this rank's own: on a stream that ranks share, the first one's average would wait for one
    /// that is behind it. And it is of the non-blocking kind: what a peer does on the null stream
    /// would wait for the others. Any other is refused, on this rank alone, whose peers find out
    /// when it drops its averager or at the timeout. With ranks on CPUs no stream is looked at, and
    /// the average is over on return.
    ///
    /// If the stream is being captured, the average becomes a part of the graph, with the tensors
    /// where they are now: nothing runs, and there is nothing to wait for. Every rank captures one
    /// in a graph of its own and replays it as often as the others, each replay is one average, and
    /// [`graph_outcome`](ParamAverager::graph_outcome) tells what came of it. Wrong tensors or a wrong weight
    /// are this rank's error alone then, at once, and nothing is captured.
    ///
    /// If the average fails, what the stream is given later runs all the same, on tensors as they
    /// were: `wait` tells.
    ///
    /// # Safety
    /// Until the average is done, the stream lives, and the tensors live and are used by nobody but
    /// by work that is ordered before or after it on that stream. This holds for every replay of a
    /// graph, which ends before the averager is dropped.
    pub unsafe fn average_on<P: Parameters + ?Sized>(
        &mut self,
        params: &mut P,
        stream: *mut c_void,
    ) -> Result<Pending<'_>> {
        // SAFETY: the caller's promise.
        unsafe { self.average_later(params, None, stream) }
    }

    /// Enqueues a weighted average, see [`average_weighted`](ParamAverager::average_weighted).
    ///
    /// # Safety
    /// As [`average_on`](ParamAverager::average_on).
    pub unsafe fn average_weighted_on<P: Parameters + ?Sized>(
        &mut self,
        params: &mut P,
        weight: f64,
        stream: *mut c_void,
    ) -> Result<Pending<'_>> {
        // SAFETY: the caller's promise.
        unsafe { self.average_later(params, Some(weight), stream) }
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
            found: "one on which no captured average has been graph_outcome".into(),
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

    unsafe fn average_later<P: Parameters + ?Sized>(
        &mut self,
        params: &mut P,
        weight: Option<f64>,
        stream: *mut c_void,
    ) -> Result<Pending<'_>> {
        let start = Instant::now();
        // SAFETY: the caller's promise.
        unsafe { self.check_stream(stream) }?;
        let call = Call::by_hand(weight);
        // SAFETY: the caller's promise.
        unsafe { self.enqueue(params, call, Some(stream), start) }
    }

    #[cfg(feature = "cudarc")]
    pub(crate) fn device(&self) -> crate::Device {
        self.communicator.device()
    }

    /// Refuses a stream that an average can't be enqueued on.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(crate) unsafe fn check_stream(&mut self, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's promise.
        match unsafe { self.refusal(stream) }? {
            Some(found) if self.world_size() > 1 => Err(Error::InvalidOption {
                rank: self.rank(),
                option: "stream",
                found: found.into(),
                expected: "a stream of this rank's own that was made with CU_STREAM_NON_BLOCKING",
            }),
            _ => Ok(()),
        }
    }

    /// Why an average can't be enqueued on this stream.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(crate) unsafe fn refusal(&mut self, stream: *mut c_void) -> Result<Option<&'static str>> {
        // SAFETY: the caller's promise.
        unsafe { self.own.engine.refuses(stream) }.map_err(|reason| self.device_failed(reason))
    }

    /// The first half of an average, as something to wait for.
    ///
    /// # Safety
    /// As `begin`.
    pub(crate) unsafe fn enqueue<P: Parameters + ?Sized>(
        &mut self,
        params: &mut P,
        call: Call,
        stream: Option<*mut c_void>,
        start: Instant,
    ) -> Result<Pending<'_>> {
        // SAFETY: the caller's promise.
        let over = unsafe { self.begin(params, call, stream, start) }?.map(Ok);
        Ok(Pending { averager: self, start, over })
    }
}

impl<'a> Pending<'a> {
    /// Whether `wait` would return at once.
    pub fn is_done(&self) -> bool {
        self.over.is_some() || self.averager.own.engine.is_done()
    }

    /// Waits until the average is done. `elapsed` of the report is the time from the call to this
    /// return. One that was captured has not run, which is an error.
    pub fn wait(self) -> Result<Report> {
        match self.outcome()? {
            Outcome::Averaged(report) => Ok(report),
            Outcome::Unneeded => unreachable!("this rank needs it"),
        }
    }

    pub(crate) fn outcome(mut self) -> Result<Outcome> {
        self.end()
    }

    /// Keeps the stream for as long as the average may be under way, also if `self` is forgotten.
    /// If the events that later uses of the tensors wait for could not be `recorded`, waits for the
    /// average now.
    #[cfg(feature = "cudarc")]
    pub(crate) fn keep(
        mut self,
        stream: &std::sync::Arc<cudarc::driver::CudaStream>,
        recorded: std::result::Result<(), String>,
    ) -> Result<Pending<'a>> {
        if self.over.is_none() {
            // The average of the one before it is done: `begin` has waited for it.
            drop(self.averager.stream.replace(stream.clone()));
        }
        if let Err(reason) = recorded {
            let _ = self.end();
            return Err(self.averager.device_failed(reason));
        }
        Ok(self)
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
