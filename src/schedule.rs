//! Schedules: the steps after which to average. Pure functions, without I/O.

mod course;
pub(crate) mod place;
#[cfg(test)]
mod properties;
mod rule;
#[cfg(test)]
mod tests;

use std::fmt;

pub(crate) use course::{Course, Decisions, Due, Rate, Reason};
pub(crate) use rule::Agreed;
use rule::{Parameter, Rule};

/// The optimizer steps after which the ranks average.
///
/// Local SGD with H local steps is `Schedule::every(H)`: an average after steps H, 2·H, 3·H, … H =
/// 8 is the default of Accelerate's `LocalSGD`; H = 1 averages after every step.
///
/// The other schedules adapt H. They decide it in the average of a step, for the steps that follow,
/// from values that all ranks know, so that all ranks take the same decision. An average makes the
/// measurements of single ranks known to all. Decisions take effect one average later where
/// averages are [enqueued](crate::Action::Enqueued).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Schedule {
    rule: Rule,
    warmup: u64,
    /// Largest H.
    at_most: u64,
}

/// The call that builds it: `every(8).after_warmup(100)`.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rule)?;
        if self.at_most != u64::MAX {
            write!(f, ".at_most({})", self.at_most)?;
        }
        match self.warmup {
            0 => Ok(()),
            warmup => write!(f, ".after_warmup({warmup})"),
        }
    }
}

impl Schedule {
    /// Target of [`overhead`](Self::overhead) that flodl has by default.
    pub const OVERHEAD: f64 = 0.05;

    /// Target of [`divergence`](Self::divergence): flodl warns when the relative change of a rank's
    /// parameters rises above it.
    pub const DIVERGENCE: f64 = 0.05;

    /// Averages after every `h`-th step: after steps h, 2·h, 3·h, …
    ///
    /// # Panics
    /// If `h` is 0.
    pub fn every(h: u64) -> Self {
        assert!(
            h > 0,
            "Schedule::every(0): the number of local steps between averages is at least 1"
        );
        Schedule::of(Rule::Every(h))
    }

    /// Schedules of groups of ranks within groups, a period for each, the smallest group first:
    /// after a step, the group of the largest period that divides its number averages, and no
    /// other, as with PyTorch's `HierarchicalModelAverager`. Each group is a world of its own, with
    /// a [`LocalSgd`](crate::LocalSgd) of its schedule, and a rank calls `step` of all of its
    /// groups after each optimizer step, on all ranks in one order. All have the same
    /// [warm-up](Self::after_warmup), whose averages the last group makes, that of all ranks. Its
    /// `finish` makes the last average. A group that recovers goes on at the step of its rank that
    /// was farthest on, whatever its ranks' other groups have.
    /// [`guide::practice`](crate::guide::practice) has a program. For ranks of several hosts see
    /// [`Hierarchy`](crate::Hierarchy).
    ///
    /// # Panics
    /// If a period is 0, or is not a multiple of the one before it and larger.
    pub fn hierarchical<const N: usize>(periods: [u64; N]) -> [Self; N] {
        std::array::from_fn(|level| {
            let h = periods[level];
            let Some(&above) = periods.get(level + 1) else { return Schedule::every(h) };
            assert!(
                h > 0 && above > h && above.is_multiple_of(h),
                "Schedule::hierarchical({periods:?}): each period is a multiple of the one before"
            );
            Schedule::of(Rule::Level { h, above })
        })
    }

    /// Averages less often as the learning rate η falls: H = max(h_base, ⌊(alpha / η)²⌋), the
    /// quadratic synchronization rule (QSR) of Gu et al., 2024, "A Quadratic Synchronization Rule
    /// for Distributed Deep Learning", arXiv 2310.14423. η is that of the last step before the
    /// average that begins a round: give it to [`LocalSgd::step_with`](crate::LocalSgd::step_with).
    /// The first round has h_base steps.
    ///
    /// The paper has alpha = 0.0175 with h_base = 4 for ViT-B with AdamW, whose learning rate falls
    /// from 0.008. A rate that falls to 0 ends the averages, except the last one; see
    /// [`at_most`](Self::at_most).
    ///
    /// # Panics
    /// If `alpha` is not positive and finite, or `h_base` is 0.
    pub fn quadratic(alpha: f64, h_base: u64) -> Self {
        assert!(h_base > 0, "Schedule::quadratic(_, 0): H is at least 1");
        let alpha = Parameter::new(alpha)
            .unwrap_or_else(|| panic!("Schedule::quadratic({alpha}, _): alpha is above 0"));
        Schedule::of(Rule::Quadratic { alpha, base: h_base })
    }

    /// Averages as often as possible, if averages may take the share `target` of the time of the
    /// steps, such as [`OVERHEAD`](Self::OVERHEAD). The rule is that of flodl: with T the time of
    /// an average and t that of a step, the overhead is T / (H·t). Above the target, H becomes ⌈H ·
    /// overhead / target⌉; below half of it, H − 1. H is 10 at first and [at most](Self::at_most)
    /// 200, as there; unlike there, it may become smaller than at first.
    ///
    /// T is that of the slowest rank, from the time when all have come ([`Report::active`]): of
    /// each rank's last two averages the shorter one, so that a single slow one counts nothing. t
    /// is that of the slowest rank, with everything that it does between its calls of `step`.
    ///
    /// [`Report::active`]: crate::Report::active
    ///
    /// # Panics
    /// If `target` is not positive and finite.
    pub fn overhead(target: f64) -> Self {
        let target = Parameter::new(target)
            .unwrap_or_else(|| panic!("Schedule::overhead({target}): a share is above 0"));
        Schedule::of(Rule::Overhead(target)).at_most(200)
    }

