//! The averager: one rank's tensors, the memory it shares with its peers, and the launches of an
//! average.

mod algorithm;
mod assemble;
mod builder;
mod coded;
mod defaults;
mod exchange;
mod hosts;
mod lend;
mod link;
mod memory;
mod outcome;
mod outer_state;
mod overlap;
mod pending;
mod progress;
mod raw;
mod rebuild;
mod recover;
mod report;
mod run;
mod stage;
mod start;
mod table;
mod telemetry;
mod watch;

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

pub use algorithm::Algorithm;
pub use builder::Builder;
#[cfg(feature = "__testing")]
pub use builder::Testing;
pub use exchange::Reduction;
pub(crate) use lend::Begun;
#[cfg_attr(not(feature = "cuda"), allow(unused_imports))]
pub(crate) use lend::Ordered;
pub use lend::{Lend, LendError, Loan};
pub use link::Link;
pub(crate) use outer_state::saved::OUTER as OUTER_SECTION;
pub(crate) use overlap::Landed;
pub use overlap::Overlapped;
pub use pending::Pending;
pub(crate) use progress::{Halt, Progress};
pub use raw::RawCudaParams;
pub(crate) use recover::{Regrouped, TRIES};
pub use report::Report;
pub use start::Start;
pub use telemetry::Telemetry;

use crate::abi::*;
use crate::plan::End;
use crate::schedule::{place, Reason};
use crate::world::{AbortHandle, Agreement, Communicator};
use crate::{Compression, Error, Result};
use coded::Reference;
use memory::RankMemory;
use outer_state::{AnchorState, Launches, OuterState};
use overlap::UnderWay;
use pending::Captured;
use rebuild::Blueprint;
use recover::Admitted;
use stage::RankStage;
use table::Table;
use watch::Watch;

/// Averages a rank's parameters with those of its peers, in place.
///
/// Every average is collective: it returns when all ranks have called it, and gives every rank the
/// same bits, unless an [outer optimizer](Builder::outer) lets ranks keep a share. If it fails
/// before any rank wrote, every tensor of every rank is as it was, and every rank gets the same
/// error. Building gives all ranks rank 0's values ([`Start`]).
///
/// ```
/// use param_averager::{Device, ParamAverager, Communicator};
///
/// Communicator::run(&[Device::cpu(), Device::cpu()], |communicator| {
///     let rank = communicator.rank() as f32;
///     let mut model = vec![vec![0.0; 1000], vec![1.0; 10]];
///     let mut averager = ParamAverager::builder(communicator).build(&mut model)?;
///     model[0].fill(rank); // each rank trains its own copy
///     let report = averager.average(&mut model)?;
///     assert_eq!(report.bytes, 4040);
///     assert_eq!(model[0], [0.5; 1000]);
///     Ok::<_, param_averager::Error>(())
/// })?;
/// # Ok::<(), param_averager::Error>(())
/// ```
pub struct ParamAverager {
    communicator: Communicator,
    agreement: Arc<Agreement>,
    algorithm: Algorithm,
    launches: Launches,
    /// Data packs of a slot of the ring.
    chunk: u32,
    table: Table,
    own: RankMemory,
    args: PaArgs,
    timeout: Duration,
    /// Options of this averager's successor in a later view.
    options: Builder,
    failed: Option<Error>,
    /// Number of exchanges made by calls.
    exchanges: u32,
    /// The latest call that was launched.
    call: Call,
    /// Average of a copy that was started and not finished.
    under_way: Option<UnderWay>,
    /// Failure of a `lend` after its average was made, until the call that made it ends.
    late: Option<Error>,
    /// Average that gave a joiner the model. `regroup` takes it.
    admitted: Option<Admitted>,
    /// Recipe for a successor, which is built without the tensors. `None` in a successor that has
    /// not been taken yet.
    blueprint: Option<Arc<Blueprint>>,
    /// State of the outer optimizer in an earlier view, until this averager has taken it over.
    inherited: Option<Arc<OuterState>>,
    /// State of the outer optimizer: whether it is to be taken over from an earlier view, and
    /// whether it has an anchor.
    anchor: AnchorState,
    /// End of the average that was launched last.
    end: End,
    /// Progress to the first coded average.
    reference: Reference,
    /// Code of the average that was launched last.
    compression: Compression,
    /// The average that was captured into a CUDA graph last.
    captured: Option<Captured>,
    /// True if ranks kept a share of their values in the last average that was made.
    mixed: bool,
    /// Share of the outer optimizer's state that no rank of this view had.
    lost_state: f64,
    #[cfg(feature = "metrics")]
    metrics: telemetry::Metrics,
    /// The user's stage, and the link to other hosts.
    stage: Option<RankStage>,
    /// True if the next recovery is one of this host alone.
    leaves_hosts: bool,
    /// Stream of the average that may be under way, kept alive until the next one has begun.
    stream: Option<Arc<dyn Any + Send + Sync>>,
    watch: Arc<Watch>,
}

