//! What several tests share.
#![allow(dead_code)] // each test uses its own part

/// A test that can't run here says so, on one line that `.ci/run` counts.
pub fn skipped(test: &str, reason: &str) {
    use std::io::Write;
    // Not println: the test harness would capture it.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}
