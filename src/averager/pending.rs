//! Averages that are enqueued behind a trainer's work on a CUDA stream.

#[cfg(feature = "cuda")]
use std::any::Any;
use std::ffi::c_void;
#[cfg(feature = "cuda")]
use std::sync::Arc;
use std::time::Instant;

use super::lend::Begun;
use super::{Call, Lend, Outcome, ParamAverager, Report};
use crate::abi::{PaStatus, PA_OPEN};
use crate::notice;
use crate::plan::End;
use crate::{Compression, Error, Result};

/// Average that has been enqueued; [`wait`](Self::wait) returns its report or its error.
///
/// Dropping it waits, too. A fatal error is then the cause of the next call's
/// [`Error::Poisoned`](crate::Error::Poisoned); any other error is lost.
#[derive(Debug)]
#[must_use = "wait for it: its error is lost otherwise"]
pub struct Pending<'a> {
    averager: &'a mut ParamAverager,
    start: Instant,
    /// The average, until it is over.
    begun: Option<Begun>,
    /// Its result, once it is known.
    over: Option<Result<Outcome>>,
}

/// Average that was captured into a CUDA graph, for the reports of its replays.
#[derive(Clone, Copy, Debug)]
pub(super) struct Captured {
    call: Call,
    end: End,
    compression: Compression,
    /// Epoch of an average that was not captured, and whose status is in the place of a replay's.
    overwritten: Option<u32>,
    /// True if an average that was not captured has been launched, whose end is not known.
    is_beside: bool,
}

