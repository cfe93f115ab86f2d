//! Schedules: the steps after which to average. Pure functions, without state or I/O.

use std::fmt;

use crate::hash::fnv1a;

/// The optimizer steps after which the ranks average.
///
/// Local SGD with H local steps is `Schedule::every(H)`: an average after steps H, 2·H, 3·H, … H =
/// 8 is the default of Accelerate's `LocalSGD`; H = 1 averages after every step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Schedule {
    every: u64,
    warmup: u64,
}

/// Values that stand for averages outside of the step count. A step count never reaches them.
pub(crate) mod place {
    pub(crate) const FINISH: u64 = u64::MAX;
    pub(crate) const RECOVERY: u64 = u64::MAX - 1;
    pub(crate) const ADMISSION: u64 = u64::MAX - 2;
    pub(crate) const BY_HAND: u64 = u64::MAX - 3;
    /// The mean that all ranks begin with.
    pub(crate) const START: u64 = u64::MAX - 4;
    /// A rank that has ended its steps.
    pub(crate) const DONE: u64 = u64::MAX - 5;
    /// Copies of rank 0, of rank 1, and so on.
    const COPIES: u64 = u64::MAX - 0xffff;
    const LAST_COPY: u64 = COPIES + 0xff;

    /// A copy of rank `root`'s tensors. Roots that are too large for every world share a place.
    pub(crate) fn copy_of(root: usize) -> u64 {
        COPIES + root.min(0xff) as u64
    }

    /// True for averages that give the ranks the values that they go on from.
    pub(crate) fn sets_values(place: u64) -> bool {
        matches!(place, RECOVERY | ADMISSION | START | COPIES..=LAST_COPY)
    }

    /// True for averages that `LocalSgd` makes in the course of training.
    pub(crate) fn is_of_schedule(place: u64) -> bool {
        place < COPIES || place == FINISH || place == RECOVERY
    }

    /// The value by which ranks check that they average at the same place, outside of a schedule.
    pub(crate) fn digest(place: u64) -> u64 {
        crate::hash::fnv1a(place.to_le_bytes()) | 1
    }

    /// The call of a place, in words.
    pub(crate) fn call(place: u64) -> String {
        match place {
            FINISH => "LocalSgd::sync or finish".into(),
            DONE => "LocalSgd::done".into(),
            RECOVERY => "LocalSgd::recover".into(),
            ADMISSION => "admit_joiner".into(),
            BY_HAND => "average".into(),
            START => "build, which starts from the mean".into(),
            COPIES..=LAST_COPY => format!("broadcast from rank {}", place - COPIES),
            step => format!("LocalSgd::step, its step {step}"),
        }
    }

    /// The time of an average in the course of training, in words, to follow "averages".
    pub(crate) fn time(place: u64) -> String {
        match place {
            FINISH => "in `sync` or `finish`".into(),
            RECOVERY => "in a recovery".into(),
            step => format!("after step {step}"),
        }
    }
}

/// As it is built: `every(8).after_warmup(100)`.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "every({})", self.every)?;
        match self.warmup {
            0 => Ok(()),
            warmup => write!(f, ".after_warmup({warmup})"),
        }
    }
}

impl Schedule {
    /// Averages after every `h`-th step: after steps h, 2·h, 3·h, …
    ///
    /// # Panics
    /// If `h` is 0.
    pub fn every(h: u64) -> Self {
        assert!(
            h > 0,
            "Schedule::every(0): the number of local steps between averages is at least 1"
        );
        Schedule { every: h, warmup: 0 }
    }

    /// Averages after each of the first `w` steps, and then after every `h`-th step: after 1, 2, …,
    /// w, w + h, w + 2·h, … Post-local SGD (Lin et al., 2018, "Don't use large mini-batches, use
    /// local SGD").
    pub fn after_warmup(self, w: u64) -> Self {
        Schedule { warmup: w, ..self }
    }

    /// True if an average follows step `step`, counted from 1.
    pub fn is_due(&self, step: u64) -> bool {
        step > 0 && (step <= self.warmup || (step - self.warmup).is_multiple_of(self.every))
    }

    /// The first step after `step` that an average follows; [`u64::MAX`] if it exceeds `u64`.
    pub fn next_due(&self, step: u64) -> u64 {
        if step < self.warmup {
            return step + 1;
        }
        let past = (step - self.warmup) % self.every;
        step.saturating_add(self.every - past)
    }

    /// The value by which ranks check that they average at the same place of the same schedule.
    /// Never 0, which stands for an average outside of any schedule.
    pub(crate) fn digest(&self, place: u64) -> u64 {
        let words = [self.every, self.warmup, place];
        fnv1a(words.iter().flat_map(|word| word.to_le_bytes())) | 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn due(schedule: Schedule) -> Vec<u64> {
        (0..=12).filter(|&step| schedule.is_due(step)).collect()
    }

    #[test]
    fn every_h_steps() {
        assert_eq!(due(Schedule::every(4)), [4, 8, 12]);
        assert_eq!(due(Schedule::every(1)), (1..=12).collect::<Vec<_>>());
    }

    #[test]
    fn every_step_before_the_warmup_ends() {
        assert_eq!(due(Schedule::every(4).after_warmup(3)), [1, 2, 3, 7, 11]);
    }

    #[test]
    fn next_due_is_the_next_step_that_is_due() {
        for schedule in [Schedule::every(4), Schedule::every(1), Schedule::every(5).after_warmup(3)]
        {
            for step in 0..40 {
                let next = (step + 1..).find(|&s| schedule.is_due(s)).unwrap();
                assert_eq!(schedule.next_due(step), next, "{schedule:?} after {step}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_schedule_and_step_have_an_answer(
            every in near_powers(), warmup in near_powers(), step in near_powers()
        ) {
            let schedule = Schedule::every(every.max(1)).after_warmup(warmup);
            let next = schedule.next_due(step);
            prop_assert!(next > step || step == u64::MAX);
            prop_assert!(schedule.is_due(next) || next == u64::MAX);
            prop_assert!(next - step <= every.max(1));
            // No step in between is due; checked for the first ones.
            for between in (step.saturating_add(1)..next).take(20) {
                prop_assert!(!schedule.is_due(between));
            }
            prop_assert_ne!(schedule.digest(step), 0);
        }
    }

    /// Numbers of every magnitude, numbers next to a power of two, and numbers next to the ends of
    /// the range.
    fn near_powers() -> impl Strategy<Value = u64> {
        let near =
            (0u32..64, -3i64..=3).prop_map(|(bit, off)| (1u64 << bit).wrapping_add_signed(off));
        prop_oneof![any::<u64>(), near, 0u64..40, (0u64..40).prop_map(|off| u64::MAX - off)]
    }

    #[test]
    fn digests_tell_schedules_and_reasons_apart() {
        let a = Schedule::every(4);
        let digests = [
            a.digest(8),
            a.digest(12),
            Schedule::every(5).digest(8),
            a.after_warmup(1).digest(8),
            0,
        ];
        for (i, x) in digests.iter().enumerate() {
            assert!(digests[..i].iter().all(|y| x != y), "digest {i}");
        }
    }

    #[test]
    #[should_panic(expected = "at least 1")]
    fn every_zero_steps_is_refused() {
        Schedule::every(0);
    }
}
