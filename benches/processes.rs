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
    match std::env::var(test_support::process::ROLE) {
        Ok(rank) => linux::rank(&rank),
        Err(_) => linux::measure(),
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::time::Duration;

    use param_averager::{Communicator, ParamAverager, Start};
    use rustix::time::{clock_gettime, ClockId};
    use test_support::process::{self, RankProcess};

    const RANKS: usize = 4;
    const RUNS: usize = 15;

    /// Time of the host's monotonic clock in milliseconds.
    fn now() -> f64 {
        let time = clock_gettime(ClockId::Monotonic);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32).as_secs_f64() * 1e3
    }

    fn report(what: &str, since: f64) {
        test_support::rank::say(&format!("{what} {since} {}", now()));
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
        let name = std::env::var("PA_TEST_NAME").unwrap();
        let world = Communicator::builder().rendezvous(name);
        let build = |communicator: Communicator, model: &mut Vec<Vec<f32>>| {
            ParamAverager::builder(communicator)
                .start_from(Start::Own)
                .allow_unnamed()
                .build(model)
                .unwrap()
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

    /// `role`: its rank, or `late`.
    fn start(world: &str, role: &str) -> RankProcess {
        process::start(role, &[("PA_TEST_NAME", world.to_owned())])
    }

    /// Waits for a line: what began, and what ended.
    fn hear(process: &mut RankProcess, what: &str) -> (f64, f64) {
        let line = process.wait_for_within(&format!("{what} "), Duration::from_secs(600));
        let mut numbers = line.split(' ').map(|number| number.parse().unwrap());
        (numbers.next().unwrap(), numbers.next().unwrap())
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
        let mut ranks: Vec<RankProcess> =
            (0..RANKS).map(|rank| start(&world, &rank.to_string())).collect();
        for rank in &mut ranks {
            hear(rank, "model");
        }
        ranks.iter_mut().for_each(RankProcess::ask_to_end);
        let met = span(ranks.iter_mut().map(|rank| hear(rank, "met")));
        let built = span(ranks.iter_mut().map(|rank| hear(rank, "built")));
        let first = span(ranks.iter_mut().map(|rank| hear(rank, "first")));
        let mut late = start(&world, "late");
        hear(&mut late, "model");

        // The kill hits an average, at another time in each run.
        std::thread::sleep(Duration::from_millis(300 + 37 * run as u64));
        let mut dead = ranks.remove(run % RANKS);
        let killed = now();
        dead.child.kill().unwrap();
        let told = span(ranks.iter_mut().map(|rank| (killed, hear(rank, "failed").1)));
        let recovered = span(ranks.iter_mut().map(|rank| hear(rank, "recovered")));
        let again = span(ranks.iter_mut().map(|rank| hear(rank, "again")));

        late.ask_to_end();
        let joined = span([hear(&mut late, "joined")]);
        let admitted = span(ranks.iter_mut().map(|rank| hear(rank, "admitted")));
        [met, built, first, told, recovered, again, joined, admitted]
    }
}
