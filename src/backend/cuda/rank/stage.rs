//! The host's work between two halves of an average: a user's stage and its stream, copies of the
//! shard for other hosts, and the second half.

use std::ffi::c_void;
use std::sync::Arc;

use super::super::driver::{call, Failed};
use super::super::launch::Part;
use super::super::memory::Pinned;
use super::super::streams::{Event, LaunchStream};
use super::super::Context;
use super::Rank;
use crate::abi::{PaArgs, PA_FLAG_VETO};
use crate::backend::{Copied, Gathering, Refuses, Unstarted};

/// The stream of the work between the halves.
#[derive(Debug)]
pub(crate) struct StageStream {
    context: Arc<Context>,
    stream: LaunchStream,
    /// Copies of what the rank exchanges with other hosts, if it does.
    copies: Option<Vec<(Copied, Pinned)>>,
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

    /// Copies the shard to the host, behind the work of the stream so far, and waits for that.
    pub(crate) fn fetch(&mut self, with_anchors: bool) -> Result<(), Failed> {
        let (_bound, on) = (self.context.bind()?, self.stream.raw());
        let is_wanted = |of: &Copied| with_anchors || !of.is_anchor;
        let copies = self.copies.iter_mut().flatten();
        for (of, copy) in copies.filter(|(of, _)| is_wanted(of)) {
            let (from, to) = (of.address, copy.bytes_mut());
            // SAFETY: memory of the same size on both sides, which lives as long as `self`. The
            // copy is waited for, and its earlier ones lie before it in the stream.
            unsafe { call!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), on)) }?;
        }
        self.synchronize()
    }

    /// Enqueues a copy of the shard from the host. Nothing changes that copy until the stream has
    /// come to its end.
    pub(crate) fn put(&self) -> Result<(), Failed> {
        let (_bound, on) = (self.context.bind()?, self.stream.raw());
        let copies = self.copies.iter().flatten();
        for (of, copy) in copies.filter(|(of, _)| !of.is_anchor) {
            let (to, from) = (of.address, copy.bytes());
            // SAFETY: as in `fetch`; the caller leaves the copy as it is.
            unsafe { call!(cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), on)) }?;
        }
        Ok(())
    }

    /// Address in a copy on the host of an address on the device.
    pub(crate) fn on_host(&self, address: u64) -> u64 {
        let of = |(of, copy): &(Copied, Pinned)| {
            let at = address.checked_sub(of.address)?;
            (at < copy.size() as u64).then(|| copy.address() + at)
        };
        self.copies.iter().flatten().find_map(of).expect("an address of the shard")
    }

    fn synchronize(&self) -> Result<(), Failed> {
        let _bound = self.context.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { call!(cuStreamSynchronize(self.stream.raw())) }
    }
}

impl Rank {
    /// Makes a stage possible. `copied`: the shard, if the rank exchanges it with other hosts.
    pub(crate) fn prepare_for_stage(&mut self, copied: Option<&[Copied]>) -> Result<(), Failed> {
        let (context, stream) = (self.context.clone(), LaunchStream::new(&self.context)?);
        let copy = |&of: &Copied| Ok((of, Pinned::new(&context, of.bytes)?));
        let copies = copied.map(|copied| copied.iter().map(copy).collect::<Result<_, Failed>>());
        let copies = copies.transpose()?;
        self.stage = Some(StageStream { context, stream, copies });
        Ok(())
    }

    /// Memory of the host for copies of the shard, in bytes.
    pub(super) fn copied_bytes(&self) -> usize {
        let copies = self.stage.iter().flat_map(|stage| stage.copies.iter().flatten());
        copies.map(|(_, copy)| copy.size()).sum()
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
        let mut stage = self.stage.take().expect("prepared when this rank was made");
        // SAFETY: guaranteed by the caller.
        let launched = unsafe { self.launch_behind(&mut stage, reduced, rest, refuses, peers) };
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
        stage: &mut StageStream,
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
        let refuses = match stage.copies.is_some() {
            // Other hosts have to know how this host's own sum has ended.
            true => {
                reduced.synchronize()?;
                refuses(Some(stage), self.ended())
            }
            false => refuses(Some(stage), &[]),
        };
        let vetoes = if refuses { PA_FLAG_VETO } else { 0 };
        // SAFETY: as above.
        unsafe { self.ready.record(on) }?;
        let args = PaArgs { flags: rest.args.flags | vetoes, ..rest.args };
        self.meet_and_launch(Part { args, ..rest }, peers, true)
    }
}
