//! Local SGD: count optimizer steps, average when the schedule says so.

use crate::averager::{Call, Halt, Lend, Outcome, Progress, Regrouped, TRIES};
use crate::schedule::place;
use crate::world::Admission;
use crate::{Error, ParamAverager, Report, Result, Schedule};

/// Averages a model's parameters across ranks every so many optimizer steps.
///
/// Call [`step`](Self::step) once after every optimizer step, not after every micro-batch;
/// [`skip`](Self::skip) where the optimizer step was left out (a loss scaler that found an
/// overflow); [`finish`](Self::finish) once at the end of the loop. Every rank makes the same
/// sequence of `step` and `skip` taken together, up to the last due average.
///
/// Nothing happens on drop or while unwinding: a rank that panics leaves, and its peers get
/// [`Error::PeerLost`](crate::Error::PeerLost), not a hang.
#[derive(Debug)]
pub struct LocalSgd {
    averager: ParamAverager,
    schedule: Schedule,
    enabled: bool,
    position: u64,
    applied: u64,
    since_average: u64,
    averages: u64,
}

/// What a call of [`LocalSgd`] did.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Action {
    /// No average was due. The next one follows after so many more steps.
    Counted {
        /// Steps until then, at least 1.
        until_next: u64,
    },
    /// The parameters are now the mean of all ranks' parameters.
    Averaged(Report),
    /// A process was let in: the world has one rank more, which has a copy of the model. The
    /// parameters are what `average` has made them.
    Admitted {
        /// The average that was due, made just before; `None`: this rank was alone, and its
        /// parameters are as they were.
        average: Option<Report>,
    },
    /// This is the only rank left, and the failed average had begun to write: each
    /// element is this rank's own or their mean.
    PartlyAveraged,
    /// No rank had taken a step since the last average, so nothing moved.
    Unneeded,
    /// This is the only rank, or Local SGD is not enabled: the step was counted, and the parameters
    /// are as they were.
    Alone,
}

impl Action {
    /// The average that was made, if one was.
    pub fn report(&self) -> Option<&Report> {
        match self {
            Action::Averaged(report) => Some(report),
            Action::Admitted { average } => average.as_ref(),
            _ => None,
        }
    }
}

impl LocalSgd {
    /// Local SGD with this rank's averager. The schedule must be the same on every rank. In a
    /// process that [joined](crate::Communicator::join), it begins at the place in the schedule that the
    /// others have.
    pub fn new(averager: ParamAverager, schedule: Schedule) -> Self {
        let position = averager.schedule_position();
        averager.set_position_in_schedule(position);
        LocalSgd {
            averager,
            schedule,
            enabled: true,
            position,
            applied: 0,
            since_average: 0,
            averages: 0,
        }
    }

    /// `false`: only count steps, never average. Must be the same on every rank.
    pub fn enabled(mut self, enabled: bool) -> Self {
        self.enabled = enabled;
        self
    }

