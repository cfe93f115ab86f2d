//! The mailbox protocol as a model (protocol/ring.pml), explored in every interleaving by
//! spin: no deadlock, no chunk lost or doubled, no rank writes unless all have voted, all ranks
//! that end an average agree on its outcome. Also the turn lock (turn.pml) and departure
//! (leave.pml): a rank that has completed an average fails no peer, and a death during it ends
//! every wait. And the meeting before launches (meeting.pml): no rank launches what another one
//! gave up, none returns while a launch uses its tensors, every wait ends. Each planted fault is
//! found, so the models do look.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use test_support::{tool, Skip};

/// Models in `protocol`, each with the number of its faults.
const MODELS: [(&str, u32); 4] = [("ring", 15), ("turn", 8), ("leave", 6), ("meeting", 9)];

fn file(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/kernels/protocol")
        .join(model)
        .with_extension("pml")
}

/// A state space for spin to explore.
#[derive(Clone, Copy)]
struct World {
    model: &'static str,
    ranks: u32,
    /// No rank dies or gives up, so every rank must reach the end.
    healthy: bool,
    fault: u32,
}

/// Result of an exploration.
struct Found {
    states: String,
    /// The assertion that failed, or the deadlock.
    error: Option<String>,
}

fn c_compiler() -> String {
    std::env::var("CC").ok().filter(|name| !name.is_empty()).unwrap_or_else(|| "cc".into())
}

fn explore(world: World) -> Found {
    let name = format!("model-{}-{}-{}-{}", world.model, world.ranks, world.healthy, world.fault);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).expect("a folder for the model");
    let mut spin = Command::new("spin");
    spin.arg("-a").arg(format!("-DN={}", world.ranks)).arg(format!("-DFAULT={}", world.fault));
    spin.args(["-DROUNDS=2", "-DAVERAGES=2"]);
    if world.healthy {
        spin.arg("-DHEALTHY");
    }
    said(spin.arg(file(world.model)).current_dir(&folder));
    let mut compiler = Command::new(c_compiler());
    // A fault is found soon, often before an optimised search were compiled.
    compiler.arg(if world.fault == 0 { "-O2" } else { "-O0" });
    // SAFETY: invalid end states and assertions, no cycles. COLLAPSE: states in a third of the
    // memory.
    compiler.args(["-w", "-DSAFETY", "-DNOCLAIM", "-DCOLLAPSE", "-o", "pan", "pan.c"]);
    said(compiler.current_dir(&folder));
    let text = said(Command::new(folder.join("pan")).arg("-m200000").current_dir(&folder));
    assert!(
        text.contains("errors: ") && !text.contains("too small") && !text.contains("out of memory"),
        "{text}"
    );
    let states =
        text.lines().find(|line| line.contains("states, stored")).unwrap_or("").trim().to_owned();
    let error = text.lines().find_map(|line| line.strip_prefix("pan:1: ")).map(str::to_owned);
    assert_eq!(error.is_none(), text.contains("errors: 0"), "{text}");
    Found { states, error }
}

/// Runs a program to success, and returns its output.
fn said(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let text = [output.stdout, output.stderr]
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .concat();
    assert!(output.status.success(), "{command:?}\n{text}");
    text
}

/// Skips without spin or a C compiler.
pub fn tools() -> Skip {
    tool("spin", &["-V"]).or_else(|| tool(&c_compiler(), &["--version"]))
}

pub fn every_interleaving_is_good() {
    for (model, _) in MODELS {
        for (ranks, healthy) in [(2, true), (2, false), (3, true), (3, false)] {
            let found = explore(World { model, ranks, healthy, fault: 0 });
            let kind = if healthy { "no rank fails" } else { "ranks give up and die" };
            println!("{model}, {ranks} ranks, {kind}: {}", found.states);
            assert!(found.error.is_none(), "{model}, {ranks} ranks, {kind}: {:?}", found.error);
        }
    }
}

/// Number and description of each fault, from the model's own list.
fn faults(model: &str) -> Vec<(u32, String)> {
    let text = fs::read_to_string(file(model)).expect("the model");
    let fault = |line: &str| {
        let (_, rest) = line.strip_prefix("#define ")?.split_once("(FAULT == ")?;
        let (number, rest) = rest.split_once(')')?;
        let what = rest.trim().trim_start_matches("/*").trim_end_matches("*/").trim();
        Some((number.parse().ok()?, what.to_owned()))
    };
    text.lines().filter_map(fault).collect()
}

pub fn every_planted_fault_is_found() {
    for (model, count) in MODELS {
        let faults = faults(model);
        assert_eq!(
            faults.iter().map(|fault| fault.0).collect::<Vec<_>>(),
            (1..=count).collect::<Vec<_>>()
        );
        for (fault, what) in faults {
            // Three ranks: with two, neither can get far ahead of the other.
            let found = [false, true].into_iter().find_map(|healthy| {
                let error = explore(World { model, ranks: 3, healthy, fault }).error?;
                Some((if healthy { "no rank fails" } else { "ranks give up" }, error))
            });
            let Some((kind, error)) = found else {
                panic!("spin does not find fault {fault} of {model}: {what}")
            };
            let error = error.chars().take(90).collect::<String>();
            println!("{model} {fault:>2}  {what:<62}  {kind:<14}  {error}");
        }
    }
}
