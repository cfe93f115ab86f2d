//! Local SGD: counts optimizer steps, and averages when the schedule says so.

use crate::averager::{Call, Halt, Lend, Outcome, Progress, Regrouped, TRIES};
use crate::schedule::place;
use crate::world::Admission;
use crate::{Error, ParamAverager, Report, Result, Schedule};

/// Averages a model's parameters across ranks every so many optimizer steps.
///
/// Call [`step`](Self::step) once after every optimizer step, not after every micro-batch;
/// [`skip`](Self::skip) where the optimizer step was left out (a loss scaler that found an
/// overflow); [`finish`](Self::finish) once at the end of the loop. On every rank, the calls of
/// `step` and `skip` together are equally many, up to the last due average.
///
/// `LocalSgd` makes all ranks agree at its first average, not before: ranks begin with the same
/// weights, or copy rank 0's after building ([`guide::frameworks`](crate::guide::frameworks)).
/// Buffers and the optimizer's state stay local unless they are passed as tensors.
///
/// Nothing is averaged on drop or while unwinding: a rank that panics leaves, and its peers get
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

/// Result of a call of [`LocalSgd`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Action {
    /// The step was counted, and no average was due.
    Counted {
        /// Steps until the next average, at least 1.
        until_next: u64,
    },
    /// The parameters are now the mean of all ranks' parameters.
    Averaged(Report),
    /// A process was admitted: the world has one more rank, which has a copy of the model.
    Admitted {
        /// Average that was due, made just before. `None`: this rank was alone, and its parameters
        /// are unchanged.
        average: Option<Report>,
    },
    /// This is the only rank left, and the failed average had begun to write: each
    /// element is this rank's own or their mean.
    PartlyAveraged,
    /// No rank had taken a step since the last average, so no parameter was moved.
    Unneeded,
    /// This is the only rank, or Local SGD is not enabled: the step was counted, and the parameters
    /// are unchanged.
    Alone,
}

impl Action {
    /// Report of the average, if one was made.
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
    /// process that [joined](crate::Communicator::join), it begins at the place in the schedule
    /// that its peers have reached.
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

    /// Switch for all averages. `false`: steps are counted, and nothing is averaged. Must be the
    /// same on every rank. Default: `true`.
    pub fn enabled(mut self, enabled: bool) -> Self {
        self.enabled = enabled;
        self
    }

    /// Counts an optimizer step that was applied, and averages if an average is due.
    ///
    /// After an average that was due, a process that waits to [join](crate::Communicator::join) is
    /// admitted, with a copy of the model. [`finish`](Self::finish) admits no process.
    ///
    /// # Errors
    /// As [`ParamAverager::average`]; [`Error::SchedulesDiffer`] if another rank averages at
    /// another place of its schedule. If the admission fails, the error is
    /// [`Error::AfterAverage`], and the parameters are the mean.
    pub fn step<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.applied += 1;
        self.since_average += 1;
        self.skip(params)
    }

    /// Counts an optimizer step that was left out, on this rank alone or on all. It does not count
    /// as applied, but this rank takes part in the average if one is due, so that its peers need
    /// not wait.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn skip<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.position += 1;
        self.averager.set_position_in_schedule(self.position);
        if self.schedule.is_due(self.position) {
            let made = self.average(params, self.position);
            let made = made.and_then(|action| self.admit(params, action).map_err(Halt::error));
            return self.unless_late(made);
        }
        if self.is_alone() {
            return Ok(Action::Alone);
        }
        Ok(Action::Counted { until_next: self.schedule.next_due(self.position) - self.position })
    }

    /// Makes the last average, after which all ranks' parameters are the same. Ranks may have made
    /// different numbers of steps since the last due average. If no rank has stepped since, no
    /// parameter is moved, so a second call changes nothing.
    ///
    /// # Errors
    /// As [`step`](Self::step). A rank that has made fewer steps than its peers gets
    /// [`Error::SchedulesDiffer`] while they average, and calls it again.
    pub fn finish<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        let made = self.average(params, place::FINISH);
        self.unless_late(made)
    }

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
        let made = self.recover_step(params, &mut Progress::default()).map_err(Halt::error);
        self.unless_late(made)
    }

    fn averaged(&mut self, report: Report) -> Action {
        self.since_average = 0;
        self.averages += 1;
        Action::Averaged(report)
    }

    /// Place in the schedule: number of steps taken and skipped by this rank and, in a process that
    /// joined, by its peers before.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Number of optimizer steps applied so far, by this rank.
    pub fn steps(&self) -> u64 {
        self.applied
    }

    /// Number of averages made so far.
    pub fn averages(&self) -> u64 {
        self.averages
    }

    /// Averager of this rank, to abort its world or to average outside of the schedule.
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
                return Ok(self.averaged(admitted.report)); // The mean over all members.
            }
            if let Some((error, ranks)) = last.take() {
                in_vain = if self.averager.world_size() < ranks { 0 } else { in_vain + 1 };
                if in_vain == TRIES {
                    return Err(progress.halt(error));
                }
            }
            self.since_average += 1; // Tensors may be half written, so an average is needed.
            match self.average(params, place::RECOVERY) {
                // Another rank is lost. The next view leaves it out.
                Err(error @ (Error::PeerLost { .. } | Error::Timeout { .. })) => {
                    progress.survived(&error);
                    last = Some((error, self.averager.world_size()));
                }
                Ok(Action::Alone) if progress.has_written() => return Ok(Action::PartlyAveraged),
                made => return made.map_err(|error| progress.halt(error)),
            }
        }
    }

    /// Admits a process that waits, after an average that was due.
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
        // The joiner vanished. Run the recovery average, which ranks that had admitted the joiner
        // before they lost it are already running.
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

    /// The result of a call, unless its [`Lend`](crate::Lend) has failed after an average. That
    /// changes no step of the call, since the peers know nothing of it.
    fn unless_late(&mut self, made: Result<Action>) -> Result<Action> {
        match (made, self.averager.take_late()) {
            (Ok(action), Some(cause)) => Err(match action.report() {
                Some(report) => Error::AfterAverage {
                    averaged: Some(Box::new(report.clone())),
                    cause: Box::new(cause),
                },
                None => cause,
            }),
            (made, _) => made,
        }
    }

    fn is_alone(&self) -> bool {
        !self.enabled || self.averager.world_size() == 1
    }
}
