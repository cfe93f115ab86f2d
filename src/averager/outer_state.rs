//! State of the outer optimizer: this rank's shard, and its transfer to the ranks of a later view.

mod assembly;
pub(crate) mod saved;
mod sharing;
mod take_over;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::Arc;

use super::link::Link;
use super::table::Table;
use super::{flag, Builder, Call, ParamAverager, Work};
use crate::abi::{
    PaBucket, PaOuter, PaStatus, PA_COMMITTED, PA_FLAG_DELTA, PA_FLAG_STEP, PA_FLAG_WHOLE,
    PA_PACK_BYTES,
};
use crate::backend::{Memory, MemorySpace};
use crate::bucket::{self, Division};
use crate::plan::{End, Launch, Plan};
use crate::schedule::place;
use crate::tensor::Dtype;
use crate::{Error, Result};
use assembly::{reserved, Piece};

/// The launches of an averager's averages, by their end.
pub(super) struct Launches {
    mean: Vec<Launch>,
    anchor: Vec<Launch>,
    step: Vec<Launch>,
    mix: Vec<Launch>,
    delta: Vec<Launch>,
    step_delta: Vec<Launch>,
    coded_mean: Vec<Launch>,
    coded_step: Vec<Launch>,
    coded_delta: Vec<Launch>,
    coded_step_delta: Vec<Launch>,
}

impl Launches {
    pub(super) fn new(options: &Builder, ring: bool) -> Launches {
        let world = options.communicator.world_size() as u32;
        let kernel = options.compression.kernel().filter(|_| ring);
        let in_code = |end, is_coded: bool| {
            let plan = Plan::new(ring, options.commits_late(), options.rejects_non_finite(), end)
                .with_stage(options.has_stage());
            let plan = match kernel {
                Some(kernel) => plan.coded(is_coded.then_some(kernel)),
                None => plan,
            };
            let plan = if options.telemetry { plan.sampled() } else { plan };
            plan.launches(world, options.is_sequenced())
        };
        let to = |end| in_code(end, false);
        let (has_state, copies) = (!options.outer.is_mean(), options.overlap.copies());
        let to_if = |has: bool, end| if has { to(end) } else { vec![] };
        let coded =
            |has: bool, end| if has && kernel.is_some() { in_code(end, true) } else { vec![] };
        Launches {
            mean: to(End::Mean),
            anchor: to_if(has_state, End::Anchor),
            step: to_if(has_state, End::Step),
            mix: to_if(has_state, End::Mix),
            delta: to_if(copies, End::Delta),
            step_delta: to_if(has_state && copies, End::StepDelta),
            coded_mean: coded(!has_state, End::Mean),
            coded_step: coded(has_state, End::Step),
            coded_delta: coded(!has_state && copies, End::Delta),
            coded_step_delta: coded(has_state && copies, End::StepDelta),
        }
    }

    /// The launches of an average with this end.
    pub(super) fn to(&self, end: End, is_coded: bool) -> &[Launch] {
        match (end, is_coded) {
            (End::Mean, false) => &self.mean,
            (End::Mean, true) => &self.coded_mean,
            (End::Step, false) => &self.step,
            (End::Step, true) => &self.coded_step,
            (End::Anchor, _) => &self.anchor,
            (End::Mix, _) => &self.mix,
            (End::Delta, false) => &self.delta,
            (End::Delta, true) => &self.coded_delta,
            (End::StepDelta, false) => &self.step_delta,
            (End::StepDelta, true) => &self.coded_step_delta,
        }
    }
}

/// Progress of an averager with an outer optimizer to its first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AnchorState {
    /// The state of an earlier view is to be taken over, at the first average.
    ToInherit,
    /// The next average gives the anchor.
    Missing,
    /// The average that was launched last gives the anchor, if it is committed.
    Launched {
        /// True if there was an anchor before, which stays if that average has failed.
        was_set: bool,
    },
    Set,
}

/// The state of the outer optimizer on one rank: for each bucket the anchor and the slots, each
/// `[channels][shard_packs]` of elements in the type of sums.
#[derive(Debug)]
pub(super) struct OuterState {
    division: Division,
    /// Ring position of this rank.
    position: u32,
    /// State of all buckets, one after another.
    memory: Arc<Memory>,
    buckets: Vec<BucketState>,
    /// Memory with the state of the rank before this one in the ring, where ranks share theirs. It
    /// outlives that rank.
    previous: Option<Arc<Memory>>,
    /// False from the load of a saved state to the first step since: the rank before may not have
    /// loaded its own.
    is_previous_alike: AtomicBool,
}

#[derive(Debug)]
struct BucketState {
    /// Bytes of the memory before it.
    at: usize,
    /// The mean before the commit, where it is wider than the tensors.
    mean: Option<Memory>,
    packs: u64,
    /// Bytes of the state of a pack, in each array.
    pack_bytes: usize,
    /// Bytes of an array.
    array: usize,
    slots: usize,
}

