//! `allreduce-bench --backend cuda`, on the simulated driver. NCCL can't use that one, so a
//! stand-in takes its place where its rows are to have a result: it shows that the bench calls NCCL
//! as it should and what it makes of the answers, not what NCCL does.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use serde_json::Value;

use test_support::simulator::{self, Driver};
use test_support::{tests, Skip};

mod common;
use common::{file, FIELDS};

#[path = "../build/flatten.rs"]
mod build_flatten;

/// The folder of the simulator's driver.
fn driver() -> PathBuf {
    match simulator::driver() {
        Driver::Simulated(folder) => folder,
        Driver::Own => unreachable!("these tests are skipped"),
    }
}

/// Skips without a simulated device.
fn simulated() -> Skip {
    let own = || Some("about a simulated machine: unset PARAM_AVERAGER_GPU".to_owned());
    simulator::missing().or_else(|| simulator::on_own_driver().then(own).flatten())
}

/// Skips without cuobjdump beside the nvcc of the build.
fn cuobjdump() -> Skip {
    let Some(nvcc) = option_env!("ALLREDUCE_BENCH_NVCC") else {
        return Some("built without nvcc: set NVCC".to_owned());
    };
    let is_there = Path::new(nvcc).with_file_name("cuobjdump").is_file();
    (!is_there).then(|| "no cuobjdump beside nvcc: install nvidia-cuda-cuobjdump".to_owned())
}

/// Standard output and standard error of a run, and its exit code.
struct Ended {
    table: String,
    said: String,
    code: Option<i32>,
}

fn bench(line: &str, driver: &Path, settings: &[(&str, &str)]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_allreduce-bench"));
    for name in [
        "CUDA_VISIBLE_DEVICES",
        "CUDASIM_RACE",
        "PA_NCCL_LIB",
        "FAKE_NCCL",
        "NCCL_MULTI_RANK_GPU_ENABLE",
    ] {
        command.env_remove(name);
    }
    command.args(["--backend", "cuda"]).args(line.split_whitespace());
    command.env("LD_LIBRARY_PATH", driver).env("CUDASIM_DEVICES", "1").env("CUDASIM_KILL_S", "60");
    // As in tests/support/src/simulator.rs.
    command.envs([("CUDASIM_TIMESCALE", "30"), ("PARAM_AVERAGER_P2P_LIMIT_MS", "100")]);
    command.env("PARAM_AVERAGER_P2P", "1");
    let output = command.envs(settings.iter().copied()).output().expect("the binary was built");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    Ended { table: text(output.stdout), said: text(output.stderr), code: output.status.code() }
}

/// Cells of the rows: the seven figures and the ulps come last.
fn rows(table: &str) -> Vec<Vec<String>> {
    common::rows(table, 8)
}

fn methods(table: &str) -> Vec<String> {
    rows(table).into_iter().map(|row| row[4].clone()).collect()
}

/// The stand-in for NCCL. It needs `_Float16` of the compiler.
fn fake_nccl() -> &'static str {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libfake_nccl.so");
        test_support::shared_library("tests/bench_cuda/fake_nccl.cpp".as_ref(), &library, &[]);
        library
    };
    LIBRARY.get_or_init(build).to_str().expect("a name in UTF-8")
}

/// No figure of time anywhere, and it says why.
fn is_timeless(table: &str) {
    assert!(table.contains("# simulated: no GPU; figures of time are left out"), "{table}");
    for row in rows(table) {
        assert!(row[5..10].iter().chain([&row[12]]).all(|cell| cell == "-"), "{row:?}");
    }
}

