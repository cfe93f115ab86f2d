//! The averager: one rank's tensors, the memory it shares with its peers, and the launches of an average.

mod builder;
mod defaults;
mod link;
mod memory;
mod outcome;
mod pending;
mod recover;
mod report;
mod table;

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use builder::{Builder, Testing};
pub use link::Link;
pub use pending::Pending;
pub use report::Report;

use crate::abi::*;
use crate::backend::{Memory, Unstarted};
use crate::error::Stage;
use crate::world::{AbortHandle, Agreement, Card, Communicator};
use crate::{Error, Parameters, Result};
use memory::{Own, Sizes, LINE_BYTES};
use table::Table;

/// How the parameters move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Algorithm {
    /// Direct where every rank can address every other's tensors (ranks that are threads of one process, on CPUs or on one
    /// CUDA device), else the ring: peers may not even read memory of another device's pool, where trainers keep tensors.
    Auto,
    /// Around a ring through mailboxes: S/n + 4 MiB of extra memory at most, 16 MiB more on a CUDA device. Sums of shard s are made in the order of
    /// ranks s+1, s+2, …, s, as they follow one another in [`ring_order`](ParamAverager::ring_order).
    Ring,
    /// The owner of each part reads all ranks' values, in rank order, and writes all ranks' means: no mailboxes, one
    /// rounding.
    Direct,
}

/// Averages a rank's parameters with those of its peers, in place.
///
/// Every average is collective: it returns when all ranks have called it, and gives every rank the same bits. If it
/// fails before anybody wrote, every tensor of every rank is as it was, and every rank gets the same error.
///
/// ```
/// use param_averager::{Device, ParamAverager, World};
///
/// let world = World::in_process(&[Device::cpu(), Device::cpu()])?;
/// let ranks: Vec<_> = world.into_iter().map(|communicator| std::thread::spawn(move || {
///     let mut model = vec![vec![communicator.rank() as f32; 1000], vec![1.0; 10]];
///     let mut averager = ParamAverager::builder(communicator).build(&mut model)?;
///     let report = averager.average(&mut model)?;
///     assert_eq!(report.bytes, 4040);
///     assert_eq!(model[0], [0.5; 1000]);
///     Ok::<_, param_averager::Error>(())
/// })).collect();
/// for rank in ranks {
///     rank.join().unwrap()?;
/// }
/// # Ok::<(), param_averager::Error>(())
/// ```
pub struct ParamAverager {
    communicator: Communicator,
    agreement: Arc<Agreement>,
    algorithm: Algorithm,
    phases: &'static [u32],
    table: Table,
    own: Own,
    args: PaArgs,
    timeout: Duration,
    /// To build another one by.
    options: Builder,
    failed: Option<Error>,
    /// The stream of the average that may be under way: to cudarc, a context whose last stream is gone has no need to order
    /// the uses of its slices any more.
    #[cfg(feature = "cudarc")]
    stream: Option<Arc<cudarc::driver::CudaStream>>,
}

/// One average, as asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) weight: Option<f64>,
    /// What the schedule makes of it; 0: it was asked for by hand.
    pub(crate) schedule: u64,
    /// This rank has nothing to average, but takes part if another has.
    pub(crate) unneeded: bool,
}

/// How it ended, if it did not fail.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    Averaged(Report),
    Unneeded,
}

impl ParamAverager {
    /// Starts to build an averager for this rank of a world.
    pub fn builder(communicator: Communicator) -> Builder {
        Builder::new(communicator)
    }

    fn build<P: Parameters + ?Sized>(options: Builder, params: &mut P) -> Result<Self> {
        let communicator = options.communicator.clone();
        let (rank, world) = (communicator.rank(), communicator.world_size());
        let (mut table, problem) = Table::new(params, communicator.device(), communicator.site().clone());
        let algorithm = options.chosen_algorithm();
        let ring = algorithm == Algorithm::Ring && world > 1;
        // From here on nothing returns before the peers know: what is refused here is shown to them as such.
        let refusal = options.check().err().or(problem.map(|problem| table.error(rank, problem)));
        let channels = if refusal.is_none() { options.channel_count() } else { 1 };
        let sizes = Sizes::of(&options, &table, channels);
        let own = match refusal {
            None => Own::new(&options, &mut table, sizes, channels, ring),
            Some(refusal) => Err(refusal),
        };
        let card = Card {
            refusal: own.as_ref().err().cloned(),
            options: options.shown(),
            tensors: table.describe_all(),
            schedule_position: options.schedule_position,
            inbox: own.as_ref().ok().and_then(|own| own.inbox.clone()),
            credits: own.as_ref().ok().and_then(|own| own.credits.clone()),
            control: own.as_ref().ok().and_then(|own| own.control.clone()),
        };
        let patience = if options.timeout.is_zero() { defaults::TIMEOUT } else { options.timeout };
        let agreement = communicator.agree(card, patience)?; // a refusal comes back from here
        let own = own?;

        let mut averager = ParamAverager {
            args: bytemuck::Zeroable::zeroed(),
            phases: phases(algorithm, options.all_or_nothing, options.reject_non_finite),
            timeout: options.timeout,
            options: options.clone(),
            failed: None,
            #[cfg(feature = "cudarc")]
            stream: None,
            communicator,
            agreement,
            algorithm,
            table,
            own,
        };
        averager.args = averager.launch_args(&options, sizes, channels);
        Ok(averager)
    }

