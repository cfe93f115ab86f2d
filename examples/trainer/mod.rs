//! Parts that trainers of the digits share: the data, each rank's part of it, options, and ranks
//! that are threads or processes.

#[path = "../launch/mod.rs"]
mod launch;

#[cfg(not(target_os = "linux"))]
use launch::Processes as _;
use param_averager::{Communicator, Device, Outer};

/// Pixels of an image, 0 to 1.
pub const PIXELS: usize = 64;
/// Digits.
pub const CLASSES: usize = 10;

/// Any error of a trainer's.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// An image, and the digit that it shows.
#[derive(Clone, Copy)]
pub struct Sample {
    pub pixels: [f32; PIXELS],
    pub digit: u8,
}

/// Handwritten digits; see `examples/data/README.md`.
pub struct Data {
    pub train: Vec<Sample>,
    pub test: Vec<Sample>,
}

impl Data {
    pub fn digits() -> Data {
        let mut data = Data { train: vec![], test: vec![] };
        for (index, line) in include_str!("../data/digits.txt").lines().enumerate() {
            let bytes = line.as_bytes();
            let pixels = std::array::from_fn(|at| f32::from(bytes[at] - b'a') / 16.0);
            let sample = Sample { pixels, digit: bytes[PIXELS] - b'0' };
            if index % 5 == 0 { &mut data.test } else { &mut data.train }.push(sample);
        }
        data
    }

    /// A rank's part of the training data: as many samples on every rank, so that all ranks make
    /// equally many steps.
    pub fn shard(&self, rank: usize, ranks: usize, sorted: bool) -> Vec<Sample> {
        let (mut all, each) = (self.train.clone(), self.train.len() / ranks);
        if sorted {
            all.sort_by_key(|sample| sample.digit);
            return all[rank * each..(rank + 1) * each].to_vec();
        }
        all.into_iter().skip(rank).step_by(ranks).take(each).collect()
    }
}

/// Random numbers that depend on a seed alone.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// `count` numbers between -`bound` and `bound`.
    #[allow(dead_code)] // Frameworks have initial weights of their own.
    pub fn uniform(&mut self, count: usize, bound: f32) -> Vec<f32> {
        let mut number = || (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..count).map(|_| number() * bound).collect()
    }

    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for at in (1..values.len()).rev() {
            values.swap(at, (self.next() % (at as u64 + 1)) as usize);
        }
    }
}

/// Options of a run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of ranks.
    pub ranks: usize,
    /// Steps from one average to the next, H.
    pub every: u64,
    pub seed: u64,
    pub epochs: usize,
    /// Samples in an optimizer step of one rank.
    pub batch: usize,
    /// True if ranks are processes, false if they are threads.
    pub processes: bool,
    /// True if each rank sees some digits only.
    pub sorted: bool,
    pub outer: Outer,
}

impl Options {
    const USAGE: &str = "[--ranks N] [--every H] [--seed S] [--epochs N] [--processes] [--sorted] \
        [--outer diloco|slowmo|ease(0.5)|...]";

    /// Settings of the command line.
    pub fn from_arguments() -> Result<Options, Error> {
        let mut options = Options {
            ranks: 2,
            every: 8,
            seed: 1,
            epochs: 20,
            batch: 16,
            processes: false,
            sorted: false,
            outer: Outer::mean(),
        };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let mut number = || -> Result<u64, Error> {
                let value = arguments.next().and_then(|value| value.parse().ok());
                value.ok_or_else(|| format!("{name} needs a number: {}", Self::USAGE).into())
            };
            match name.as_str() {
                "--ranks" => options.ranks = number()? as usize,
                "--every" => options.every = number()?,
                "--seed" => options.seed = number()?,
                "--epochs" => options.epochs = number()? as usize,
                "--batch" => options.batch = number()?.max(1) as usize,
                "--processes" => options.processes = true,
                "--sorted" => options.sorted = true,
                "--outer" => options.outer = arguments.next().unwrap_or_default().parse()?,
                _ => return Err(format!("{name} is no option: {}", Self::USAGE).into()),
            }
        }
        Ok(options)
    }
}

/// A model after training.
pub struct Trained {
    /// Part of the test data that it gets right.
    pub accuracy: f64,
    /// Mean cross entropy over the training data of all ranks.
    pub loss: f64,
    /// Averages that were made.
    pub averages: u64,
}

/// Trains with the ranks that the options ask for, and prints what rank 0 has in the end. Under a
/// launcher this process is one rank.
pub fn run(
    trainer: &str,
    options: Options,
    train: impl Fn(Communicator) -> Result<Trained, Error> + Sync,
) -> Result<(), Error> {
    let timed = |communicator: Communicator| -> Result<(), Error> {
        let (rank, ranks) = (communicator.rank(), communicator.world_size());
        let start = std::time::Instant::now();
        let Trained { accuracy, loss, averages } = train(communicator)?;
        if rank == 0 {
            let Options { every, seed, outer, .. } = options;
            println!(
                "{trainer}: {ranks} ranks, H {every}, {outer}, seed {seed}: accuracy {:.2} %, \
                 train loss {loss:.4}, {averages} averages, {:.2} s",
                accuracy * 100.0,
                start.elapsed().as_secs_f64()
            );
        }
        Ok(())
    };
    if Communicator::is_launched() {
        return timed(Communicator::from_env(Device::cpu())?);
    }
    if options.processes {
        let ranks = (0..options.ranks).map(|rank| launch::start(rank, options.ranks));
        for process in ranks.collect::<Vec<_>>() {
            if !process?.wait()?.success() {
                return Err("a rank failed".into());
            }
        }
        return Ok(());
    }
    Communicator::run(&vec![Device::cpu(); options.ranks], timed)?;
    Ok(())
}