impl OuterState {
    /// Allocates zeroed state. `failed` makes the error of memory that ranks share, `own_failed`
    /// that of other memory.
    pub(super) fn new(
        options: &Builder,
        table: &Table,
        (chunk, channels, is_ring): (u32, u32, bool),
        failed: impl Fn(String) -> Error,
        own_failed: impl Fn(String) -> Error,
    ) -> Result<OuterState> {
        let (communicator, slots) = (&options.communicator, options.outer.slots());
        let world = communicator.world_size() as u32;
        let space = communicator.space();
        let (mut buckets, mut at) = (vec![], 0);
        for bucket in &table.buckets {
            let each = bucket::channel_packs(bucket.packs, channels);
            let shard = bucket::shard_packs(each, world, chunk) * u64::from(channels);
            let pack_bytes = pack_bytes(bucket.dtype);
            let array = shard as usize * pack_bytes;
            let is_wider = pack_bytes > PA_PACK_BYTES as usize;
            let mean = match is_ring && is_wider {
                true => Some(Memory::new(space, array).map_err(&own_failed)?),
                false => None,
            };
            let packs = bucket.packs;
            buckets.push(BucketState { at, mean, packs, pack_bytes, array, slots });
            at += array * (slots + 1);
        }
        let memory = match options.shares_state() {
            true => Link::place(true, communicator.placement(), space, at).map_err(failed)?,
            false => Memory::new(space, at).map_err(own_failed)?,
        };
        Ok(OuterState {
            division: Division { world, channels, chunk, is_ring },
            position: communicator.placement().position(communicator.rank()) as u32,
            memory: Arc::new(memory),
            buckets,
            previous: None,
            is_previous_alike: AtomicBool::new(true),
        })
    }

    /// Completes the kernels' table of a bucket.
    pub(super) fn complete(&mut self, index: usize, raw: &mut PaBucket, outer: PaOuter) {
        let state = &self.buckets[index];
        raw.state = self.memory.address() + state.at as u64;
        raw.outer = outer;
        if self.division.is_ring {
            raw.mean = state.mean.as_ref().map_or(raw.shard, Memory::address);
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let means = self.buckets.iter().filter_map(|state| state.mean.as_ref());
        self.memory.bytes() + means.map(Memory::bytes).sum::<usize>()
    }

    /// Pieces of some arrays of the states of the ranks at `positions`, in the order of a stream of
    /// bytes. Array 0 is the anchor.
    fn pieces(&self, division: &Division, positions: &[u32], arrays: Range<usize>) -> Vec<Piece> {
        let mut pieces = vec![];
        let mut before = 0;
        for &position in positions {
            for (bucket, state) in self.buckets.iter().enumerate() {
                for array in arrays.clone().filter(|&array| array <= state.slots) {
                    for run in division.runs(state.packs, position) {
                        pieces.push(Piece { bucket, array, run, before });
                        before += run.packs as usize * state.pack_bytes;
                    }
                }
            }
        }
        pieces
    }

    /// Bytes of a stream of these pieces.
    fn length(&self, pieces: &[Piece]) -> usize {
        pieces.last().map_or(0, |last| last.before + last.bytes(&self.buckets[last.bucket]))
    }

    /// Reads the states of some positions, this rank's or the one before, as one stream of bytes.
    /// No average may be running.
    pub(super) fn read(&self, positions: &[u32], arrays: Range<usize>) -> Result<Vec<u8>, String> {
        let mut bytes = vec![];
        for &position in positions {
            let memory = match &self.previous {
                Some(previous) if position != self.position => previous,
                _ => &self.memory,
            };
            let mut all = reserved(memory.bytes())?;
            // SAFETY: this rank's memory, which no average uses now; or that of a rank which this
            // world has lost. If its process lives, it ends at most a step that it has begun.
            unsafe { memory.read(&mut all) }?;
            for piece in self.pieces(&self.division, &[position], arrays.clone()) {
                let state = &self.buckets[piece.bucket];
                let at = state.place(piece.array, piece.run.at);
                bytes.extend_from_slice(&all[at..][..piece.bytes(state)]);
            }
        }
        Ok(bytes)
    }
}

impl BucketState {
    /// Place of a pack of the shard in the memory.
    fn place(&self, array: usize, pack: u64) -> usize {
        self.at + array * self.array + pack as usize * self.pack_bytes
    }
}

/// Bytes of the state of a pack.
fn pack_bytes(dtype: Dtype) -> usize {
    PA_PACK_BYTES as usize * if dtype.size() == 2 { 2 } else { 1 }
}

impl ParamAverager {
    /// True if averages make outer steps.
    pub(crate) fn has_outer(&self) -> bool {
        self.own.outer.is_some()
    }

