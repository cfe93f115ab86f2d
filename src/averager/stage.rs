//! Work of the host between the reduce and the vote: the mean over all hosts, and the user's stage.

use super::hosts::{RankHosts, Wanted};
use super::table::Table;
use super::watch::Watch;
use super::{flag, Algorithm, Builder, ParamAverager};
use crate::abi::{PaArgs, PA_FLAG_VETO, PA_OPEN, PA_PACK_BYTES, PA_RING_VOTE};
use crate::backend::{Engine, Gathering, MemorySpace, Order, Unstarted};
use crate::bucket::Division;
use crate::hash::Digest;
use crate::plan::Launch;
use crate::stage::{Shard, Span, Stage, Veto};
use crate::tensor::Dtype;
use crate::Error;

/// The work of one rank, and the parts of its shard.
pub(super) struct RankStage {
    stage: Option<Stage>,
    hosts: Option<RankHosts>,
    names: Vec<String>,
    spans: Vec<Span>,
    rank: usize,
    world_size: usize,
    layout: u32,
    rejects_non_finite: bool,
    /// True if the function was called in the average that is under way.
    was_called: bool,
    /// Refusal of this rank in the last average.
    refusal: Option<Refusal>,
}

/// Reason of a rank to refuse an average.
enum Refusal {
    Veto(Veto),
    /// Error of the exchange with other hosts.
    Hosts(Error),
}

impl From<Veto> for Refusal {
    fn from(veto: Veto) -> Refusal {
        Refusal::Veto(veto)
    }
}

impl RankStage {
    /// `table` has the addresses of the means.
    pub(super) fn new(
        options: &Builder,
        table: &Table,
        chunk: u32,
        channels: u32,
    ) -> Option<RankStage> {
        if !options.has_stage() {
            return None;
        }
        let communicator = &options.communicator;
        let (rank, world_size) = (communicator.rank(), communicator.world_size());
        let division = Division { world: world_size as u32, channels, chunk, is_ring: true };
        let position = communicator.placement().position(rank) as u32;
        Some(RankStage {
            stage: options.stage.clone(),
            hosts: RankHosts::new(options, table, chunk, channels),
            names: table.names(),
            spans: spans(table, &division, position),
            rank,
            world_size,
            layout: communicator.view(),
            rejects_non_finite: options.rejects_non_finite(),
            was_called: false,
            refusal: None,
        })
    }

    /// Does the work. Returns true if this rank refuses the average.
    ///
    /// # Safety
    /// If `is_reduced`, the reduce has filled the means, and nothing else uses them until this
    /// returns.
    unsafe fn refuses(
        &mut self,
        is_reduced: bool,
        wanted: Wanted,
        describe: &dyn Fn(usize) -> String,
    ) -> bool {
        // SAFETY: guaranteed by the caller.
        self.refusal = unsafe { self.run(is_reduced, wanted, describe) }.err();
        self.refusal.is_some()
    }

    /// # Safety
    /// As `refuses`.
    unsafe fn run(
        &mut self,
        is_reduced: bool,
        wanted: Wanted,
        describe: &dyn Fn(usize) -> String,
    ) -> Result<(), Refusal> {
        let sets_values = wanted.sets_values();
        let is_of_all = self.hosts.as_ref().is_some_and(|hosts| hosts.is_due(sets_values));
        self.hosts.iter_mut().for_each(|hosts| hosts.begin(is_of_all));
        // SAFETY: guaranteed by the caller, here and below.
        let own = is_reduced.then(|| unsafe { self.check(describe) });
        if let Some(hosts) = self.hosts.as_mut().filter(|_| is_of_all) {
            let failed = !matches!(own, Some(Ok(())));
            // SAFETY: as above.
            let made = unsafe { hosts.average(&self.spans, wanted, failed) };
            made.map_err(Refusal::Hosts)?;
        }
        let Some(own) = own else { return Ok(()) };
        own?;
        // SAFETY: as above.
        let called = unsafe { self.call(sets_values, describe) };
        if let Some(hosts) = self.hosts.as_ref().filter(|_| is_of_all) {
            let agreed = hosts.agree(called.is_err());
            called?;
            return agreed.map_err(Refusal::Hosts);
        }
        Ok(called?)
    }

