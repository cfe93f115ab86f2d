//! Launches of one average: checks before tensors are asked for, the first half, and the wait.

use std::time::Instant;

use super::hosts::Wanted;
use super::outer_state::AnchorState;
use super::stage::StageOf;
use super::table::Problem;
use super::{flag, stage, Call, Outcome, ParamAverager, Work};
use crate::abi::*;
use crate::backend::{Gathering, Order, Unstarted, Way};
use crate::error::Phase;
use crate::plan::End;
use crate::schedule::place;
use crate::{Error, Parameters, Result};

impl ParamAverager {
    /// Error of an averager that can't average any more. Looks at no tensor.
    pub(super) fn preflight(&mut self) -> Result<()> {
        self.check_world()?;
        if let Some(error) = self.refusal_of_another() {
            return Err(error);
        }
        // A forgotten `Pending` still uses the tables. The next launch reports its fatal error.
        let _ = self.own.engine.finish();
        self.note_stage();
        Ok(())
    }

    /// Error of an averager whose world has failed, or is no more.
    pub(super) fn check_world(&mut self) -> Result<()> {
        if let Some(cause) = &self.failed {
            return Err(Error::Poisoned { cause: Box::new(cause.clone()) });
        }
        let failure =
            self.agreement.control.failure().map(|failure| self.fatal(failure, Phase::Meet, false));
        let superseded =
            || self.communicator.is_superseded().then(|| Error::StaleView { rank: self.rank() });
        if let Some(error) = failure.or_else(superseded) {
            self.fail(&error);
            return Err(error);
        }
        Ok(())
    }

    /// First half of an average, after `preflight`. Returns the outcome if there is one already,
    /// else `None`: `end` waits for it.
    ///
    /// # Safety
    /// Nothing else uses the tensors until `end` has returned, except on the device what `order`
    /// puts before or after the average. Its stream is one of the primary context and lives as
    /// long.
    pub(crate) unsafe fn begin(
        &mut self,
        params: &mut dyn Parameters,
        call: Call,
        order: Order,
        start: Instant,
    ) -> Result<Option<Outcome>> {
        let problem = self.table.refresh(params).err();
        if call.work != Work::InPlace {
            // SAFETY: the caller's promise; the tables hold the addresses of these tensors.
            return unsafe { self.begin_beside(problem, call, order, start) };
        }
        if self.is_alone() {
            return self.alone(self.refusal_of(problem, call), call, start).map(Some);
        }
        // SAFETY: the caller's promise; the tables hold the addresses of these tensors.
        unsafe { self.launch(problem, call, order, start) }.map(|()| None)
    }

