//! `allreduce-bench` as its users meet it: flags, columns, files, errors and exit codes.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

mod common;
use common::{file, FIELDS};

fn bench(line: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_allreduce-bench"));
    command
        .args(line.split_whitespace())
        .stdin(Stdio::null())
        .output()
        .expect("the binary was built")
}

/// Output of a run that succeeds.
fn table(line: &str) -> String {
    let output = bench(line);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {:?}, {said}", output.status);
    assert_eq!(said, "", "{line}: nothing on standard error that is no terminal");
    String::from_utf8(output.stdout).expect("text")
}

/// Error text of a run that fails with this code.
fn error(line: &str, code: i32) -> String {
    let output = bench(line);
    let said = String::from_utf8(output.stderr).expect("text");
    assert_eq!(output.status.code(), Some(code), "{line}: {said}");
    assert!(said.starts_with("error: "), "{said}");
    said
}

fn rows(table: &str) -> Vec<Vec<String>> {
    common::rows(table, 7)
}

/// A checkpoint of which there is the header only.
fn safetensors(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()
}

/// … with these tensors: name, dtype, shape, offsets.
fn checkpoint(tensors: &[(&str, &str, &str, &str)]) -> Vec<u8> {
    let entry = |(name, dtype, shape, offsets): &_| {
        format!(r#""{name}": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}"#)
    };
    let entries: Vec<String> = tensors.iter().map(entry).collect();
    safetensors(&format!("{{{}}}", entries.join(", ")))
}

#[test]
fn a_sweep_has_a_row_for_each_size_and_nothing_wrong() {
    let table = table("-b 1K -e 64K -g 3 -n 3 -w 1");
    let rows = rows(&table);
    let sizes: Vec<u64> = rows.iter().map(|row| row[0].parse().unwrap()).collect();
    assert_eq!(sizes, [1, 2, 4, 8, 16, 32, 64].map(|kib| kib << 10));
    for row in &rows {
        assert_eq!(row.len(), 12, "{row:?}");
        assert_eq!(row[1].parse::<u64>().unwrap() * 4, row[0].parse::<u64>().unwrap());
        assert_eq!(
            [&row[2], &row[3], &row[4], &row[10], &row[11]],
            ["f32", "avg", "direct", "0", "-"]
        );
        let [time, least, most] = [5, 6, 7].map(|cell| row[cell].parse::<f64>().unwrap());
        assert!(least <= time && time <= most, "{row:?}");
    }
    for says in ["(us)", "(GB/s)", "3 ranks", "Out of bounds values : 0 OK"] {
        assert!(table.contains(says), "{says}:\n{table}");
    }
    assert!(table.lines().all(|line| line.chars().count() <= 120), "{table}");
    assert!(!table.contains('\x1b'), "colour is for terminals");
}

#[test]
fn every_dtype_and_algorithm_is_right() {
    let worlds = if test_support::count(1, 3) >= 3 { "2,3,5" } else { "3" };
    let count = worlds.split(',').count();
    for (flags, methods) in [
        ("--algorithm auto,ring,direct --baseline", 6),
        ("--algorithm ring,direct --no-commit --narrow-wire --chunk 1K --slots 2 --channels 2", 2),
        ("--algorithm ring,direct --weighted --reject-non-finite --timeout 60 --baseline=limit", 3),
    ] {
        let table = table(&format!("-b 10000 -e 10000 -g {worlds} -d all -n 2 -w 0 {flags}"));
        let rows = rows(&table);
        assert_eq!(rows.len(), 4 * count * methods);
        assert!(rows.iter().all(|row| row[10] == "0"), "{table}");
        for dtype in ["f32", "f64", "f16", "bf16"] {
            assert_eq!(rows.iter().filter(|row| row[2] == dtype).count(), count * methods);
        }
        assert_eq!(flags.contains("--baseline"), rows.iter().all(|row| row[11] != "-"), "{table}");
    }
}

/// The result of a step is the mean, so that a step that is left out, made twice, or made from
/// another anchor is seen.
#[test]
fn outer_steps_have_rows_of_their_own_and_are_right() {
    for (flags, labels) in [
        ("--outer", "direct;direct, nesterov;direct, adam"),
        ("--outer=adam --algorithm ring,direct", "ring;ring, adam;direct;direct, adam"),
        (
            "--outer --no-commit --algorithm ring --weighted",
            "ring, no commit;ring, nesterov;ring, adam",
        ),
    ] {
        let labels: Vec<&str> = labels.split(';').collect();
        let table = table(&format!("-b 10000 -e 10000 -g 2,3 -d all -n 3 -w 1 {flags}"));
        let rows = rows(&table);
        assert_eq!(rows.len(), 8 * labels.len(), "{table}");
        for (row, label) in rows.iter().zip(labels.iter().cycle()) {
            assert_eq!((row[4].as_str(), row[10].as_str()), (*label, "0"), "{table}");
        }
    }
    let corrupt = bench("-b 64K -e 64K -d all -n 1 --algorithm direct,ring --outer --corrupt");
    let table = String::from_utf8(corrupt.stdout).unwrap();
    assert!(rows(&table).iter().all(|row| row[10] == "1"), "{table}");
    let json = file("outer.json", "");
    self::table(&format!("-b 1K -e 1K -n 1 --outer --json {}", json.display()));
    let records: Vec<Value> = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let methods: Vec<_> = records.iter().map(|record| record["method"].clone()).collect();
    assert_eq!(methods, ["average", "average_nesterov", "average_adam"]);
}

#[test]
fn one_rank_and_sixteen() {
    let table =
        table("-b 1 -e 1K -f 1024 -g 1,16 -n 1 -w 0 --baseline=limit --algorithm direct,ring");
    assert!(rows(&table).iter().all(|row| row[10] == "0"), "{table}");
    assert_eq!(rows(&table).len(), 2 * 2 * 3);
}

#[test]
fn a_wrong_element_is_seen_and_fails_the_run() {
    let output = bench("-b 64K -e 64K -d all -n 1 --algorithm direct,ring --baseline --corrupt");
    let table = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(rows(&table).iter().all(|row| row[10] == "1"), "{table}");
    assert!(table.contains("Out of bounds values : 20 FAILED"), "{table}");
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: 20 elements"));
    // A run that does not check finds nothing.
    let unchecked = self::table("-b 1K -e 1K -n 1 -c 0 --corrupt");
    assert_eq!(rows(&unchecked)[0][10], "N/A");
}

#[test]
fn records_have_the_fields_that_they_promise() {
    let (json, csv) = (file("records.json", ""), file("records.csv", ""));
    let files = format!("--json {} --csv {}", json.display(), csv.display());
    let table = table(&format!(
        "--layout gpt2 --scale 0.0001 -g 4 -n 3 --baseline --algorithm direct,ring {files}"
    ));
    let json = std::fs::read_to_string(json).unwrap();
    let records: Vec<Value> = serde_json::from_str(&json).unwrap();
    let methods = [
        "average",
        "average",
        "per_tensor_ring",
        "flatten_ring_unflatten",
        "two_pass_limit",
        "one_pass_limit",
    ];
    let algorithms = ["direct", "ring", "ring", "ring", "two_pass", "one_pass"];
    assert_eq!(records.len(), 6);
    let fields: Vec<&str> = FIELDS.split(',').collect();
    let csv = std::fs::read_to_string(csv).unwrap();
    let mut lines = csv.lines();
    assert_eq!(lines.next().unwrap(), FIELDS);
    for (index, record) in records.iter().enumerate() {
        assert_eq!(record.as_object().unwrap().len(), fields.len());
        assert_eq!(
            (&record["method"], &record["algorithm"]),
            (&methods[index].into(), &algorithms[index].into())
        );
        for (field, value) in [("backend", "cpu"), ("layout", "gpt2"), ("dtype", "f32")] {
            assert_eq!(record[field], value);
        }
        for (field, value) in [("tensors", 148), ("ranks", 4), ("wrong", 0)] {
            assert_eq!(record[field], value);
        }
        let number = |field: &str| record[field].as_f64().unwrap();
        assert!(number("min_us") <= number("time_us") && number("time_us") <= number("max_us"));
        assert!(number("bytes") > 100_000.0 && number("ratio_to_limit") > 0.0);
        // They are rounded to 4 digits after the point.
        let (busbw, algbw) = (number("busbw_gbs"), number("algbw_gbs"));
        assert!((busbw - 1.5 * algbw).abs() < 2e-4 + 0.01 * busbw, "{record}");
        let cells: Vec<&str> = lines.next().unwrap().split(',').collect();
        let of_json = fields.iter().map(|&field| record[field].to_string());
        let of_json: Vec<_> = of_json.map(|value| value.trim_matches('"').to_owned()).collect();
        assert_eq!(cells, of_json);
    }
    // In this order, one a line.
    let line = json.lines().nth(1).unwrap();
    let places = fields.iter().map(|field| line.find(&format!("\"{field}\": ")).unwrap());
    assert!(places.is_sorted(), "{line}");
    assert!(table.contains("gpt2 at scale 0.0001: 148 tensors"), "{table}");
}

#[test]
fn models_come_from_files() {
    let list = r#"[{"name": "a", "shape": [30, 7], "dtype": "f32"},
        {"name": "b", "shape": [9], "dtype": "bf16"},
        {"name": "empty", "shape": [0, 4], "dtype": "f32"},
        {"name": "scalar", "shape": [], "dtype": "half"}]"#;
    let tensors = [
        ("wte", "F16", "[70, 9]", "[0, 1260]"),
        ("wpe", "F64", "[5]", "[1260, 1300]"),
        ("mask", "BOOL", "[4]", "[1300, 1304]"),
    ];
    for (path, says, bytes) in [
        (file("model.json", list), "4 tensors, 220 parameters in mixed", "860"),
        (
            file("model.safetensors", checkpoint(&tensors)),
            "2 tensors, 635 parameters in mixed (1 left out",
            "1300",
        ),
    ] {
        let table = table(&format!(
            "--layout {} -g 3 -n 3 --algorithm direct,ring --baseline",
            path.display()
        ));
        assert!(table.contains(says), "{table}");
        let rows = rows(&table);
        assert_eq!(rows.len(), 6);
        assert!(
            rows.iter().all(|row| row[0] == bytes && row[2] == "mixed" && row[10] == "0"),
            "{table}"
        );
        let table = self::table(&format!("--layout {} -d f64,bf16 -n 1", path.display()));
        assert_eq!(
            self::rows(&table).iter().map(|row| row[2].as_str()).collect::<Vec<_>>(),
            ["f64", "bf16"]
        );
    }
}