impl ParamAverager {
    /// Starts an average. On a CUDA stream it is enqueued behind the stream's earlier work, and
    /// later work sees the mean. Collective, as [`average`](ParamAverager::average): it returns
    /// when all ranks of this process have called it, and each device has its launch; see
    /// [`guide::streams`](crate::guide::streams).
    ///
    /// It is enqueued if the parameters are used on a stream, as [`RawCudaParams`] and cudarc's
    /// slices are. Any other parameters hold the mean when this returns.
    ///
    /// If the stream is being captured, the average becomes a part of the graph, with the tensors'
    /// current addresses: nothing runs, and there is nothing to wait for. Every rank captures an
    /// average in a graph of its own, and all ranks replay their graphs equally often. Each replay
    /// is one average; [`graph_outcome`](ParamAverager::graph_outcome) returns its result. Wrong
    /// tensors or a wrong weight are then an error of this rank alone, at once, and nothing is
    /// captured.
    ///
    /// If the average fails, later work of the stream runs all the same, on unchanged tensors.
    ///
    /// # Errors
    /// A tensor, weight or stream of this rank that can't be used; [`Pending::wait`] has the errors
    /// of the average itself.
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
        let begun = self.average_lent(params, call, false, start)?;
        Ok(Pending { averager: self, start, begun: Some(begun), over: None })
    }

    /// Waits for a stream on which a graph with an average in it has been launched, and returns the
    /// result of the last replay. After a fatal failure every later replay ends at once. `elapsed`
    /// of the report is 0, since a replay is not timed. The default stream of a thread is waited
    /// for on that thread.
    ///
    /// # Errors
    /// Errors of an average. [`Error::InvalidOption`] if no replay has come since this averager's
    /// last average that was not captured, or its last capture; a world of one rank can't tell.
    ///
    /// # Safety
    /// The stream is one of the device's primary context, and no replay is under way on another.
    /// While a replay is under way, this averager makes no other average.
    pub unsafe fn graph_outcome(&mut self, stream: *mut c_void) -> Result<Report> {
        if let Some(cause) = &self.failed {
            return Err(Error::Poisoned { cause: Box::new(cause.clone()) });
        }
        if let Some(error) = self.refusal_of_another() {
            return Err(error);
        }
        // SAFETY: the caller's promise.
        unsafe { self.own.engine.wait_for(stream) }.map_err(|unwaited| self.unstarted(unwaited))?;
        if self.is_alone() {
            return Ok(self.report(None));
        }
        let none = Error::InvalidOption {
            rank: self.rank(),
            option: "stream",
            found: "a stream on which no captured average has been replayed".into(),
            expected: "a stream on which a graph with this averager's average was launched",
        };
        // No block has begun an average yet, or the last launch was none.
        if self.args.fault_step == 0 && self.ended().any(|status| status.outcome == PA_OPEN) {
            return Err(none);
        }
        let Some(captured) = self.captured else { return Err(none) };
        let is_of_none = |status: PaStatus| Some(status.epoch) == captured.overwritten;
        if captured.is_beside || self.ended().any(is_of_none) {
            return Err(Error::InvalidOption {
                rank: self.rank(),
                option: "stream",
                found:
                    "a stream on which no captured average has been replayed since the last one \
                        that was not captured"
                        .into(),
                expected: "graph_outcome behind a replay, before the next average",
            });
        }
        (self.call, self.end, self.compression) =
            (captured.call, captured.end, captured.compression);
        // An average that was not captured may have left the ranks' values different.
        let mixed = self.mixed;
        let outcome = self.outcome(None);
        self.mixed |= mixed;
        match outcome? {
            Outcome::Averaged(report) => Ok(report),
            Outcome::Unneeded { .. } => Err(none),
        }
    }

    /// Notes what replays make, if the average that was launched last was captured.
    pub(super) fn note_captured(&mut self) {
        if self.own.engine.was_captured() {
            let (call, end, compression) = (self.call, self.end, self.compression);
            let (overwritten, is_beside) = (None, false);
            self.captured = Some(Captured { call, end, compression, overwritten, is_beside });
            self.note_no_replay();
        } else if let Some(captured) = &mut self.captured {
            captured.is_beside = true;
        }
    }

    /// Notes that the status that is there now is of no replay.
    pub(super) fn note_no_replay(&mut self) {
        let epoch = self.ended().next().map(|status| status.epoch);
        if let Some(captured) = &mut self.captured {
            (captured.overwritten, captured.is_beside) = (epoch, false);
        }
    }

    /// Refuses a stream that is being captured if the caller `waits`.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(crate) unsafe fn check_stream(&mut self, stream: *mut c_void, waits: bool) -> Result<()> {
        // SAFETY: the caller's promise.
        let launches = !self.is_alone();
        if waits && launches && unsafe { self.is_capturing(stream) }? {
            return Err(Error::InvalidOption {
                rank: self.rank(),
                option: "stream",
                found: "a stream that is being captured".into(),
                expected: "a stream that is not captured, or ParamAverager::start",
            });
        }
        Ok(())
    }

    /// True if the stream is being captured.
    ///
    /// # Safety
    /// It is a stream of the device's primary context.
    pub(super) unsafe fn is_capturing(&mut self, stream: *mut c_void) -> Result<bool> {
        // SAFETY: the caller's promise.
        unsafe { self.own.engine.is_capturing(stream) }
            .map_err(|unstarted| self.unstarted(unstarted))
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn device(&self) -> crate::Device {
        self.communicator.device()
    }

    /// Keeps a stream alive until the next average has begun, when this one is done, also if its
    /// `Pending` was forgotten.
    #[cfg(feature = "cuda")]
    pub(crate) fn keep(&mut self, stream: Arc<dyn Any + Send + Sync>) {
        self.stream = Some(stream);
    }
}

impl Pending<'_> {
    /// True if `wait` returns at once.
    pub fn is_done(&self) -> bool {
        let is_over = self.over.is_some() || self.begun.as_ref().is_some_and(Begun::is_over);
        is_over || self.averager.own.engine.is_done()
    }

    /// Waits until the average is done. `elapsed` of the report is the time from the call of
    /// `start` to this return.
    ///
    /// # Errors
    /// As [`ParamAverager::average`]; [`Error::InvalidOption`](crate::Error::InvalidOption) if the
    /// average was captured, since it has not run.
    pub fn wait(mut self) -> Result<Report> {
        let report = self.end().map(Outcome::report)?;
        self.averager.unless_late(report)
    }

    fn end(&mut self) -> Result<Outcome> {
        if let Some(begun) = self.begun.take() {
            self.over = Some(self.averager.conclude(begun, self.start));
        }
        self.over.clone().expect("an average that has begun ends")
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let ended = if self.over.is_none() { self.end().err() } else { None };
        if let Some(error) = ended.or(self.averager.take_late()) {
            let rank = self.averager.rank();
            let text = format!("an average that was not waited for has failed: {error}");
            notice::warn(Some(rank), &text);
        }
    }
}
