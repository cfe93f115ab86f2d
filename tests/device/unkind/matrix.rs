//! The outcome of every case, as a file: `benches/record` keeps one of each way of averaging.

use std::io::Write;
use std::path::Path;

use super::case::Verdict;

/// Variable with the file to write, in the place of running tests.
pub const FILE: &str = "PA_UNKIND_MATRIX";
/// Variable with a part of the names of tests whose cases are run; all if it is not set.
const ONLY: &str = "PA_UNKIND_ONLY";

/// Runs all cases and writes a line for each: test, finding, scenario, mode, outcome.
pub fn write(file: &Path) {
    let only = std::env::var(ONLY).unwrap_or_default();
    let mut out = std::fs::File::create(file).unwrap();
    let mut counts = [0; 3];
    for (name, finding, cases) in super::all() {
        if !name.contains(&only) {
            continue;
        }
        writeln!(out, "\n{finding}: {name}").unwrap();
        for case in cases {
            let Some((verdict, _, took)) = case.run(&[]) else { continue };
            counts[match verdict {
                Verdict::Passes => 0,
                Verdict::Hangs(_) => 1,
                Verdict::Fails(_) => 2,
            }] += 1;
            let verdict: String = verdict.to_string().chars().take(170).collect();
            let (scenario, mode) = (&case.scenario, case.mode());
            writeln!(out, "  {scenario:40} {mode:40} {:5.1} s  {verdict}", took.as_secs_f64())
                .unwrap();
        }
    }
    let [passes, hangs, fails] = counts;
    writeln!(out, "\n{passes} pass, {hangs} hang, {fails} fail").unwrap();
}