    /// Looks at the mean of this host's ranks.
    ///
    /// # Safety
    /// As `refuses`.
    unsafe fn check(&self, describe: &dyn Fn(usize) -> String) -> Result<(), Veto> {
        // SAFETY: guaranteed by the caller.
        if let Some((tensor, element)) = unsafe { self.first_non_finite() } {
            // The rank that holds such a value votes against the average, too, and its error is the
            // one that all ranks get. Otherwise the sum has overflowed.
            let tensor = describe(tensor);
            return Err(Veto::new(format!("the mean is not finite: {tensor}, element {element}")));
        }
        Ok(())
    }

    /// Calls the function, and looks at what it leaves.
    ///
    /// # Safety
    /// As `refuses`.
    unsafe fn call(
        &mut self,
        sets_values: bool,
        describe: &dyn Fn(usize) -> String,
    ) -> Result<(), Veto> {
        let Some(stage) = &self.stage else {
            // SAFETY: guaranteed by the caller.
            return match unsafe { self.first_non_finite() } {
                Some((tensor, element)) => Err(Veto::new(format!(
                    "the mean of all hosts is not finite: {}, element {element}",
                    describe(tensor)
                ))),
                None => Ok(()),
            };
        };
        // SAFETY: guaranteed by the caller, here and below.
        let before = sets_values.then(|| unsafe { self.digest() });
        // SAFETY: as above.
        let mut shard = unsafe { Shard::new(&self.names, &self.spans) };
        (shard.rank, shard.world_size, shard.layout) = (self.rank, self.world_size, self.layout);
        shard.sets_values = sets_values;
        self.was_called = true;
        stage.call(&mut shard)?;
        // SAFETY: as above; the function has returned.
        if before.is_some_and(|before| before != unsafe { self.digest() }) {
            return Err(Veto::new(
                "its function has changed values that all ranks begin with: leave them as they are \
                 where Shard::sets_values is true",
            ));
        }
        // SAFETY: as above.
        match unsafe { self.first_non_finite() } {
            Some((tensor, element)) => Err(Veto::new(format!(
                "its function has left a value that is not finite, or too large for its dtype, in \
                 {}, element {element}",
                describe(tensor)
            ))),
            None => Ok(()),
        }
    }

    /// Tensor and element of a value that is rejected, if there is one.
    ///
    /// # Safety
    /// As `refuses`.
    unsafe fn first_non_finite(&self) -> Option<(usize, usize)> {
        if !self.rejects_non_finite {
            return None;
        }
        self.spans.iter().find_map(|span| {
            // SAFETY: guaranteed by the caller.
            let found = unsafe { span.values() }.first_beyond(span.dtype)?;
            Some((span.tensor, span.first + found))
        })
    }

    /// # Safety
    /// As `refuses`.
    unsafe fn digest(&self) -> u64 {
        let mut digest = Digest::default();
        // SAFETY: guaranteed by the caller.
        self.spans.iter().for_each(|span| digest.add(unsafe { span.values() }.bytes()));
        digest.value()
    }

    /// Notes the end of an average.
    pub(super) fn ended(&mut self, committed: bool) {
        self.hosts.iter_mut().for_each(|hosts| hosts.ended(committed));
        if std::mem::take(&mut self.was_called) {
            self.stage.iter().for_each(|stage| stage.ended(committed));
        }
    }

    /// The number of hosts in the last average.
    pub(super) fn hosts(&self) -> usize {
        self.hosts.as_ref().map_or(1, RankHosts::in_last)
    }