fn averages_on_a_device_are_right_and_have_no_times_where_it_is_simulated() {
    let driver = driver();
    let (json, csv) = (file("cuda-records.json", ""), file("cuda-records.csv", ""));
    let line = format!(
        "-b 3K -e 3K -g 2 -d f32,bf16 -n 2 -w 1 --algorithm direct,ring --baseline --channels 2 \
         --json {} --csv {}",
        json.display(),
        csv.display()
    );
    let ended = bench(&line, &driver, &[("PA_NCCL_LIB", "/nowhere/libnccl.so.2")]);
    assert_eq!((ended.code, ended.said.as_str()), (Some(0), ""), "{}", ended.table);
    is_timeless(&ended.table);
    let ours = ["direct", "ring", "flatten+ring+unflatten", "copies+ring+copies"];
    let others =
        ["NCCL grouped avg", "NCCL grouped sum+scale", "pinned host both ways", "device copy"];
    assert_eq!(methods(&ended.table), [ours, others, ours, others].concat());
    for row in rows(&ended.table) {
        let ulp = row[11].parse::<f64>();
        match ours.contains(&row[4].as_str()) {
            true => assert!(row[10] == "0" && (0.01..=1.0).contains(&ulp.unwrap()), "{row:?}"),
            false => assert_eq!(row[10..12], ["N/A", "N/A"]),
        }
    }
    for says in [
        "2 ranks on cuda:0 (cudasim (CPU simulation)), which they share",
        "NCCL not measured: several ranks on one GPU: /nowhere/libnccl.so.2 could not be loaded",
        "Out of bounds values : 0 OK",
    ] {
        assert!(ended.table.contains(says), "{says}:\n{}", ended.table);
    }

    let records: Vec<Value> =
        serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(records.len(), 16);
    for record in &records {
        assert_eq!(record.as_object().unwrap().len(), 20);
        assert_eq!((&record["backend"], &record["simulated"]), (&"cuda".into(), &true.into()));
        assert_eq!(record["placement"], "several ranks on one GPU");
        for time in ["time_us", "min_us", "max_us", "algbw_gbs", "busbw_gbs", "ratio_to_limit"] {
            assert_eq!(record[time], Value::Null, "{record}");
        }
        let nccl = record["algorithm"] == "nccl";
        assert_eq!(
            nccl,
            record["note"].as_str().is_some_and(|note| note.starts_with("NCCL not measured"))
        );
    }
    let csv = std::fs::read_to_string(csv).unwrap();
    let fields = format!("{FIELDS},max_ulp,device,placement,simulated,note");
    assert_eq!(csv.lines().next().unwrap(), fields);
    assert_eq!(csv.lines().count(), 17);
}

fn models_of_many_dtypes_weights_and_a_wrong_element() {
    let driver = driver();
    let list = r#"[{"name": "a", "shape": [300], "dtype": "f32"},
        {"name": "b", "shape": [301], "dtype": "bf16"},
        {"name": "c", "shape": [17], "dtype": "half"},
        {"name": "none", "shape": [0], "dtype": "f64"},
        {"name": "d", "shape": [33], "dtype": "f64"},
        {"name": "e", "shape": [1], "dtype": "f32"}]"#;
    let model = file("cuda-model.json", list);
    let line =
        format!("--layout {} -n 1 -w 0 --channels 1 --narrow-wire --weighted", model.display());
    let ended = bench(
        &format!(
            "{line} -g 1,3 --algorithm auto,ring --reject-non-finite --baseline=per-tensor,flatten"
        ),
        &driver,
        &[],
    );
    assert_eq!((ended.code, ended.said.as_str()), (Some(0), ""), "{}", ended.table);
    let rows = rows(&ended.table);
    assert!(
        rows.len() == 10 && rows.iter().all(|row| row[2] == "mixed" && row[10] == "0"),
        "{}",
        ended.table
    );
    // One rank has nobody to differ from.
    let wrong = bench(&format!("{line} -g 3 --corrupt"), &driver, &[]);
    assert_eq!(wrong.code, Some(1), "{}", wrong.table);
    assert!(wrong.table.contains("Out of bounds values : 1 FAILED"), "{}", wrong.table);
}

fn nccl_has_rows_of_its_own() {
    let (driver, fake) = (driver(), fake_nccl());
    let list = r#"[{"name": "a", "shape": [300], "dtype": "f32"},
        {"name": "b", "shape": [33], "dtype": "f32"}]"#;
    let model = file("cuda-two.json", list);
    let line =
        format!("--layout {} -d all -g 3 -n 1 -w 1 --channels 1 --baseline=nccl", model.display());
    let ended = bench(&line, &driver, &[("PA_NCCL_LIB", fake)]);
    assert_eq!((ended.code, ended.said.as_str()), (Some(0), ""), "{}", ended.table);
    is_timeless(&ended.table);
    let each = [
        "direct",
        "NCCL grouped avg",
        "NCCL grouped sum+scale",
        "NCCL flatten avg",
        "NCCL flatten sum+scale",
    ];
    assert_eq!(methods(&ended.table), [each; 4].concat());
    let rows = rows(&ended.table);
    assert!(rows.iter().all(|row| row[10] == "0"), "{}", ended.table);
    for row in &rows {
        assert_eq!(row[3], if row[4].contains("sum") { "sum" } else { "avg" });
    }
    let ulp = |dtype: &str, method: &str| -> f64 {
        rows.iter().find(|row| row[2] == dtype && row[4] == method).unwrap()[11].parse().unwrap()
    };
    assert!(ulp("bf16", "direct") <= 0.5, "one rounding");
    assert!(ulp("bf16", "NCCL grouped avg") > 0.5, "the scale and every hop are rounded");
    let says =
        "# NCCL 2.32.3, several ranks on one GPU, in process, with NCCL_MULTI_RANK_GPU_ENABLE=1";
    assert!(ended.table.contains(says), "{}", ended.table);
}