    /// After an optimizer step was applied: counts it, and averages if it is due.
    ///
    /// After an average that was due, a process that waits to [join](crate::Communicator::join) is let in,
    /// with a copy of the model. If that fails, the error is [`Error::AfterAverage`]: the
    /// parameters are the mean. [`finish`](Self::finish) lets no process in.
    pub fn step<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.applied += 1;
        self.since_average += 1;
        self.skip(params)
    }

    /// After an optimizer step was left out, on this rank alone or on all: the step is not counted
    /// as applied, but this rank takes part in the average if one is due, so that its peers need
    /// not wait.
    pub fn skip<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.position += 1;
        self.averager.set_position_in_schedule(self.position);
        if self.schedule.is_due(self.position) {
            let action = self.average(params, self.position)?;
            return self.admit(params, action).map_err(Halt::error);
        }
        if self.is_alone() {
            return Ok(Action::Alone);
        }
        Ok(Action::Counted { until_next: self.schedule.next_due(self.position) - self.position })
    }

    /// The last average, which makes all ranks' parameters the same. Ranks may have made different
    /// numbers of steps since the last due average. If no rank has stepped since, nothing moves;
    /// calling it twice is calling it once.
    pub fn finish<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.average(params, place::FINISH)
    }

    /// After an error that [is fatal](crate::Error::is_fatal): goes on among the ranks that are
    /// left, all of which call it; see [`ParamAverager::recover`]. The average that failed is made
    /// up for at once, so that all have the same parameters.
    ///
    /// All take the place in the schedule of the one that was farthest on when the first averager
    /// of the world was recovered: some may have been done with the average that failed for others.
    /// It can be one that this rank has passed.
    ///
    /// A process with several `LocalSgd`s of one world recovers all of them when one has failed, in
    /// the same order on every rank, since each makes an average; ranks that begin with different
    /// ones are told so.
    pub fn recover<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.recover_step(params, &mut Progress::default()).map_err(Halt::error)
    }

    fn averaged(&mut self, report: Report) -> Action {
        self.since_average = 0;
        self.averages += 1;
        Action::Averaged(report)
    }

    /// The place in the schedule: steps taken and skipped by this rank and, in a process that
    /// joined, by the others before.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Optimizer steps applied so far, by this rank.
    pub fn steps(&self) -> u64 {
        self.applied
    }

    /// Averages made so far.
    pub fn averages(&self) -> u64 {
        self.averages
    }

    /// The averager, to abort it or to average outside of the schedule.
    pub fn averager(&mut self) -> &mut ParamAverager {
        &mut self.averager
    }

    fn recover_step(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        progress: &mut Progress,
    ) -> Result<Action, Halt> {
        let (mut last, mut in_vain) = (None::<(Error, usize)>, 0);
        loop {
            let Regrouped { position, admitted } =
                self.averager.recover_step(params, true, progress)?;
            self.position = position;
            if let Some(admitted) = admitted {
                return Ok(self.averaged(admitted.report)); // the mean over all members
            }
            if let Some((error, ranks)) = last.take() {
                in_vain = if self.averager.world_size() < ranks { 0 } else { in_vain + 1 };
                if in_vain == TRIES {
                    return Err(progress.halt(error));
                }
            }
            self.since_average += 1; // whatever was half written
            match self.average(params, place::RECOVERY) {
                // Another rank is lost, and the next view is without it.
                Err(error @ (Error::PeerLost { .. } | Error::Timeout { .. })) => {
                    progress.survived(&error);
                    last = Some((error, self.averager.world_size()));
                }
                Ok(Action::Alone) if progress.has_written() => return Ok(Action::PartlyAveraged),
                made => return made.map_err(|error| progress.halt(error)),
            }
        }
    }

    /// Lets a process in that waits, after an average that was due.
    fn admit(&mut self, params: &mut (impl Lend + ?Sized), action: Action) -> Result<Action, Halt> {
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
        self.position = regrouped.position;
        match regrouped.admitted {
            Some(admitted) if admitted.is_mean => return Ok(self.averaged(admitted.report)),
            Some(_) => return Ok(Action::Admitted { average }),
            None => {}
        }
        // The joiner is gone. Some ranks may have seen it in and then lost it, and recover: this is
        // the average that they make.
        match self.recover_step(params, &mut progress)? {
            made @ (Action::Averaged(_) | Action::PartlyAveraged) if average.is_none() => Ok(made),
            Action::PartlyAveraged => Ok(Action::PartlyAveraged),
            _ => Ok(action),
        }
    }

    fn average(&mut self, params: &mut (impl Lend + ?Sized), place: u64) -> Result<Action> {
        if self.is_alone() {
            return Ok(Action::Alone);
        }
        let call = Call {
            schedule: self.schedule.digest(place),
            place,
            unneeded: self.since_average == 0,
            ..Call::by_hand(None)
        };
        Ok(match self.averager.run(params, call)? {
            Outcome::Averaged(report) => self.averaged(report),
            Outcome::Unneeded => {
                self.since_average = 0;
                Action::Unneeded
            }
        })
    }

    fn is_alone(&self) -> bool {
        !self.enabled || self.averager.world_size() == 1
    }
}