    /// Averages as often as each rank may send `bytes_per_second`, on average over a round of H
    /// steps: H = ⌈V / (bytes_per_second · t)⌉, with t the time of a step on the slowest rank and V
    /// = 2·S·(n − 1)/n the bytes that a ring sends for S bytes of parameters and n ranks. (The time
    /// of the average itself, which would allow a smaller H, is not counted.) H is 10 at first.
    ///
    /// # Panics
    /// If `bytes_per_second` is not positive and finite.
    pub fn budget(bytes_per_second: f64) -> Self {
        let rate = Parameter::new(bytes_per_second).unwrap_or_else(|| {
            panic!("Schedule::budget({bytes_per_second}): a number of bytes is above 0")
        });
        Schedule::of(Rule::Budget(rate))
    }

    /// Averages as rarely as possible, if the parameters of no rank may move away from the mean by
    /// more than the share `target` of its norm, such as [`DIVERGENCE`](Self::DIVERGENCE). With d
    /// the largest [relative change](crate::Telemetry::relative_change) of a rank's parameters by
    /// the last average but one that was due, after h steps: above the target, H becomes ⌊h ·
    /// target / d⌋, and no longer than it is; below half of it, H + 1. H is 10 at first. With an
    /// [outer optimizer](crate::Outer), d has its step in it.
    ///
    /// Needs [`Builder::telemetry`](crate::Builder::telemetry): without, the averages of
    /// [`LocalSgd`](crate::LocalSgd) are refused with
    /// [`Error::InvalidOption`](crate::Error::InvalidOption) on every rank.
    ///
    /// # Panics
    /// If `target` is not positive and finite.
    pub fn divergence(target: f64) -> Self {
        let target = Parameter::new(target)
            .unwrap_or_else(|| panic!("Schedule::divergence({target}): a share is above 0"));
        Schedule::of(Rule::Divergence(target))
    }

    fn of(rule: Rule) -> Self {
        Schedule { rule, warmup: 0, at_most: u64::MAX }
    }

    /// Limits H, whatever the rule asks for.
    ///
    /// # Panics
    /// If `h` is 0.
    pub fn at_most(self, h: u64) -> Self {
        assert!(h > 0, "Schedule::at_most(0): the number of local steps is at least 1");
        Schedule { at_most: h, ..self }
    }

    /// Averages after each of the first `w` steps, and then by the rule: with `every(h)` after 1,
    /// 2, …, w, w + h, w + 2·h, … Post-local SGD (Lin et al., 2018, "Don't use large mini-batches,
    /// use local SGD").
    pub fn after_warmup(self, w: u64) -> Self {
        Schedule { warmup: w, ..self }
    }

    /// Post-local SGD with the steps of PyTorch: averages at each step up to `start`, then after
    /// steps start + 1, start + 1 + h, start + 1 + 2·h, … The same as `after_warmup(start + 1)`.
    ///
    /// In PyTorch, `post_localSGD_hook` all-reduces the gradients of the first `start_localSGD_iter
    /// = start` steps, and `PeriodicModelAverager(period=h, warmup_steps=start)` averages the
    /// parameters at steps s, counted from 0, with s ≥ start and (s − start) % h = 0. Averaged
    /// parameters in the place of averaged gradients are the same for SGD, with or without momentum
    /// (rounding aside), but not for Adam, whose moments stay local here.
    pub fn post_local(self, start: u64) -> Self {
        self.after_warmup(start.saturating_add(1))
    }

    /// True if H depends on more than the position.
    pub(crate) fn adapts(&self) -> bool {
        !matches!(self.rule, Rule::Every(_) | Rule::Level { .. })
    }

    /// True if the round of `h` steps that ends so many steps after the warm-up has no average,
    /// since a larger group makes it; 0: the warm-up. Never of two rounds in a row.
    fn is_left_out(&self, end: u64, h: u64) -> bool {
        matches!(self.rule, Rule::Level { above, .. } if h < above && end.is_multiple_of(above))
    }

    /// True if every step up to this position is averaged.
    pub(crate) fn is_in_warmup(&self, position: u64) -> bool {
        position <= self.warmup
    }

    /// True if H depends on the learning rate.
    pub(crate) fn needs_rate(&self) -> bool {
        matches!(self.rule, Rule::Quadratic { .. })
    }

    /// True if H depends on times.
    pub(crate) fn needs_times(&self) -> bool {
        matches!(self.rule, Rule::Overhead(_) | Rule::Budget(_))
    }

    /// True if H depends on what averages change.
    pub(crate) fn needs_telemetry(&self) -> bool {
        matches!(self.rule, Rule::Divergence(_))
    }

    /// Words that are equal for equal schedules only, in all versions of this crate.
    pub(crate) fn words(&self) -> [u64; 5] {
        let [rule, first, second] = self.rule.words();
        [rule, first, second, self.warmup, self.at_most]
    }

    fn limited(&self, h: u64) -> u64 {
        h.min(self.at_most)
    }
}
