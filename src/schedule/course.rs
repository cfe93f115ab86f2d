//! Place of one rank in its schedule, and the decisions of the schedule.

use std::fmt;

use super::{place, Agreed, Schedule};
use crate::hash::fnv1a;

/// Place of a rank in its schedule, with the state of the schedule.
///
/// The state is the same on all ranks that have made the same averages: it changes only in an
/// average of a step, by values that are the same on all ranks. It is part of the digest that ranks
/// compare at each average, so ranks that have decided differently get an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(processes, derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Course {
    /// Steps taken and skipped.
    pub(crate) position: u64,
    /// Step of the last decision. Rounds are counted from there, or from the end of the warm-up.
    pub(crate) anchor: u64,
    /// H, the length of a round. 0: no schedule has begun.
    pub(crate) local_steps: u64,
}

/// An average that is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Whole,
    Fragment(usize),
}

/// Number of fragments that are due at the first `step` steps of a round.
fn fragments_by(step: u64, local_steps: u64, fragments: u32) -> u64 {
    // p with ⌊p·H/P⌋ ≤ step, from 1 on: p·H < (step + 1)·P.
    let most = (u128::from(step) + 1) * u128::from(fragments);
    (most.div_ceil(local_steps.into()) - 1).min(fragments.into()) as u64
}

impl Course {
    /// Beginning of a schedule, at a position.
    pub(crate) fn begin(schedule: &Schedule, position: u64) -> Course {
        let anchor = if schedule.adapts() { position } else { 0 };
        Course { position, anchor, local_steps: schedule.limited(schedule.rule.first()) }
    }

    /// The average that follows the step of this position, if one does. Of several fragments,
    /// number p is due at ⌊(p + 1)·H/P⌋ of a round of H steps; there are H at most.
    pub(crate) fn due(&self, schedule: &Schedule, fragments: u32) -> Option<Due> {
        let Course { position, anchor, local_steps } = *self;
        let from = anchor.max(schedule.warmup);
        if position > 0 && position <= schedule.warmup {
            return (!schedule.is_left_out(0, local_steps)).then_some(Due::Whole);
        }
        let before = position.checked_sub(from)?.checked_sub(1)?;
        let step = before % local_steps + 1;
        let end = (before - (step - 1)).saturating_add(local_steps);
        if schedule.is_left_out(end, local_steps) {
            return None;
        }
        if fragments == 1 {
            return (step == local_steps).then_some(Due::Whole);
        }
        let last = fragments_by(step, local_steps, fragments);
        (last > fragments_by(step - 1, local_steps, fragments))
            .then(|| Due::Fragment(last as usize - 1))
    }

    /// Steps from here to the next one that an average follows, at least 1. Not an exact number
    /// where that exceeds `u64`.
    pub(crate) fn until_next(&self, schedule: &Schedule, fragments: u32) -> u64 {
        let Course { position, anchor, local_steps } = *self;
        let from = anchor.max(schedule.warmup);
        let step = position.saturating_sub(from) % local_steps;
        // A round that is left out is followed by one that is not.
        let end = (position.saturating_sub(from) - step).checked_add(local_steps);
        let left_out = end.filter(|&end| schedule.is_left_out(end, local_steps));
        if let Some(end) = left_out.and_then(|end| from.checked_add(end)) {
            let next = Course { position: end, ..*self }.until_next(schedule, fragments);
            return (end - position).saturating_add(next);
        }
        // Step of the round that the next fragment is due at.
        let next = fragments_by(step, local_steps, fragments) + 1;
        let at = (u128::from(next) * u128::from(local_steps)).div_euclid(fragments.into()) as u64;
        let next = match position {
            _ if position < schedule.warmup && !schedule.is_left_out(0, local_steps) => {
                position + 1
            }
            _ if position < from => from.saturating_add(at),
            _ => position.saturating_add(at - step),
        };
        (next - position).max(1)
    }

    /// Decides the length of the next round, in or after an average of the step of this position.
    /// Every rank calls it in the same averages, with the same values.
    pub(crate) fn decide(&mut self, schedule: &Schedule, agreed: &Agreed) {
        if schedule.adapts() {
            self.anchor = self.position;
            self.local_steps = schedule.limited(schedule.rule.next(self.local_steps, agreed));
        }
    }

    /// The course of ranks that have made different averages: the position of the rank that is
    /// farthest on, with the last decision. Of two decisions at one step, the longer round counts.
    pub(crate) fn farthest(courses: impl IntoIterator<Item = Course>) -> Course {
        courses.into_iter().fold(Course::default(), |most, course| {
            let (anchor, local_steps) =
                (most.anchor, most.local_steps).max((course.anchor, course.local_steps));
            Course { position: most.position.max(course.position), anchor, local_steps }
        })
    }
}

