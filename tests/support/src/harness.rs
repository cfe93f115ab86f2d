//! Harness of the test programs with `harness = false`: tests that can't run here, or that belong
//! to another tier, count as ignored, and the last line says why and what would enable them.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::catch_unwind;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use libtest_mimic::{Arguments, Failed, Trial};

/// Reason why a test is ignored, with what would enable it. `None`: it runs.
pub type Skip = Option<String>;

/// A test of a program with `harness = false`; see [`tests!`](crate::tests).
pub struct Test {
    name: String,
    run: fn(),
    skip: Skip,
}

impl Test {
    /// `path`: the function's path, which becomes the test's name.
    pub fn new(path: &str, run: fn()) -> Test {
        Test { name: path.split_whitespace().collect(), run, skip: None }
    }

    /// Ignores the test for this reason, if it is one and there is no other yet.
    #[must_use]
    pub fn unless(mut self, skip: &Skip) -> Test {
        self.skip = self.skip.or_else(|| skip.clone());
        self
    }
}

/// A `Vec<Test>` of functions, each with the [`Skip`]s that apply to it: `tests![module::function,
/// module::other: stress & strace]`.
#[macro_export]
macro_rules! tests {
    ($($test:path $(: $($skip:ident)&+)?),* $(,)?) => {
        vec![$($crate::Test::new(stringify!($test), $test)$($(.unless(&$skip))+)?),*]
    };
}

/// Reasons why parts of tests did not run, with how many parts.
fn parts() -> MutexGuard<'static, BTreeMap<String, usize>> {
    static PARTS: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());
    PARTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes that a part of a test can't run here. The last line says so.
pub fn partly(reason: &str) {
    *parts().entry(reason.to_owned()).or_default() += 1;
}

static SAYS_MORE: AtomicBool = AtomicBool::new(false);

/// True if what a test has seen is to be printed though it passes: with `--nocapture`, and where
/// `PA_TEST_SCALE` asks for more than a little.
pub fn says_more() -> bool {
    SAYS_MORE.load(Ordering::Relaxed)
}

/// `println!` of what a test has seen, such as a time, for a reader of the log.
#[macro_export]
macro_rules! note {
    ($($argument:tt)*) => { if $crate::says_more() { println!($($argument)*) } };
}

/// Runs the tests that the command line asks for. The program's exit code is to be returned from
/// `main`.
pub fn main(tests: Vec<Test>) -> ExitCode {
    run(Arguments::from_args(), tests)
}

/// [`main`] with this many tests at a time, if the command line does not say how many.
pub fn main_with_threads(threads: usize, tests: Vec<Test>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(threads);
    run(arguments, tests)
}

fn run(arguments: Arguments, tests: Vec<Test>) -> ExitCode {
    SAYS_MORE.store(arguments.nocapture || crate::stress().is_none(), Ordering::Relaxed);
    let mut skipped = BTreeMap::<String, usize>::new();
    for test in tests.iter().filter(|test| is_asked_for(&arguments, &test.name)) {
        if let Some(reason) = &test.skip {
            *skipped.entry(reason.clone()).or_default() += 1;
        }
    }
    let runs_ignored = arguments.ignored || arguments.include_ignored;
    let trial = |test: Test| {
        let run = move || {
            crate::random::forget_seed(); // of the test before it on this thread
            catch_unwind(test.run).map_err(|panic| {
                let seed = crate::random::seed_of_this_thread();
                let seed = seed.map_or(String::new(), |seed| format!(", with PA_TEST_SEED={seed}"));
                Failed::from(format!("panicked{seed}: {}", message(&*panic)))
            })
        };
        Trial::test(test.name, run).with_ignored_flag(test.skip.is_some())
    };
    let conclusion = libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect());
    if !arguments.list {
        if runs_ignored {
            skipped.clear();
        }
        if let Some(line) = last_line(&skipped, &parts()) {
            println!("{line}\n");
        }
    }
    conclusion.exit_code()
}

fn message(panic: &dyn Any) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message")
}

/// True if the command line selects the test, by the rule of libtest-mimic: filters are parts of
/// names, or with `--exact` whole names.
fn is_asked_for(arguments: &Arguments, name: &str) -> bool {
    let matches = |filter: &str| match arguments.exact {
        true => name == filter,
        false => name.contains(filter),
    };
    let is_in = arguments.filter.as_deref().is_none_or(matches);
    is_in && !arguments.skip.iter().any(|filter| matches(filter))
}

/// Line about skipped tests, which `.ci/run` looks for; none if nothing was skipped.
fn last_line(skipped: &BTreeMap<String, usize>, parts: &BTreeMap<String, usize>) -> Option<String> {
    let of = |reasons: &BTreeMap<String, usize>, what: &str| -> Vec<String> {
        let line = |(reason, count): (&String, &usize)| {
            format!("{count} {what}{}: {reason}", if *count == 1 { "" } else { "s" })
        };
        reasons.iter().map(line).collect()
    };
    let all = [of(skipped, "test"), of(parts, "part")].concat();
    (!all.is_empty()).then(|| format!("skipped: {}", all.join("; ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Arguments {
        Arguments::from_iter(["program"].into_iter().chain(line.split_whitespace()))
    }

    #[test]
    fn skips_are_one_line_with_the_reasons() {
        let skipped = BTreeMap::from([("no spin: install it".to_owned(), 2)]);
        let parts = BTreeMap::from([("no AVX2".to_owned(), 1)]);
        assert_eq!(
            last_line(&skipped, &parts).unwrap(),
            "skipped: 2 tests: no spin: install it; 1 part: no AVX2"
        );
        assert_eq!(last_line(&BTreeMap::new(), &BTreeMap::new()), None);
    }

    #[test]
    fn filters_are_those_of_libtest() {
        assert!(is_asked_for(&arguments("two"), "one::two"));
        assert!(!is_asked_for(&arguments("--exact two"), "one::two"));
        assert!(!is_asked_for(&arguments("one --skip two"), "one::two"));
        assert!(is_asked_for(&arguments(""), "one::two"));
    }

    #[test]
    fn the_first_reason_counts() {
        let (none, first, second) = (None, Some("a".to_owned()), Some("b".to_owned()));
        fn passes() {}
        let [test] = &crate::tests![passes: none & first & second][..] else { panic!() };
        assert_eq!((test.name.as_str(), test.skip.as_deref()), ("passes", Some("a")));
    }
}
