//! Static checks of the GPU kernels: the output of nvcc, for each architecture of the fatbin. No
//! GPU needed.
//!
//! Registers, spills, the width of accesses in the loops that move packs, and the orderings that
//! publish a flag. The kernels in `sass/controls.cu` have one flaw each, and the same checks
//! must find it.

mod checks;
mod flight;
mod listing;
mod loops;

use checks::{check, check_ptx, Expected, Findings, Talks};
use listing::{kernels, ptx, Kernel, Tools};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use test_support::Skip;

/// The kernels and the loops that move packs in each: f32, f64, f16, bf16, and in the ring the last
/// two again with partial sums of f32, where the first partial sum is made of raw packs.
const KERNELS: [(&str, Expected); 17] = [
    // Loops per dtype: two, three and four ranks, and more of them, four by four.
    (
        "pa_direct",
        Expected { hot_loops: 4 * 4, loads: 92, talks: Talks::Both, steps: 0, codes: false },
    ),
    // Loops per dtype: first, middle and last step of the reduce; then middle and last step of the
    // gather. In a few places ptxas 13.0 enters a loop at two points, which makes it no natural
    // loop: 3 of 32 on sm_100 and sm_120. Its 128-bit loads are there all the same.
    (
        "pa_ring",
        Expected {
            hot_loops: 6 * 5 - 1,
            loads: 250,
            talks: Talks::Both,
            steps: 6 * 5 + 2,
            codes: false,
        },
    ),
    // Loops per dtype: first, middle and last step of each; of 16 bits also the last step of the
    // reduce whose mean is not narrowed. On sm_100 and sm_120 four are no natural loops.
    (
        "pa_ring_commit",
        Expected {
            hot_loops: 6 * 6 + 4 - 4,
            loads: 300,
            talks: Talks::Both,
            steps: 6 * 7,
            codes: false,
        },
    ),
    // Loops per dtype: any number of ranks, of both optimizers.
    (
        "pa_direct_step",
        Expected { hot_loops: 4 * 2, loads: 60, talks: Talks::Both, steps: 0, codes: false },
    ),
    // Loops per dtype: the steps of both optimizers.
    (
        "pa_ring_step",
        Expected { hot_loops: 4 * 2, loads: 60, talks: Talks::Both, steps: 0, codes: false },
    ),
    // Loops per dtype.
    (
        "pa_ring_vote",
        Expected { hot_loops: 4, loads: 20, talks: Talks::Publishes, steps: 0, codes: false },
    ),
    // Loops per dtype: first, middle and last step of the gather.
    (
        "pa_ring_mix",
        Expected { hot_loops: 6 * 3, loads: 60, talks: Talks::Both, steps: 6 * 3, codes: false },
    ),
    // Loops: first, middle and last step of the reduce, differences and codes; of the gather.
    (
        "pa_ring_int8",
        Expected { hot_loops: 10, loads: 60, talks: Talks::Both, steps: 6, codes: true },
    ),
    (
        "pa_ring_bf16",
        Expected { hot_loops: 10, loads: 60, talks: Talks::Both, steps: 6, codes: true },
    ),
    ("pa_reference", Expected { hot_loops: 1, loads: 5, talks: Talks::No, steps: 0, codes: false }),
    ("pa_anchor", Expected { hot_loops: 4, loads: 20, talks: Talks::No, steps: 0, codes: false }),
    ("pa_sample", Expected { hot_loops: 4, loads: 20, talks: Talks::No, steps: 0, codes: false }),
    // Reads 64 KiB of each dtype at most; ptxas for sm_120 loads two by two, of f16 and bf16.
    ("pa_compare", Expected { hot_loops: 0, loads: 40, talks: Talks::No, steps: 0, codes: false }),
    // Loops per dtype.
    ("pa_snapshot", Expected { hot_loops: 4, loads: 20, talks: Talks::No, steps: 0, codes: false }),
    ("pa_apply", Expected { hot_loops: 4, loads: 40, talks: Talks::No, steps: 0, codes: false }),
    // Loops per dtype: any number of ranks, four by four. What is subtracted is read rank by rank,
    // in loops of their own with one load each.
    (
        "pa_direct_delta",
        Expected { hot_loops: 4, loads: 20, talks: Talks::Both, steps: 0, codes: false },
    ),
    ("pa_scan", Expected { hot_loops: 4, loads: 20, talks: Talks::No, steps: 0, codes: false }),
];

/// Skips without machine code or the tools that print it.
pub fn tools() -> Skip {
    test_support::gpu_kernels().or_else(|| Tools::find().err())
}

/// The tools and the fatbin as a file.
fn fatbin(test: &str) -> (Tools, PathBuf) {
    let bytes = param_averager::__testing::fatbin().expect("GPU kernels");
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}.fatbin"));
    std::fs::write(&file, bytes).unwrap();
    (Tools::find().expect("tools"), file)
}

fn row(table: &mut String, kernel: &Kernel, findings: &Findings) {
    writeln!(
        table,
        "{:<8} {:<16} {:>9} {:>6} {:>12} {:>14} {:>9} {:>15}",
        kernel.architecture,
        kernel.name,
        kernel.registers,
        kernel.stack,
        kernel.code.len(),
        format!("{} ({})", findings.loads_128, findings.hot_loops),
        findings.in_flight.map_or("-".to_owned(), |least| least.to_string()),
        findings.stores_128
    )
    .unwrap();
}