/// Request for one average.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) weight: Option<f64>,
    /// Digest of the schedule and of the place in it; 0: outside of every schedule.
    pub(crate) schedule: u64,
    /// Place in the schedule, for errors: a step, or one of `schedule::place`.
    pub(crate) place: u64,
    /// True if this rank has nothing to average, but takes part if a peer has.
    pub(crate) unneeded: bool,
    /// True if this rank takes part and its tensors stay as they are. For the ring only.
    pub(crate) keeps: bool,
    /// Fragment that is averaged. `None`: the whole model.
    pub(crate) fragment: Option<usize>,
    pub(crate) work: Work,
    /// Reason of a `LocalSgd`, for errors.
    pub(crate) reason: Option<Reason>,
    /// Steps since the last average, for the report.
    pub(crate) local_steps: u64,
    /// Measurements of this rank. All ranks get the largest of each, in the report.
    pub(crate) measured: Option<[f64; 2]>,
}

/// Work of a call on the tensors that are lent for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// The average of the tensors.
    InPlace,
    /// A copy of them, and the start of its average.
    OfCopy,
    /// The addition of what that average has changed.
    Apply,
}

impl Call {
    /// An average outside of every schedule.
    pub(crate) fn by_hand(weight: Option<f64>) -> Call {
        Call {
            weight,
            schedule: 0,
            place: place::BY_HAND,
            unneeded: false,
            keeps: false,
            fragment: None,
            work: Work::InPlace,
            reason: None,
            local_steps: 0,
            measured: None,
        }
    }

    /// The call in words, as the cause of [`Error::SchedulesDiffer`] or `CallsDiffer`.
    fn in_words(&self, is_of_schedule: bool) -> String {
        match self.reason {
            Some(reason) if is_of_schedule => reason.at(self.place),
            _ => place::call(self.place),
        }
    }
}

/// End of an average that did not fail.
#[expect(clippy::large_enum_variant, reason = "averages on CPUs allocate nothing")]
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Averaged(Report),
    Unneeded {
        /// True if every rank has ended its steps.
        all_done: bool,
    },
}

impl Outcome {
    /// The report of an average that this rank needed.
    fn report(self) -> Report {
        match self {
            Outcome::Averaged(report) => report,
            Outcome::Unneeded { .. } => {
                unreachable!("only a rank that does not need one is told so")
            }
        }
    }
}

impl ParamAverager {
    /// Options of an averager for this rank; [`Builder::build`] builds it.
    pub fn builder(communicator: Communicator) -> Builder {
        Builder::new(communicator)
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.communicator.world_size()
    }

    /// Ranks in the order of the ring, from rank 0. On several CUDA devices the order follows their
    /// topology.
    pub fn ring_order(&self) -> &[usize] {
        self.communicator.placement().order()
    }

    /// Number of this rank in the kernels: its place in the ring.
    fn position(&self) -> usize {
        self.communicator.placement().position(self.rank())
    }

    /// Algorithm in use, never [`Algorithm::Auto`].
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Memory of this rank beyond its parameters, in bytes: slots, shard, counters, tables, the
    /// state of the outer optimizer, the reference and the residual of compression, and buffers for
    /// other hosts.
    pub fn memory_overhead(&self) -> usize {
        let stage = self.stage.as_ref().map_or(0, RankStage::bytes);
        self.own.bytes(&self.table) + size_of::<PaControl>() + stage
    }

