//! Recovery and joins: averagers in a view without lost ranks, or with a joiner.

use super::progress::Halt;
use super::rebuild::is_of_the_view;
use super::{Builder, Call, Lend, Outcome, ParamAverager, Progress, Report};
use crate::error::Phase;
use crate::schedule::{place, Course};
use crate::world::{Admission, Communicator};
use crate::{Error, Result};

/// Result of an averager's move to the next view of its world.
pub(crate) struct Regrouped {
    /// Course of the ranks that are farthest on.
    pub(crate) course: Course,
    /// Average that gave a joiner the model, if a process joined.
    pub(crate) admitted: Option<Admitted>,
}

/// Average that gave a joiner the model.
#[derive(Clone, Debug)]
pub(crate) struct Admitted {
    pub(crate) report: Report,
    /// True if the tensors of this rank are the mean now, false if they are unchanged.
    pub(crate) is_mean: bool,
}

/// Most tries in a row in which no rank is lost: a peer may have been stopped for a while, or have
/// been on its way to the next view. Further tries would end as these.
pub(crate) const TRIES: u32 = 4;

impl ParamAverager {
    /// Builds the averager again after a [fatal](Error::is_fatal) error, with the same options, for
    /// the ranks that are alive and call it within the builder's `timeout`; see
    /// [`Communicator::recover`](crate::Communicator::recover). Collective among them. Ranks are
    /// renumbered. If another rank is lost on the way, the others go on without it. The next
    /// average is the mean over them, and makes them agree where some tensors were half written.
    ///
    /// A process with several averagers calls it on each, in any order, unless a process joins
    /// meanwhile: the world has lost the rank for all averagers, whichever has failed. It does
    /// nothing while the world has all its ranks and the averager has not failed.
    ///
    /// # Errors
    /// [`Error::Excluded`] if the others went on without this rank, and
    /// [`Error::RecoveryUnsupported`] for ranks that are threads. After any other error it can be
    /// called again. It gives up after a few tries in a row in which no rank is lost; a try takes
    /// the builder's `timeout` for each averager at most.
    pub fn recover<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<()> {
        let mut progress = Progress::default();
        self.drop_overlapped();
        let made = self.recover_step(params, false, &mut progress).map(drop).map_err(Halt::error);
        // The average with a joiner, if there was one, was made all the same.
        match (made, self.take_late()) {
            (Ok(()), Some(cause)) => Err(cause),
            (made, _) => made,
        }
    }

    /// Recovers as [`recover`](Self::recover) does, with the ranks of this host alone: the link to
    /// [other hosts](crate::Builder::hosts) is left for good. The averages that follow are of this
    /// host's ranks, and their reports have one host. An outer optimizer's state stays, but for the
    /// part of a lost rank. Hosts that go on alone move apart: save a checkpoint of one, and
    /// restart all from it. Without a link the same as `recover`.
    ///
    /// A host may also leave the others without a failure: they get [`Error::HostLost`]. So it is
    /// called after any error of an average on one rank, on all ranks of the host: one beside a
    /// rank whose link has failed gets [`Error::StageVetoed`], which is not fatal.
    ///
    /// # Errors
    /// As [`recover`](Self::recover).
    pub fn recover_within_host<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<()> {
        self.leave_hosts(true);
        let made = self.recover(params);
        self.leave_hosts(false);
        made
    }

    /// Sets whether a recovery leaves the link to other hosts.
    pub(crate) fn leave_hosts(&mut self, leaves: bool) {
        self.leaves_hosts = leaves;
    }

    /// Recovers, as one step of a call that may have more. Returns the place in the schedule, since
    /// some ranks may have completed the average that failed for others, and have gone on to the
    /// next. `averages` is true if the caller averages next, to make up for an average that was
    /// due.
    pub(crate) fn recover_step(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        averages: bool,
        progress: &mut Progress,
    ) -> Result<Regrouped, Halt> {
        let latest = &self.options.communicator;
        let is_over = latest.is_superseded() || latest.has_lost_a_member();
        let leaves = self.leaves_hosts && self.options.hosts.is_some();
        if !leaves && !is_over && !self.has_failed() && !self.communicator.is_superseded() {
            return Ok(Regrouped { course: self.course(), admitted: None });
        }
        // In this view all averagers but this one were built, and are in use.
        let refused =
            self.blueprint.as_ref().and_then(|blueprint| blueprint.refusal(latest.view()));
        match refused {
            Some(error) if !is_over && !leaves => Err(progress.halt(error)),
            _ => self.regroup(params, Admission::None, averages, progress),
        }
    }

