//! `allreduce-bench`: how fast, and how right, averages are here. `--help` has the rest.

mod bench;
mod cli;
mod crew;
mod failure;
mod layout;
mod limit;
mod memory;
mod methods;
mod models;
mod number;
mod plan;
mod records;
mod reference;
mod safetensors;
mod simd;
mod table;

use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use param_averager::{Device, World};

use bench::Bench;
use cli::{Args, Backend};
use failure::Failure;
use plan::Section;
use records::{Record, Sink};
use table::Table;

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(wrong) => {
            eprintln!("error: {wrong} elements are not what they should be, see the column #wrong");
            ExitCode::from(1)
        }
        Err(failure) => {
            if !failure.is_silent() {
                eprintln!("error: {failure}");
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Returns the number of wrong elements.
fn run(args: &Args) -> Result<u64, Failure> {
    let (sections, options) = (plan::plan(args)?, plan::options(args));
    if args.backend == Backend::Cuda {
        return Err(no_cuda(&sections));
    }
    bench::fits(&sections)?;
    let json = args.json.as_deref().map(|path| Sink::create(path, records::json)).transpose()?;
    let csv = args.csv.as_deref().map(|path| Sink::create(path, records::csv)).transpose()?;

    let progress = progress(&sections);
    let mut table = Table::new(progress.clone());
    let mut bench = Bench::new(options, args.check == 1, args.sabotage, progress.clone());
    let mut records: Vec<Record> = vec![];
    table.preamble(args, &options)?;
    for section in &sections {
        table.section(section, &options)?;
        for group in &section.groups {
            let new = bench.run(group)?;
            new.iter().try_for_each(|record| table.row(record))?;
            records.extend(new);
        }
    }
    progress.finish_and_clear();
    table.ending(&records)?;
    for sink in [json, csv].into_iter().flatten() {
        sink.write(&records)?;
    }
    Ok(records.iter().filter_map(|record| record.wrong).sum())
}

/// On a terminal; nothing elsewhere.
fn progress(sections: &[Section]) -> ProgressBar {
    let steps = sections.iter().flat_map(|section| &section.groups).map(Bench::steps).sum();
    let style = ProgressStyle::with_template("{bar:24} {percent:>3}% {elapsed:>4} {wide_msg}");
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// What the library says of a world of ranks on a CUDA device.
fn no_cuda(sections: &[Section]) -> Failure {
    let ranks =
        sections.iter().flat_map(|section| &section.groups).map(|group| group.ranks).max().unwrap_or(1);
    let reason = match World::in_process(&vec![Device::cuda(0); ranks]) {
        Err(error) => error.to_string(),
        Ok(_) => "the library can use cuda:0, but this bench measures ranks on CPUs only so far".into(),
    };
    Failure::Failed(format!(
        "{reason}\n\nhint: --backend cpu, the default, runs the same kernels on this machine's cores"
    ))
}
