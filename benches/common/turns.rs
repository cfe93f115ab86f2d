//! Two kinds of averages that take turns, and a line about them.

use std::fmt;
use std::time::Duration;

use crate::ranks::Ranks;

const TURNS: usize = 41;
const TURN: Duration = Duration::from_millis(30);

/// Medians of the times, in microseconds, and quartiles of the ratios of neighbouring turns.
pub struct Turns {
    times: [f64; 2],
    ratios: [f64; 3],
}

impl Turns {
    /// Names of the columns.
    pub const HEAD: &'static str = "without, us  with, us  ratio  quarters";

    /// Measures both. A test makes one turn of each.
    pub fn measure(without: &Ranks, with: &Ranks, is_test: bool) -> Turns {
        let once = without.time(1).max(with.time(1)).max(Duration::from_nanos(1));
        let count = (TURN.as_nanos() / once.as_nanos()).clamp(1, 100_000) as u64;
        let count = if is_test { 1 } else { count };
        let per = |ranks: &Ranks| ranks.time(count).as_secs_f64() / count as f64;
        let turns: Vec<(f64, f64)> =
            (0..if is_test { 1 } else { TURNS }).map(|_| (per(without), per(with))).collect();
        let at = |of: fn(&(f64, f64)) -> f64, at: f64| {
            let mut all: Vec<f64> = turns.iter().map(of).collect();
            all.sort_by(f64::total_cmp);
            all[((all.len() - 1) as f64 * at) as usize]
        };
        Turns {
            times: [1e6 * at(|turn| turn.0, 0.5), 1e6 * at(|turn| turn.1, 0.5)],
            ratios: [0.5, 0.25, 0.75].map(|part| at(|turn| turn.1 / turn.0, part)),
        }
    }
}

impl fmt::Display for Turns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([without, with], [middle, low, high]) = (self.times, self.ratios);
        write!(f, "{without:>11.1}  {with:>8.1}  {middle:>5.3}  {low:.3} to {high:.3}")
    }
}
