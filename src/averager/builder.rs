//! Options of an averager.

mod check;

use std::sync::Arc;
use std::time::Duration;

use super::defaults::{self, Cut};
use super::outer_state::OuterState;
use super::{Algorithm, Lend, Link, ParamAverager, Start};
use crate::backend::{MemorySpace, ProcessWay};
use crate::hosts::{Hierarchy, HostLink};
use crate::schedule::Course;
use crate::stage::Stage;
use crate::world::{Admission, Communicator};
#[cfg(doc)]
use crate::Error;
use crate::{Compression, Outer, Overlap, Result};

/// Options of a [`ParamAverager`]; the same on every rank.
#[derive(Clone, Debug)]
#[must_use = "call build"]
pub struct Builder {
    pub(super) communicator: Communicator,
    pub(super) algorithm: Algorithm,
    pub(super) link: Link,
    pub(super) all_or_nothing: bool,
    pub(super) reject_non_finite: Option<bool>,
    pub(super) reproducible: bool,
    pub(super) narrow_wire: bool,
    pub(super) allow_unnamed: bool,
    pub(super) start: Start,
    pub(super) outer: Outer,
    pub(super) share_outer_state: bool,
    pub(super) compression: Compression,
    pub(super) hosts_compression: Compression,
    pub(super) telemetry: bool,
    pub(super) overlap: Overlap,
    pub(super) stage: Option<Stage>,
    pub(super) hosts: Option<(HostLink, Hierarchy)>,
    pub(super) timeout: Duration,
    pub(super) device_timeout: Duration,
    pub(super) channels: Option<u32>,
    pub(super) slots: u32,
    pub(super) chunk_bytes: Option<usize>,
    /// True if the tensors' uses are ordered on a stream; set by `build`.
    pub(super) on_stream: bool,
    /// True if other devices can't access this rank's tensors; set by `build`.
    pub(super) is_unreached: bool,
    /// Course of a `LocalSgd`, part of the handshake: a joiner starts from it.
    pub(super) course: Course,
    /// Role of this rank in an admission.
    pub(super) admission: Admission,
    /// Identity of the averager in its world, if it is built again.
    pub(super) ordinal: Option<String>,
    /// State of the outer optimizer in an earlier view.
    pub(super) inherited: Option<Arc<OuterState>>,
    pub(super) testing: Testing,
}

/// Settings of this crate's own tests.
#[derive(Clone, Debug, Default)]
pub struct Testing {
    /// Initial value of all counters.
    pub counter: u32,
    /// True if the slots are filled with NaN first.
    pub poison_slots: bool,
    /// Latency of a slot's cache line, in nanoseconds, above which slots are written past the
    /// caches: 0 always, `u32::MAX` never.
    pub remote_ns: Option<u32>,
    /// Longest delay of every block at each of its protocol steps, in nanoseconds.
    pub delay_ns: u32,
    /// Instruction set in the place of the best one.
    pub instruction_set: Option<&'static str>,
}

impl Builder {
    pub(super) fn new(communicator: Communicator) -> Self {
        Builder {
            communicator,
            algorithm: Algorithm::Auto,
            link: Link::Auto,
            all_or_nothing: true,
            reject_non_finite: None,
            reproducible: false,
            narrow_wire: false,
            allow_unnamed: false,
            start: Start::Rank(0),
            outer: Outer::mean(),
            share_outer_state: false,
            compression: Compression::None,
            hosts_compression: Compression::None,
            telemetry: false,
            overlap: Overlap::default(),
            stage: None,
            hosts: None,
            timeout: defaults::TIMEOUT,
            device_timeout: defaults::DEVICE_TIMEOUT,
            channels: None,
            slots: defaults::SLOTS,
            chunk_bytes: None,
            on_stream: false,
            is_unreached: false,
            course: Course::default(),
            admission: Admission::None,
            ordinal: None,
            inherited: None,
            testing: Testing::default(),
        }
    }