    /// The arguments that stay the same for all launches.
    fn launch_args(&self, options: &Builder, sizes: Sizes, channels: u32) -> PaArgs {
        let (position, world) = (self.position(), self.world_size());
        let order = self.communicator.places().order();
        let card = |position: usize| &self.agreement.cards[order[position % world]];
        let address = |memory: &Option<Arc<Memory>>| memory.as_ref().map_or(0, |memory| memory.address());
        let own = card(position);
        let (own_inbox, own_credits) = (address(&own.inbox), address(&own.credits));
        let next = address(&card(position + 1).inbox);
        let slots = u64::from(channels) * LINE_BYTES as u64; // behind the counters
        PaArgs {
            control: self.agreement.control.address(),
            channel: self.own.engine.channels(),
            buckets: self.own.buckets,
            inbox: own_inbox + slots,
            outbox: next + slots,
            filled_in: own_inbox,
            filled_out: next,
            drained_in: own_credits,
            drained_out: address(&card(position + world - 1).credits),
            timeout_ns: u64::try_from(options.timeout.as_nanos()).unwrap_or(u64::MAX),
            rank: position as u32,
            world: world as u32,
            channels,
            slots: options.slots,
            slot_packs: sizes.slot_packs,
            bucket_count: self.table.raw.len() as u32,
            spins: spins(world * channels as usize),
            far_ns: options.testing.far_ns.unwrap_or(defaults::FAR_NS),
            delay_ns: options.testing.delay_ns,
            flags: flag(PA_FLAG_REJECT_NON_FINITE, options.reject_non_finite)
                | flag(PA_FLAG_THROUGH, self.agreement.control.has_through()),
            ..bytemuck::Zeroable::zeroed()
        }
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.communicator.world_size()
    }

    /// The ranks as they follow one another around the ring, from rank 0: on several CUDA devices, as these lie.
    pub fn ring_order(&self) -> &[usize] {
        self.communicator.places().order()
    }

    /// What this rank is called in the kernels.
    fn position(&self) -> usize {
        self.communicator.places().position(self.rank())
    }

    /// How parameters move: never [`Algorithm::Auto`].
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Memory of this rank beyond its parameters, in bytes: slots, shard, counters and tables.
    pub fn extra_bytes(&self) -> usize {
        self.own.bytes(&self.table) + size_of::<PaControl>()
    }

    /// A handle that ends whatever this world waits for, from any thread.
    pub fn abort_handle(&self) -> AbortHandle {
        self.communicator.abort_handle()
    }

    /// Replaces every tensor by its mean over all ranks. Collective.
    pub fn average<P: Parameters + ?Sized>(&mut self, params: &mut P) -> Result<Report> {
        self.average_by_hand(params, None)
    }

    /// Replaces every tensor by its weighted mean over all ranks, Σ wᵢ·xᵢ / Σ wᵢ. Collective.
    ///
    /// `weight` is this rank's, such as the number of samples it has seen since the last average. A rank of weight 0 only
    /// receives: its values, NaN included, count for nothing. Not all weights may be 0.
    pub fn average_weighted<P: Parameters + ?Sized>(
        &mut self,
        params: &mut P,
        weight: f64,
    ) -> Result<Report> {
        self.average_by_hand(params, Some(weight))
    }

    fn average_by_hand<P: Parameters + ?Sized>(
        &mut self,
        params: &mut P,
        weight: Option<f64>,
    ) -> Result<Report> {
        match self.run(params, Call { weight, schedule: 0, unneeded: false })? {
            Outcome::Averaged(report) => Ok(report),
            Outcome::Unneeded => unreachable!("this rank needs it"),
        }
    }

    pub(crate) fn run<P: Parameters + ?Sized>(&mut self, params: &mut P, call: Call) -> Result<Outcome> {
        let start = Instant::now();
        // SAFETY: `params` stays borrowed until `end` has returned.
        match unsafe { self.begin(params, call, None, start) }? {
            Some(outcome) => Ok(outcome),
            None => self.end(start),
        }
    }

