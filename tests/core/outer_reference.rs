//! Reference of the outer optimizers in f64: the formulas of the papers, with a bound on the error
//! of the kernels.

use std::ops::{Add, Div, Mul, Sub};

use param_averager::{Dtype, Outer};
use test_support::ulp;

/// Number, and a bound on how far the kernels' is from it. Each operation adds the error of its
/// operands, as calculus has it, and half an ulp of its result in the type of sums.
#[derive(Clone, Copy, Debug)]
pub struct Near {
    pub value: f64,
    pub error: f64,
    dtype: Dtype,
}

impl Near {
    pub fn new(value: f64, error: f64, dtype: Dtype) -> Near {
        Near { value, error, dtype }
    }

    /// A number of the optimizer, rounded to the type of sums.
    fn constant(self, value: f64) -> Near {
        Near::new(value, 0.0, self.dtype).rounded()
    }

    fn rounded(self) -> Near {
        // f64 rounds here as well as in the kernels; in f32, the 2^-29 of f64's rounding count.
        let (sums, times) = match self.dtype {
            Dtype::F64 => (Dtype::F64, 1.0),
            _ => (Dtype::F32, 0.5 + 1e-8),
        };
        let size = self.value.abs() + self.error;
        Near { error: self.error + times * ulp(sums, size), ..self }
    }

    fn root(self) -> Near {
        let (low, high) = ((self.value - self.error).max(0.0), self.value + self.error);
        let value = self.value.sqrt();
        let error = (value - low.sqrt()).max(high.sqrt() - value);
        Near { value, error, ..self }.rounded()
    }

    /// The number rounded to the tensors' dtype, which f32 and f64 are already.
    pub fn narrowed(self) -> Near {
        let half = match self.dtype.size() {
            2 => 0.5 * ulp(self.dtype, self.value.abs() + self.error),
            _ => 0.0,
        };
        Near { error: self.error + half, ..self }
    }

    /// `keeps` of a rank's own value, and the rest of this one.
    pub fn mixed_into(self, own: f64, keeps: f64) -> Near {
        let own = Near::new(own, 0.0, self.dtype);
        // The kernels have 1 - mix, in the type of sums, in the place of `keeps`.
        let mix = self.constant(1.0 - keeps);
        let kept = self.constant(1.0) - mix;
        own * kept + self * mix
    }

    pub fn allows(self, got: f64) -> bool {
        (got - self.value).abs() <= self.error
    }
}

impl Add for Near {
    type Output = Near;
    fn add(self, other: Near) -> Near {
        Near::new(self.value + other.value, self.error + other.error, self.dtype).rounded()
    }
}
impl Sub for Near {
    type Output = Near;
    fn sub(self, other: Near) -> Near {
        Near::new(self.value - other.value, self.error + other.error, self.dtype).rounded()
    }
}
impl Mul for Near {
    type Output = Near;
    fn mul(self, other: Near) -> Near {
        let error = self.value.abs() * other.error
            + other.value.abs() * self.error
            + self.error * other.error;
        Near::new(self.value * other.value, error, self.dtype).rounded()
    }
}
impl Div for Near {
    type Output = Near;
    fn div(self, other: Near) -> Near {
        let least = other.value.abs() - other.error;
        let value = self.value / other.value;
        let error = match least > 0.0 {
            true => (self.error + value.abs() * other.error) / least,
            false => f64::INFINITY,
        };
        Near::new(value, error, self.dtype).rounded()
    }
}

/// An outer optimizer with its numbers, in the order of `Outer`'s functions.
#[derive(Clone, Copy, Debug)]
pub enum Rule {
    Mean,
    Sgd(f64),
    Momentum(f64, f64),
    Nesterov(f64, f64),
    SlowMomentum(f64, f64),
    Adam(f64, f64, f64, f64),
}

impl Rule {
    pub fn outer(&self) -> Outer {
        match *self {
            Rule::Mean => Outer::mean(),
            Rule::Sgd(lr) => Outer::sgd(lr),
            Rule::Momentum(lr, mu) => Outer::momentum(lr, mu),
            Rule::Nesterov(lr, mu) => Outer::nesterov(lr, mu),
            Rule::SlowMomentum(alpha, beta) => Outer::slow_momentum(alpha, beta),
            Rule::Adam(lr, beta1, beta2, tau) => Outer::adam(lr, beta1, beta2, tau),
        }
    }
}

/// State of one element.
#[derive(Clone, Copy, Debug)]
pub struct State {
    pub anchor: Near,
    first: Near,
    second: Near,
}

impl State {
    pub fn new(anchor: f64, dtype: Dtype) -> State {
        let zero = Near::new(0.0, 0.0, dtype);
        State { anchor: Near::new(anchor, 0.0, dtype), first: zero, second: zero }
    }

    /// The step from this mean. Returns the new anchor.
    pub fn step(&mut self, rule: &Rule, mean: Near) -> Near {
        let number = |value| mean.constant(value);
        let delta = self.anchor - mean;
        let way = match *rule {
            // With a share to keep it is a step of SGD; without one, nothing but the mean.
            Rule::Mean => delta,
            Rule::Sgd(lr) => number(lr) * delta,
            Rule::Momentum(lr, mu) => {
                self.first = number(mu) * self.first + delta;
                number(lr) * self.first
            }
            Rule::Nesterov(lr, mu) => {
                self.first = number(mu) * self.first + delta;
                number(lr) * (delta + number(mu) * self.first)
            }
            Rule::SlowMomentum(alpha, beta) => {
                let gamma = number(0.125); // of the inner optimizer: it cancels out
                self.first = number(beta) * self.first + delta / gamma;
                number(alpha) * gamma * self.first
            }
            Rule::Adam(lr, beta1, beta2, tau) => {
                let rest = |beta| number(1.0) - number(beta);
                self.first = number(beta1) * self.first + rest(beta1) * delta;
                self.second = number(beta2) * self.second + rest(beta2) * (delta * delta);
                number(lr) * (self.first / (self.second.root() + number(tau)))
            }
        };
        self.anchor = self.anchor - way;
        self.anchor
    }
}
