//! Rules for H, the number of local steps between two averages: pure functions of values that all
//! ranks know.

use std::fmt;

/// H before anything is measured: flodl's first one.
const FIRST: u64 = 10;

/// The rule of a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Rule {
    Every(u64),
    /// Every `h` steps, except for those of which `above` is a divisor: a larger group averages
    /// after them.
    Level {
        h: u64,
        above: u64,
    },
    Quadratic {
        alpha: Parameter,
        base: u64,
    },
    Overhead(Parameter),
    Budget(Parameter),
    Divergence(Parameter),
}

/// A rule's parameter: a positive number, compared by its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Parameter(u64);

impl Parameter {
    pub(super) fn new(value: f64) -> Option<Parameter> {
        (value > 0.0 && value.is_finite()).then_some(Parameter(value.to_bits()))
    }

    fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

/// Values that all ranks know after an average, the same on each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Agreed {
    /// Largest of all ranks' measurements, 0 for one that is unknown. Of a rule on times: seconds
    /// of a step, and of an average without waits for ranks that came later. Of a rule on
    /// divergence: the relative change of a rank's parameters by the average before, and the number
    /// of steps before that one.
    pub(crate) measured: [f64; 2],
    /// Bytes that each rank sends in an average by the ring.
    pub(crate) sent: f64,
    /// Learning rate of the step before the average.
    pub(crate) rate: Option<f64>,
}

impl Rule {
    /// H of the first round.
    pub(super) fn first(self) -> u64 {
        match self {
            Rule::Every(h) | Rule::Level { h, .. } | Rule::Quadratic { base: h, .. } => h,
            Rule::Overhead(_) | Rule::Budget(_) | Rule::Divergence(_) => FIRST,
        }
    }

    /// H of the next round, where that of the last one was `h`. Casts saturate.
    pub(super) fn next(self, h: u64, agreed: &Agreed) -> u64 {
        let Agreed { measured, sent, rate } = *agreed;
        let [step, average] = measured;
        let next = match self {
            Rule::Every(h) | Rule::Level { h, .. } => h,
            Rule::Quadratic { alpha, base } => match rate {
                Some(rate) => base.max((alpha.get() / rate).powi(2).floor() as u64),
                None => h,
            },
            Rule::Overhead(target) if step > 0.0 && average > 0.0 => {
                let overhead = average / (h as f64 * step);
                match overhead / target.get() {
                    excess if excess > 1.0 => (h as f64 * excess).ceil() as u64,
                    excess if excess < 0.5 => h - 1,
                    _ => h,
                }
            }
            Rule::Budget(rate) if step > 0.0 => (sent / (rate.get() * step)).ceil() as u64,
            Rule::Divergence(target) if measured[0] > 0.0 && measured[1] > 0.0 => {
                match measured[0] / target.get() {
                    excess if excess > 1.0 => ((measured[1] / excess).floor() as u64).min(h),
                    excess if excess < 0.5 => h.saturating_add(1),
                    _ => h,
                }
            }
            Rule::Overhead(_) | Rule::Budget(_) | Rule::Divergence(_) => h,
        };
        next.max(1)
    }

    /// Words that stand for the rule in a digest.
    pub(super) fn words(self) -> [u64; 3] {
        match self {
            Rule::Every(h) => [0, h, 0],
            Rule::Quadratic { alpha, base } => [1, alpha.0, base],
            Rule::Overhead(target) => [2, target.0, 0],
            Rule::Budget(rate) => [3, rate.0, 0],
            Rule::Divergence(target) => [4, target.0, 0],
            Rule::Level { h, above } => [5, h, above],
        }
    }
}