    /// Current communicator of this rank, for further averagers. After a rank was lost or admitted
    /// its rank and size differ from those of the communicator that the averager was built with.
    pub fn communicator(&self) -> &Communicator {
        &self.communicator
    }

    /// Number of tensors, bytes of all, and digest of their names, dtypes and sizes.
    pub(crate) fn layout(&self) -> [u64; 3] {
        let Table { layout, bytes, .. } = &self.table;
        [layout.size().0 as u64, *bytes, layout.digest()]
    }

    /// Handle that ends every wait of this world, from any thread.
    pub fn abort_handle(&self) -> AbortHandle {
        self.communicator.abort_handle()
    }

    /// Replaces every tensor by its mean over all ranks, or by the result of the
    /// [outer optimizer](Builder::outer)'s step. Collective.
    ///
    /// # Errors
    /// Before the commit, the same error on every rank, and no tensor of any rank has changed. It
    /// names the rank that was late, left, aborted, passed other tensors or, if that is
    /// [rejected](Builder::reject_non_finite), held a value that is not finite. [`Error::is_fatal`]
    /// tells whether the averager can be used again, [`Error::tensors`] what this rank's tensors
    /// hold.
    pub fn average<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Report> {
        let report = self.run(params, Call::by_hand(None)).map(Outcome::report)?;
        self.unless_late(report)
    }

    /// Replaces every tensor by its weighted mean over all ranks, Σ wᵢ·xᵢ / Σ wᵢ. Collective.
    ///
    /// `weight` is this rank's share, such as the number of samples it has seen since the last
    /// average: finite, not negative, and positive on one rank at least. A rank of weight 0 only
    /// receives: its values, NaN included, do not count. Weight 1 on rank 0 and 0 on every other
    /// rank copies rank 0's parameters to all ranks.
    ///
    /// # Errors
    /// As [`average`](Self::average); [`Error::InvalidWeight`] and [`Error::AllWeightsZero`];
    /// [`Error::WeightingDiffers`] if another rank calls `average`.
    pub fn average_weighted<P: Lend + ?Sized>(
        &mut self,
        params: &mut P,
        weight: f64,
    ) -> Result<Report> {
        let report = self.run(params, Call::by_hand(Some(weight))).map(Outcome::report)?;
        self.unless_late(report)
    }
}

#[cfg(feature = "__testing")]
#[doc(hidden)]
impl ParamAverager {
    /// Makes the next averages end silently before their `step`-th protocol step; 0: at none.
    ///
    /// # Safety
    /// A rank that ends a direct average early does not wait for its peers. Its tensors must stay
    /// alive and untouched until every peer has returned from that average.
    pub unsafe fn leave_before_step(&mut self, step: u32) {
        self.args.fault_step = step;
    }

    /// Protocol steps that channel 0 made in the last average.
    pub fn steps(&self) -> u32 {
        self.ended().next().map_or(0, |status| status.step)
    }
}

impl Drop for ParamAverager {
    fn drop(&mut self) {
        // The kernels of a forgotten `Pending` still use the memory that is freed now.
        let _ = self.own.engine.finish();
        self.publish_completed();
        self.agreement.control.leave(self.position());
    }
}

impl fmt::Debug for ParamAverager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParamAverager")
            .field("rank", &self.rank())
            .field("world_size", &self.world_size())
            .field("algorithm", &self.algorithm)
            .field("tensors", &self.table.describe_all().len())
            .field("bytes", &self.table.bytes)
            .field("engine", &self.own.engine)
            .finish_non_exhaustive()
    }
}

/// Polls of a wait before it yields. With a core for each thread, more than a hand-off takes; with
/// shared cores none, since the peer may be waiting for this core.
fn spins(threads: usize) -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    if threads <= cores {
        200
    } else {
        0
    }
}

fn flag(flag: PaFlag, set: bool) -> u32 {
    if set {
        flag
    } else {
        0
    }
}
