//! Local SGD: counts optimizer steps, and averages when the schedule says so.

mod action;
mod decide;
mod overlapped;
mod resume;
mod rounds;
#[cfg(feature = "serde")]
mod serialized;
mod since;

use std::time::Instant;

use crate::averager::{Begun, Lend};
use crate::schedule::{place, Course, Decisions};
use crate::{Error, ParamAverager, Report, Result, Schedule};
pub use action::Action;
use decide::Measured;
use overlapped::{behind, Flight};
#[cfg(feature = "serde")]
pub use serialized::SavedState;
use since::Since;

/// Largest position to begin at: leaves room to count, and for `place`.
const MOST_STEPS: u64 = u64::MAX / 2;

/// Averages a model's parameters across ranks every so many optimizer steps.
///
/// Call [`step`](Self::step) once after every optimizer step, not after every micro-batch;
/// [`skip`](Self::skip) where the optimizer step was left out (a loss scaler that found an
/// overflow); [`finish`](Self::finish) once at the end of the loop. On every rank, the calls of
/// `step` and `skip` together are equally many, up to the last due average. Where ranks have
/// different numbers of batches, each calls [`done`](Self::done) after its last one.
///
/// [`build`](crate::Builder::build) has given all ranks one model to begin with. Buffers and the
/// optimizer's state stay local unless they are passed as tensors.
///
/// Nothing is averaged on drop or while unwinding: a rank that panics leaves, and its peers get
/// [`Error::PeerLost`](crate::Error::PeerLost), not a hang.
#[derive(Debug)]
pub struct LocalSgd {
    averager: ParamAverager,
    decisions: Decisions,
    enabled: bool,
    measured: Measured,
    applied: u64,
    since: Since,
    averages: u64,
    /// Average of a copy that a step has started.
    flight: Option<Flight>,
    enqueued: Option<Enqueued>,
    /// True if the next due average is waited for, since a process can be admitted after it.
    admits_next: bool,
    /// Error of an average that was enqueued, until the next call.
    unreported: Option<Error>,
    /// True if the last average moved nothing, and all ranks have ended their steps.
    all_done: bool,
}

/// Average on the parameters' stream whose outcome was not taken yet.
#[derive(Debug)]
struct Enqueued {
    begun: Begun,
    start: Instant,
    /// Place in the schedule.
    place: u64,
    fragment: Option<usize>,
    /// Steps and samples that it averages.
    steps: u64,
    samples: Option<f64>,
    /// Learning rate of the step before it.
    rate: Option<f64>,
}

impl LocalSgd {
    /// Local SGD with this rank's averager. The schedule must be the same on every rank. In a
    /// process that [joined](crate::Communicator::join), it begins at the place in the schedule
    /// that its peers have reached.
    pub fn new(averager: ParamAverager, schedule: Schedule) -> Self {
        let decisions = Decisions::new(schedule, averager.farthest_course());
        averager.set_course(decisions.course);
        let measured = Measured::from(decisions.course.position);
        let since = Since::new(averager.overlap().fragments);
        LocalSgd {
            averager,
            decisions,
            enabled: true,
            measured,
            applied: 0,
            since,
            averages: 0,
            flight: None,
            enqueued: None,
            admits_next: false,
            unreported: None,
            all_done: false,
        }
    }

    /// Switch for all averages. `false`: steps are counted, nothing is averaged, and no outer step
    /// is made. Must be the same on every rank. Default: `true`.
    pub fn enabled(mut self, enabled: bool) -> Self {
        self.enabled = enabled;
        self
    }

    /// Place in the schedule to begin at, such as [`position`](Self::position) when a checkpoint
    /// was written: a warm-up is then not repeated. A schedule that adapts begins with its first H;
    /// [`load`](Self::load) restores its last one. Must be the same on every rank. In a process
    /// that [joined](crate::Communicator::join) it changes nothing, since its peers tell the place.
    /// Default: 0.
    pub fn at(mut self, position: u64) -> Self {
        if !self.averager.has_joined() {
            let position = position.min(MOST_STEPS);
            self.take_course(Course::begin(&self.schedule(), position));
        }
        self
    }

