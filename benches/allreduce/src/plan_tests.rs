use super::*;
use crate::memory::available;
use crate::run::fits;
use crate::threads::Threads;
use clap::Parser;

fn args(line: &str) -> Args {
    Args::try_parse_from(format!("bench {line}").split_whitespace()).unwrap()
}

fn plan(line: &str) -> Result<Vec<Section>, Failure> {
    super::plan(&args(line))
}

fn sizes(line: &str) -> Vec<u64> {
    let sections = plan(line).unwrap();
    sections[0].groups.iter().map(|group| group.layout.bytes()).collect()
}

fn labels(line: &str) -> Vec<String> {
    plan(line).unwrap()[0].groups[0].rows.iter().map(|row| row.label()).collect()
}

#[test]
fn sizes_are_those_of_nccl_tests() {
    assert_eq!(sizes("-b 1K -e 8K"), [1024, 2048, 4096, 8192]);
    assert_eq!(sizes("-b 1K -e 20K -f 4"), [1024, 4096, 16384]);
    assert_eq!(sizes("-b 1K -e 4K -i 1K"), [1024, 2048, 3072, 4096]);
    assert_eq!(sizes("-b 10 -e 10"), [8], "whole elements");
    assert_eq!(sizes("-b 64M"), [64 << 20]);
    assert_eq!(sizes("-b 8M"), [8 << 20, 16 << 20, 32 << 20]);
    assert_eq!(sizes("-e 32M"), [32 << 20]);
    assert_eq!(sizes("-e 1K"), [1024]);
    assert_eq!(plan("-b 2K -e 1K").unwrap_err().exit_code(), 2);
    assert_eq!(plan("-b 1 -e 1G -i 1").unwrap_err().exit_code(), 2);
}

#[test]
fn the_tour_is_gpt2_and_a_sweep() {
    let sections = plan("").unwrap();
    let shape = sections.iter().map(|section| &section.groups[0]);
    let shape: Vec<_> = shape.map(|group| (group.layout.name.as_str(), group.ranks)).collect();
    assert_eq!(shape, [("gpt2", 2), ("gpt2", 4), ("gpt2", 2), ("flat", 2)]);
    assert_eq!(sections[0].groups[0].rows.len(), 7);
    assert!(sections[0].heading.contains("124,439,808 parameters"), "{}", sections[0].heading);
    assert_eq!(sections[2].groups[0].layout.dtype(), Some(Dtype::Bf16));
    let sweep: Vec<_> = sections[3].groups.iter().map(|group| group.layout.bytes()).collect();
    assert_eq!((sweep[0], sweep[8], sweep.len()), (1 << 10, 64 << 20, 9));
    let one = plan("-g 3 -d half --algorithm ring --no-commit").unwrap();
    assert_eq!((one.len(), one[0].groups[0].ranks), (2, 3));
    assert_eq!(one[0].groups[0].rows[0].name(), "average_no_commit");
}

#[test]
fn baselines_are_added_once_asked_for() {
    assert_eq!(labels("--layout resnet50"), ["direct"]);
    assert_eq!(labels("--layout resnet50 --baseline").len(), 5);
    let flat = ["direct", "flatten+ring+unflatten", "two-pass limit", "one-pass limit"];
    assert_eq!(labels("-b 1K --baseline"), flat);
    assert_eq!(labels("-b 1K --baseline=none"), ["direct"]);
    assert_eq!(labels("--layout resnet50 --baseline --backend cuda").len(), 10);
    assert_eq!(labels("-b 1K --baseline --backend cuda").len(), 7, "one tensor is flat");
    assert_eq!(labels("-b 1K --processes"), ["ring, processes", "ring, threads"]);
    let both = ["direct", "direct, nesterov", "direct, adam", "one-pass limit"];
    assert_eq!(labels("-b 1K --outer --baseline=limit"), both);
    let tour = ["direct", "direct, adam", "ring", "ring, adam", "ring, no commit"];
    assert_eq!(labels("--outer=adam --baseline=none"), tour, "the last one has the same step");
    for (line, says) in [
        ("-b 1K --outer --backend cuda", "threads on CPUs"),
        ("-b 1K --outer --processes", "threads on CPUs"),
        ("-b 1K --baseline=nccl", "a row of --backend cuda"),
        ("-b 1K --baseline=two-pass --backend cuda", "a row of --backend cpu"),
    ] {
        let error = plan(line).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains(says), "{error}");
    }
}

#[test]
fn what_does_not_fit_is_refused_with_a_scale_that_fits() {
    let refused = |line: &str| {
        let args = args(line);
        fits(&Threads::new(&args.options), &super::plan(&args).unwrap())
    };
    if available().is_none_or(|(free, _)| free > 16 * 2 * 16_060_522_496) {
        return; // llama3-8b, on 16 ranks and as often again
    }
    let line = "--layout llama3-8b -g 16 --baseline=flatten";
    let error = refused(line).unwrap_err().to_string();
    let scale = error.split("--scale ").nth(1).unwrap().split(',').next().unwrap();
    refused(&format!("{line} --scale {scale}")).unwrap();
    let error = refused("-b 128T -e 128T --baseline=flatten").unwrap_err().to_string();
    assert!(error.contains("smaller -e"), "{error}");
}

#[test]
fn the_models_are_the_real_ones() {
    for (name, tensors, parameters, dtype) in [
        ("gpt2", 148, 124_439_808, Dtype::F32),
        ("resnet50", 161, 25_557_032, Dtype::F32),
        ("llama3-8b", 291, 8_030_261_248, Dtype::Bf16),
    ] {
        let layout = load(name).unwrap();
        assert_eq!((layout.tensors.len(), layout.elements()), (tensors, parameters), "{name}");
        let size = dtype.size() as u64;
        assert_eq!((layout.dtype(), layout.bytes()), (Some(dtype), parameters * size));
        let names: std::collections::BTreeSet<_> =
            layout.tensors.iter().map(|tensor| &tensor.name).collect();
        assert_eq!(names.len(), tensors, "{name}: names are unique");
    }
}

#[test]
fn layouts_are_scaled_and_flat_ones_are_whole_elements() {
    let layout = load("gpt2").unwrap().scaled(0.01);
    assert_eq!(layout.tensors.len(), 148);
    assert_eq!(layout.tensors[0].shape, [503, 768]);
    assert!(layout.tensors.iter().all(|tensor| tensor.elements() > 0));
    assert_eq!(layout.scaled(1e-9).tensors[0].shape, [1, 768]);
    assert_eq!(Layout::flat(1023, Dtype::F64).elements(), 127);
    assert_eq!(Layout::flat(3, Dtype::F32).elements(), 1);
}