    /// The first half of an average: what is over already, or nothing, and then `end` waits for it.
    ///
    /// # Safety
    /// The tensors that `params` visits are nobody else's until `end` has returned, and are used on the device only by
    /// what is ordered before or after `stream`, which is one of its primary context and lives as long.
    unsafe fn begin<P: Parameters + ?Sized>(
        &mut self,
        params: &mut P,
        call: Call,
        stream: Option<*mut c_void>,
        start: Instant,
    ) -> Result<Option<Outcome>> {
        if let Some(cause) = &self.failed {
            return Err(Error::Poisoned { cause: Box::new(cause.clone()) });
        }
        if let Some(failure) = self.agreement.control.failure() {
            let error = self.fatal(failure, Stage::Meet, false);
            self.failed = Some(error.clone());
            return Err(error);
        }
        // If a Pending was forgotten: it uses the tables. An error is told by what comes next.
        let _ = self.own.engine.finish();
        let problem = self.table.refresh(params).err();
        let refusal = self.refusal_of(problem, call);
        if self.world_size() == 1 {
            return self.alone(refusal, call, start).map(Some);
        }
        if let (Some(refusal), Some(stream)) = (&refusal, stream) {
            // What peers are told by an average, they would be told by every replay of a graph.
            // SAFETY: the caller's promise.
            if unsafe { self.own.engine.is_capturing(stream) }.map_err(|reason| self.device_failed(reason))? {
                return Err(refusal.clone());
            }
        }
        let args = PaArgs {
            schedule: call.schedule,
            weight: call.weight.unwrap_or(1.0),
            detail: problem.map_or(0, |problem| problem.tensor),
            found: problem.map_or(call.weight.unwrap_or(1.0).to_bits(), |problem| problem.found),
            flags: self.args.flags
                | flag(PA_FLAG_WEIGHTED, call.weight.is_some())
                | flag(PA_FLAG_UNNEEDED, call.unneeded)
                | flag(PA_FLAG_LAYOUT, problem.is_some()),
            ..self.args
        };
        if std::mem::take(&mut self.table.moved) {
            self.own
                .engine
                .set_tables(&self.table.raw, self.table.buckets.iter().map(|bucket| &bucket.segments[..]));
        }
        // Tensors that are not as they should be are not read: the launch that meets is enough to say so.
        let meets = |phase: u32| phase != PA_SCAN && phase != PA_RING_GATHER;
        let phases = self.phases.iter().copied().filter(|&phase| problem.is_none() || meets(phase));
        // SAFETY: the tables describe the tensors that `params` visited just now, which are the caller's promise; all other
        // memory is this averager's or kept by `agreement`.
        match unsafe { self.own.engine.start(&args, phases, stream) } {
            Ok(()) => Ok(None),
            Err(refused @ Unstarted::Refused { .. }) => {
                Err(refusal.unwrap_or_else(|| self.unstarted(refused)))
            }
            Err(failed @ Unstarted::Failed(_)) => {
                // Half an average may have been enqueued, whose kernels wait for peers, which wait for the other half, or for
                // this very call to return before they come: all must hear first.
                self.agreement.control.give_up(self.position());
                Err(self.unstarted(failed))
            }
        }
    }

    /// The second half: waits for it.
    fn end(&mut self, start: Instant) -> Result<Outcome> {
        if self.own.engine.was_captured() {
            return Err(Error::Option {
                rank: self.rank(),
                option: "stream",
                found: "being captured, so the average has not run".into(),
                expected: "nothing to wait for: launch the graph, then ask ParamAverager::replayed",
            });
        }
        self.own.engine.finish().map_err(|reason| self.device_failed(reason))?;
        self.outcome(Some(start))
    }

    /// The next averages end without a word before their `step`-th step; 0: they do not.
    #[doc(hidden)]
    pub fn leave_before_step(&mut self, step: u32) {
        self.args.fault_step = step;
    }

    /// Protocol steps that channel 0 made in the last average.
    #[doc(hidden)]
    pub fn steps(&self) -> u32 {
        self.ended().next().map_or(0, |status| status.step)
    }
}

impl Drop for ParamAverager {
    fn drop(&mut self) {
        let _ = self.own.engine.finish(); // if a Pending was forgotten: its kernels still use the memory that goes now
        self.say_through();
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

/// The launches of one average.
fn phases(algorithm: Algorithm, all_or_nothing: bool, reject_non_finite: bool) -> &'static [u32] {
    match (algorithm, all_or_nothing, reject_non_finite) {
        (Algorithm::Ring, true, _) => &[PA_RING_REDUCE, PA_RING_GATHER],
        (Algorithm::Ring, false, true) => &[PA_SCAN, PA_RING],
        (Algorithm::Ring, false, false) => &[PA_RING],
        (_, _, true) => &[PA_SCAN, PA_DIRECT],
        (_, _, false) => &[PA_DIRECT],
    }
}

/// How often a wait looks before it yields: where every thread has a core, longer than a hand-off takes; where threads
/// share cores, not at all, since the peer may be waiting for this very core.
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