    /// Counts an optimizer step that was applied, and averages if an average is due.
    ///
    /// If the parameters' uses are ordered on a CUDA stream (as cudarc's slices are, and
    /// [`RawCudaParams`](crate::RawCudaParams)), the average is [enqueued](Action::Enqueued) on it.
    /// Its error is that of the next call that averages, or of [`wait`](Self::wait). All other
    /// parameters hold the mean when this returns.
    ///
    /// After an average that was due, a process that waits to [join](crate::Communicator::join) is
    /// admitted, with a copy of the model; on a stream, after the next one that is due, which is
    /// waited for. [`sync`](Self::sync), [`finish`](Self::finish) and [`done`](Self::done) admit no
    /// process.
    ///
    /// # Errors
    /// As [`ParamAverager::average`]; [`Error::SchedulesDiffer`] if another rank averages at
    /// another place of its schedule, or its schedule does not fit its averager's options: that
    /// rank gets [`Error::InvalidOption`]. If the admission fails, the error is
    /// [`Error::AfterAverage`], and the parameters are the mean.
    pub fn step<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.count(params, 1.0)
    }

    /// Counts an optimizer step that was applied to a batch of `samples` samples, or of any other
    /// weight, and averages if an average is due. A rank then counts by the samples that it has
    /// seen since the last average; one that has seen none only receives.
    ///
    /// All ranks use it for all steps. After the first call, [`step`](Self::step) counts as one
    /// sample.
    ///
    /// # Errors
    /// As [`step`](Self::step). [`Error::InvalidWeight`] if `samples` is negative or not finite: if
    /// an average is due, on every rank; else on this rank alone, which has counted the step
    /// without its samples.
    pub fn step_weighted<P: Lend + ?Sized>(
        &mut self,
        params: &mut P,
        samples: f64,
    ) -> Result<Action> {
        self.since.weigh();
        if !(samples >= 0.0 && samples.is_finite()) {
            self.since.wrong = self.is_next_due().then_some(samples);
            let made = self.count(params, 0.0);
            self.since.wrong = None;
            let weight = samples;
            return made.and(Err(Error::InvalidWeight { rank: self.rank(), weight }));
        }
        self.count(params, samples)
    }

    /// Counts an optimizer step that was applied with the learning rate `lr`, for schedules that
    /// depend on it, and averages if an average is due. The rate of the step before an average must
    /// be the same on every rank. Calls that pass no rate go on with the last one;
    /// [`set_learning_rate`](Self::set_learning_rate) gives them theirs.
    ///
    /// # Errors
    /// As [`step`](Self::step). [`Error::SchedulesDiffer`] on every rank, with no tensor changed,
    /// if the ranks' rates differ. With [`Schedule::quadratic`], if a rank has no rate that is
    /// finite and not negative when an average is due: [`Error::InvalidOption`] on that rank, and
    /// `SchedulesDiffer` on the others.
    pub fn step_with<P: Lend + ?Sized>(&mut self, params: &mut P, lr: f64) -> Result<Action> {
        self.set_learning_rate(lr);
        self.step(params)
    }

    /// Learning rate of the steps that follow, as [`step_with`](Self::step_with) passes it: for
    /// [`step_weighted`](Self::step_weighted), and for [`skip`](Self::skip) where the rate changes
    /// in steps that are left out.
    pub fn set_learning_rate(&mut self, lr: f64) {
        self.measured.rate = Some(lr);
    }

    fn count<P: Lend + ?Sized>(&mut self, params: &mut P, samples: f64) -> Result<Action> {
        self.applied += 1;
        self.since.count(samples);
        self.skip(params)
    }

    /// Counts an optimizer step that was left out, on this rank alone or on all. It does not count
    /// as applied, but this rank takes part in the average if one is due, so that its peers need
    /// not wait.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn skip<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        let fragments = self.averager.overlap().fragments;
        let due = self.decisions.step(fragments);
        self.averager.set_course(self.decisions.course);
        let landed = if self.is_landing() { self.land(params) } else { Ok(None) };
        if landed.as_ref().is_err_and(Error::is_fatal) {
            return self.ended(behind(landed, Ok(Action::Unneeded)));
        }
        if let Some(due) = due {
            let made = self.make_due(params, due);
            return self.ended(behind(landed, made));
        }
        let counted = match self.is_alone() {
            true => Action::Alone,
            false => Action::Counted {
                until_next: self.decisions.course.until_next(&self.schedule(), fragments),
            },
        };
        match self.unreported.take() {
            None => behind(landed, Ok(counted)),
            Some(cause) => behind(landed, Err(cause)),
        }
    }

    /// Averages now, outside of the due steps, and waits for it: before an evaluation or a
    /// checkpoint, or at the end of an epoch. All ranks call it after the same due average; they
    /// may have made different numbers of steps since. If no rank has stepped since, no parameter
    /// is moved, so a second call changes nothing. (Where ranks [keep a
    /// share](crate::Outer::keeping), the first call moves them all the same.)
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn sync<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        let landed = self.land(params);
        if landed.as_ref().is_err_and(Error::is_fatal) {
            return self.ended(behind(landed, Ok(Action::Unneeded)));
        }
        let made = self.average(params, place::FINISH, None, true);
        self.ended(behind(landed, made))
    }

    /// Makes the last average, after which all ranks' parameters are the same: [`sync`](Self::sync)
    /// by the name that the end of a loop has.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn finish<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        self.sync(params)
    }

    /// Ends this rank's batches, of one epoch or of all, where ranks have different numbers of
    /// them. Every rank calls it after its last step, in the place of [`finish`](Self::finish), and
    /// it returns when all have: until then this rank takes part in the averages of the others.
    /// In the first of them it counts with the steps that it has made since the last average, and
    /// in the others it only receives. All ranks end with the same parameters, at the position of
    /// the one that was farthest, so that another epoch can follow.
    ///
    /// PyTorch's `Join` makes a rank without data repeat the collectives of the others, too; here
    /// they are the averages of the schedule only. Averages by hand, broadcasts, barriers and
    /// scalars wait until all ranks are done. While a rank is done, no process is admitted.
    ///
    /// # Errors
    /// As [`step`](Self::step), of every average made meanwhile. Call it again after the error; if
    /// that was fatal, after [`recover`](Self::recover), whose average counts every rank. After
    /// [`Error::AfterAverage`] all ranks are done. [`Error::InvalidOption`], before this rank takes
    /// part in anything, if the outer optimizer lets ranks
    /// [keep a share](crate::Outer::keeping): a due average then mixes and the last one does not,
    /// and a rank that is done can't tell which of them the others make.
    pub fn done<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Action> {
        // An earlier error is returned before this rank takes part. After the last average of all
        // it would make this rank call `done` again, which its peers have left.
        self.averager();
        self.unreported.take().map_or(Ok(()), Err)?;
        self.averager.refusal_of_done().filter(|_| self.enabled).map_or(Ok(()), Err)?;
        let mut last = Action::Unneeded;
        let made = loop {
            match self.average(params, place::DONE, None, true) {
                Ok(Action::Unneeded) if self.all_done => {
                    break self.meet_at_farthest().map(|()| last)
                }
                Ok(Action::Unneeded) => {} // of ranks that go on
                Ok(Action::Alone) => break Ok(Action::Alone),
                Ok(action) => last = action,
                Err(error) => break Err(error),
            }
        };
        self.ended(made)
    }

    fn meet_at_farthest(&mut self) -> Result<()> {
        let course = self.averager.farthest(self.decisions.course)?;
        self.take_course(course);
        Ok(())
    }

    /// Takes the course that all ranks take now.
    fn take_course(&mut self, course: Course) {
        self.decisions.take(course);
        self.measured.restart(course.position);
        self.averager.set_course(course);
    }

    /// Waits for the average that [`step`](Self::step) has enqueued. `None` if none was under way.
    ///
    /// # Errors
    /// Those of the average. It may be called on some ranks only.
    pub fn wait(&mut self) -> Result<Option<Report>> {
        self.unreported.take().map_or(Ok(()), Err)?;
        self.settle()
    }

    /// True if the next [`step`](Self::step) or [`skip`](Self::skip) averages, or starts the
    /// average of a copy.
    pub fn is_next_due(&self) -> bool {
        !self.is_alone() && self.decisions.is_next_due(self.averager.overlap().fragments)
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.averager.rank()
    }

    /// The number of ranks.
    pub fn world_size(&self) -> usize {
        self.averager.world_size()
    }

    /// Schedule of the averages.
    pub fn schedule(&self) -> Schedule {
        self.decisions.schedule
    }

    /// Place in the schedule: number of steps taken and skipped by this rank and, in a process that
    /// joined, by its peers before.
    pub fn position(&self) -> u64 {
        self.decisions.course.position
    }

    /// H of the current round: number of local steps between averages, after the warm-up. It
    /// changes with schedules that adapt, and is the same on every rank.
    pub fn local_steps(&self) -> u64 {
        self.decisions.course.local_steps
    }

    /// Number of optimizer steps applied so far, by this rank.
    pub fn steps(&self) -> u64 {
        self.applied
    }

    /// Number of averages made so far, each fragment's by itself.
    pub fn averages(&self) -> u64 {
        self.averages
    }

    /// Averager of this rank, to abort its world, to reduce scalars, or to average outside of the
    /// schedule. Waits for an average that was enqueued, whose error is that of the next call.
    /// While an average of a copy is under way it makes no other; see [`flush`](Self::flush).
    pub fn averager(&mut self) -> &mut ParamAverager {
        if let Err(error) = self.settle() {
            self.unreported.get_or_insert(error);
        }
        &mut self.averager
    }

    /// Result of a call that averages.
    fn ended(&mut self, made: Result<Action>) -> Result<Action> {
        let made = self.unless_late(made);
        match self.unreported.take() {
            Some(cause) => made.and_then(|action| Err(action.after(cause))),
            None => made,
        }
    }
}
