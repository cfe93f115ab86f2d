//! Ranks as threads or as processes, and what they report.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use param_averager::{Communicator, Device};

use super::{train, Failure, Options, Point, Task};

/// Trains, and returns rank 0's points. In a process that was started as another rank: none.
///
/// `arguments` start this program again as a rank with the same options.
pub fn run<T: Task>(options: &Options, arguments: &[String]) -> Result<Vec<Point>, Failure> {
    // Ranks share the machine's cores, so that one rank computes on one core.
    std::env::set_var("RAYON_NUM_THREADS", "1");
    if Communicator::is_launched() {
        let communicator = Communicator::from_env(Device::cpu())?;
        let is_first = communicator.rank() == 0;
        let points = train::<T>(communicator, options)?;
        return Ok(if is_first { points } else { vec![] });
    }
    match options.processes {
        true => processes(options.ranks, arguments),
        false => threads::<T>(options),
    }
}

fn threads<T: Task>(options: &Options) -> Result<Vec<Point>, Failure> {
    let world = Communicator::from_devices(&vec![Device::cpu(); options.ranks])?;
    std::thread::scope(|scope| {
        let ranks: Vec<_> = world
            .into_iter()
            .map(|communicator| scope.spawn(move || train::<T>(communicator, options)))
            .collect();
        let join =
            |rank: std::thread::ScopedJoinHandle<'_, _>| rank.join().expect("a rank panicked");
        let points: Result<Vec<_>, Failure> = ranks.into_iter().map(join).collect();
        Ok(points?.swap_remove(0))
    })
}

/// Starts this program as every rank, as torchrun would. Rank 0 prints its points as CSV.
fn processes(ranks: usize, arguments: &[String]) -> Result<Vec<Point>, Failure> {
    let program = std::env::current_exe()?;
    static WORLDS: AtomicUsize = AtomicUsize::new(0);
    let world = WORLDS.fetch_add(1, Ordering::Relaxed);
    let name = format!("candle-{}-{world}", std::process::id());
    let started: Result<Vec<_>, _> = (0..ranks)
        .map(|rank| {
            let mut command = Command::new(&program);
            command.args(arguments).stdout(Stdio::piped());
            command.env("RANK", rank.to_string()).env("WORLD_SIZE", ranks.to_string());
            command.env("PARAM_AVERAGER_RENDEZVOUS", &name).spawn()
        })
        .collect();
    let mut points = vec![];
    for (rank, process) in started?.into_iter().enumerate() {
        let output = process.wait_with_output()?;
        if !output.status.success() {
            return Err(format!("the process of rank {rank} failed: {}", output.status).into());
        }
        for point in csv::Reader::from_reader(&output.stdout[..]).deserialize() {
            points.push(point?);
        }
    }
    Ok(points)
}

/// An example's `main`: trains as the command line says, and prints a row for each test.
pub fn main<T: Task>(options: &Options) -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let points = run::<T>(options, &arguments)?;
    let mut rows = csv::Writer::from_writer(std::io::stdout().lock());
    points.iter().try_for_each(|point| rows.serialize(point))?;
    Ok(rows.flush()?)
}