/// The call that builds it; of a level of a hierarchy, its steps.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rule::Every(h) => write!(f, "every({h})"),
            Rule::Level { h, above } => write!(f, "every({h}) without every({above})"),
            Rule::Quadratic { alpha, base } => write!(f, "quadratic({}, {base})", alpha.get()),
            Rule::Overhead(target) => write!(f, "overhead({})", target.get()),
            Rule::Budget(rate) => write!(f, "budget({})", rate.get()),
            Rule::Divergence(target) => write!(f, "divergence({})", target.get()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNKNOWN: Agreed = Agreed { measured: [0.0; 2], sent: 0.0, rate: None };

    fn parameter(value: f64) -> Parameter {
        Parameter::new(value).unwrap()
    }

    #[test]
    fn quadratic_rule_by_hand() {
        let rule = Rule::Quadratic { alpha: parameter(0.0175), base: 4 };
        assert_eq!(rule.first(), 4);
        let next = |rate| rule.next(7, &Agreed { rate: Some(rate), ..UNKNOWN });
        // The paper's values for ViT-B: (0.0175 / 0.008)² = 4.78, (0.0175 / 0.004)² = 19.1.
        assert_eq!([next(0.008), next(0.004), next(0.0175), next(1.0)], [4, 19, 4, 4]);
        // A learning rate that has decayed to 0: no more averages but the last one.
        assert_eq!([next(0.0), next(1e-300)], [u64::MAX; 2]);
        assert_eq!(rule.next(7, &UNKNOWN), 7);
    }

    #[test]
    fn overhead_rule_by_hand() {
        let rule = Rule::Overhead(parameter(0.05));
        assert_eq!(rule.first(), 10);
        let next =
            |h, step, average| rule.next(h, &Agreed { measured: [step, average], ..UNKNOWN });
        // 30 ms of averages for 10 · 20 ms of steps are 0.15, three times the target.
        assert_eq!(next(10, 0.020, 0.030), 30);
        // With the H that follows, 0.05: as wanted. Between half the target and the target: kept.
        assert_eq!([next(30, 0.020, 0.030), next(50, 0.020, 0.030)], [30, 50]);
        // 0.0249…: under half. One step less at a time, and never none.
        assert_eq!([next(61, 0.020, 0.030), next(1, 1.0, 1e-9)], [60, 1]);
        // 0.0501, rounded up.
        assert_eq!(next(100, 0.010, 0.0501), 101);
        for (step, average) in [(0.0, 0.030), (0.020, 0.0), (0.0, 0.0)] {
            assert_eq!(next(17, step, average), 17, "nothing is known: {step} {average}");
        }
        assert_eq!(next(10, 1e-300, 1e300), u64::MAX);
    }

    #[test]
    fn budget_rule_by_hand() {
        let rule = Rule::Budget(parameter(100e6)); // 100 MB/s
        assert_eq!(rule.first(), 10);
        let next = |step, sent| rule.next(3, &Agreed { measured: [step, 0.0], sent, ..UNKNOWN });
        // 248 MB in steps of 100 ms: 10 MB a step are allowed, so 24.8 steps.
        assert_eq!(next(0.1, 248e6), 25);
        assert_eq!([next(0.1, 10e6), next(0.1, 1.0), next(0.1, 0.0)], [1, 1, 1]);
        assert_eq!([next(0.0, 248e6), next(1e-300, 1e300)], [3, u64::MAX]);
    }

    #[test]
    fn divergence_rule_by_hand() {
        let rule = Rule::Divergence(parameter(0.05));
        assert_eq!(rule.first(), 10);
        let after =
            |h, change, steps| rule.next(h, &Agreed { measured: [change, steps], ..UNKNOWN });
        let next = |h: u64, change| after(h, change, h as f64);
        // Twice the target: half of H. Four thirds of it: 7.5, rounded down.
        assert_eq!([next(10, 0.1), next(10, 0.2 / 3.0)], [5, 7]);
        // Between half the target and the target: kept. Under half: one step more at a time.
        assert_eq!([next(10, 0.05), next(10, 0.0251), next(10, 0.0249)], [10, 10, 11]);
        assert_eq!([next(3, 1e300), next(u64::MAX, 1e-9)], [1, u64::MAX]);
        assert_eq!([next(17, 0.0), after(17, 0.2, 0.0)], [17, 17], "nothing is known");
        // The change of a round of 100 steps is known when H is 50 already, as it should be.
        assert_eq!([after(50, 0.1, 100.0), after(60, 0.1, 100.0)], [50, 50]);
        // And one of a longer round is none of this one: H does not grow.
        assert_eq!(after(10, 0.06, 40.0), 10);
    }

    #[test]
    fn parameters_are_positive_numbers() {
        for value in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(Parameter::new(value), None, "{value}");
        }
    }
}