    /// Largest of what the ranks of all hosts have measured, if the last average was of all.
    pub(super) fn measured(&self) -> Option<[f64; 2]> {
        self.hosts.as_ref().and_then(RankHosts::measured)
    }

    /// Tells other hosts that this one can't average any more.
    pub(super) fn abort(&self, error: &Error) {
        self.hosts.iter().for_each(|hosts| hosts.abort(error));
    }

    /// Bytes of the tables.
    pub(super) fn bytes(&self) -> usize {
        self.hosts.as_ref().map_or(0, RankHosts::bytes)
            + size_of_val(&self.spans[..])
            + self.names.iter().map(String::len).sum::<usize>()
    }
}

/// The parts of a rank's shard: the runs of its packs, cut at the ends of tensors.
fn spans(table: &Table, division: &Division, position: u32) -> Vec<Span> {
    let (mut spans, mut at) = (vec![], 0);
    for (bucket, raw) in table.buckets.iter().zip(&table.raw) {
        let per_pack = u64::from(PA_PACK_BYTES) / bucket.dtype.size() as u64;
        let value = if bucket.dtype == Dtype::F64 { 8 } else { 4 };
        for run in division.runs(bucket.packs, position) {
            let (first, end) = (run.first * per_pack, (run.first + run.packs) * per_pack);
            let is_before = |segment: &crate::abi::PaSegment| {
                segment.first_pack * per_pack + segment.elements <= first
            };
            let from = bucket.segments.partition_point(is_before);
            for (segment, &tensor) in bucket.segments.iter().zip(&bucket.tensors).skip(from) {
                let begin = segment.first_pack * per_pack;
                if begin >= end {
                    break;
                }
                let (low, high) = (begin.max(first), (begin + segment.elements).min(end));
                let elements = (high - low) as usize;
                spans.push(Span {
                    tensor,
                    dtype: bucket.dtype,
                    first: (low - begin) as usize,
                    elements,
                    at,
                    address: raw.mean + (run.at * per_pack + low - first) * value,
                });
                at += elements;
            }
        }
    }
    spans
}

impl Builder {
    /// Stage of this rank: a function that has the rank's [`Shard`] of the mean, in f32 (f64 for
    /// f64), before the commit. What it leaves there is what all ranks get, rounded to the tensors'
    /// dtype: an optimizer of one's own, a filter, a check. It is called once in every average that
    /// has summed, also of a world of one rank, on the thread that averages, unless a mean is not
    /// finite where that is [rejected](Self::reject_non_finite); peers wait for it meanwhile, until
    /// the [`timeout`](Self::timeout). With an [`outer`](Self::outer) optimizer it comes first, and
    /// the outer step is made from what it leaves. Averagers of clones of one builder share it.
    ///
    /// If it returns a [`Veto`] or panics, no tensor of any rank changes, every rank gets
    /// [`Error::StageVetoed`], and the world lives. The same holds if it leaves a value that is not
    /// finite where such values are rejected. After a panic it is not called again, and every
    /// average is refused.
    ///
    /// All ranks have a stage or none. Averages use the ring with its commit; the algorithm
    /// `Direct` and `all_or_nothing(false)` are refused, and so are CUDA devices. Its state is its
    /// own: it is in no saved state, and [`Shard::layout`] tells when its parts have changed.
    /// [`guide::outer`](crate::guide::outer) has an example. Default: none.
    pub fn stage(
        mut self,
        stage: impl FnMut(&mut Shard<'_>) -> Result<(), Veto> + Send + 'static,
    ) -> Self {
        self.stage = Some(Stage::new(stage));
        self
    }

    /// Option that contradicts a stage: its name, what was found, and what is expected.
    pub(super) fn stage_refusal(&self) -> Option<(&'static str, &'static str, &'static str)> {
        const RING: &str = "Auto or Ring: only the ring commits after it has summed";
        if self.algorithm == Algorithm::Direct {
            return Some(("algorithm", "Direct, with a stage", RING));
        }
        if !self.all_or_nothing {
            let expected = "true, the default: a stage comes between the sum and the commit";
            return Some(("all_or_nothing", "false, with a stage", expected));
        }
        match self.communicator.space() {
            MemorySpace::Host => None,
            MemorySpace::Cuda(_) => Some((
                "stage",
                "set, for a rank on a CUDA device",
                "none: stages are for ranks on CPUs; Builder::outer works on devices",
            )),
        }
    }
}

/// A rank's stage, in one average.
pub(super) struct StageOf<'a> {
    pub(super) stage: &'a mut RankStage,
    pub(super) watch: &'a Watch,
    /// The average, with the weight of this rank alone.
    pub(super) wanted: Wanted,
    /// Sum of the weights of this host's ranks, once they have met.
    pub(super) weight: &'a dyn Fn(u32) -> f64,
    /// The line about a tensor.
    pub(super) describe: &'a dyn Fn(usize) -> String,
}

