//! Result of an average, from the kernels' status records and the device's errors.

use std::time::{Duration, Instant};

use super::stage::RankStage;
use super::table::Problem;
use super::{Algorithm, Call, Outcome, ParamAverager, Report};
use crate::abi::*;
use crate::backend::{Failure, Unstarted};
use crate::error::Phase;
use crate::plan::End;
use crate::schedule::place;
use crate::{Compression, Error, Result};

impl ParamAverager {
    /// Status records of the channels. Between launches only.
    pub(super) fn ended(&self) -> impl Iterator<Item = PaStatus> + '_ {
        self.own.engine.ended().iter().copied()
    }

    /// Tells the peers that this rank has completed its last average, if it has: then it may leave,
    /// and they need not give up an average that they are still in.
    pub(super) fn publish_completed(&self) {
        let is_through = |status: PaStatus| match status.outcome {
            PA_COMMITTED => true,
            verdict => (PA_UNNEEDED..=PA_NO_WEIGHT).contains(&verdict),
        };
        if self.ended().all(is_through) {
            self.agreement
                .control
                .completed(self.position(), self.ended().next().map_or(0, |status| status.epoch));
        }
    }

    /// Result of the average that began at `start`, if that is known.
    pub(super) fn outcome(&mut self, start: Option<Instant>) -> Result<Outcome> {
        self.publish_completed();
        self.note_stage();
        if start.is_some() {
            self.note_no_replay();
        }
        let committed = self.ended().any(|status| status.committed != 0);
        let Some(status) =
            self.ended().max_by_key(|status| (status.outcome != PA_COMMITTED, status.outcome))
        else {
            unreachable!("there is a channel")
        };
        let position = status.peer as usize;
        let rank = self.ring_order()[position];
        let problem = Problem { tensor: status.detail, found: status.found };
        let error = match status.outcome {
            PA_COMMITTED => {
                self.mixed = matches!(self.end, End::Mix | End::Delta | End::StepDelta);
                let report = self.report(start);
                if start.is_some() {
                    self.publish(&report); // not at each look at a graph's replays
                }
                return Ok(Outcome::Averaged(report));
            }
            PA_UNNEEDED => {
                let all_done = status.detail == self.world_size() as u64;
                return Ok(Outcome::Unneeded { all_done });
            }
            PA_NON_FINITE if self.is_unneeded_by_hosts() => {
                return Ok(Outcome::Unneeded { all_done: false });
            }
            PA_NON_FINITE if status.detail >= PA_VETOED => self.vetoed(rank, status),
            PA_NON_FINITE => self.non_finite(rank, status.detail),
            PA_LAYOUT => self.table.error(rank, problem),
            PA_SCHEDULE => self.calls_differ(rank, status),
            PA_WEIGHTING => Error::WeightingDiffers { rank },
            PA_BAD_WEIGHT => Error::InvalidWeight { rank, weight: f64::from_bits(status.found) },
            PA_NO_WEIGHT => Error::AllWeightsZero,
            // PA_OPEN: a test made this rank leave silently.
            PA_OPEN => self.fatal(
                Failure { kind: PA_DEPARTED, position: self.position() },
                Phase::Exit,
                committed,
            ),
            kind => self.fatal(Failure { kind, position }, phase(status.phase), committed),
        };
        if error.is_fatal() {
            // A peer that has committed may not know of it, and must not wait at its next meeting.
            // Hosts do not see what kernels write to memory of a device.
            let control = &self.agreement.control;
            if control.failure().is_none() && status.outcome >= PA_TIMEOUT {
                control.lose(position);
            }
            self.fail(&error);
        }
        Err(error)
    }

    /// Error of ranks that have different reasons to average. All ranks get here, and tell one
    /// another theirs, since a status record has room for two numbers only.
    fn calls_differ(&mut self, rank: usize, status: PaStatus) -> Error {
        let places = [status.found, status.detail];
        let is_of_schedule = places.into_iter().all(place::is_of_schedule);
        let mut words = self.call.in_words(is_of_schedule);
        if self.has_code() {
            words += match self.compression {
                Compression::None => ", in full",
                _ => ", coded",
            };
        }
        let all = self.all_reasons(status.epoch, words);
        let all = all.filter(|all| all.iter().any(|(_, is_done)| !is_done));
        let [mut found, mut expected] =
            places.map(if is_of_schedule { place::time } else { place::call });
        let mut reference = 0;
        if let Some(all) = all {
            // In the order in which the kernels look.
            let first = self.ring_order().iter().copied().find(|&rank| !all[rank].1);
            reference = first.unwrap_or(0);
            [found, expected] = [rank, reference].map(|rank| all[rank].0.clone());
        }
        match is_of_schedule {
            true => Error::SchedulesDiffer { rank, reference, found, expected },
            false => Error::CallsDiffer { rank, reference, found, expected },
        }
    }

    /// True if no rank of any host had anything to average. After a failure of this host's world
    /// the next call has the error.
    fn is_unneeded_by_hosts(&self) -> bool {
        self.stage.as_ref().is_some_and(RankStage::is_unneeded)
    }

    /// Notes that this averager can't average any more.
    pub(super) fn fail(&mut self, error: &Error) {
        self.failed = Some(error.clone());
        self.stage.iter().for_each(|stage| stage.abort(&error.to_string()));
    }

    /// Error of a device that failed. Peers are told that this rank has left.
    pub(crate) fn device_failed(&mut self, reason: String) -> Error {
        // Peers do not wait for the kernels of a rank that has left, so these end first. They do
        // end: what was enqueued is a whole average, which waits for the peers' part only; or
        // `launch` has told all ranks to end; or the device is lost.
        let _ = self.own.engine.finish();
        self.agreement.control.leave(self.position());
        let error = Error::DeviceFailed { rank: self.rank(), source: reason.into() };
        self.fail(&error);
        error
    }

    /// Error of this rank's own tensors or weight, whatever its peers do.
    pub(super) fn refusal_of(&self, problem: Option<Problem>, call: Call) -> Option<Error> {
        let rank = self.rank();
        match (problem, call.weight) {
            (Some(problem), _) => Some(self.table.error(rank, problem)),
            (_, Some(weight)) if !(weight >= 0.0 && weight.is_finite()) => {
                Some(Error::InvalidWeight { rank, weight })
            }
            _ => None,
        }
    }

    /// Result of an average in a world of one rank without an outer optimizer: the checks of its
    /// arguments, and nothing else.
    pub(super) fn alone(
        &self,
        refusal: Option<Error>,
        call: Call,
        start: Instant,
    ) -> Result<Outcome> {
        match (refusal, call.weight) {
            (Some(refusal), _) => Err(refusal),
            (_, Some(0.0)) => Err(Error::AllWeightsZero),
            _ => Ok(Outcome::Averaged(self.report(Some(start)))),
        }
    }

    pub(super) fn report(&self, start: Option<Instant>) -> Report {
        let waited = self.ended().map(|status| status.waited_ns).max().unwrap_or(0);
        let has_peers = self.world_size() > 1 || self.options.hosts.is_some();
        let is_measured = self.call.measured.is_some() && has_peers;
        let active = self.ended().map(|status| status.active_ns).max();
        let waited_for_hosts = self.stage.as_ref().map_or(Duration::ZERO, RankStage::waited);
        let of_hosts = self.stage.as_ref().and_then(RankStage::measured);
        let measured = of_hosts.or_else(|| self.ended().next().map(|status| status.measured));
        Report {
            bytes: match self.call.fragment {
                None => self.table.bytes,
                fragment => self.table.bytes_of(fragment),
            },
            elapsed: start.map_or(Duration::ZERO, |start| start.elapsed()),
            waited: Duration::from_nanos(waited) + waited_for_hosts,
            active: active
                .filter(|_| is_measured)
                .map(|active| Duration::from_nanos(active).saturating_sub(waited_for_hosts)),
            measured: measured.filter(|_| is_measured).unwrap_or_default(),
            world_size: self.world_size(),
            hosts: self.stage.as_ref().map_or(1, RankStage::hosts),
            algorithm: self.algorithm,
            channels: self.args.channels,
            chunk_bytes: match self.algorithm {
                Algorithm::Ring => u64::from(self.chunk) * u64::from(PA_PACK_BYTES),
                _ => 0,
            },
            join_pending: match self.world_size() {
                1 => self.communicator.has_joiner() && self.options.hosts.is_none(),
                _ => self.ended().next().is_some_and(|status| status.joiner != 0),
            },
            compression: self.compression,
            lost_state: self.lost_state,
            local_steps: self.call.local_steps,
            telemetry: (self.options.telemetry && !self.is_alone()).then(|| self.telemetry()),
        }
    }

    /// Error of an average that could not be started or waited for.
    pub(crate) fn unstarted(&mut self, unstarted: Unstarted) -> Error {
        match unstarted {
            Unstarted::Refused { found, expected } => {
                Error::InvalidOption { rank: self.rank(), option: "stream", found, expected }
            }
            Unstarted::Ended(failure) => self.halted(failure, Phase::Meet, false),
            Unstarted::Halted(failure) => {
                let committed = self.ended().any(|status| status.committed != 0);
                let phase = if committed { Phase::Gather } else { Phase::Reduce };
                self.halted(failure, phase, committed)
            }
            Unstarted::Failed(reason) => self.device_failed(reason),
        }
    }

    fn halted(&mut self, failure: Failure, phase: Phase, committed: bool) -> Error {
        let error = self.fatal(failure, phase, committed);
        self.fail(&error);
        error
    }

    fn non_finite(&self, rank: usize, bad: u64) -> Error {
        let (tensor, element) = self.place_of_bad(bad);
        Error::NonFinite { rank, tensor, element }
    }

    /// Line about the tensor, and element, of a `PaChannel.bad`.
    pub(super) fn place_of_bad(&self, bad: u64) -> (String, u64) {
        let place = bad.wrapping_sub(1);
        let (bucket, element) = ((place >> 56) as usize, place & ((1 << 56) - 1));
        let bucket = self.table.buckets_of(self.call.fragment).start + bucket;
        match self.table.buckets.get(bucket) {
            Some(bucket) => {
                let (tensor, element) = bucket.locate(element);
                (self.table.describe(tensor), element)
            }
            // A peer's record must not make this rank panic.
            None => ("a tensor that it has not named".into(), 0),
        }
    }

    /// Longest wait in the average that timed out: for a rank that has not come, or, in a kernel on
    /// a device, for one that has.
    fn longest_wait(&self) -> Duration {
        match self.own.engine.longest_wait() {
            Some(wait) if self.agreement.control.found_by_a_host() != Some(PA_TIMEOUT) => wait,
            _ => self.timeout,
        }
    }

    pub(super) fn fatal(&self, failure: Failure, phase: Phase, committed: bool) -> Error {
        let Failure { kind, position } = failure;
        let rank = self.ring_order()[position];
        match kind {
            PA_TIMEOUT => Error::Timeout { rank, timeout: self.longest_wait(), phase, committed },
            PA_ABORTED => Error::Aborted { rank, phase, committed },
            _ => Error::PeerLost { rank, phase, committed },
        }
    }
}

fn phase(at: u32) -> Phase {
    match at {
        PA_AT_MEET => Phase::Meet,
        PA_AT_REDUCE => Phase::Reduce,
        PA_AT_COMMIT => Phase::Commit,
        PA_AT_GATHER => Phase::Gather,
        _ => Phase::Exit,
    }
}