pub fn kernels_are_compiled_as_they_are_meant() {
    let (tools, file) = fatbin("kernels_are_compiled_as_they_are_meant");
    let all = kernels(&tools, &file);
    let mut table = format!(
        "{:<8} {:<16} {:>9} {:>6} {:>12} {:>14} {:>9} {:>15}\n",
        "arch",
        "kernel",
        "registers",
        "stack",
        "instructions",
        "128-bit loads*",
        "in flight",
        "128-bit stores"
    );
    let mut complaints = String::new();
    let mut architectures: Vec<&str> =
        all.iter().map(|kernel| kernel.architecture.as_str()).collect();
    architectures.dedup();
    assert!(!architectures.is_empty(), "the fatbin holds machine code");
    for architecture in architectures {
        for (name, expected) in &KERNELS {
            let kernel = all
                .iter()
                .find(|kernel| kernel.architecture == architecture && kernel.name == *name)
                .unwrap_or_else(|| panic!("no {name} for {architecture}"));
            let findings = check(kernel, expected);
            row(&mut table, kernel, &findings);
            for complaint in findings.complaints {
                writeln!(complaints, "{architecture} {name}: {complaint}").unwrap();
            }
        }
    }
    eprintln!("{table}* in brackets: loops that have four or more");
    assert!(complaints.is_empty(), "\n{table}\n{complaints}");
}

pub fn ptx_is_ordered_and_coherent() {
    let (tools, file) = fatbin("ptx_is_ordered_and_coherent");
    let all = ptx(&tools, &file);
    assert!(!all.is_empty(), "the fatbin holds PTX");
    for (architecture, text) in &all {
        assert!(
            KERNELS.iter().all(|(name, _)| text.contains(&format!(".entry {name}("))),
            "{architecture}"
        );
        assert_eq!(check_ptx(text), Vec::<String>::new(), "{architecture}");
    }
}

pub fn the_checks_find_what_they_look_for() {
    let (tools, file) = fatbin("the_checks_find_what_they_look_for");
    let architecture = kernels(&tools, &file)[0].architecture.clone();
    let target = architecture.trim_start_matches("sm_");
    let controls = file.with_file_name("controls.fatbin");
    let output = Command::new(&tools.nvcc)
        .args([
            "-fatbin",
            "-std=c++17",
            "-O3",
            "-gencode",
            &format!("arch=compute_{target},code=[sm_{target},compute_{target}]"),
        ])
        .arg("-o")
        .arg(&controls)
        .arg("tests/kernels/sass/controls.cu")
        .output()
        .expect("nvcc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let all = kernels(&tools, &controls);
    // Each control and the beginnings of all complaints about it.
    let flaws: [(&str, &[&str]); 13] = [
        ("flawless", &[]),
        ("relaxed_load", &["no acquire"]),
        ("relaxed_store", &["no release"]),
        ("narrow_in_the_loop", &["narrow access in a loop over packs"]),
        ("one_load_in_flight", &["loads in flight"]),
        ("two_steps", &[]),
        ("look_up_after_the_wait", &["look-up after the wait"]),
        ("two_fences", &["fences: 2 in the step"]),
        ("scalar_loop", &["0 loops with"]),
        ("byte_loop", &["byte access", "0 loops with"]),
        ("stack_array", &["local memory", "0 loops with"]),
        ("generic_pointer", &["generic access", "0 loops with"]),
        ("many_registers", &["registers:"]),
    ];
    for (name, expected) in flaws {
        let kernel =
            all.iter().find(|kernel| kernel.name == name).unwrap_or_else(|| panic!("no {name}"));
        let talks = match name {
            "flawless" | "relaxed_load" | "relaxed_store" | "narrow_in_the_loop" => Talks::Both,
            _ => Talks::No,
        };
        let steps = match name {
            "two_steps" | "look_up_after_the_wait" | "two_fences" => 2,
            _ => 0,
        };
        let hot_loops = usize::from(name != "many_registers");
        let complaints =
            check(kernel, &Expected { hot_loops, loads: 0, talks, steps, codes: false }).complaints;
        for complaint in &complaints {
            assert!(expected.iter().any(|flaw| complaint.starts_with(flaw)), "{name}: {complaint}");
        }
        for flaw in expected {
            assert!(
                complaints.iter().any(|complaint| complaint.starts_with(flaw)),
                "{name}: no `{flaw}` in {complaints:?}"
            );
        }
    }
    let text = &ptx(&tools, &controls)[0].1;
    let complaints = check_ptx(text);
    assert!(
        complaints.iter().any(|complaint| complaint.starts_with("not coherent")),
        "{complaints:?}"
    );
    assert!(
        complaints.iter().any(|complaint| complaint.starts_with("local memory")),
        "{complaints:?}"
    );
    let without = check_ptx(
        &text
            .replace("ld.acquire.sys", "ld.relaxed.sys")
            .replace("st.release.sys", "st.relaxed.sys"),
    );
    assert!(
        ["no ld.acquire.sys", "no st.release.sys"]
            .iter()
            .all(|flaw| without.iter().any(|c| c == flaw)),
        "{without:?}"
    );
}
