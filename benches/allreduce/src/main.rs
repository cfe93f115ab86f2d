//! `allreduce-bench`: how fast, and how right, averages are here. `--help` has the rest.

mod bench;
mod cli;
mod crew;
mod cuda;
mod failure;
mod layout;
mod limit;
mod memory;
mod methods;
mod models;
mod number;
mod plan;
#[cfg(target_os = "linux")]
mod processes;
mod records;
mod reference;
mod safetensors;
mod simd;
mod table;

use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use bench::Bench;
use cli::{Args, Backend};
use failure::Failure;
use plan::{Group, Section};
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
                // In one piece: other ranks may write, too.
                let line = format!("error: {failure}\n");
                eprint!("{line}");
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Returns the number of wrong elements.
fn run(args: &Args) -> Result<u64, Failure> {
    if let Some(ranks) = args.nccl_probe {
        cuda::answer_nccl_probe(ranks.into(), cuda::nccl_limit(args.timeout));
        return Ok(0);
    }
    if args.devices {
        print!("{}", cuda::show_devices()?);
        return Ok(0);
    }
    if args.processes {
        #[cfg(target_os = "linux")]
        return processes::run(args);
        #[cfg(not(target_os = "linux"))]
        return Err(Failure::Usage("--processes is for Linux".into()));
    }
    let (sections, options) = (plan::plan(args)?, plan::options(args));
    let machine = match args.backend {
        Backend::Cpu => None,
        Backend::Cuda => Some(cuda::Machine::open()?),
    };
    bench::fits(args.backend, &sections)?;
    if let Some(machine) = &machine {
        cuda::prepare_nccl(&sections, machine);
    }
    let json = args.json.as_deref().map(|path| Sink::create(path, records::json)).transpose()?;
    let csv = args.csv.as_deref().map(|path| Sink::create(path, records::csv)).transpose()?;

    let progress = progress(&sections);
    let mut table = Table::new(progress.clone(), machine.is_some(), false);
    table.preamble(args, &options)?;
    if machine.as_ref().is_some_and(|machine| machine.simulated) {
        table.simulated()?;
    }
    let (check, bar) = (args.check == 1, progress.clone());
    let mut bench = match machine {
        None => Either::Cpu(Bench::new(options, check, args.sabotage, bar)),
        Some(machine) => {
            Either::Cuda(cuda::Bench::new(machine, options, check, args.sabotage, bar))
        }
    };
    let mut records: Vec<Record> = vec![];
    for section in &sections {
        let ranks = section.groups.first().map_or(0, |group| group.ranks);
        table.section(section, &bench.who(ranks))?;
        for group in &section.groups {
            let new = bench.run(group)?;
            new.iter().try_for_each(|record| table.row(record))?;
            table.notes(&new)?;
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

/// Where ranks are.
enum Either {
    Cpu(Bench),
    Cuda(cuda::Bench),
}

impl Either {
    fn run(&mut self, group: &Group) -> Result<Vec<Record>, Failure> {
        match self {
            Either::Cpu(bench) => bench.run(group),
            Either::Cuda(bench) => bench.run(group),
        }
    }

    fn who(&self, ranks: usize) -> String {
        match self {
            Either::Cpu(bench) => bench.who(ranks),
            Either::Cuda(bench) => bench.who(ranks),
        }
    }
}
