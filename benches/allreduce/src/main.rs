//! `allreduce-bench`: how fast, and how right, averages are here. `--help` has the rest.

mod averager;
mod cli;
mod crew;
mod cuda;
mod failure;
mod layout;
mod limit;
mod load;
mod memory;
mod models;
mod number;
mod plan;
mod plot;
#[cfg(target_os = "linux")]
mod processes;
mod record;
mod rows;
mod run;
mod table;
mod threads;
mod verify;

use std::process::ExitCode;

use clap::Parser;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use cli::{Args, Backend};
use failure::Failure;
use plan::Section;
use run::{Bench, Ranks};
use table::Report;
use threads::Threads;

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(wrong) => {
            eprintln!("error: {wrong} elements are not what they should be, see the column #wrong");
            ExitCode::from(1)
        }
        Err(failure) => {
            if !matches!(failure, Failure::Silent(_)) {
                // In one piece: other ranks may write, too.
                let line = format!("error: {failure}\n");
                eprint!("{line}");
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Returns the number of wrong elements.
fn run(mut args: Args) -> Result<u64, Failure> {
    if let Some(ranks) = args.nccl_probe {
        println!("{}", cuda::probe::answer(&args, ranks.into()));
        return Ok(0);
    }
    if args.what.devices {
        print!("{}", param_averager::Topology::probe()?);
        return Ok(0);
    }
    let sections = plan::plan(&args)?;
    if args.what.processes {
        #[cfg(not(target_os = "linux"))]
        return Err(Failure::Usage("--processes is for Linux".into()));
        #[cfg(target_os = "linux")]
        return match processes::start(&mut args)? {
            None => Ok(0), // this was the launcher
            Some(mut ranks) => measure(&args, &plan::plan(&args)?, &mut ranks),
        };
    }
    match args.what.backend {
        Backend::Cpu => measure(&args, &sections, &mut Threads::new(&args.options)),
        Backend::Cuda => measure(&args, &sections, &mut cuda::Cuda::open(&args, &sections)?),
    }
}

fn measure(args: &Args, sections: &[Section], ranks: &mut dyn Ranks) -> Result<u64, Failure> {
    let progress = progress(sections, ranks.prints() && !args.what.processes);
    let report = ranks.prints().then(|| Report::open(args, sections, ranks, progress.clone()));
    let report = report.transpose();
    ranks.confirm(report.as_ref().err())?;
    let (mut report, mut bench) = (report?, Bench::new(args, progress));
    for section in sections {
        let on = ranks.describe(section.groups[0].ranks);
        let mut heading = Some([section.heading.clone(), on]);
        for group in &section.groups {
            let records = bench.measure(ranks, group)?;
            let print = |report: &mut Report| report.group(heading.take(), records);
            let printed = report.as_mut().map_or(Ok(()), print);
            ranks.confirm(printed.as_ref().err())?;
            printed?;
        }
    }
    report.map_or(Ok(0), Report::close)
}

/// On a terminal; nothing elsewhere.
fn progress(sections: &[Section], shown: bool) -> ProgressBar {
    if !shown {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:24} {percent:>3}% {elapsed:>4} {wide_msg}");
    let target = ProgressDrawTarget::stderr();
    let bar = ProgressBar::with_draw_target(Some(Bench::steps(sections)), target);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