    /// Admits a process that [waits to join](Report::join_pending), as the last rank, and gives it
    /// a copy of rank 0's tensors, by an average in which rank 0 alone has a weight. Collective,
    /// after an average whose report says so. The tensors of all other ranks stay as they are, bit
    /// for bit; but where ranks [keep a share](crate::Outer::keeping) of their values, all of them
    /// get the mean. If the process is gone by now, or its tensors or options differ, the others go
    /// on without it, and make a plain average instead, since some of them may have to recover.
    ///
    /// With an [outer optimizer](crate::Outer) it is called right after an average, before further
    /// inner steps: the members' tensors become the anchor.
    ///
    /// Every other averager of this world calls it next, in the order in which they were built. An
    /// averager that averages first gets an error, and [`recover`](Self::recover) then does the
    /// same. Anything else that the new process needs to know, such as the number of steps made,
    /// belongs into a tensor; [`LocalSgd`](crate::LocalSgd) tells it the number of steps by itself.
    ///
    /// # Errors
    /// [`Error::RecoveryUnsupported`] for ranks that are threads, with nothing changed. Otherwise
    /// as [`recover`](Self::recover) and [`average`](Self::average).
    ///
    /// ```no_run
    /// # use param_averager::{ParamAverager, Result};
    /// # fn train(averager: &mut ParamAverager, model: &mut Vec<Vec<f32>>) -> Result<()> {
    /// if averager.average(model)?.join_pending {
    ///     averager.admit_joiner(model)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn admit_joiner<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Report> {
        let mut progress = Progress::default();
        // Ranks that differ have no one model to copy, and to anchor.
        let admission = if self.mixed { Admission::Mean } else { Admission::Copy };
        let regrouped =
            self.regroup(params, admission, false, &mut progress).map_err(Halt::error)?;
        let report = match regrouped.admitted {
            Some(admitted) => admitted.report,
            None => {
                let made = self.run(params, Call::by_hand(None));
                made.map(Outcome::report).map_err(|error| progress.halt(error).error())?
            }
        };
        self.unless_late(report)
    }

    fn has_failed(&self) -> bool {
        self.failed.is_some() || self.agreement.control.failure().is_some()
    }

    /// True if no average can have left the tensors half written. An averager of a stale view has
    /// begun none.
    fn tensors_are_whole(&self) -> bool {
        matches!(self.failed, None | Some(Error::StaleView { .. }))
            && self.agreement.control.failure().is_none()
    }

    /// Moves to the next view of the world, and builds this averager in it.
    pub(crate) fn regroup(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        mut admission: Admission,
        averages: bool,
        progress: &mut Progress,
    ) -> Result<Regrouped, Halt> {
        if let Some(refusal) = self.refusal_of_regrouping().filter(|_| !self.leaves_hosts) {
            return Err(progress.halt(refusal));
        }
        // Enqueued work ends by itself.
        self.drop_overlapped();
        let _ = self.own.engine.finish();
        self.note_anchor();
        self.note_stage();
        if admission != Admission::None {
            match &self.failed {
                None | Some(Error::StaleView { .. }) => {}
                Some(cause) => {
                    return Err(progress.halt(Error::Poisoned { cause: Box::new(cause.clone()) }))
                }
            }
            if let Some(failure) = self.agreement.control.failure() {
                let error = self.fatal(failure, Phase::Build, false);
                return Err(self.halt(error, progress));
            }
        }
        // Tensors of an averager that has not failed are whole: a joiner copies them, unless an
        // average is due.
        let is_whole = !averages && self.tensors_are_whole();
        self.options.course = self.course();
        // Error that ended the last try, and the number of ranks in that try.
        let mut last: Option<(Error, usize)> = None;
        let mut in_vain = 0;
        loop {
            let next = self.options.communicator.next(self.timeout, admission != Admission::None);
            // Kept also if a later step fails: the next call begins from this view.
            self.options.communicator = match next {
                Ok(communicator) => communicator,
                // Nothing has changed.
                Err(error @ Error::RecoveryUnsupported { .. }) => return Err(progress.halt(error)),
                Err(error) => return Err(self.halt(error, progress)),
            };
            if self.leaves_hosts {
                self.options = self.options.clone().within_host();
                let left = "this host has left the others (recover_within_host)";
                self.stage.iter().for_each(|stage| stage.abort(left));
            }
            let communicator = self.options.communicator.clone();
            if let Some((error, ranks)) = last.take() {
                in_vain = if communicator.world_size() < ranks { 0 } else { in_vain + 1 };
                if in_vain == TRIES {
                    return Err(self.halt(error, progress));
                }
            }
            let joins = communicator.has_joined() && !communicator.is_new();
            let built = if communicator.has_joined() {
                // Also where this averager comes to the new view through recovery, because another
                // averager admitted the joiner.
                self.options.admission = match admission {
                    _ if !joins => Admission::None,
                    Admission::None if is_whole && !progress.has_written() => Admission::Copy,
                    Admission::None => Admission::Mean,
                    admission => admission,
                };
                let inherited = self.state_to_pass_on();
                ParamAverager::build(Builder { inherited, ..self.options.clone() }, params)
            } else {
                self.successor(&communicator, averages).map(|mut averager| {
                    averager.inherited = self.state_to_pass_on();
                    averager
                })
            };
            match built {
                Ok(averager) => {
                    let late = self.take_late();
                    *self = averager;
                    self.late = self.late.take().or(late);
                    self.options.admission = Admission::None;
                    let (course, admitted) = (self.farthest_course(), self.admitted.take());
                    self.set_course(course);
                    return Ok(Regrouped { course, admitted });
                }
                // A rank of the new view was lost.
                Err(error) if is_of_the_view(&error) => {
                    progress.survived(&error);
                    last = Some((error, communicator.world_size()));
                }
                Err(error @ Error::Aborted { .. }) => return Err(self.halt(error, progress)),
                // The joiner differs, or was lost before it had the model: it has left.
                Err(error) if joins => {
                    progress.survived(&error);
                    admission = Admission::None;
                }
                Err(error) => return Err(self.halt(error, progress)),
            }
        }
    }

    /// Successor of this averager in a view without a joiner; see `rebuild`.
    fn successor(&self, communicator: &Communicator, averages: bool) -> Result<ParamAverager> {
        let ordinal = self.agreement.ordinal.as_deref().filter(|_| averages);
        communicator.rebuild(ordinal, self.timeout)?;
        let taken =
            self.blueprint.as_ref().and_then(|blueprint| blueprint.take(communicator.view()));
        taken.unwrap_or_else(|| Err(Error::StaleView { rank: communicator.rank() }))
    }

    /// Error after which this averager is unusable until it recovers.
    fn halt(&mut self, error: Error, progress: &mut Progress) -> Halt {
        self.failed.get_or_insert_with(|| error.clone());
        progress.halt(error)
    }

    /// Makes the first average of an averager that was built since a process joined.
    pub(super) fn average_with_joiner(&mut self, params: &mut (impl Lend + ?Sized)) -> Result<()> {
        let handshakes = &self.agreement.handshakes;
        if handshakes.iter().all(|handshake| handshake.admission == Admission::None) {
            return match self.communicator.lacks_model() {
                true => Err(self.communicator.not_admitted()),
                false => Ok(()),
            };
        }
        // The same on every rank, although the last average may have failed on some of them only.
        // Members that keep a share of their own values have no one model to copy, and to anchor.
        let is_mean = handshakes.iter().any(|handshake| handshake.admission == Admission::Mean)
            || self.options.outer.mixes();
        let is_member = self.options.admission != Admission::None;
        let counts = is_member && (is_mean || self.rank() == 0);
        let call = Call {
            weight: Some(if counts { 1.0 } else { 0.0 }),
            schedule: u64::MAX, // the digest of no schedule
            place: place::ADMISSION,
            keeps: is_member && !is_mean,
            ..Call::by_hand(None)
        };
        if let Outcome::Averaged(report) = self.run(params, call)? {
            self.admitted = Some(Admitted { report, is_mean });
        }
        self.communicator.has_model();
        Ok(())
    }

    /// Course of the ranks that were farthest on when the averager was built.
    pub(crate) fn farthest_course(&self) -> Course {
        Course::farthest(self.agreement.handshakes.iter().map(|handshake| handshake.course))
    }

    /// Course of this rank.
    fn course(&self) -> Course {
        self.blueprint.as_ref().map_or(Course::default(), |blueprint| blueprint.course())
    }

    pub(crate) fn set_course(&self, course: Course) {
        self.blueprint.iter().for_each(|blueprint| blueprint.set_course(course));
    }

    /// True if this averager got its model from its peers, after its process had joined.
    pub(crate) fn has_joined(&self) -> bool {
        self.admitted.is_some()
    }

    /// True if averages are enqueued: the tensors' uses are ordered on a stream, on every rank.
    pub(crate) fn is_on_stream(&self) -> bool {
        self.options.on_stream
    }

    /// True if this rank knows of a process that waits to join.
    pub(crate) fn join_pending(&self) -> bool {
        self.communicator.has_joiner()
    }
}
