//! Averages of [`LocalSgd`](super::LocalSgd): what a call makes, admissions and recoveries.

use std::time::Instant;

use super::{Action, Enqueued, LocalSgd};
use crate::averager::{Call, Halt, Lend, Outcome, Progress, Regrouped, TRIES};
use crate::hash::fnv1a;
use crate::schedule::place;
use crate::world::Admission;
#[cfg(doc)]
use crate::ParamAverager;
use crate::{Error, Report, Result};

impl LocalSgd {
    /// Recovers from an error that [is fatal](crate::Error::is_fatal), among the ranks that are
    /// left, all of which call it; see [`ParamAverager::recover`]. It makes the average that failed
    /// at once, so that all ranks have the same parameters.
    ///
    /// All ranks take the place in the schedule of the rank that was farthest on when the first
    /// averager of the world was recovered: some may have completed the average that failed for
    /// others. This rank may have passed that place.
    ///
    /// A process with several `LocalSgd`s of one world recovers all of them when one has failed, in
    /// the same order on every rank, since each makes an average. Ranks that begin with different
    /// ones get an error.
    ///
    /// # Errors
    /// As [`ParamAverager::recover`], and those of the average.
    pub fn recover<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.unreported = None; // it has failed for good
        let made = self.recover_step(params, &mut Progress::default()).map_err(Halt::error);
        self.ended(made)
    }

    /// Recovers as [`recover`](Self::recover) does, with the ranks of this host alone; see
    /// [`ParamAverager::recover_within_host`].
    ///
    /// # Errors
    /// As [`recover`](Self::recover).
    pub fn recover_within_host<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.averager.leave_hosts(true);
        let made = self.recover(params);
        self.averager.leave_hosts(false);
        made
    }

    /// Makes one average of a fragment, or of the whole model, behind an earlier one that was
    /// enqueued. `waits` is false if it may be enqueued, too.
    pub(super) fn average(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        place: u64,
        fragment: Option<usize>,
        waits: bool,
    ) -> Result<Action> {
        if self.is_alone() {
            return Ok(Action::Alone);
        }
        let refusal = self.refusal_at(place);
        if let Some(refusal) = refusal.clone().filter(|_| self.averager.has_no_peer()) {
            return Err(refusal);
        }
        // Peers that have asked for its outcome before do not make this average without this rank.
        let earlier = match self.settle() {
            Err(error) if error.is_fatal() => return Err(error),
            earlier => earlier.err(),
        };
        // After `settle`, which sets it: so it is the same on all ranks, whether they have asked
        // for the outcome of the last average before or not.
        let waits = waits | std::mem::take(&mut self.admits_next) | refusal.is_some();
        self.decisions.before(place);
        self.averager.set_course(self.decisions.course);
        let made = match waits || !self.averager.is_on_stream() {
            true => self.made(params, place, fragment),
            false => self.enqueue(params, place, fragment),
        };
        let made = match (refusal, made) {
            // Its peers have got `SchedulesDiffer`.
            (Some(refusal), Err(error)) if !error.is_fatal() => Err(refusal),
            (Some(refusal), Ok(action)) => Err(action.after(refusal)),
            (_, made) => made,
        };
        match earlier {
            Some(cause) => made.and_then(|action| Err(action.after(cause))),
            None => made,
        }
    }

    /// Error of a schedule that does not fit the options of its averager. At a due average this
    /// rank takes part, with a reason that no other rank has, so that its peers learn of it.
    pub(super) fn refusal_at(&self, place: u64) -> Option<Error> {
        if !place::is_step(place) || self.is_alone() {
            return None;
        }
        let of_hosts = self.averager.refusal_of_adapting(&self.schedule());
        of_hosts.or_else(|| self.refusal_of_overlap()).or_else(|| self.refusal_of_telemetry())
    }

    fn refusal_of_telemetry(&self) -> Option<Error> {
        let lacks = self.schedule().needs_telemetry() && !self.averager.has_telemetry();
        lacks.then(|| Error::InvalidOption {
            rank: self.rank(),
            option: "telemetry",
            found: format!("false, with the schedule {}", self.schedule()),
            expected: "true: the schedule depends on what averages change",
        })
    }

    fn made(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        place: u64,
        fragment: Option<usize>,
    ) -> Result<Action> {
        let call = self.call(place, fragment, false);
        let made = self.averager.run(params, call);
        self.begin_round(false);
        Ok(match made? {
            Outcome::Averaged(report) => {
                let agreed = self.agreed(&report, place, self.measured.rate);
                self.decisions.after(place, &agreed);
                self.averager.set_course(self.decisions.course);
                self.averaged(report, fragment)
            }
            Outcome::Unneeded { all_done } => {
                self.all_done = all_done;
                self.since.forget(fragment);
                Action::Unneeded
            }
        })
    }

    fn enqueue(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        place: u64,
        fragment: Option<usize>,
    ) -> Result<Action> {
        let (start, call) = (Instant::now(), self.call(place, fragment, false));
        let begun = self.averager.average_lent(params, call, false, start)?;
        let (steps, samples) = (self.since.steps(fragment), self.since.samples(fragment));
        let rate = self.measured.rate;
        self.enqueued = Some(Enqueued { begun, start, place, fragment, steps, samples, rate });
        self.since.forget(fragment);
        self.begin_round(true);
        Ok(Action::Enqueued)
    }

    /// Takes the outcome of an average that was enqueued, if there is one.
    pub(super) fn settle(&mut self) -> Result<Option<Report>> {
        let Some(enqueued) = self.enqueued.take() else { return Ok(None) };
        let Enqueued { begun, start, place, fragment, steps, samples, rate } = enqueued;
        match self.averager.conclude(begun, start) {
            Ok(Outcome::Averaged(report)) => {
                self.averages += 1;
                let agreed = self.agreed(&report, place, rate);
                self.decisions.after_enqueued(agreed);
                self.admits_next = report.join_pending;
                match self.averager.take_late() {
                    None => Ok(Some(report)),
                    Some(cause) => Err(Error::AfterAverage {
                        averaged: Some(Box::new(report)),
                        cause: Box::new(cause),
                    }),
                }
            }
            Ok(Outcome::Unneeded { .. }) => Ok(None),
            Err(error) => {
                // Its steps belong to the next average.
                self.since.take_back(fragment, steps, samples);
                Err(error)
            }
        }
    }

    /// Call of an average at `place`: of a fragment, or of the whole model; of a copy, or in place.
    pub(super) fn call(&self, place: u64, fragment: Option<usize>, of_copy: bool) -> Call {
        let (done, recovers) = (place == place::DONE, place == place::RECOVERY);
        let (steps, samples) = (self.since.steps(fragment), self.since.weight(fragment));
        let has_news = steps > 0 && samples != Some(0.0);
        let evens_out = place == place::FINISH && self.averager.has_mixed();
        let evens_out_hosts = self.averager.evens_out_hosts(place);
        let weight = match samples {
            // A rank that is done counts with the steps that no average has had, and then no more.
            _ if done && !has_news => Some(0.0),
            None if done => Some(1.0),
            // It may have completed the average that failed for others, and holds the mean. A rank
            // that has joined does not know whether the others pass weights.
            None | Some(0.0) if recovers => Some(1.0),
            // No rank has samples, or those that have count alone.
            Some(0.0) if evens_out || evens_out_hosts => Some(f64::MIN_POSITIVE),
            samples => samples,
        };
        let reason = self.reason(place);
        let digest = reason.digest(place);
        Call {
            schedule: match fragment {
                None if !of_copy => digest,
                _ => {
                    let part = fragment.map_or(u64::MAX, |fragment| fragment as u64);
                    let words = [digest, part, u64::from(of_copy)];
                    fnv1a(words.iter().flat_map(|word| word.to_le_bytes())) | 1
                }
            },
            fragment,
            place,
            unneeded: !has_news && !recovers && !evens_out,
            reason: Some(reason),
            local_steps: steps,
            measured: self.measured_at(place),
            ..Call::by_hand(weight)
        }
    }

    fn averaged(&mut self, report: Report, fragment: Option<usize>) -> Action {
        self.since.forget(fragment);
        self.averages += 1;
        Action::Averaged(report)
    }

    pub(super) fn recover_step(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        progress: &mut Progress,
    ) -> Result<Action, Halt> {
        // The world was lost with it, if it has failed.
        let _ = self.settle();
        self.drop_flight();
        self.admits_next = false;
        let (mut last, mut in_vain) = (None::<(Error, usize)>, 0);
        loop {
            let Regrouped { course, admitted } =
                self.averager.recover_step(params, true, progress)?;
            self.take_course(course);
            if let Some(admitted) = admitted {
                return Ok(self.averaged(admitted.report, None)); // The mean over all members.
            }
            if let Some((error, ranks)) = last.take() {
                in_vain = if self.averager.world_size() < ranks { 0 } else { in_vain + 1 };
                if in_vain == TRIES {
                    return Err(progress.halt(error));
                }
            }
            match self.average(params, place::RECOVERY, None, true) {
                // Another rank is lost. The next view leaves it out.
                Err(error @ (Error::PeerLost { .. } | Error::Timeout { .. })) => {
                    progress.survived(&error);
                    last = Some((error, self.averager.world_size()));
                }
                // Alone, also where an outer optimizer has taken these values for its anchor.
                Ok(Action::Alone | Action::Averaged(_))
                    if self.averager.world_size() == 1 && progress.has_written() =>
                {
                    return Ok(Action::PartlyAveraged)
                }
                made => return made.map_err(|error| progress.halt(error)),
            }
        }
    }

    /// Admits a process that waits, after an average that was due.
    pub(super) fn admit(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        action: Action,
    ) -> Result<Action, Halt> {
        let (average, waits) = match &action {
            Action::Averaged(report) => (Some(report.clone()), report.join_pending),
            Action::Alone => (None, self.enabled && self.averager.join_pending()),
            _ => (None, false),
        };
        if !waits {
            return Ok(action);
        }
        let mut progress = Progress::default();
        average.iter().for_each(|report| progress.averaged(report));
        let regrouped = self.averager.regroup(params, Admission::Copy, false, &mut progress)?;
        self.take_course(regrouped.course);
        match regrouped.admitted {
            Some(admitted) if admitted.is_mean => return Ok(self.averaged(admitted.report, None)),
            Some(_) => return Ok(Action::Admitted { average }),
            None => {}
        }
        // The joiner vanished. Run the recovery average, which ranks that had admitted the joiner
        // before they lost it are already running.
        match self.recover_step(params, &mut progress)? {
            made @ (Action::Averaged(_) | Action::PartlyAveraged) if average.is_none() => Ok(made),
            Action::PartlyAveraged => Ok(Action::PartlyAveraged),
            _ => Ok(action),
        }
    }

    /// The result of a call, unless its [`Lend`](crate::Lend) has failed after an average. That
    /// changes no step of the call, since the peers know nothing of it.
    pub(super) fn unless_late(&mut self, made: Result<Action>) -> Result<Action> {
        match self.averager.take_late() {
            Some(cause) => made.and_then(|action| Err(action.after(cause))),
            None => made,
        }
    }

    pub(super) fn is_alone(&self) -> bool {
        !self.enabled || self.averager.is_alone()
    }
}
