//! Durations of changes of a world of processes, with a model of GPT-2's size: `cargo bench --bench
//! processes`.
//!
//! Each run starts a world of 4 processes, kills one at a different time while they average, and
//! lets another process join. This program is each of the processes. Times are by the monotonic
//! clock of the host, from the first event of any process to the last event of all.
//! `allreduce-bench --processes` measures averages.

#[cfg(target_os = "linux")]
mod common;

#[cfg(not(target_os = "linux"))]
fn main() {
    println!("ranks that are processes need Linux");
}

#[cfg(target_os = "linux")]
fn main() {
    match std::env::var("PA_BENCH_RANK").ok() {
        Some(rank) => linux::rank(&rank),
        None => linux::measure(),
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, ChildStdout, Command, Stdio};
    use std::time::Duration;

    use param_averager::{Communicator, ParamAverager};
    use rustix::time::{clock_gettime, ClockId};

    const RANKS: usize = 4;
    const RUNS: usize = 15;

    /// Time of the host's monotonic clock in milliseconds.
    fn now() -> f64 {
        let time = clock_gettime(ClockId::Monotonic);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32).as_secs_f64() * 1e3
    }

    fn report(what: &str, since: f64) {
        println!("{what} {since} {}", now());
        let _ = std::io::stdout().flush();
    }

    /// Runs a rank, which averages until its standard input is closed.
    pub fn rank(rank: &str) {
        let mut model: Vec<Vec<f32>> =
            super::common::layouts()[0].1.iter().map(|&elements| vec![1.0; elements]).collect();
        // All models exist before any rank starts.
        report("model", 0.0);
        let _ = std::io::stdin().read_line(&mut String::new());
        std::thread::spawn(|| {
            let _ = std::io::stdin().read_line(&mut String::new());
            std::process::exit(0);
        });
        let start = now();
        let name = std::env::var("PA_BENCH_WORLD").unwrap();
        let world = Communicator::builder().rendezvous(name);
        let build = |communicator: Communicator, model: &mut Vec<Vec<f32>>| {
            ParamAverager::builder(communicator).build(model).unwrap()
        };
        let mut averager = match rank.parse() {
            Ok(rank) => {
                let communicator = world.rank(rank).world_size(RANKS).build().unwrap();
                report("met", start);
                let mut averager = build(communicator, &mut model);
                report("built", start);
                averager.average(&mut model).unwrap();
                report("first", start);
                averager
            }
            Err(_) => {
                let communicator = world.join().unwrap();
                let averager = build(communicator, &mut model);
                report("joined", start);
                averager
            }
        };
        loop {
            let result = averager.average(&mut model);
            let ended = now();
            match result {
                Ok(done) if done.join_pending => {
                    averager.admit_joiner(&mut model).unwrap();
                    report("admitted", ended);
                }
                Ok(_) => {}
                Err(_) => {
                    report("failed", ended);
                    averager.recover(&mut model).unwrap();
                    report("recovered", ended);
                    averager.average(&mut model).unwrap();
                    report("again", ended);
                }
            }
        }
    }

    struct Process {
        child: Child,
        lines: std::io::Lines<BufReader<ChildStdout>>,
    }

    impl Process {
        fn start(world: &str, rank: &str) -> Process {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.env("PA_BENCH_RANK", rank).env("PA_BENCH_WORLD", world);
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            Process { child, lines }
        }

        /// Waits for a line, and returns the times of start and end that it reports.
        fn wait_for(&mut self, what: &str) -> (f64, f64) {
            let begin = format!("{what} ");
            let mut lines = self.lines.by_ref().map_while(Result::ok);
            let line =
                lines.find(|line| line.starts_with(&begin)).unwrap_or_else(|| panic!("no {what}"));
            let mut numbers = line.split(' ').skip(1).map(|number| number.parse().unwrap());
            (numbers.next().unwrap(), numbers.next().unwrap())
        }

        fn start_rank(&mut self) {
            self.child.stdin.as_ref().unwrap().write_all(b"\n").unwrap();
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// Time from the first start to the last end.
    fn span(times: impl IntoIterator<Item = (f64, f64)>) -> f64 {
        let (first, last) =
            times.into_iter().fold((f64::MAX, f64::MIN), |(first, last), (begin, end)| {
                (first.min(begin), last.max(end))
            });
        last - first
    }

    pub fn measure() {
        // Every argument is ignored: cargo passes --bench, and a name if one is given.
        let mut rows: Vec<(&str, Vec<f64>)> = [
            "start: all 4 ranks connected",
            "start: all 4 averagers built",
            "start: first average complete on all 4 ranks",
            "death: from the kill to the error of the last survivor",
            "recovery: from the first error to the last new averager",
            "recovery: from the first error to the first average of the 3",
            "join: from the call to the model, with running averages",
            "join: time of the 3 members, with the average",
        ]
        .map(|name| (name, vec![]))
        .into();
        for run in 0..RUNS {
            let times = one(run);
            rows.iter_mut().zip(times).for_each(|((_, all), time)| all.push(time));
            eprintln!("# run {} of {RUNS}: {times:.1?}", run + 1);
        }
        println!(
            "# GPT-2: 148 tensors, 124,439,808 parameters in f32, {RANKS} processes, {RUNS} \
            runs; ms"
        );
        println!("{:68} {:>8} {:>8} {:>8}", "#", "median", "min", "max");
        for (name, mut times) in rows {
            times.sort_by(f64::total_cmp);
            println!("{name:68} {:8.1} {:8.1} {:8.1}", times[RUNS / 2], times[0], times[RUNS - 1]);
        }
    }

    fn one(run: usize) -> [f64; 8] {
        let world = format!("bench-processes-{}-{run}", std::process::id());
        let mut ranks: Vec<Process> =
            (0..RANKS).map(|rank| Process::start(&world, &rank.to_string())).collect();
        for rank in &mut ranks {
            rank.wait_for("model");
        }
        ranks.iter_mut().for_each(Process::start_rank);
        let met = span(ranks.iter_mut().map(|rank| rank.wait_for("met")));
        let built = span(ranks.iter_mut().map(|rank| rank.wait_for("built")));
        let first = span(ranks.iter_mut().map(|rank| rank.wait_for("first")));
        let mut late = Process::start(&world, "late");
        late.wait_for("model");

        // The kill hits an average, at another time in each run.
        std::thread::sleep(Duration::from_millis(300 + 37 * run as u64));
        let mut dead = ranks.remove(run % RANKS);
        let killed = now();
        dead.child.kill().unwrap();
        let failed = span(ranks.iter_mut().map(|rank| (killed, rank.wait_for("failed").1)));
        let recovered = span(ranks.iter_mut().map(|rank| rank.wait_for("recovered")));
        let again = span(ranks.iter_mut().map(|rank| rank.wait_for("again")));

        late.start_rank();
        let joined = span([late.wait_for("joined")]);
        let admitted = span(ranks.iter_mut().map(|rank| rank.wait_for("admitted")));
        [met, built, first, failed, recovered, again, joined, admitted]
    }
}
