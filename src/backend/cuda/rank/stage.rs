//! A user's stage between two halves of an average: its stream, its call, and the second half.

use std::ffi::c_void;
use std::sync::Arc;

use super::super::driver::{call, Failed};
use super::super::launch::Part;
use super::super::streams::{Event, LaunchStream};
use super::super::Context;
use super::Rank;
use crate::abi::{PaArgs, PA_FLAG_VETO};
use crate::backend::{Gathering, Refuses, Unstarted};

/// The stream on which a user's stage enqueues its work.
#[derive(Debug)]
pub(crate) struct StageStream {
    context: Arc<Context>,
    stream: LaunchStream,
}

impl StageStream {
    /// Ordinal of the device.
    pub(crate) fn device(&self) -> usize {
        self.context.ordinal()
    }

    pub(crate) fn raw(&self) -> *mut c_void {
        self.stream.raw().cast()
    }

    /// Reads bytes behind the work of the stream so far, and waits for that.
    ///
    /// # Safety
    /// The bytes are in memory of the device that stays allocated.
    pub(crate) unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Failed> {
        let (_bound, on) = (self.context.bind()?, self.stream.raw());
        // SAFETY: the caller's promise; `to` outlives the copy, which is waited for.
        unsafe { call!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), on)) }?;
        self.synchronize()
    }

    fn synchronize(&self) -> Result<(), Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { call!(cuStreamSynchronize(self.stream.raw())) }
    }
}

impl Rank {
    /// Makes a stage possible.
    pub(crate) fn prepare_for_stage(&mut self) -> Result<(), Failed> {
        let (context, stream) = (self.context.clone(), LaunchStream::new(&self.context)?);
        self.stage = Some(StageStream { context, stream });
        Ok(())
    }

    /// Calls the stage behind `reduced`, and launches the second half of the average behind what
    /// the stages of all ranks have enqueued.
    ///
    /// # Safety
    /// As `start`.
    pub(super) unsafe fn launch_behind_stage(
        &mut self,
        reduced: &Event,
        rest: Part,
        refuses: &mut Refuses<'_>,
        peers: &Gathering<'_>,
    ) -> Result<Arc<Event>, Unstarted> {
        let stage = self.stage.take().expect("prepared when this rank was made");
        // SAFETY: guaranteed by the caller.
        let launched = unsafe { self.launch_behind(&stage, reduced, rest, refuses, peers) };
        if launched.is_err() {
            // The shard, and tensors that go back to the caller, are in use until then.
            let _ = stage.synchronize();
        }
        self.stage = Some(stage);
        launched.map_err(|unstarted| match unstarted {
            Unstarted::Ended(failure) => Unstarted::Halted(failure),
            unstarted => unstarted,
        })
    }

    /// # Safety
    /// As `start`.
    unsafe fn launch_behind(
        &mut self,
        stage: &StageStream,
        reduced: &Event,
        rest: Part,
        refuses: &mut Refuses<'_>,
        peers: &Gathering<'_>,
    ) -> Result<Arc<Event>, Unstarted> {
        if rest.args.fault_step != 0 {
            reduced.synchronize()?;
            if self.was_left(&rest.args) {
                return Ok(self.done.clone()); // its peers wait for it in the first half
            }
        }
        let on = stage.stream.raw();
        // SAFETY: a stream of this rank's context, which is bound.
        unsafe { reduced.hold(on) }?;
        let vetoes = if refuses(Some(stage), &[]) { PA_FLAG_VETO } else { 0 };
        // SAFETY: as above.
        unsafe { self.ready.record(on) }?;
        let args = PaArgs { flags: rest.args.flags | vetoes, ..rest.args };
        self.meet_and_launch(Part { args, ..rest }, peers, true)
    }
}