    /// Error of `LocalSgd::done` where ranks keep a share of their values. The ranks that are not
    /// done make due averages, which mix, or the last one, which does not.
    pub(crate) fn refusal_of_done(&self) -> Option<Error> {
        if self.options.hosts.is_some() {
            return Some(Error::InvalidOption {
                rank: self.rank(),
                option: "hosts",
                found: format!("{}, with LocalSgd::done", self.options.hosts_in_words()),
                expected: "LocalSgd::finish, after as many steps on every rank of every host",
            });
        }
        if self.options.overlap.is_on() {
            return Some(Error::InvalidOption {
                rank: self.rank(),
                option: "overlap",
                found: format!("{}, with LocalSgd::done", self.options.overlap),
                expected: "Overlap::default(); or LocalSgd::finish, after as many steps on every \
                           rank",
            });
        }
        self.options.outer.mixes().then(|| Error::InvalidOption {
            rank: self.rank(),
            option: "outer",
            found: format!("{}, with LocalSgd::done", self.options.outer),
            expected: "no share to keep; or LocalSgd::finish, after as many steps on every rank",
        })
    }

    /// End of this call's average.
    pub(super) fn end_of(&self, call: Call) -> End {
        if call.work == Work::OfCopy {
            // Begun with an anchor only.
            return if self.has_outer() { End::StepDelta } else { End::Delta };
        }
        match (&self.own.outer, self.anchor) {
            (None, _) => End::Mean,
            (Some(_), AnchorState::Set) if !place::sets_values(call.place) => {
                match self.options.outer.mixes() && call.place != place::FINISH {
                    true => End::Mix,
                    false => End::Step,
                }
            }
            _ => End::Anchor,
        }
    }

    /// True if a rank that has ended its steps takes part in this call, as in any of the schedule.
    /// With an outer optimizer, a stage or a code not in one of another end: the recovery's makes
    /// no step, and is not coded. Nor in one that is refused.
    pub(super) fn is_joined_by_done(&self, call: Call) -> bool {
        let has_step = self.has_outer() || self.stage.is_some() || self.has_code();
        let is_other = has_step && call.place == place::RECOVERY;
        let is_refused = call.reason.is_some_and(|reason| reason.unfit.is_some());
        place::is_of_schedule(call.place) && !is_other && !is_refused
    }

    /// Flags of an average with this end.
    pub(super) fn flags_of(end: End) -> u32 {
        flag(PA_FLAG_WHOLE, end != End::Mix)
            | flag(PA_FLAG_STEP, matches!(end, End::Step | End::Mix | End::StepDelta))
            | flag(PA_FLAG_DELTA, matches!(end, End::Delta | End::StepDelta))
    }

    /// State of the outer optimizer for an averager in a later view.
    pub(super) fn state_to_pass_on(&self) -> Option<Arc<OuterState>> {
        self.inherited.as_ref().or(self.own.outer.as_ref()).cloned()
    }

    /// Brings the outer optimizer's state up to date before a launch. Collective where the state of
    /// an earlier view is taken over.
    pub(super) fn prepare_outer(&mut self) -> Result<()> {
        self.note_anchor();
        if self.anchor == AnchorState::ToInherit {
            self.take_over()?;
            self.anchor = AnchorState::Missing;
        }
        Ok(())
    }

    /// Notes that the ranks' values may differ, where averages are made of copies and a state was
    /// loaded. Called on all ranks or on none.
    pub(crate) fn assume_mixed(&mut self) {
        self.mixed |= self.options.overlap.copies();
    }

    /// True if the ranks' values differ since they kept a share of their own; the same on every
    /// rank.
    pub(crate) fn has_mixed(&self) -> bool {
        self.mixed
    }

    /// The error of state that could not be copied, for a reason that the driver or the allocator
    /// gives.
    fn state_error(&self, reason: String) -> Error {
        let rank = self.rank();
        match self.communicator.space() {
            MemorySpace::Host => Error::Memory { rank, reason },
            MemorySpace::Cuda(_) => Error::DeviceFailed { rank, source: reason.into() },
        }
    }

    /// As `state_error`, while peers wait for this rank's part of the state.
    fn state_lost(&mut self, reason: String) -> Error {
        let error = self.state_error(reason);
        self.give_up(&error);
        error
    }

    /// True if outer steps can begin, or there are none.
    pub(crate) fn has_anchor(&mut self) -> bool {
        if self.under_way.is_some() {
            return true; // or it would not have begun; its records are being written
        }
        let _ = self.own.engine.finish(); // of a forgotten `Pending`
        self.note_anchor();
        !self.has_outer() || self.anchor == AnchorState::Set
    }

    /// Notes whether the last average has given the anchor, or has made a step.
    pub(super) fn note_anchor(&mut self) {
        // Until a step, a further view begins with what this one has inherited: some of its ranks
        // may not have taken it over yet, and some not learnt of what was lost. A step is committed
        // when all ranks have completed the average before.
        let has_committed = |status: PaStatus| status.committed != 0;
        let is_step = matches!(self.end, End::Step | End::Mix | End::StepDelta);
        if is_step && self.ended().any(has_committed) {
            self.inherited = None;
            if let Some(outer) = &self.own.outer {
                outer.note_previous(true);
            }
        }
        if let AnchorState::Launched { was_set } = self.anchor {
            let is_committed = |status: PaStatus| status.outcome == PA_COMMITTED;
            let is_set = was_set || self.ended().all(is_committed);
            self.anchor = if is_set { AnchorState::Set } else { AnchorState::Missing };
        }
    }
}