    /// Launches the kernels of an average. With a `problem`, only those that tell peers of it.
    ///
    /// # Safety
    /// Without a problem: as `begin`, for the tensors that the tables describe.
    pub(super) unsafe fn launch(
        &mut self,
        problem: Option<Problem>,
        call: Call,
        order: Order,
        start: Instant,
    ) -> Result<()> {
        let refusal = self.refusal_of(problem, call);
        let is_captured = match order {
            // SAFETY: the caller's promise.
            Order::Behind(stream) | Order::Within(stream) => unsafe { self.is_capturing(stream) }?,
            Order::NullStream => false,
        };
        if let (Some(_), true) = (call.reason, is_captured) {
            return Err(Error::InvalidOption {
                rank: self.rank(),
                option: "stream",
                found: "being captured, in a step of LocalSgd".into(),
                expected: "a stream that is not captured, or ParamAverager::start, whose average \
                           every replay of the graph makes",
            });
        }
        if is_captured && !(self.has_anchor() && self.has_reference()) {
            return Err(Error::InvalidOption {
                rank: self.rank(),
                option: "stream",
                found: "being captured, before the first average since a recovery".into(),
                expected:
                    "one average that is not captured: the outer optimizer's steps, and what \
                           compression codes, begin from it",
            });
        }
        if is_captured && self.stage.is_some() {
            return Err(Error::InvalidOption {
                rank: self.rank(),
                option: "stream",
                found: "being captured, with a stage or several hosts".into(),
                expected: "a stream that is not captured: the host calls the stage, and exchanges \
                           with other hosts, in every average, and sees no replay of a graph",
            });
        }
        // If captured, every replay of the graph would report the refusal to the peers.
        if let (Some(refusal), true) = (&refusal, is_captured) {
            return Err(refusal.clone());
        }
        self.prepare_outer()?;
        let (end, is_coded) = (self.end_of(call), self.is_coded(call));
        self.end = end;
        self.call = call;
        // A graph replays the same flags each time, but joiners come and go. None enters a world
        // that has a link to other hosts.
        let has_joiner =
            self.communicator.has_joiner() && !is_captured && self.options.hosts.is_none();
        let of_hosts = self.stage.as_ref().is_some_and(|stage| stage.is_of_all_hosts(call.place));
        // If no rank of this host has weight, the kernels make a sum all the same.
        let receives = (of_hosts && call.weight == Some(0.0))
            || self.stage.as_ref().is_some_and(|stage| stage.only_receives(call.place));
        let common = self.args.flags & !flag(PA_FLAG_REJECT_NON_FINITE, receives);
        let of_copy = call.work == Work::OfCopy;
        let (buckets, bucket_count) = self.place_tables(call.fragment, of_copy);
        let args = PaArgs {
            buckets,
            bucket_count,
            schedule: call.schedule,
            weight: call.weight.unwrap_or(1.0),
            detail: problem.map_or(0, |problem| problem.tensor),
            found: problem.map_or(call.place, |problem| problem.found),
            measured: call.measured.unwrap_or_default(),
            flags: common
                | flag(PA_FLAG_WEIGHTED, call.weight.is_some())
                | flag(PA_FLAG_UNNEEDED, call.unneeded)
                | flag(PA_FLAG_LAYOUT, problem.is_some())
                | flag(PA_FLAG_JOINER, has_joiner)
                | flag(PA_FLAG_KEEP, call.keeps)
                | flag(PA_FLAG_MEASURED, call.measured.is_some())
                | flag(PA_FLAG_DONE, call.place == place::DONE)
                | flag(PA_FLAG_OF_SCHEDULE, self.is_joined_by_done(call))
                | flag(PA_FLAG_CODED, is_coded)
                | flag(PA_FLAG_HOSTS, of_hosts)
                | ParamAverager::flags_of(end),
            ..self.args
        };
        // With a problem, no tensor is read: the launch with the entry barrier reports it.
        // Launches that do not meet come first. No allocation: averages on CPUs make none.
        let before = (self.anchor, self.reference);
        self.launched_coded(call, is_coded);
        let launches = self.launches.to(end, is_coded);
        let first = launches.iter().position(|launch| problem.is_none() || launch.meets());
        let launches = &launches[first.unwrap_or(0)..];
        if end == End::Anchor {
            self.anchor = AnchorState::Launched { was_set: self.anchor == AnchorState::Set };
        }
        let (agreement, position) = (&self.agreement, self.position());
        let placement = self.communicator.placement();
        let peers = Gathering {
            position,
            ranks: self.world_size(),
            world: &*agreement.control,
            timeout: self.timeout,
            shares_device: placement.shares_device(),
            way: match placement.process_way() {
                Some(way) => Way::Processes(way, agreement.control.clone()),
                None => Way::Threads {
                    calls: &agreement.calls,
                    launches: &agreement.launches,
                    world: agreement.control.clone(),
                },
            },
        };
        // Threads run the whole average in this call, and ranks on devices meet in it.
        let _waiting = self.watch.waits(start);
        let describe = |tensor| self.table.describe(tensor);
        let weight = |epoch| agreement.control.weight(epoch, self.args.world as usize);
        let (ranks, own) = (self.args.world as usize, self.args.rank as usize);
        let is_over = |needs_peers: bool| {
            let control = &agreement.control;
            let has_left = |peer| peer != own && control.has_left(peer);
            control.failure().is_some() || (needs_peers && (0..ranks).any(has_left))
        };
        let stage = self.stage.as_mut();
        let stage = stage.map(|stage| StageOf {
            stage,
            watch: &self.watch,
            wanted: Wanted::new(&call, matches!(end, End::Step | End::Mix)),
            weight: &weight,
            is_over: &is_over,
            describe: &describe,
        });
        let average = (&args, launches, order, &peers, of_copy);
        // SAFETY: the tables describe the tensors of the caller's promise; all other memory is this
        // averager's or kept by `agreement`.
        match unsafe { stage::start(&mut self.own.engine, average, stage) } {
            Ok(()) => {
                self.note_captured();
                Ok(())
            }
            Err(refused @ Unstarted::Refused { .. }) => {
                (self.anchor, self.reference) = before; // nothing was launched
                Err(refusal.unwrap_or_else(|| self.unstarted(refused)))
            }
            // Nothing is running. Every rank gets the failure of the world.
            Err(ended @ (Unstarted::Ended(_) | Unstarted::Halted(_))) => Err(self.unstarted(ended)),
            Err(failed @ Unstarted::Failed(_)) => {
                // Half an average may have been enqueued. Its kernels wait for peers, and these for
                // the other half, or for this call to return: so all are told before it returns.
                self.agreement.control.give_up(self.position());
                Err(self.unstarted(failed))
            }
        }
    }

    /// Brings the kernels' tables up to date. Returns the address of the buckets of a call, and
    /// their number; see `Table::place`.
    pub(super) fn place_tables(&mut self, fragment: Option<usize>, of_copies: bool) -> (u64, u32) {
        let placed = self.table.place(&self.own.engine, fragment, of_copies);
        if std::mem::take(&mut self.table.moved) {
            self.own.engine.set_tables(&self.table.raw, self.table.segments());
        }
        placed
    }

    /// Second half of an average: waits for it.
    pub(crate) fn end(&mut self, start: Instant) -> Result<Outcome> {
        if self.own.engine.was_captured() {
            return Err(Error::InvalidOption {
                rank: self.rank(),
                option: "stream",
                found: "being captured, so the average has not run".into(),
                expected:
                    "nothing to wait for: launch the graph, then ask ParamAverager::graph_outcome",
            });
        }
        let waiting = self.watch.waits(start);
        self.own.engine.finish().map_err(|reason| self.device_failed(reason))?;
        drop(waiting);
        self.outcome(Some(start))
    }
}
