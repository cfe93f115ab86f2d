//! Overlap of averages with training, and averages of a part of the model at a time.

use std::fmt;

/// How averages overlap with training: the parts that are averaged one at a time, the steps that
/// training goes on meanwhile, and the share of its own values that a rank keeps.
///
/// `Overlap::default()` averages the whole model while training waits: one fragment, delay 0, α 0,
/// as torchft's and MaxText's defaults are. [`Builder::overlap`](crate::Builder::overlap) takes it,
/// and [`LocalSgd`](crate::LocalSgd) does the rest; [`guide::overlap`](crate::guide::overlap) says
/// when each is worth it.
///
/// ```
/// use param_averager::Overlap;
///
/// // A quarter of the model at a time, each while two more steps are made.
/// let overlap = Overlap::default().fragments(4).delay(2);
/// assert_eq!(overlap.to_string(), "fragments 4, delay 2, alpha 0");
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use = "pass it to Builder::overlap"]
pub struct Overlap {
    pub(crate) fragments: u32,
    pub(crate) delay: u64,
    pub(crate) alpha: f64,
}

/// Most fragments: records of the kernels have 8 bits for one of their four dtypes.
pub(crate) const MOST_FRAGMENTS: u32 = 64;

impl Default for Overlap {
    fn default() -> Self {
        Overlap { fragments: 1, delay: 0, alpha: 0.0 }
    }
}

impl Overlap {
    /// Number P of fragments, 1 to 64: parts of neighbouring tensors, of about as many bytes
    /// each, that are averaged one at a time (Streaming DiLoCo, Douillard et al. 2025). In a round
    /// of H steps, fragment p is due after step ⌊(p + 1)·H/P⌋, so H is P at least. The average of a
    /// warm-up step, and those of [`sync`](crate::LocalSgd::sync) and of a recovery, are of the
    /// whole model. Default: 1.
    pub fn fragments(mut self, fragments: u32) -> Self {
        self.fragments = fragments;
        self
    }

    /// Delay τ: number of steps that training goes on while an average is made, at most ⌊H/P⌋.
    /// The average is that of a copy of the fragment, which each rank makes when it is due; τ steps
    /// later its result less the copy is added to the parameters, which so keep what they have
    /// learnt meanwhile. With 0 training waits, and no copy is made. Default: 0.
    pub fn delay(mut self, steps: u64) -> Self {
        self.delay = steps;
        self
    }

    /// Share α of the difference that a rank keeps, from 0 up to 1, which is excluded: the
    /// parameters get 1 − α of it. Needs a [`delay`](Self::delay); without one, use
    /// [`Outer::keeping`](crate::Outer::keeping). Default: 0.
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Option, value and what is accepted, if this can't be used.
    pub(crate) fn refusal(&self) -> Option<(&'static str, String, &'static str)> {
        let Overlap { fragments, delay, alpha } = *self;
        match () {
            _ if !(1..=MOST_FRAGMENTS).contains(&fragments) => {
                Some(("overlap", format!("{fragments} fragments"), "1 to 64"))
            }
            _ if !(0.0..1.0).contains(&alpha) => {
                Some(("overlap", format!("alpha {alpha}"), "from 0 up to 1, which is excluded"))
            }
            _ if alpha != 0.0 && delay == 0 => Some((
                "overlap",
                format!("alpha {alpha} with delay 0"),
                "a delay of 1 or more; Outer::keeping keeps a share without one",
            )),
            _ => None,
        }
    }

    /// True if averages are made of a copy, while training goes on.
    pub(crate) fn copies(&self) -> bool {
        self.delay > 0
    }

    /// True if anything differs from the default.
    pub(crate) fn is_on(&self) -> bool {
        self.fragments > 1 || self.delay > 0
    }
}

impl fmt::Display for Overlap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Overlap { fragments, delay, alpha } = self;
        write!(f, "fragments {fragments}, delay {delay}, alpha {alpha}")
    }
}
