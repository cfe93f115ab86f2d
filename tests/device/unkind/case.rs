//! A case: a scenario in a process of its own, under a mode, and how it ended.

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use test_support::simulator::{not_here, on_own_driver, outcome, Setting};
use test_support::Ended;

use super::modes::{Mode, ENDS, OWN_NODE};

/// Time limit of a case. Those that hang end sooner, by a wedge.
const LIMIT: Duration = Duration::from_secs(300);

/// A scenario under a mode.
#[derive(Clone, Debug)]
pub struct Case {
    pub scenario: String,
    pub mode: Mode,
}

/// Cases of these scenarios under one mode.
pub fn cases<T: ToString>(scenarios: &[T], mode: Mode) -> Vec<Case> {
    scenarios.iter().map(|scenario| Case { scenario: scenario.to_string(), mode }).collect()
}

/// The end of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Passes,
    /// Waits for something that cannot come.
    Hangs(String),
    /// Ends with an error that it should not have.
    Fails(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Passes => f.write_str("passes"),
            Verdict::Hangs(reason) => write!(f, "hangs: {reason}"),
            Verdict::Fails(reason) => write!(f, "fails: {reason}"),
        }
    }
}

impl Verdict {
    fn new(ended: &Ended) -> Verdict {
        if ended.code == Some(0) {
            return Verdict::Passes;
        }
        let after = |mark: &str| {
            let mut lines = ended.said.lines().skip_while(|line| !line.contains(mark));
            lines.next().map(|line| (line.to_owned(), lines.next().unwrap_or_default().to_owned()))
        };
        if let Some((_, held)) = after("WEDGE:") {
            let held = held.split("held:").last().unwrap_or_default();
            return Verdict::Hangs(held.trim().to_owned());
        }
        if let Some((killed, _)) = after("killed: it took longer") {
            return Verdict::Hangs(killed);
        }
        match after("panicked at") {
            Some((_, reason)) if !reason.trim().is_empty() => {
                Verdict::Fails(reason.trim().to_owned())
            }
            _ => Verdict::Fails(format!("{:?}: {}", ended.code, ended.said.trim())),
        }
    }
}

impl Case {
    /// The mode in words of the simulator.
    pub fn mode(&self) -> String {
        let words: Vec<String> = self
            .mode
            .iter()
            .filter(|setting| **setting != OWN_NODE && setting.0 != "CUDASIM_DEVICES")
            .map(|(name, value)| format!("{}={value}", name.trim_start_matches("CUDASIM_")))
            .collect();
        if words.is_empty() {
            "none".to_owned()
        } else {
            words.join(" ")
        }
    }

    /// Runs the case, and returns how it ended, with what it said and how long it took. `None`
    /// where a machine's own driver has no use for it.
    pub fn run(&self, more: &[Setting<'_>]) -> Option<(Verdict, Ended, Duration)> {
        let is_simulated = self.mode.iter().all(|(name, _)| name.starts_with("CUDASIM_"));
        if on_own_driver() && is_simulated && !self.scenario.starts_with("threads ") {
            not_here(&format!("{}: about a mode of the simulator", self.scenario));
            return None; // other tests run it without the mode
        }
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let node = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("node-{}-{number}", std::process::id()));
        let own = node.to_str().expect("a path in UTF-8");
        let mut settings: Vec<Setting<'_>> = vec![("CUDASIM_DEVICES", self.devices())];
        settings.extend(ENDS);
        settings.extend(self.mode.iter().map(|&(name, value)| match (name, value) {
            OWN_NODE => (name, own),
            setting => setting,
        }));
        settings.extend(more);
        let start = Instant::now();
        let ended = outcome(&self.scenario, &settings, LIMIT);
        let _ = std::fs::remove_file(&node);
        ended.map(|ended| (Verdict::new(&ended), ended, start.elapsed()))
    }

    /// Number of devices of the scenario: the highest ordinal in its list, or that of the scenarios
    /// of `cuda`.
    fn devices(&self) -> &'static str {
        let list = self.scenario.split(' ').find(|word| word.contains(','));
        let highest = list.and_then(|list| list.split(',').max());
        match (self.scenario.as_str(), highest) {
            ("links", _) => "4",
            ("graphs-devices", _) => "3",
            (name, None) if name.contains("devices") => "2",
            (name, None) if name.starts_with("link") || name.starts_with("stage") => "2",
            (_, Some("0") | None) => "1",
            (_, Some("1")) => "2",
            _ => "4",
        }
    }
}

/// Asserts that all cases pass; runs all of them first.
pub fn check(cases: &[Case]) {
    let mut bad = vec![];
    for case in cases {
        match case.run(&[]) {
            None | Some((Verdict::Passes, ..)) => {}
            Some((verdict, ended, took)) => bad.push(format!(
                "{} under {} {verdict} ({:.1} s)\n{}",
                case.scenario,
                case.mode(),
                took.as_secs_f64(),
                ended.said
            )),
        }
    }
    assert!(bad.is_empty(), "{} of {} cases:\n{}", bad.len(), cases.len(), bad.join("\n"));
}

/// Asserts that each case hangs or fails by the former way of averages, a mutant of the engine: a
/// mode that stops nothing would show nothing.
pub fn check_former(cases: &[Case]) {
    if on_own_driver() {
        return not_here("the former way: about modes of the simulator");
    }
    let passes = |case: &&Case| {
        let ended = case.run(&[("PA_FORMER_WAY", "1")]);
        matches!(ended, Some((Verdict::Passes, ..)))
    };
    let good: Vec<&Case> = cases.iter().filter(passes).collect();
    assert!(good.is_empty(), "the former way passes: {good:#?}");
}
