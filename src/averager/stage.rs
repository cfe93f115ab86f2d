//! Work of the host between the reduce and the vote: the mean over all hosts, and the user's stage.

mod options;
mod parts;
mod refused;
mod values;

use std::time::Duration;

use super::hosts::{Own, RankHosts, Wanted};
use super::table::Table;
use super::watch::Watch;
use super::{Builder, ParamAverager};
use crate::abi::{PaArgs, PaStatus, PA_OPEN, PA_RING_VOTE, PA_UNNEEDED};
use crate::backend::cuda::StageStream;
use crate::backend::{Engine, Gathering, Order, Unstarted};
use crate::bucket::Division;
use crate::plan::Launch;
use crate::stage::{DeviceShard, Function, Shard, Share, Span, Stage, Veto};
use crate::world::MetWeight;
use crate::Error;
use parts::spans;
use values::{fetch, on_host, unmoved};

/// The work of one rank, and the parts of its shard.
pub(super) struct RankStage {
    stage: Option<Stage>,
    hosts: Option<RankHosts>,
    names: Vec<String>,
    spans: Vec<Span>,
    /// The same parts of the outer optimizer's anchor, where the exchange with hosts is coded.
    anchors: Vec<Span>,
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
    /// No rank of any host has anything to average.
    Unneeded,
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
            anchors: match options.needs_anchors() {
                true => spans(table, &division, position, |raw| raw.state),
                false => vec![],
            },
            spans: spans(table, &division, position, |raw| raw.mean),
            rank,
            world_size,
            layout: communicator.view(),
            rejects_non_finite: options.rejects_non_finite(),
            was_called: false,
            refusal: None,
        })
    }

    /// Does the work. Returns true if this rank refuses the average. `on` is the stream of a
    /// device; `None` on CPUs.
    ///
    /// # Safety
    /// The means hold the sum, on a device behind the earlier work of the stream. Nothing else uses
    /// them until this returns, on a device until the work has ended that is on the stream then.
    unsafe fn refuses(
        &mut self,
        on: Option<&mut StageStream>,
        own: Own,
        wanted: Wanted,
        (describe, is_over): (&dyn Fn(usize) -> String, &dyn Fn() -> bool),
    ) -> bool {
        // SAFETY: guaranteed by the caller.
        self.refusal = unsafe { self.run(on, own, wanted, (describe, is_over)) }.err();
        self.refusal.is_some()
    }

    /// # Safety
    /// As `refuses`.
    unsafe fn run(
        &mut self,
        mut on: Option<&mut StageStream>,
        own: Own,
        wanted: Wanted,
        (describe, is_over): (&dyn Fn(usize) -> String, &dyn Fn() -> bool),
    ) -> Result<(), Refusal> {
        let sets_values = wanted.sets_values();
        let is_of_all = self.hosts.as_mut().is_some_and(|hosts| hosts.begin(&wanted));
        let Some(hosts) = self.hosts.as_mut().filter(|_| is_of_all) else {
            if own == Own::Made {
                if on.is_none() {
                    // SAFETY: guaranteed by the caller, here and below.
                    unsafe { self.check(&self.spans, describe) }?;
                }
                // SAFETY: as above.
                unsafe { self.call(on.as_deref(), sets_values) }?;
            }
            return Ok(());
        };
        let limits = hosts.limits(is_over);
        let counts = own == Own::Made && hosts.counts(&wanted);
        let needs_anchors = hosts.needs_anchors(&wanted);
        let copied = on.as_deref().map(|on| on_host(&self.spans, on));
        let spans = copied.as_ref().unwrap_or(&self.spans);
        let anchors = on.as_deref().filter(|_| needs_anchors);
        let anchors = anchors.map(|on| on_host(&self.anchors, on));
        let anchors = anchors.as_ref().unwrap_or(&self.anchors);
        // SAFETY: as above.
        let fetched = match own {
            Own::Failed => Ok(()),
            Own::Made | Own::Unneeded => fetch(&mut on, needs_anchors),
        };
        // Values that do not count may be anything. Where no other host has news either, none
        // matters; or else one that is not finite is found in the mean of all hosts.
        let checked = match counts {
            true => fetched.and_then(|()| unsafe { self.check(spans, describe) }),
            false => fetched,
        };
        let own = if checked.is_ok() { own } else { Own::Failed };
        let hosts = self.hosts.as_mut().expect("it was there");
        // SAFETY: as above.
        let made = unsafe { hosts.average((spans, anchors), wanted, own, &limits) };
        checked?;
        if !made.map_err(Refusal::Hosts)? {
            return Err(Refusal::Unneeded);
        }
        let put = on.as_deref().map_or(Ok(()), StageStream::put).map_err(unmoved);
        // SAFETY: as above.
        let left = put.and_then(|()| unsafe { self.call(on.as_deref(), sets_values) });
        // The vote finds a value that is not finite, too, but on this host alone.
        let left = left.and_then(|()| {
            if self.stage.is_some() {
                fetch(&mut on, false)?;
            }
            let spans = copied.as_ref().unwrap_or(&self.spans);
            // SAFETY: as above.
            unsafe { self.check(spans, describe) }
        });
        // A failure of this host, or a stage that is too slow, is not to be found after its word.
        let left = left.and_then(|()| {
            limits[1].check().map_err(|error| {
                Veto::new(format!(
                    "the exchange with other hosts and the stage have taken three quarters of the \
                     builder's `timeout`, or {}: raise it",
                    error.reason
                ))
            })
        });
        let hosts = self.hosts.as_ref().expect("it was there");
        let agreed = hosts.agree(left.is_err(), is_over);
        left?;
        agreed.map_err(Refusal::Hosts)
    }

    /// Calls the function, if there is one.
    ///
    /// # Safety
    /// As `refuses`.
    unsafe fn call(&mut self, on: Option<&StageStream>, sets_values: bool) -> Result<(), Veto> {
        let Some(stage) = &self.stage else { return Ok(()) };
        // SAFETY: guaranteed by the caller, here and below.
        let before = sets_values.then(|| unsafe { self.digest(on) }).transpose()?;
        self.was_called = true;
        stage.call(|function, was_committed| {
            let share = Share {
                rank: self.rank,
                world_size: self.world_size,
                layout: self.layout,
                sets_values,
                was_committed,
                names: &self.names,
                spans: &self.spans,
            };
            match (function, on) {
                // SAFETY: as above.
                (Function::Host(function), None) => function(&mut unsafe { Shard::new(share) }),
                (Function::Device(function), Some(on)) => {
                    function(&mut DeviceShard::new(share, on.device(), on.raw()))
                }
                _ => unreachable!("a stage for other memory was refused"),
            }
        })?;
        let Some(before) = before else { return Ok(()) };
        // SAFETY: as above; the function has returned.
        if before != unsafe { self.digest(on) }? {
            return Err(Veto::new(
                "its function has changed values that all ranks begin with: leave them as they are \
                 where `sets_values` is true",
            ));
        }
        Ok(())
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

    /// True if an average at this place makes hosts agree that may differ.
    pub(super) fn evens_out(&self, place: u64) -> bool {
        self.hosts.as_ref().is_some_and(|hosts| hosts.are_apart() && hosts.is_of_all(place))
    }

    /// True if this host's values do not count in an average at this place.
    pub(super) fn only_receives(&self, place: u64) -> bool {
        self.hosts.as_ref().is_some_and(|hosts| hosts.only_receives(place))
    }

    /// Largest of what the ranks of all hosts have measured, if the last average was of all.
    pub(super) fn measured(&self) -> Option<[f64; 2]> {
        self.hosts.as_ref().and_then(RankHosts::measured)
    }

    /// Wait for the last host to come to the last average.
    pub(super) fn waited(&self) -> Duration {
        self.hosts.as_ref().map_or(Duration::ZERO, RankHosts::waited)
    }

    /// Error of the exchange with other hosts in the last average.
    pub(super) fn error_of_hosts(&self) -> Option<Error> {
        match &self.refusal {
            Some(Refusal::Hosts(error)) => Some(error.clone()),
            _ => None,
        }
    }

    /// True if no host has needed the last average.
    pub(super) fn is_unneeded(&self) -> bool {
        matches!(self.refusal, Some(Refusal::Unneeded))
    }

    /// True if an average at this place is of all hosts.
    pub(super) fn is_of_all_hosts(&self, place: u64) -> bool {
        self.hosts.as_ref().is_some_and(|hosts| hosts.is_of_all(place))
    }

    /// Tells other hosts that this one can't average any more.
    pub(super) fn abort(&self, reason: &str) {
        self.hosts.iter().for_each(|hosts| hosts.abort(reason));
    }

    /// Bytes of the tables.
    pub(super) fn bytes(&self) -> usize {
        self.hosts.as_ref().map_or(0, RankHosts::bytes)
            + size_of_val(&self.spans[..])
            + size_of_val(&self.anchors[..])
            + self.names.iter().map(String::len).sum::<usize>()
    }
}

