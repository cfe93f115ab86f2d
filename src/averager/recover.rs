//! Going on with other ranks: without those that were lost, or with one that joins.

use super::{Call, Outcome, ParamAverager, Plain, Report, Tensors};
use crate::error::Stage;
use crate::{Error, Parameters, Result};

/// Why the average is made that gives a process that joined its model; no schedule asks for it.
const ADMIT: u64 = u64::MAX;

/// What came of it.
pub(crate) struct Regrouped {
    /// The place in the schedule of the rank that is farthest on.
    pub(crate) position: u64,
    /// The average that was made since a process joined, if one did.
    pub(crate) averaged: Option<Report>,
}

/// What a rank's tensors are worth in the average that gives a process that joined its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Nothing: it is the one that joined, or nobody has.
    None,
    /// As much as those of all that were there.
    Mean,
    /// All that were there have the same, of which one is enough, and is not rounded.
    Same,
}

impl ParamAverager {
    /// Collective among the ranks that are left, after an error that [is fatal](Error::is_fatal): builds the averager anew, with
    /// the same options, for the ranks that call it within the builder's `timeout` and are not gone; see
    /// [`Communicator::recover`](crate::Communicator::recover). Ranks are numbered anew. If another is lost on the way, the rest goes on
    /// without it. The next average is the mean over them, and makes them agree where some tensors were half written.
    ///
    /// Does nothing if the averager has not failed. After an error that says nothing of this rank being left out, it can be called again.
    pub fn recover<P: Parameters + ?Sized>(&mut self, params: &mut P) -> Result<()> {
        self.recover_at(&mut Plain(params), 0).map(drop)
    }

    /// The same with this rank's place in its schedule: some ranks may have been done with the average that failed for others, and
    /// have gone on to the next.
    pub(crate) fn recover_at(&mut self, tensors: &mut impl Tensors, position: u64) -> Result<Regrouped> {
        if self.failed.is_none() && self.agreement.control.failure().is_none() {
            return Ok(Regrouped { position, averaged: None });
        }
        self.regroup(tensors, position, Admission::None)
    }

    /// Collective, after an average whose report says that a process [waits to join](Report::joiner_waits): lets it in, as the last
    /// rank, and averages, with weight 0 for it and 1 for all others, which gives it the model. If it is gone by now, or its
    /// tensors or options are not those of the others, these go on without it, and average all the same.
    ///
    /// Every other averager of this world is to call it next, in the order in which they were built; one that averages first gets
    /// an error, and [`recover`](Self::recover) then does the same. What the new process needs to know besides, such as how many steps were
    /// made, belongs into a tensor: `LocalSgd` tells it by itself. For ranks that are processes; threads get
    /// [`Error::NoRecovery`], and nothing has happened.
    ///
    /// ```no_run
    /// # fn train(averager: &mut param_averager::ParamAverager, model: &mut Vec<Vec<f32>>) -> param_averager::Result<()> {
    /// if averager.average(model)?.joiner_waits {
    ///     averager.admit(model)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn admit<P: Parameters + ?Sized>(&mut self, params: &mut P) -> Result<Report> {
        self.admit_with(&mut Plain(params))
    }

    pub(crate) fn admit_with(&mut self, tensors: &mut impl Tensors) -> Result<Report> {
        if let Some(report) = self.regroup(tensors, 0, Admission::Mean)?.averaged {
            return Ok(report);
        }
        match tensors.average(self, Call { weight: None, schedule: 0, unneeded: false })? {
            Outcome::Averaged(report) => Ok(report),
            Outcome::Unneeded => unreachable!("this rank needs it"),
        }
    }

    /// The next generation of the world, and this averager in it.
    pub(crate) fn regroup(
        &mut self,
        tensors: &mut impl Tensors,
        position: u64,
        mut admission: Admission,
    ) -> Result<Regrouped> {
        // Whatever was enqueued ends by itself.
        let _ = self.own.engine.finish();
        if let (true, Some(failure)) = (admission != Admission::None, self.agreement.control.failure()) {
            let error = self.fatal(failure, Stage::Build, false);
            self.fail_by(&error);
            return Err(error);
        }
        self.options.schedule_position = position;
        loop {
            let next = self.options.communicator.next(self.timeout, admission != Admission::None);
            if let Err(Error::NoRecovery { .. }) = next {
                return next.map(|_| unreachable!("an error")); // nothing has happened
            }
            // Kept also where what follows fails: the next call begins from there.
            self.options.communicator = next.inspect_err(|error| self.fail_by(error))?;
            let joined = self.options.communicator.has_joined();
            // Also if this averager comes to the new generation by an error: another has let the process in.
            self.options.admission = match admission {
                _ if !joined || self.options.communicator.is_new() => Admission::None,
                Admission::None => Admission::Mean,
                admission => admission,
            };
            match ParamAverager::build(self.options.clone(), tensors) {
                Ok(averager) => {
                    *self = averager;
                    self.options.admission = Admission::None;
                    return Ok(Regrouped {
                        position: self.schedule_position(),
                        averaged: self.let_in.take(),
                    });
                }
                // A rank that was there a moment ago: each round is without one more.
                Err(
                    Error::PeerLost { stage: Stage::Build, .. } | Error::Timeout { stage: Stage::Build, .. },
                ) => {}
                // The one that joined is not like the others, or was lost before it had the model: it has left.
                Err(_) if joined && !self.options.communicator.is_new() => admission = Admission::None,
                Err(error) => {
                    self.fail_by(&error);
                    return Err(error);
                }
            }
        }
    }

    /// Its world is over, so that `recover` is the way on.
    fn fail_by(&mut self, error: &Error) {
        self.failed.get_or_insert_with(|| error.clone());
    }

    /// The first average of an averager that was built since a process joined.
    pub(super) fn average_with_joiner(&mut self, tensors: &mut impl Tensors) -> Result<()> {
        if !self.agreement.cards.iter().any(|card| card.admits) {
            return match self.communicator.lacks_model() {
                true => Err(self.communicator.not_admitted()),
                false => Ok(()),
            };
        }
        let counts = match self.options.admission {
            Admission::None => false,
            Admission::Mean => true,
            Admission::Same => self.rank() == 0,
        };
        let weight = if counts { 1.0 } else { 0.0 };
        let call = Call { weight: Some(weight), schedule: ADMIT, unneeded: false };
        if let Outcome::Averaged(report) = tensors.average(self, call)? {
            self.let_in = Some(report);
        }
        self.communicator.has_model();
        Ok(())
    }

    /// Of all ranks, when the averager was built.
    pub(crate) fn schedule_position(&self) -> u64 {
        let positions = self.agreement.cards.iter().map(|card| card.schedule_position);
        positions.max().unwrap_or(0)
    }

    /// Whether this rank knows of a process that waits to join.
    pub(crate) fn joiner_waits(&self) -> bool {
        self.communicator.has_guest()
    }
}
