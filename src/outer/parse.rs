//! Outer optimizers as text, such as the value of a flag.

use std::fmt;
use std::str::FromStr;

use super::Outer;

/// Error of a text that is no [`Outer`] optimizer, or one with numbers that are refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseOuterError {
    found: String,
    expected: &'static str,
}

impl fmt::Display for ParseOuterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the outer optimizer is {}: {}", self.found, self.expected)
    }
}

impl std::error::Error for ParseOuterError {}

/// Optimizers, with the numbers that each takes.
const NAMES: &str = "use mean, sgd(lr), momentum(lr, mu), nesterov(lr, mu), \
    slow_momentum(alpha, beta), adam(lr, beta1, beta2, tau), ease(alpha), diloco, maxtext, muloco \
    or slowmo; .keeping(alpha) may follow";

/// A call of one of the functions of [`Outer`], as its `Display` writes it: `nesterov(0.7, 0.9)`,
/// `sgd(1).keeping(0.5)`. Functions without numbers need no parentheses: `diloco`.
impl FromStr for Outer {
    type Err = ParseOuterError;

    fn from_str(text: &str) -> Result<Outer, ParseOuterError> {
        let error = |expected| ParseOuterError { found: format!("{text:?}"), expected };
        let outer = parse(text).ok_or_else(|| error(NAMES))?;
        match outer.refusal() {
            Some((_, expected)) => Err(error(expected)),
            None => Ok(outer),
        }
    }
}

fn parse(text: &str) -> Option<Outer> {
    let (rule, keeping) = match text.split_once(".keeping") {
        Some((rule, numbers)) => (rule, Some(numbers)),
        None => (text, None),
    };
    let (name, rest) = rule.split_at(rule.find('(').unwrap_or(rule.len()));
    let numbers = if rest.is_empty() { vec![] } else { in_parentheses(rest)? };
    let outer = match (name.trim(), &numbers[..]) {
        ("mean", &[]) => Outer::mean(),
        ("sgd", &[lr]) => Outer::sgd(lr),
        ("momentum", &[lr, mu]) => Outer::momentum(lr, mu),
        ("nesterov", &[lr, mu]) => Outer::nesterov(lr, mu),
        ("slow_momentum", &[alpha, beta]) => Outer::slow_momentum(alpha, beta),
        ("adam", &[lr, beta1, beta2, tau]) => Outer::adam(lr, beta1, beta2, tau),
        ("ease", &[alpha]) => Outer::ease(alpha),
        ("diloco", &[]) => Outer::diloco(),
        ("maxtext", &[]) => Outer::maxtext(),
        ("muloco", &[]) => Outer::muloco(),
        ("slowmo", &[]) => Outer::slowmo(),
        _ => return None,
    };
    let Some(keeping) = keeping else { return Some(outer) };
    match &in_parentheses(keeping)?[..] {
        &[alpha] => Some(outer.keeping(alpha)),
        _ => None,
    }
}

/// Numbers of a text such as `(0.7, 0.9)`.
fn in_parentheses(text: &str) -> Option<Vec<f64>> {
    let inner = text.trim().strip_prefix('(')?.strip_suffix(')')?.trim();
    if inner.is_empty() {
        return Some(vec![]);
    }
    inner.split(',').map(|number| number.trim().parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_numbers_are_read() {
        for (text, outer) in [
            ("mean", Outer::mean()),
            (" mean() ", Outer::mean()),
            ("sgd(0.5)", Outer::sgd(0.5)),
            ("momentum( 1,.5 )", Outer::slowmo()),
            ("nesterov(0.7,0.9)", Outer::diloco()),
            ("slow_momentum(1, 0.5)", Outer::slowmo()),
            ("adam(0.1, 0.9, 0.99, 1e-9)", Outer::adam(0.1, 0.9, 0.99, 1e-9)),
            ("ease(0.5)", Outer::ease(0.5)),
            ("diloco.keeping(0.25)", Outer::diloco().keeping(0.25)),
            ("maxtext", Outer::maxtext()),
            ("muloco()", Outer::muloco()),
            ("slowmo", Outer::slowmo()),
        ] {
            assert_eq!(text.parse(), Ok(outer), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused_with_what_to_do() {
        for text in [
            "",
            "diloco(0.7)",
            "sgd",
            "sgd()",
            "sgd(1",
            "sgd 1",
            "sgd(1))",
            "sgd(1,)",
            "sgd(one)",
            "nesterov(0.7)",
            "nesterov(0.7 0.9)",
            "adam(0.1, 0.9, 0.99)",
            "diloco.keeping",
            "diloco.keeping()",
            "diloco.keeping(0.1, 0.2)",
            "diloco.keeping(0.1).keeping(0.1)",
            "DiLoCo",
        ] {
            let error = text.parse::<Outer>().expect_err(text).to_string();
            assert!(error.contains(&format!("{text:?}: use mean, sgd(lr)")), "{error}");
        }
        for (text, expected) in [
            ("sgd(0)", "a finite learning rate above 0"),
            ("nesterov(0.7, NaN)", "a momentum from 0 to less than 1"),
            ("ease(2)", "a share of own values from 0 to less than 1"),
        ] {
            let error = text.parse::<Outer>().expect_err(text).to_string();
            assert_eq!(error, format!("the outer optimizer is {text:?}: {expected}"));
        }
    }

    proptest! {
        #[test]
        fn display_is_read_as_what_it_was(
            lr in 1e-30f64..1e30, share in 0.0f64..1.0, other in 0.0f64..1.0, kind in 0usize..6,
            keeps in prop::option::of(0.0f64..1.0),
        ) {
            let outer = [
                Outer::mean(),
                Outer::sgd(lr),
                Outer::momentum(lr, share),
                Outer::nesterov(lr, share),
                Outer::adam(lr, share, other, lr),
                Outer::ease(1.0 - share),
            ][kind];
            let outer = keeps.map_or(outer, |alpha| outer.keeping(alpha));
            prop_assert_eq!(outer.to_string().parse(), Ok(outer));
        }
    }
}
