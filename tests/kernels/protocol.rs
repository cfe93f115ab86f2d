//! The kernels' protocol under sanitizers, as C++: worlds of ranks as threads, in averages that
//! succeed and that fail (protocol/harness.cpp). Mutants: each synchronisation is taken out of a
//! copy of kernels/ once, and a check must notice (protocol/mutants.txt).

mod harness;
pub mod mutants;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use test_support::partly;

pub use harness::tools;
use harness::{best_vectors, build, run, unfit, Flavour, How, Vectors};
use mutants::Mutant;

/// Runs two jobs at a time: the harness itself has many threads.
fn two_at_a_time<T: Send, R: Send>(items: Vec<T>, job: impl Fn(T) -> R + Sync) -> Vec<R> {
    let queue = Mutex::new(items.into_iter().enumerate());
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| loop {
                let Some((index, item)) = queue.lock().expect("the queue").next() else { return };
                let result = job(item);
                results.lock().expect("the results").push((index, result));
            });
        }
    });
    let mut results = results.into_inner().expect("the results");
    results.sort_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, result)| result).collect()
}
/// Lock by which one test runs at a time, for the same reason.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn every_scenario_is_clean_in_every_build() {
    let _alone = alone();
    let mut flavours = vec![Flavour::Lanes, Flavour::Tsan];
    flavours.extend([Vectors::Avx512, Vectors::Avx2, Vectors::Baseline].map(Flavour::Asan));
    flavours.push(Flavour::Plain(best_vectors()));
    let failures = two_at_a_time(flavours, |flavour| {
        let test = format!("protocol under {}", flavour.name());
        if !flavour.here() {
            partly("this CPU lacks an instruction set");
            return None;
        }
        let program = match build(flavour, None) {
            Ok(program) => program,
            Err(reason) => {
                partly(&reason);
                return None;
            }
        };
        let start = Instant::now();
        let (how, text) = run(flavour, &program, &["all"]);
        if unfit(&text) {
            partly("ThreadSanitizer does not know this memory layout, and no setarch -R");
            return None;
        }
        println!("{test}: {how:?} after {:.1?}\n{text}", start.elapsed());
        (how != How::Good).then(|| format!("{test}: {how}\n{text}"))
    });
    let failures: Vec<_> = failures.into_iter().flatten().collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// True if a run of a mutant ended as mutants.txt says. The consequences of a race may show before
/// the sanitizer reports the race.
fn allows(mutant: &Mutant, how: &How) -> bool {
    let consequence = matches!(how, How::Wrong(_) | How::Crash(_));
    mutant.expected.iter().any(|word| word == how.word() || word == "race" && consequence)
}

/// The table, with the flavour that each mutant is built in.
fn mutants_and_flavours(vectors: Vectors) -> Vec<(Mutant, Flavour)> {
    let flavour = |mutant: &Mutant| match mutant.flavour.as_str() {
        "tsan" => Flavour::Tsan,
        "lanes" => Flavour::Lanes,
        "asan" => Flavour::Asan(vectors),
        "plain" => Flavour::Plain(vectors),
        other => panic!("mutants.txt, mutant {}: no flavour {other}", mutant.number),
    };
    mutants::table()
        .into_iter()
        .map(|mutant| {
            let flavour = flavour(&mutant);
            (mutant, flavour)
        })
        .collect()
}