fn where_nccl_fails_its_rows_say_so_and_the_rest_runs() {
    let (driver, fake) = (driver(), fake_nccl());
    for (name, value, says) in [
        ("FAKE_NCCL", "crash", "NCCL ended the process that tried it"),
        ("FAKE_NCCL", "hang", "a rank did not come back within 15s"),
        ("FAKE_NCCL", "late", "ncclGroupEnd: a fault that was asked for"),
        (
            "FAKE_NCCL_VERSION",
            "22907",
            "NCCL 2.29.7 can't have several ranks of a process on one GPU",
        ),
        ("FAKE_NCCL_VERSION", "2708", "has no ncclAvg"),
    ] {
        // Long enough for ranks on a busy machine.
        let timeout = if value == "hang" { 15 } else { 60 };
        let line =
            format!("-b 1K -e 1K -n 1 -w 0 --channels 1 --baseline=nccl,limit --timeout {timeout}");
        let ended = bench(&line, &driver, &[("PA_NCCL_LIB", fake), (name, value)]);
        assert_eq!((ended.code, ended.said.as_str()), (Some(0), ""), "{value}: {}", ended.table);
        let note = ended.table.lines().find(|line| line.starts_with("# NCCL not measured: "));
        assert!(note.is_some_and(|note| note.contains(says)), "{value}: {}", ended.table);
        let rows = rows(&ended.table);
        let checked = rows.iter().map(|row| (row[4].as_str(), row[10] == "0"));
        let ours: Vec<_> = checked.filter(|(_, checked)| *checked).collect();
        assert_eq!((rows.len(), ours), (5, vec![("direct", true)]), "{value}: {}", ended.table);
    }
}

fn machines_that_do_not_suit_say_what_to_do() {
    let driver = driver();
    for (settings, line, says) in [
        (("CUDASIM_NO_DEVICE", "1"), "-b 1K", ["cuda:0", "CUDA_VISIBLE_DEVICES"]),
        (("CUDASIM_OLD_DRIVER", "11040"), "-b 1K", ["cuda:0", "update the driver"]),
        (("CUDASIM_MEM_MB", "64"), "-b 64M -e 64M -n 1", ["OUT_OF_MEMORY", "smaller -e"]),
    ] {
        let ended = bench(line, &driver, &[settings]);
        assert_eq!(ended.code, Some(1), "{settings:?}: {}", ended.said);
        assert!(
            says.iter().all(|words| ended.said.contains(words)),
            "{settings:?}: {}",
            ended.said
        );
    }
}

/// For every architecture that the kernels were compiled for.
fn the_kernels_have_no_spills() {
    let Some(nvcc) = option_env!("ALLREDUCE_BENCH_NVCC") else { unreachable!("skipped") };
    let cuobjdump = Path::new(nvcc).with_file_name("cuobjdump");
    let mut command = Command::new(cuobjdump);
    command.arg("--dump-resource-usage").arg(concat!(env!("OUT_DIR"), "/flatten.fatbin"));
    let output = command.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let kernels: Vec<&str> = printed.lines().filter(|line| line.contains("REG:")).collect();
    assert!(!kernels.is_empty() && kernels.len().is_multiple_of(5), "{printed}");
    for kernel in kernels {
        assert!(kernel.contains(" STACK:0 ") && kernel.contains(" LOCAL:0 "), "{kernel}");
    }
}

fn where_there_is_no_nvcc_or_it_fails_the_kernels_say_why() {
    let fatbin = Path::new(env!("CARGO_TARGET_TMPDIR")).join("none.fatbin");
    for (line, says) in [
        ("", "built without nvcc"),
        ("/nowhere/nvcc\u{1f}-fatbin", "/nowhere/nvcc did not run"),
        ("false\u{1f}-fatbin", "nvcc failed on flatten.cu"),
    ] {
        std::env::set_var("DEP_PARAM_AVERAGER_KERNELS_NVCC", line);
        let reason = build_flatten::compile(&fatbin).unwrap_err();
        assert!(reason.contains(says), "{reason}");
    }
}

fn main() -> ExitCode {
    let (simulated, cuobjdump) = (simulated(), cuobjdump());
    test_support::main(tests![
        averages_on_a_device_are_right_and_have_no_times_where_it_is_simulated: simulated,
        models_of_many_dtypes_weights_and_a_wrong_element: simulated,
        nccl_has_rows_of_its_own: simulated,
        where_nccl_fails_its_rows_say_so_and_the_rest_runs: simulated,
        machines_that_do_not_suit_say_what_to_do: simulated,
        the_kernels_have_no_spills: cuobjdump,
        where_there_is_no_nvcc_or_it_fails_the_kernels_say_why,
    ])
}
