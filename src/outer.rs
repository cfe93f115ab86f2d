//! Outer optimizers: the step that all ranks make from their mean. Pure data; the formulas are in
//! `kernels/stage.h`.

mod parse;

use std::fmt;

pub use parse::ParseOuterError;

use crate::abi::{PaOuter, PA_OUTER_ADAM, PA_OUTER_MOMENTUM};

/// The outer optimizer of Local SGD: makes a step from the mean w̄ of all ranks' parameters.
///
/// It keeps the outer parameters θ, the result of the last average, and takes Δ = θ − w̄ as the
/// gradient. Every rank makes the step for its own n-th part of the parameters, so the state takes
/// 8 bytes for each element of f32, f16 and bf16, divided by n. Adam takes 12, f64 twice as much,
/// and the ring 4 more for f16 and bf16. For models of f16 and bf16, θ is a master copy in f32. All
/// ranks get the same bits, unless they [keep a share](Self::keeping) of their own values. A failed
/// average changes no state, or that of all ranks that are left.
///
/// An average that gives the ranks the values to begin with makes no step: that of
/// [`build`](crate::Builder::build), [`broadcast`](crate::ParamAverager::broadcast), and the first
/// average after a recovery or a join. θ is then its result. All other averages make a step, also
/// averages by hand and those of a world of one rank. Where the docs of other items say that an
/// average gives the mean, it gives the result of the step.
///
/// The guide's page on [outer optimizers](crate::guide::outer) says which one to use when.
///
/// ```
/// use param_averager::{Communicator, Device, LocalSgd, Outer, ParamAverager, Schedule};
///
/// Communicator::run(&[Device::cpu(), Device::cpu()], |communicator| {
///     let mut model = vec![0.0f32; 1000];
///     let builder = ParamAverager::builder(communicator).outer(Outer::diloco());
///     let mut sgd = LocalSgd::new(builder.build(&mut model)?, Schedule::every(2));
///     for _ in 0..2 {
///         model.iter_mut().for_each(|weight| *weight -= 1.0); // an inner step
///         sgd.step(&mut model)?;
///     }
///     // Δ = 2, v = 2: θ = 0 − 0.7 · (2 + 0.9 · 2)
///     assert!(model.iter().all(|weight| (weight + 2.66).abs() < 1e-6));
///     Ok::<_, param_averager::Error>(())
/// })?;
/// # Ok::<(), param_averager::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outer {
    rule: Rule,
    /// Share of its own values that a rank keeps.
    keeps: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    Mean,
    Momentum { lr: f64, mu: f64, nesterov: bool },
    Adam { lr: f64, betas: (f64, f64), tau: f64 },
}

impl Outer {
    const fn of(rule: Rule) -> Outer {
        Outer { rule, keeps: 0.0 }
    }

    /// No outer optimizer, the default: the mean is the result, as in Local SGD and FedAvg.
    pub const fn mean() -> Outer {
        Outer::of(Rule::Mean)
    }

    /// θ ← θ − lr · Δ. With `lr` 1 it is the mean, but for roundings.
    pub const fn sgd(lr: f64) -> Outer {
        Outer::of(Rule::Momentum { lr, mu: 0.0, nesterov: false })
    }

    /// v ← μ · v + Δ, θ ← θ − lr · v: `torch.optim.SGD` with momentum, and FedAvgM (Hsu et al.,
    /// 2019, "Measuring the effects of non-identical data distribution for federated visual
    /// classification").
    pub const fn momentum(lr: f64, mu: f64) -> Outer {
        Outer::of(Rule::Momentum { lr, mu, nesterov: false })
    }

    /// v ← μ · v + Δ, θ ← θ − lr · (Δ + μ · v): `torch.optim.SGD` with Nesterov's momentum, the
    /// outer optimizer of DiLoCo (Douillard et al., 2023, arXiv 2311.08105).
    pub const fn nesterov(lr: f64, mu: f64) -> Outer {
        Outer::of(Rule::Momentum { lr, mu, nesterov: true })
    }

    /// Slow momentum (Wang et al., 2019, "SlowMo", arXiv 1910.00643): u ← β · u + Δ / γ,
    /// θ ← θ − α · γ · u. The learning rate γ of the inner optimizer cancels out where it is
    /// constant, and is assumed to be constant here: [`momentum(alpha, beta)`](Self::momentum).
    pub const fn slow_momentum(alpha: f64, beta: f64) -> Outer {
        Outer::momentum(alpha, beta)
    }

    /// FedAdam (Reddi et al., 2020, "Adaptive federated optimization", arXiv 2003.00295):
    /// m ← β₁ · m + (1 − β₁) · Δ, s ← β₂ · s + (1 − β₂) · Δ², θ ← θ − lr · m / (√s + τ), without
    /// correction of the bias. Both moments begin at 0.
    pub const fn adam(lr: f64, beta1: f64, beta2: f64, tau: f64) -> Outer {
        Outer::of(Rule::Adam { lr, betas: (beta1, beta2), tau })
    }

    /// Elastic averaging (Zhang et al., 2015, "EASGD", arXiv 1412.6651): each rank moves towards
    /// the mean by the share `alpha` of its distance, w ← (1 − α) · w + α · w̄.
    pub const fn ease(alpha: f64) -> Outer {
        Outer::sgd(1.0).keeping(1.0 - alpha)
    }

    /// The outer optimizer of DiLoCo: `nesterov(0.7, 0.9)`.
    pub const fn diloco() -> Outer {
        Outer::nesterov(0.7, 0.9)
    }

    /// The default of MaxText's DiLoCo: `nesterov(0.3, 0.9)`.
    pub const fn maxtext() -> Outer {
        Outer::nesterov(0.3, 0.9)
    }