pub fn every_mutant_is_caught() {
    let _alone = alone();
    let vectors = if Vectors::Avx2.here() { Vectors::Avx2 } else { Vectors::Baseline };
    let flavours =
        vec![Flavour::Lanes, Flavour::Tsan, Flavour::Asan(vectors), Flavour::Plain(vectors)];
    let kernels = Path::new(env!("CARGO_TARGET_TMPDIR")).join("protocol-mutants-kernels");
    mutants::write(&mutants::weave(&mutants::table(), &mutants::kernels()), &kernels);
    let built = two_at_a_time(flavours.clone(), |flavour| build(flavour, Some(&kernels)));
    let program = |flavour: Flavour| {
        &built[flavours.iter().position(|&f| f == flavour).expect("a flavour that was built")]
    };

    // A check that catches a mutant must pass on the original.
    let mut mutants = mutants_and_flavours(vectors);
    let mut checks: Vec<(Flavour, &str)> = Vec::new();
    for (mutant, flavour) in &mutants {
        if !checks.contains(&(*flavour, &mutant.scenario)) {
            checks.push((*flavour, &mutant.scenario));
        }
    }
    let mut failures = Vec::new();
    let mut missing = Vec::new();
    for (flavour, result) in flavours.iter().zip(&built) {
        if let Err(reason) = result {
            missing.push((*flavour, reason.clone()));
        }
    }
    let originals = two_at_a_time(checks, |(flavour, scenario)| {
        let program = program(flavour).as_ref().ok()?;
        Some((flavour, scenario.to_owned(), run(flavour, program, &[scenario, "--mutant", "0"])))
    });
    for (flavour, scenario, (how, text)) in originals.into_iter().flatten() {
        if unfit(&text) {
            missing.push((flavour, "ThreadSanitizer does not know this memory layout".to_owned()));
        } else if how != How::Good {
            failures.push(format!(
                "{scenario} under {} without any mutant: {how}\n{text}",
                flavour.name()
            ));
        }
    }

    mutants.retain(|(_, flavour)| {
        let Some((_, reason)) = missing.iter().find(|(missing, _)| missing == flavour) else {
            return true;
        };
        partly(reason);
        false
    });
    // Past the whole packs there is something only for vectors of several packs, and alignment
    // matters on x86 alone.
    if vectors == Vectors::Baseline {
        mutants.retain(|(mutant, _)| {
            let needs_vectors = [41, 52].contains(&mutant.number);
            if needs_vectors {
                partly("this CPU lacks AVX2");
            }
            !needs_vectors
        });
    }
    // Mutants that hang run first: they take longest.
    mutants.sort_by_key(|(mutant, _)| !mutant.expected.iter().any(|word| word == "hang"));
    let mut rows = two_at_a_time(mutants, |(mutant, flavour)| {
        // A race that has to be met may take several runs.
        const ATTEMPTS: u32 = 8;
        let program = program(flavour).as_ref().expect("flavours that are missing were taken out");
        let number = mutant.number.to_string();
        let mut how = How::Good;
        let mut attempts = 0;
        let again = |limit| {
            run(flavour, program, &[&mutant.scenario, "--mutant", &number, "--limit", limit]).0
        };
        while how == How::Good && attempts < ATTEMPTS {
            how = again(LIMIT);
            attempts += 1;
        }
        if how == How::Hang && !allows(&mutant, &how) {
            (how, attempts) = (again(LONG_LIMIT), attempts + 1); // it was slow, perhaps
        }
        (mutant, flavour, how, attempts)
    });
    rows.sort_by_key(|(mutant, ..)| mutant.number);
    for (mutant, flavour, how, attempts) in rows {
        let again = if attempts > 1 { format!(" (run {attempts})") } else { String::new() };
        let by = format!("{} {}", flavour.name(), mutant.scenario);
        println!("{:>3}  {:<88}  {by:<24}  {how}{again}", mutant.number, mutant.what);
        if !allows(&mutant, &how) {
            failures
                .push(format!("mutant {}, {}: caught by {by}: {how}", mutant.number, mutant.what));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
/// Seconds after which a mutant hangs. An unbroken scenario takes a third of it on two cores.
const LIMIT: &str = "15";
/// The same for a mutant that should not hang, on a busy machine.
const LONG_LIMIT: &str = "120";

pub fn mutants_fit_the_kernels() {
    let (mutants, kernels) = (mutants::table(), mutants::kernels());
    let numbers: Vec<u32> = mutants.iter().map(|mutant| mutant.number).collect();
    assert_eq!(
        numbers,
        (1..=mutants.len() as u32).collect::<Vec<_>>(),
        "the numbers of mutants.txt"
    );
    let problems = mutants::problems(&mutants, &kernels);
    assert!(problems.is_empty(), "mutants.txt does not fit kernels/:\n{}", problems.join("\n"));
    for (name, text) in &kernels {
        assert!(!text.to_lowercase().contains("mutant"), "kernels/{name} speaks of mutants");
    }
}

/// The sources that hold all mutants, in seconds, where `every_mutant_is_caught` takes minutes.
pub fn mutants_compile() {
    let kernels = Path::new(env!("CARGO_TARGET_TMPDIR")).join("protocol-mutants-syntax");
    mutants::write(&mutants::weave(&mutants::table(), &mutants::kernels()), &kernels);
    harness::check_mutants(&kernels).unwrap_or_else(|error| panic!("{error}"));
}

pub fn mutants_that_do_not_fit_are_named() {
    let text = "f(x);\n  g(x);\ng(y);\nreturn x + y;\nsync(); // of lanes\n";
    let sources = mutants::Sources::from([("a.h".into(), text.into())]);
    let problems = |edits: &str| {
        mutants::problems(
            &mutants::parse(&format!("7 tsan ring race\n    what the seventh\n{edits}")),
            &sources,
        )
    };
    let one = |edits: &str, contents: &[&str]| {
        let [problem] = &problems(edits)[..] else { panic!("{edits}: {:?}", problems(edits)) };
        assert!(contents.iter().all(|part| problem.contains(part)), "{edits}: {problem}");
    };
    one("    in a.h\n    - h(x);\n", &["mutant 7, the seventh", "a.h", "0 times", "h(x);"]);
    one("    in b.h\n    - f(x);\n", &["mutant 7, the seventh", "b.h", "0 times"]);
    one("    in a.h\n    - g(\n", &["mutant 7, the seventh", "2 times"]);
    // White space does not count, and letters do.
    assert_eq!(problems("    in a.h\n    - f(x);\n    - g( x );\n"), [""; 0]);
    one("    in a.h\n    - f(x);\n    - g(z);\n", &["0 times"]);
    let other = "8 tsan ring race\n    what the eighth\n    in a.h\n";
    one(
        &format!("    in a.h\n    - x + y\n{other}    - + y\n"),
        &["mutants 7 and 8, the eighth", "a.h"],
    );
    one("    in a.h\n    - sync(); // of lanes\n", &["mutant 7, the seventh", "comment in a.h"]);
    assert_eq!(problems("    in a.h\n    - «sync();» // of lanes\n"), [""; 0]);
    // its own, twice
    one("    in a.h\n    - x + y\n    in a.h\n    - x + y\n", &["mutants 7 and 7"]);
    assert_eq!(problems(&format!("    in a.h\n    - x + y\n{other}    - x + y\n")), [""; 0]);
    assert_eq!(problems(&format!("    in a.h\n    - «x» + y\n{other}    - x + «y»\n")), [""; 0]);
}

pub fn mutants_are_woven_as_expressions_and_statements() {
    let sources = mutants::Sources::from([
        ("a.h".into(), "f(x);\n  g(x);\nreturn x + y;\n".into()),
        ("b.h".into(), "f(x);\n".into()),
    ]);
    let table = "1 tsan ring race
    what one
    in a.h
    - f(x);
    - «g(x);»
    + h();
    + i();
2 tsan ring race
    what two
    in a.h
    - return «x + y»
    + x
    in a.h
    - g(x);
3 tsan ring race
    what three
    in b.h
    - f(x);
";
    let mutants = mutants::parse(table);
    let woven = mutants::weave(&mutants, &sources);
    assert_eq!(
        woven["a.h"],
        "f(x);\n  { if (chosen_mutant == 1) { h();\ni(); } else if (chosen_mutant == 2) {  } else \
         { g(x); } }\n\
         return (chosen_mutant == 2 ? (x) : (x + y));\n"
    );
    assert_eq!(woven["b.h"], "{ if (chosen_mutant == 3) {  } else { f(x); } }\n");
    let applied = mutants[1].apply(&sources);
    assert_eq!((&*applied["a.h"], &*applied["b.h"]), ("f(x);\n  \nreturn x;\n", "f(x);\n"));
}