/// Starts the launches of an average on the engine, with the call of the stage before its vote.
///
/// # Safety
/// As `Engine::start`.
pub(super) unsafe fn start(
    engine: &mut Engine,
    (args, launches, order, peers, aside): (&PaArgs, &[Launch], Order, &Gathering<'_>, bool),
    stage: Option<StageOf<'_>>,
) -> Result<(), Unstarted> {
    let vote = launches.iter().position(|launch| launch.kernel == PA_RING_VOTE);
    let (Some(StageOf { stage, watch, wanted, weight, describe }), Some(vote)) = (stage, vote)
    else {
        // SAFETY: guaranteed by the caller, here and below.
        return match aside {
            false => unsafe { engine.start(args, launches, order, peers) },
            // SAFETY: as above.
            true => unsafe { engine.start_aside(args, launches, order, peers) },
        };
    };
    stage.refusal = None;
    // SAFETY: guaranteed by the caller. On CPUs, where stages are, the launches have run when
    // `start` returns.
    unsafe { engine.start(args, &launches[..vote], order, peers) }?;
    let is_reduced = engine.ended().iter().all(|status| status.outcome == PA_OPEN);
    // SAFETY: the reduce has ended, and the kernels that read the means come after this call.
    let epoch = engine.ended().first().map_or(0, |status| status.epoch);
    let measured = engine.ended().first().map_or([0.0; 2], |status| status.measured);
    let weight = if is_reduced { weight(epoch) } else { 0.0 };
    let has_hosts = stage.hosts.is_some();
    let wanted = Wanted { weight, measured, ..wanted };
    // SAFETY: as above.
    let run = || unsafe { stage.refuses(is_reduced, wanted, describe) };
    // With a link, the user's function in it is taken for a wait.
    let refuses = if has_hosts { watch.for_hosts(run) } else { watch.pause(run) };
    let vetoes = refuses && is_reduced;
    let args = PaArgs { flags: args.flags | flag(PA_FLAG_VETO, vetoes), ..*args };
    // SAFETY: guaranteed by the caller.
    unsafe { engine.start(&args, &launches[vote..], order, peers) }
}

impl ParamAverager {
    /// Error of an average that the stage of the rank has refused.
    pub(super) fn vetoed(&self, rank: usize) -> Error {
        match self.stage.as_ref().and_then(|stage| stage.refusal.as_ref()) {
            Some(Refusal::Hosts(error)) => error.clone(),
            Some(Refusal::Veto(own)) => {
                Error::StageVetoed { rank: self.rank(), reason: own.to_string() }
            }
            None => {
                let reason = "that rank's own error has the reason".into();
                Error::StageVetoed { rank, reason }
            }
        }
    }

    /// True if an average of this rank has nothing to do but to check its arguments.
    pub(crate) fn is_alone(&self) -> bool {
        self.world_size() == 1 && !self.has_outer() && self.stage.is_none()
    }
}