#[test]
fn files_that_are_no_good_are_named_with_what_to_do() {
    let no_lists = "a layout is a list such as";
    let of_json = |shape: &str, dtype: &str| {
        format!(r#"[{{"name": "a", "shape": {shape}, "dtype": "{dtype}"}}]"#).into_bytes()
    };
    let overlap = [("v", "F32", "[2]", "[0, 8]"), ("w", "F32", "[2]", "[4, 12]")];
    let text = |text: &str| text.as_bytes().to_vec();
    for (name, content, says) in [
        ("no.json", text(r#"{"model": 1}"#), no_lists),
        ("cut.json", text(r#"[{"name": "a""#), no_lists),
        ("index.json", text(r#"{"weight_map": {}}"#), "give one of its .safetensors files"),
        ("none.json", text("[]"), "holds no tensors"),
        ("empty.json", of_json("[0]", "f32"), "all of its tensors are empty"),
        ("int.json", of_json("[1]", "i64"), "tensor `a` has dtype `i64`: use f32"),
        ("huge.json", of_json("[9999999999999, 9999999999999]", "f32"), "tensor `a`"),
        ("cut.safetensors", b"\x40\0\0\0\0\0\0\0{\"a\":".to_vec(), "is cut within its header"),
        ("list.safetensors", safetensors("[1, 2"), "its header is not one of safetensors"),
        (
            "fields.safetensors",
            safetensors(r#"{"x": {"dtype": "F32", "shape": [1]}}"#),
            "missing field `data_offsets`",
        ),
        ("size.safetensors", checkpoint(&[("x", "F32", "[4]", "[0, 4]")]), "the file is damaged"),
        ("overlap.safetensors", checkpoint(&overlap), "invalid offset for tensor `w`"),
        ("none.safetensors", safetensors("{}"), "holds no tensors"),
        (
            "ids.safetensors",
            checkpoint(&[("ids", "I64", "[2]", "[0, 16]")]),
            "none of its 1 tensors, such as `ids`, has elements that are floats",
        ),
        (
            "f8.safetensors",
            checkpoint(&[("w", "F8_E4M3", "[4]", "[0, 4]")]),
            "tensor `w` has dtype F8_E4M3, which can't be averaged",
        ),
        ("short.safetensors", text("abc"), "shorter than the 8 bytes"),
        ("text.safetensors", text("this is a text and no checkpoint"), "no safetensors file"),
        ("gguf.safetensors", b"GGUF\x03\0\0\0\0\0".to_vec(), "a GGUF file"),
        ("pickle.safetensors", b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9".to_vec(), "a pickle"),
        (
            "pointer.safetensors",
            text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548\n"),
            "git lfs pull",
        ),
        ("page.safetensors", text("<!DOCTYPE html>\n<html></html>"), "an HTML page"),
        (
            "torch.safetensors",
            b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0archive/data.pkl".to_vec(),
            "a zip, as torch.save writes",
        ),
    ] {
        let path = file(name, content);
        let said = error(&format!("--layout {}", path.display()), 1);
        assert!(said.contains(says) && said.contains(name), "{said} does not say {says}");
    }
    assert!(error("--layout missing.json", 1).contains("missing.json: cannot read it"));
    assert!(
        error("--layout missing.safetensors", 1).contains("missing.safetensors: cannot open it")
    );
    for file in ["json", "csv", "plot"] {
        let output = bench(&format!("-b 1K -e 1K --{file} /nowhere/at/all"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("error: cannot write /nowhere/at/all: "), "{said}");
        assert!(output.stdout.is_empty(), "before anything is measured");
    }
}

/// Texts of an SVG file, which must be well-formed XML.
fn texts(path: &Path) -> Vec<String> {
    let svg = std::fs::read_to_string(path).unwrap();
    let svg = roxmltree::Document::parse(&svg).expect("well-formed");
    assert_eq!(svg.root_element().tag_name().name(), "svg");
    let texts = svg.descendants().filter(|node| node.has_tag_name("text"));
    texts.map(|node| node.text().unwrap_or_default().trim().to_owned()).collect()
}

#[test]
fn a_plot_has_a_title_and_a_series_for_each_row() {
    let path = file("plot.svg", "");
    let plot = format!("-n 2 -w 0 -c 0 --algorithm direct,ring --plot {}", path.display());
    table(&format!("-b 1K -e 16K --baseline=limit {plot}"));
    let lines = texts(&path);
    for says in [
        "Bandwidth over size: flat buffers, f32, 2 ranks",
        "size of a rank's parameters",
        "algbw (GB/s)",
        "16 KiB",
        "direct",
        "ring",
        "one-pass limit",
    ] {
        assert_eq!(lines.iter().filter(|text| *text == says).count(), 1, "{says}: {lines:?}");
    }
    let svg = std::fs::read_to_string(&path).unwrap();
    assert!(svg.matches("<polyline").count() >= 3, "a line for each row");

    table(&format!("--layout gpt2 --scale 0.0001 --baseline -g 2,3 {plot}"));
    let bars = texts(&path);
    for ranks in [2, 3] {
        let title =
            format!("Time of an average (ms): gpt2, 148 tensors, 342 KiB, f32, {ranks} ranks");
        assert!(bars.contains(&title), "{title}: {bars:?}");
    }
    for label in ["direct", "ring", "ring per tensor", "flatten+ring+unflatten", "one-pass limit"] {
        assert_eq!(bars.iter().filter(|text| *text == label).count(), 2, "{label}: {bars:?}");
    }
    assert_eq!(bars.iter().filter(|text| text.contains(" ms = ")).count(), 12, "{bars:?}");
}

#[test]
fn wrong_command_lines_exit_with_2_and_failures_with_1() {
    for (line, says) in [
        ("--nonsense", "--nonsense"),
        ("-g 17", "1..=16"),
        ("-o sum", "avg"),
        ("-d int8", "bfloat16"),
        ("-b 1Q", "64K"),
        ("-b 2M -e 1M", "swap them"),
        ("--layout gpt3", "gpt2, resnet50, llama3-8b"),
        ("--layout gpt2 -b 1K", "cannot be used with"),
        ("-b 1K -e 1K --slots 3 --algorithm ring", "a power of two"),
        ("--outer=sgd", "nesterov, adam"),
        ("--outer --processes", "threads on CPUs"),
    ] {
        let said = error(line, 2);
        assert!(said.contains(says), "{said} does not say {says}");
    }
    let said = error("--backend cuda", 1);
    assert!(said.contains("cuda:0") && said.contains("hint: --backend cpu"), "{said}");
    let said = error("-b 1T -e 1T -g 16 -n 1", 1);
    assert!(said.contains("needs 16384.0 GiB of memory") && said.contains("smaller -e"), "{said}");
}

#[test]
fn help_teaches_and_a_closed_pipe_is_no_error() {
    let help = bench("--help");
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).unwrap();
    for says in ["Examples:", "--baseline", "one-pass limit", "Exit code", "-b, --minbytes"] {
        assert!(help.contains(says), "{says}");
    }
    assert!(help.lines().all(|line| line.chars().count() <= 100), "{help}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_allreduce-bench"));
    command
        .args(["-b", "1K", "-e", "16M", "-n", "2"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        (output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()),
        (Some(0), "")
    );
}