    /// Algorithm of the averages. Default: [`Algorithm::Auto`].
    pub fn algorithm(mut self, algorithm: Algorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// Placement of the ring's mailboxes on CUDA devices. Default: [`Link::Auto`].
    pub fn link(mut self, link: Link) -> Self {
        self.link = link;
        self
    }

    /// Commit of the ring. `true`, the default: a rank writes its tensors only when every rank has
    /// its shard of the mean, so a failure while summing leaves all tensors as they were. `false`:
    /// ranks write as they sum. That is faster and needs no memory for a shard, but a failure on
    /// the way leaves each element either a rank's own value or the mean. The direct average
    /// commits at its start, whatever this option is; the ring with an [outer](Self::outer)
    /// optimizer as with `true`.
    pub fn all_or_nothing(mut self, all_or_nothing: bool) -> Self {
        self.all_or_nothing = all_or_nothing;
        self
    }

    /// Check for NaN and infinities. `true`: if a rank holds one, no rank's tensors change and
    /// every rank gets [`Error::NonFinite`]. It costs the direct average, and the ring without
    /// [`all_or_nothing`](Self::all_or_nothing), one more pass over the tensors. Default: `true`
    /// for the ring with `all_or_nothing`, which looks at every element as it sums (2 to 4 % were
    /// measured on CPUs, about the noise); else `false`.
    pub fn reject_non_finite(mut self, reject: bool) -> Self {
        self.reject_non_finite = Some(reject);
        self
    }

    pub(super) fn rejects_non_finite(&self) -> bool {
        let is_free = self.all_or_nothing && self.chosen_algorithm() == Algorithm::Ring;
        self.reject_non_finite.unwrap_or(is_free)
    }

    /// Defaults that depend on nothing but the number of ranks: the ring, 4 channels and chunks of
    /// 64 KiB. Two runs with the same inputs then have the same bits on machines with other numbers
    /// of cores, and whether their ranks are threads or processes, on CPUs or on CUDA devices with
    /// one [`ring_order`](ParamAverager::ring_order). Options that are set take precedence.
    /// Otherwise [`Algorithm::Auto`], and the defaults of [`channels`](Self::channels) and
    /// [`chunk_bytes`](Self::chunk_bytes), follow the machine, and with them the bits of three
    /// ranks and more; see [`guide::accuracy`](crate::guide::accuracy). Default: `false`.
    pub fn reproducible(mut self, reproducible: bool) -> Self {
        self.reproducible = reproducible;
        self
    }

    /// Wire format of the ring's partial sums of f16 and bf16, with three ranks or more. `false`,
    /// the default: they travel as f32, so that the mean is rounded once and values that are equal
    /// on all ranks stay as they are. n ranks then send (n − 2) / (2n − 2) more bytes: 33 % for 4
    /// ranks. `true`: they travel as partial means in the tensors' dtype, and are rounded at each
    /// of n − 2 hops more.
    ///
    /// Everything else travels in the tensors' dtype either way. Two ranks send no partial sums.
    pub fn narrow_wire(mut self, narrow_wire: bool) -> Self {
        self.narrow_wire = narrow_wire;
        self
    }

    /// Permits several unnamed tensors of one dtype and size. Only their order tells them apart, so
    /// it must be the same on every rank and at every call, as in a `Vec` or an array. Without it,
    /// [`build`](Self::build) refuses them.
    pub fn allow_unnamed(mut self) -> Self {
        self.allow_unnamed = true;
        self
    }

    /// Values that all ranks begin with. Default: [`Start::Rank(0)`](Start::Rank), so that ranks
    /// need not begin with equal weights, and a checkpoint need be loaded on rank 0 only.
    pub fn start_from(mut self, start: Start) -> Self {
        self.start = start;
        self
    }

    /// Outer optimizer, which makes a step from the mean. The ring is then all or nothing, whatever
    /// [`all_or_nothing`](Self::all_or_nothing) is, and all ranks must begin with one model:
    /// [`Start::Own`] is refused. The step has state, which a [recovery](ParamAverager::recover)
    /// and a join carry over to the new ranks, except for the share of a rank that was lost: its
    /// velocity begins at 0 again, see [`Report::lost_state`](crate::Report::lost_state), unless
    /// [`share_outer_state`](Self::share_outer_state) is set. Default: [`Outer::mean`].
    pub fn outer(mut self, outer: Outer) -> Self {
        self.outer = outer;
        self
    }

    /// Code in which ranks send how far they have come since the last average, for slow links: by
    /// the ring, all or nothing, for tensors of f32 alone; values that are not finite are rejected.
    /// It takes 8 bytes of memory for each element. Averages that give the ranks values to begin
    /// with are made in full, and so is the first one after a recovery, a join, [`Start::Own`] or,
    /// with an outer optimizer, [`LocalSgd::load`](crate::LocalSgd::load). All ranks get the same
    /// reference, within a bound of the mean, and in averages in place the same bits: see
    /// [`guide::compression`](crate::guide::compression). Default: [`Compression::None`].
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Telemetry in each [`Report`](crate::Report): the norm of the parameters, and how far the
    /// average has moved those of this rank, from a sample of about 64 KiB of each dtype at
    /// most; and how long each rank has [waited](crate::Telemetry::waits) in the average before. It
    /// costs two small launches, and memory for the sample. A rank reads one number more of each
    /// other one; nothing is sent or waited for.
    /// [`Schedule::divergence`](crate::Schedule::divergence) needs it. Default: `false`.
    pub fn telemetry(mut self, telemetry: bool) -> Self {
        self.telemetry = telemetry;
        self
    }

    /// Overlap of averages with training, and averages of a part of the model at a time. With a
    /// [delay](Overlap::delay), averages that [`LocalSgd`](crate::LocalSgd) has due are made of a
    /// copy of the parameters, or of a fragment of them, while training goes on: that costs as much
    /// memory as the largest fragment has, and on CPUs one thread more. Refused with
    /// [`telemetry`](Self::telemetry), with a [`stage`](Self::stage) and with an
    /// [outer optimizer that keeps a share](crate::Outer::keeping); with a delay, the ring is all
    /// or nothing whatever [`all_or_nothing`](Self::all_or_nothing) is. Default:
    /// [`Overlap::default`], none.
    pub fn overlap(mut self, overlap: Overlap) -> Self {
        self.overlap = overlap;
        self
    }

    /// True if partial sums of f16 and bf16 travel as f32. Two ranks send no partial sums.
    pub(super) fn has_f32_wire(&self) -> bool {
        !self.narrow_wire && self.communicator.world_size() > 2
    }

    /// Longest wait for a peer, after which the average fails on every rank with
    /// [`Error::Timeout`]. Default: 10 minutes.
    ///
    /// Exception: once the direct average has begun to write, ranks wait for one another without a
    /// limit, since a peer may still be writing into their tensors.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Longest wait for a peer within a kernel on a CUDA device. All ranks have come by then, and
    /// their launches follow one another in microseconds, so that a longer wait tells of a device
    /// that has failed or does not run the peer's kernel: the average ends with [`Error::Timeout`],
    /// and so does the world. Default: 1 second, less than the time after which the driver kills
    /// kernels on a device with a display. [`timeout`](Self::timeout) bounds it, too. Averages of
    /// CUDA graphs wait for late ranks in their kernels, for as long as `timeout` says, or on a
    /// device with a display for this time.
    pub fn device_timeout(mut self, timeout: Duration) -> Self {
        self.device_timeout = timeout;
        self
    }

    /// Channels of a rank, 1 to 1,024: threads that each move a part. Default: this machine's cores
    /// divided by the ranks, 8 at most. On a CUDA device a channel is a block; default: half of the
    /// blocks that fit divided by the ranks, or 16 where the ring goes through memory of the host.
    /// More than that half is refused. Averagers whose averages overlap in time must fit on the
    /// device together, which is not checked.
    ///
    /// By the ring with three ranks or more, another number of channels gives other bits; see
    /// [`reproducible`](Self::reproducible).
    pub fn channels(mut self, channels: u32) -> Self {
        self.channels = Some(channels);
        self
    }

    /// Slots of each of the ring's mailboxes, a power of two from 2 to 1,024. Default: 4.
    pub fn slots(mut self, slots: u32) -> Self {
        self.slots = slots;
        self
    }

    /// Bytes of parameters in one slot of the ring, 128 B to 64 MiB, rounded up to a multiple of
    /// 128. Default: 256 KiB, less where all slots of a rank would exceed 2 MiB or where the model
    /// is small; on a CUDA device 32 KiB and 16 MiB.
    pub fn chunk_bytes(mut self, bytes: usize) -> Self {
        self.chunk_bytes = Some(bytes);
        self
    }

    /// Settings of this crate's own tests.
    #[cfg(feature = "__testing")]
    #[doc(hidden)]
    pub fn testing(mut self, testing: Testing) -> Self {
        self.testing = testing;
        self
    }

    /// Builds the averager for these tensors. Collective: returns when every rank has called it.
    /// Ranks compare options, names, dtypes and sizes, and then all tensors get rank 0's values,
    /// unless [`start_from`](Self::start_from) says otherwise. Afterwards values and addresses may
    /// change; number, order, names, dtypes and sizes stay.
    ///
    /// In a process that [joined](crate::Communicator::join), the tensors get the values that the
    /// members train.
    ///
    /// # Errors
    /// The same on every rank: [`Error::OptionsDiffer`], [`Error::LayoutsDiffer`], those of the
    /// average that copies rank 0's values ([`Error::NonFinite`] if they are rejected), or that of
    /// the rank that can't build, such as [`Error::InvalidOption`], [`Error::InvalidTensor`],
    /// [`Error::LendFailed`] and [`Error::Memory`]; between processes, peers get the text of that
    /// error in [`Error::PeerBuildFailed`]. [`Error::Timeout`] names a rank that does not call it.
    pub fn build<P: Lend + ?Sized>(self, params: &mut P) -> Result<ParamAverager> {
        let mut averager = ParamAverager::build(self, params)?;
        averager.start_values(params)?;
        // A process that joined has its model, but `lend` has failed with it: it leaves.
        averager.take_late().map_or(Ok(averager), Err)
    }

    /// True if the hosts make an average step by step, since processes share a device.
    pub(super) fn is_sequenced(&self) -> bool {
        self.communicator.placement().process_way() == Some(ProcessWay::Sequenced)
    }

    /// True if the ring commits after the reduce. Where hosts make the steps it always does; with
    /// an outer optimizer, whose state changes on all ranks or on none; and where averages are made
    /// of copies.
    pub(super) fn commits_late(&self) -> bool {
        let keeps_more = !self.outer.is_mean() || self.overlap.copies();
        self.all_or_nothing || self.is_sequenced() || keeps_more
    }

    /// Algorithm that `Auto` stands for.
    pub(super) fn chosen_algorithm(&self) -> Algorithm {
        match self.algorithm {
            Algorithm::Auto if self.reproducible || self.has_stage() => Algorithm::Ring,
            Algorithm::Auto if self.compression != Compression::None => Algorithm::Ring,
            Algorithm::Auto if self.prefers_direct() => Algorithm::Direct,
            Algorithm::Auto => Algorithm::Ring,
            chosen => chosen,
        }
    }

    /// True if `Auto` prefers the direct average to the ring. `Link::Host` asks for no peer access.
    fn prefers_direct(&self) -> bool {
        let placement = self.communicator.placement();
        placement.one_memory() || (placement.is_joined() && self.link != Link::Host)
    }

    /// Devices of other ranks that access this rank's tensors.
    pub(super) fn readers(&self) -> Vec<usize> {
        let placement = self.communicator.placement();
        match self.chosen_algorithm() {
            Algorithm::Direct if placement.reaches_all() => {
                placement.other_devices(self.communicator.rank())
            }
            _ => vec![],
        }
    }

    pub(super) fn cut(&self) -> Cut {
        let host = || self.link.is_host_anywhere(self.communicator.placement());
        match self.communicator.space() {
            MemorySpace::Host => defaults::CPU,
            MemorySpace::Cuda(_) if self.chosen_algorithm() == Algorithm::Ring && host() => {
                defaults::HOST
            }
            MemorySpace::Cuda(_) => defaults::PEER,
        }
    }

    pub(super) fn channel_count(&self) -> u32 {
        let pinned = self.reproducible.then_some(defaults::REPRODUCIBLE.channels);
        self.channels.or(pinned).unwrap_or_else(|| {
            let at_once = match self.communicator.placement().occupancy() {
                Some(occupancy) => occupancy.blocks / occupancy.ranks,
                None => {
                    (self.communicator.placement().cores() / self.communicator.world_size()) as u32
                }
            };
            at_once.clamp(1, self.cut().channels)
        })
    }
}
