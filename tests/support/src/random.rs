//! Reproducible numbers, and how many cases a test takes.

use std::cell::Cell;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n
    }

    /// A number between -1 and 1, of many magnitudes.
    pub fn value(&mut self) -> f64 {
        let unit = self.next_u64() as i64 as f64 / i64::MAX as f64;
        unit * 0.5f64.powi(self.below(8) as i32)
    }
}

/// Scale of the tests, `PA_TEST_SCALE`. Not set: little. `full`: the counts of CI. A number: so
/// many times that.
fn scale() -> Option<usize> {
    match std::env::var("PA_TEST_SCALE").ok()?.as_str() {
        "" => None,
        "full" => Some(1),
        number => Some(number.parse().expect("PA_TEST_SCALE is `full` or a whole number")),
    }
}

/// Cases of a test: `small`, or what `PA_TEST_SCALE` makes of `full`.
pub fn count(small: usize, full: usize) -> usize {
    scale().map_or(small, |times| times * full)
}

/// Skips unless `PA_TEST_SCALE` is set: the tests of the stress tier.
pub fn stress() -> crate::Skip {
    scale().is_none().then(|| "stress, run with PA_TEST_SCALE=full".to_owned())
}

thread_local! {
    static SEED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// `PA_TEST_SEED`, or another seed each time, which the harness prints if the test fails.
pub fn seed() -> u64 {
    let seed = std::env::var("PA_TEST_SEED")
        .map_or_else(|_| u64::from(std::process::id()), |seed| seed.parse().expect("a number"));
    SEED.set(Some(seed));
    seed
}

pub(crate) fn forget_seed() {
    SEED.set(None);
}

/// The seed of the test that runs on this thread.
pub(crate) fn seed_of_this_thread() -> Option<u64> {
    SEED.take()
}