/// The decisions of one rank's schedule.
///
/// All ranks take the same ones: each call but `step` is made by all ranks in the same average
/// (`take`: when they have met), or makes no difference before the next one.
#[derive(Clone, Debug)]
pub(crate) struct Decisions {
    pub(crate) schedule: Schedule,
    pub(crate) course: Course,
    /// Values of an average that was enqueued, until the next average of a step. Ranks learn of
    /// them at different times, and use them at the same one.
    later: Option<Agreed>,
}

impl Decisions {
    /// Decisions of a schedule that goes on at `course`, or begins at its position.
    pub(crate) fn new(schedule: Schedule, course: Course) -> Decisions {
        let course = match course.local_steps {
            0 => Course::begin(&schedule, course.position),
            _ => course,
        };
        Decisions { schedule, course, later: None }
    }

    /// Counts a step. Returns the average that follows it.
    pub(crate) fn step(&mut self, fragments: u32) -> Option<Due> {
        self.course.position += 1;
        self.course.due(&self.schedule, fragments)
    }

    /// True if an average follows the next step.
    pub(crate) fn is_next_due(&self, fragments: u32) -> bool {
        self.clone().step(fragments).is_some()
    }

    /// Makes the decision that an enqueued average has left. Called before an average at `place`,
    /// when the outcome of the last one is known to all ranks.
    pub(crate) fn before(&mut self, place: u64) {
        if place::is_step(place) {
            if let Some(agreed) = self.later.take() {
                self.course.decide(&self.schedule, &agreed);
            }
        }
    }

    /// Decides after an average at `place` that all ranks wait for.
    pub(crate) fn after(&mut self, place: u64, agreed: &Agreed) {
        if place::is_step(place) {
            self.course.decide(&self.schedule, agreed);
        }
    }

    /// Keeps the values of an enqueued average of a step, whose outcome other ranks may not know
    /// yet.
    pub(crate) fn after_enqueued(&mut self, agreed: Agreed) {
        self.later = Some(agreed);
    }

    /// Values that are to be used in the next average of a step.
    pub(crate) fn later(&self) -> Option<Agreed> {
        self.later
    }

    /// Replaces the values for the next average of a step.
    pub(crate) fn restore(&mut self, later: Option<Agreed>) {
        self.later = later;
    }

    /// Goes on at a course that all ranks have agreed on.
    pub(crate) fn take(&mut self, course: Course) {
        *self = Decisions::new(self.schedule, course);
    }
}

/// Reason of a rank to average now: everything that its peers must agree with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reason {
    pub(crate) schedule: Schedule,
    pub(crate) course: Course,
    /// Learning rate, if the schedule depends on it and this is the average of a step.
    pub(crate) rate: Option<Rate>,
    /// Number of this rank if its schedule does not fit the averager's options. The reason differs
    /// from that of every other rank then, so that no rank averages.
    pub(crate) unfit: Option<usize>,
}

/// Learning rate of the step before an average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Rate {
    Known(f64),
    /// No rate was given, or a number that is no rate. It differs from the rate of every other
    /// rank, so that no rank averages.
    Unusable {
        rank: usize,
    },
}

impl Reason {
    /// The value by which ranks check that they average at the same place of the same schedule.
    /// Never 0, which stands for an average outside of any schedule.
    pub(crate) fn digest(&self, place: u64) -> u64 {
        let [rule, first, second, warmup, at_most] = self.schedule.words();
        let (of_rate, rate) = match self.rate {
            None => (0, 0),
            Some(Rate::Known(rate)) => (1, rate.to_bits()),
            Some(Rate::Unusable { rank }) => (2, rank as u64),
        };
        let unfit = self.unfit.map_or(0, |rank| rank as u64 + 1);
        let Course { anchor, local_steps, .. } = self.course;
        let words = [
            rule,
            first,
            second,
            warmup,
            at_most,
            place,
            anchor,
            local_steps,
            of_rate,
            rate,
            unfit,
        ];
        fnv1a(words.iter().flat_map(|word| word.to_le_bytes())) | 1
    }

    /// The reason in words, to follow "averages".
    pub(crate) fn at(&self, place: u64) -> String {
        let position = match place {
            place::FINISH => format!(" after step {}", self.course.position),
            _ => String::new(),
        };
        format!("{}{position} of {self}", place::time(place))
    }
}

/// The schedule, with the decisions that it has made.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.schedule)?;
        if self.schedule.adapts() {
            let Course { anchor, local_steps, .. } = self.course;
            write!(f, ", with H = {local_steps} from step {anchor}")?;
        }
        match self.rate {
            None => {}
            Some(Rate::Known(rate)) => write!(f, " and learning rate {rate}")?,
            Some(Rate::Unusable { .. }) => write!(f, " and no learning rate")?,
        }
        match self.unfit {
            None => Ok(()),
            Some(_) => write!(f, ", which does not fit its averager's options"),
        }
    }
}