    /// The outer optimizer of MuLoCo, with Muon inside: `nesterov(0.9, 0.8)`.
    pub const fn muloco() -> Outer {
        Outer::nesterov(0.9, 0.8)
    }

    /// The default of torchdistx's SlowMo: `slow_momentum(1.0, 0.5)`.
    pub const fn slowmo() -> Outer {
        Outer::slow_momentum(1.0, 0.5)
    }

    /// Partial mixing: each rank keeps the share `alpha` of its own values,
    /// w ← α · w + (1 − α) · θ; α as torchft and MaxText count it. The ranks' values then differ
    /// after an average. [`LocalSgd::sync`](crate::LocalSgd::sync) and `finish` make an outer step
    /// that mixes nothing, also without an inner step since the last average, so that all ranks
    /// have θ. [`LocalSgd::done`](crate::LocalSgd::done) is refused. When a process joins, all
    /// ranks get the mean. Default: 0.
    pub const fn keeping(mut self, alpha: f64) -> Outer {
        self.keeps = alpha;
        self
    }

    /// True if the mean itself is the result.
    pub(crate) fn is_mean(&self) -> bool {
        self.rule == Rule::Mean && self.keeps == 0.0
    }

    /// True if ranks keep a part of their own values.
    pub(crate) fn mixes(&self) -> bool {
        self.keeps != 0.0
    }

    /// Arrays of state besides θ.
    pub(crate) fn slots(&self) -> usize {
        match self.rule {
            Rule::Mean | Rule::Momentum { .. } => 1,
            Rule::Adam { .. } => 2,
        }
    }

    /// The reason why its numbers can't be used: what was found, and what is expected.
    pub(crate) fn refusal(&self) -> Option<(String, &'static str)> {
        let is_share = |share: f64| (0.0..1.0).contains(&share);
        // In f32, too, the type of most sums.
        let is_rate = |lr: f64| (lr as f32).is_finite() && lr as f32 > 0.0;
        let expected = match self.rule {
            Rule::Momentum { lr, .. } | Rule::Adam { lr, .. } if !is_rate(lr) => {
                "a finite learning rate above 0"
            }
            Rule::Momentum { mu, .. } if !is_share(mu) => "a momentum from 0 to less than 1",
            Rule::Adam { betas, .. } if !is_share(betas.0) || !is_share(betas.1) => {
                "betas from 0 to less than 1"
            }
            Rule::Adam { tau, .. } if !is_rate(tau) => "a finite tau above 0",
            _ if !is_share(self.keeps) => "a share of own values from 0 to less than 1",
            _ => return None,
        };
        Some((self.to_string(), expected))
    }

    pub(crate) fn coefficients(&self) -> PaOuter {
        let mix = 1.0 - self.keeps;
        match self.rule {
            Rule::Mean => Outer::sgd(1.0).keeping(self.keeps).coefficients(),
            Rule::Momentum { lr, mu, nesterov } => {
                let (a, b) = if nesterov { (1.0, mu) } else { (0.0, 1.0) };
                let kind = PA_OUTER_MOMENTUM;
                PaOuter { lr, a, b, mu, mix, kind, ..bytemuck::Zeroable::zeroed() }
            }
            Rule::Adam { lr, betas: (mu, beta2), tau } => {
                let kind = PA_OUTER_ADAM;
                PaOuter { lr, mu, beta2, tau, mix, kind, ..bytemuck::Zeroable::zeroed() }
            }
        }
    }
}

/// The mean.
impl Default for Outer {
    fn default() -> Outer {
        Outer::mean()
    }
}

/// The call that builds it: `nesterov(0.7, 0.9)`.
impl fmt::Display for Outer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rule {
            Rule::Mean => write!(f, "mean()")?,
            Rule::Momentum { lr, mu, nesterov: true } => write!(f, "nesterov({lr}, {mu})")?,
            Rule::Momentum { lr, mu: 0.0, .. } => write!(f, "sgd({lr})")?,
            Rule::Momentum { lr, mu, .. } => write!(f, "momentum({lr}, {mu})")?,
            Rule::Adam { lr, betas: (first, second), tau } => {
                write!(f, "adam({lr}, {first}, {second}, {tau})")?
            }
        }
        match self.keeps {
            0.0 => Ok(()),
            alpha => write!(f, ".keeping({alpha})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_no_optimizer_has_are_refused() {
        for outer in [Outer::mean(), Outer::diloco(), Outer::adam(0.1, 0.9, 0.99, 1e-9)] {
            assert_eq!(outer.refusal(), None);
            assert_eq!(outer.keeping(0.5).refusal(), None);
        }
        let nan = f64::NAN;
        for outer in [
            Outer::sgd(0.0),
            Outer::sgd(nan),
            Outer::nesterov(-0.7, 0.9),
            Outer::momentum(1.0, 1.0),
            Outer::momentum(1.0, nan),
            Outer::adam(0.1, 0.9, 1.0, 1e-9),
            Outer::adam(0.1, -0.1, 0.9, 1e-9),
            Outer::adam(0.1, 0.9, 0.99, 0.0),
            Outer::adam(0.1, 0.9, 0.99, 1e-50),
            Outer::sgd(1e39),
            Outer::ease(0.0),
            Outer::ease(1.5),
            Outer::mean().keeping(nan),
        ] {
            let (found, _) = outer.refusal().expect("refused");
            assert_eq!(found, outer.to_string());
        }
    }

    #[test]
    fn display_is_as_it_is_built() {
        assert_eq!(Outer::diloco().to_string(), "nesterov(0.7, 0.9)");
        assert_eq!(Outer::ease(0.25).to_string(), "sgd(1).keeping(0.75)");
        assert_eq!(Outer::slowmo().to_string(), "momentum(1, 0.5)");
    }
}
