//! Averages of copies, which [`LocalSgd`](super::LocalSgd) starts and finishes some steps later.

use super::{Action, LocalSgd};
use crate::averager::{Halt, Landed, Lend, Overlapped};
use crate::schedule::Due;
use crate::{Error, Report, Result};

/// Average of a copy that a step has started.
#[derive(Debug)]
pub(super) struct Flight {
    average: Overlapped,
    /// Position after whose step its result is added.
    ends_at: u64,
    fragment: Option<usize>,
    /// Steps and samples that it averages.
    steps: u64,
    samples: Option<f64>,
}

impl LocalSgd {
    /// Makes, or starts, the average that is due.
    pub(super) fn make_due(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        due: Due,
    ) -> Result<Action> {
        let overlap = self.averager.overlap();
        if !overlap.is_on() || self.is_alone() {
            return self.make_whole(params, false);
        }
        if self.refusal_of_overlap().is_some() {
            // An average of the whole model, which all ranks refuse: see `refusal_at`.
            return self.average(params, self.position(), None, true);
        }
        // A joiner gets a model that all ranks have. The steps of an outer optimizer, and what is
        // coded, begin from one; no average that gives it is enqueued.
        let has_begun = self.enqueued.is_some()
            || (self.averager.has_anchor() && self.averager.has_reference());
        let fragment = match due {
            _ if self.admits_next || self.is_in_warmup() || !has_begun => {
                return self.make_whole(params, true)
            }
            Due::Whole => None,
            Due::Fragment(fragment) => Some(fragment),
        };
        if overlap.copies() {
            return self.start_overlapped(params, fragment);
        }
        let made = self.average(params, self.position(), fragment, false);
        if let Ok(Action::Averaged(report)) = &made {
            self.admits_next |= report.join_pending;
        }
        made
    }

    /// Makes the average of the whole model that is due. All ranks have one model then, so that a
    /// process can be admitted.
    fn make_whole(&mut self, params: &mut (impl Lend + ?Sized), waits: bool) -> Result<Action> {
        let made = self.average(params, self.position(), None, waits);
        let action = self.unless_without_rate(made)?;
        self.admit(params, action).map_err(Halt::error)
    }

    fn is_in_warmup(&self) -> bool {
        self.schedule().is_in_warmup(self.position())
    }

    /// Error of a schedule that does not fit the overlap.
    pub(super) fn refusal_of_overlap(&self) -> Option<Error> {
        let overlap = self.averager.overlap();
        if !overlap.is_on() {
            return None;
        }
        let h = self.decisions.course.local_steps;
        let fragments = u64::from(overlap.fragments);
        let (found, expected) = if self.schedule().adapts() {
            (format!("{overlap}, with {}", self.schedule()), "a schedule of one H, Schedule::every")
        } else if h < fragments {
            (format!("{fragments} fragments, with H = {h}"), "as many fragments as H at most")
        } else if overlap.delay > h / fragments {
            let found = format!("delay {}, with H = {h}, fragments {fragments}", overlap.delay);
            (found, "a delay of H / fragments at most: one average ends before the next begins")
        } else {
            return None;
        };
        Some(Error::InvalidOption { rank: self.rank(), option: "overlap", found, expected })
    }

    fn start_overlapped(
        &mut self,
        params: &mut (impl Lend + ?Sized),
        fragment: Option<usize>,
    ) -> Result<Action> {
        let (position, delay) = (self.decisions.course.position, self.averager.overlap().delay);
        self.averager.set_course(self.decisions.course);
        let call = self.call(position, fragment, true);
        let average = self.averager.begin_overlapped(call, params)?;
        let (steps, samples) = (self.since.steps(fragment), self.since.samples(fragment));
        let ends_at = position.saturating_add(delay);
        self.flight = Some(Flight { average, ends_at, fragment, steps, samples });
        self.since.forget(fragment);
        Ok(Action::Started { ends_in: delay })
    }

    /// True if an average of a copy ends with the step that was counted last.
    pub(super) fn is_landing(&self) -> bool {
        self.flight.as_ref().is_some_and(|flight| flight.ends_at <= self.position())
    }

    /// Waits for the average of a copy that a step has started, and adds its result now, before the
    /// delay has passed: before an evaluation or [`save`](Self::save). It may be called on some
    /// ranks only. `None` if none was under way, or no rank had made a step.
    ///
    /// # Errors
    /// Those of the average.
    pub fn flush<P: Lend + ?Sized>(&mut self, params: &mut P) -> Result<Option<Report>> {
        self.unreported.take().map_or(Ok(()), Err)?;
        self.land(params)
    }

    /// `flush`, as a part of a call.
    pub(super) fn land(&mut self, params: &mut (impl Lend + ?Sized)) -> Result<Option<Report>> {
        let Some(Flight { average, fragment, steps, samples, .. }) = self.flight.take() else {
            return Ok(None);
        };
        let Landed { report, is_over, error } = self.averager.end_overlapped(average, params);
        // On every rank, whatever this rank's own tensors are.
        if let Some(report) = &report {
            self.averages += 1;
            self.admits_next |= report.join_pending;
        }
        if !is_over {
            self.since.take_back(fragment, steps, samples); // they belong to the next average
        }
        error.map_or(Ok(report.filter(|_| is_over)), Err)
    }

    /// Drops the average of a copy, whose steps belong to the next average.
    pub(super) fn drop_flight(&mut self) {
        if let Some(Flight { fragment, steps, samples, .. }) = self.flight.take() {
            self.averager.drop_overlapped();
            self.since.take_back(fragment, steps, samples);
        }
    }
}

/// Result of a call that has ended one average, and then made another step.
pub(super) fn behind(landed: Result<Option<Report>>, made: Result<Action>) -> Result<Action> {
    match (landed, made) {
        (Ok(None), made) => made,
        (
            Ok(Some(report)),
            Ok(Action::Started { .. } | Action::Counted { .. } | Action::Unneeded),
        ) => Ok(Action::Averaged(report)),
        (Ok(Some(_)), Ok(made)) => Ok(made),
        (Ok(Some(report)), Err(cause)) => Err(Action::Averaged(report).after(cause)),
        (Err(cause), made) => made.and_then(|action| Err(action.after(cause))),
    }
}