/// A rank's stage, in one average.
pub(super) struct StageOf<'a> {
    pub(super) stage: &'a mut RankStage,
    pub(super) watch: &'a Watch,
    /// The average, without what is known when the ranks of this host have met.
    pub(super) wanted: Wanted,
    /// Weight of this host's ranks in an epoch.
    pub(super) weight: &'a dyn Fn(u32) -> Option<MetWeight>,
    /// True if the ranks of this host can't go on: the world has failed, or, if this average needs
    /// them, one has left.
    pub(super) is_over: &'a dyn Fn(bool) -> bool,
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
    let (Some(StageOf { stage, watch, wanted, weight, is_over, describe }), Some(vote)) =
        (stage, vote)
    else {
        // SAFETY: guaranteed by the caller, here and below.
        return match aside {
            false => unsafe { engine.start(args, launches, order, peers) },
            // SAFETY: as above.
            true => unsafe { engine.start_aside(args, launches, order, peers) },
        };
    };
    stage.refusal = None;
    let has_hosts = stage.hosts.is_some();
    let mut refuses = |on: Option<&mut StageStream>, ended: &[PaStatus]| {
        let outcome = ended.iter().map(|status| status.outcome).find(|&of| of != PA_OPEN);
        let own = match outcome {
            None => Own::Made,
            Some(PA_UNNEEDED) => Own::Unneeded,
            Some(_) => Own::Failed,
        };
        let (first, has_sum) = (ended.first(), own == Own::Made);
        let met = first.filter(|_| has_sum).and_then(|status| weight(status.epoch));
        let own = if met.is_some_and(|met| !met.is_needed) { Own::Unneeded } else { own };
        let (weight, is_weighted) =
            met.map_or_else(Default::default, |met| (met.sum, met.is_weighted));
        let measured = first.map_or([0.0; 2], |status| status.measured);
        let wanted = Wanted { weight, is_weighted, measured, ..wanted };
        // Peers vote after this, unless they have ended: then they may leave.
        let is_over = || is_over(has_sum);
        // SAFETY: the engine calls this behind the reduce, and the kernels that read the means come
        // after it.
        let run = || unsafe { stage.refuses(on, own, wanted, (describe, &is_over)) };
        // With a link, the user's function is taken for a part of the wait.
        let refuses = if has_hosts { watch.for_hosts(run) } else { watch.pause(run) };
        refuses && has_sum
    };
    // SAFETY: guaranteed by the caller.
    unsafe { engine.start_around(args, launches.split_at(vote), order, peers, &mut refuses) }
}

impl ParamAverager {
    /// True if an average of this rank has nothing to do but to check its arguments.
    pub(crate) fn is_alone(&self) -> bool {
        self.world_size() == 1 && !self.has_outer() && self.stage.is_none()
    }
}
