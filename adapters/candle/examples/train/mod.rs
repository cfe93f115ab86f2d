//! Local SGD of a task with candle: what the examples share. `train` is the whole loop.

pub mod chars;
pub mod clock;
pub mod digits;
pub mod outer;
pub mod plot;
pub mod record;
pub mod telemetry;
pub mod world;

use std::f64::consts::PI;
use std::path::PathBuf;

use candle_core::{DType, Device, Result as Candle, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use clap::{Args, ValueEnum};
use param_averager::{
    Communicator, Compression, LocalSgd, Outer, Overlap, ParamAverager, Report, Schedule,
};
use param_averager_candle::VarParams;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// Error of an example; it comes from candle, the averager or the system.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// A model, its loss on a rank's part of the data, and its test.
pub trait Task: Sized {
    /// Name in records.
    const NAME: &'static str;
    /// Rate of AdamW, the same for any number of ranks.
    const LEARNING_RATE: f64;
    /// Samples of a batch of one rank.
    const BATCH: usize;
    /// Steps of one rank after which all ranks together have seen the data so often, roughly.
    fn steps(epochs: f64, ranks: usize) -> u64;
    /// Model with new variables of `vars`, and the part of the data that is this rank's.
    fn new(vars: VarBuilder<'_>, rank: usize, options: &Options) -> Candle<Self>;
    /// Loss of the model on the next batch of this rank.
    fn next_loss(&mut self) -> Candle<Tensor>;
    /// Loss and accuracy on data that no rank trains on.
    fn test(&self) -> Candle<(f32, f32)>;
}

/// One training run. All its ranks have the same options.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Number of ranks, each with a copy of the model
    #[arg(long, default_value_t = 2)]
    pub ranks: usize,
    /// H: optimizer steps between two averages, or what it is at first
    #[arg(long, default_value_t = 8)]
    pub every: u64,
    /// Passes over the data of all ranks together
    #[arg(long, default_value_t = 1.0)]
    pub epochs: f64,
    /// Order of batches, and initial weights
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Data of one rank: a mixture, or samples of few labels
    #[arg(long, value_enum, default_value_t = Shards::Mixed)]
    pub shards: Shards,
    /// Initial weights: of the seed, or of candle's own generator, which has no seed on CPUs
    #[arg(long, value_enum, default_value_t = Init::Seed)]
    pub init: Init,
    /// Outer optimizer: mean, diloco, slowmo, "nesterov(0.7, 0.9)", "ease(0.5)", …
    #[arg(long, default_value_t = Outer::mean())]
    pub outer: Outer,
    /// Parts of the model that are averaged one at a time
    #[arg(long, default_value_t = 1)]
    pub fragments: u32,
    /// Steps that training goes on while an average is made
    #[arg(long, default_value_t = 0)]
    pub delay: u64,
    /// Share of an average's change that a rank does not take over; needs a delay
    #[arg(long, default_value_t = 0.0)]
    pub alpha: f64,
    /// Code in which differences from the last average travel
    #[arg(long, value_enum, default_value_t = Codec::Full)]
    pub codec: Codec,
    /// Rule for H
    #[arg(long, value_enum, default_value_t = Rule::Every)]
    pub schedule: Rule,
    /// Learning rate: constant, or half a cosine that ends at 0
    #[arg(long)]
    pub cosine: bool,
    /// Each rank as a process instead of a thread
    #[arg(long)]
    pub processes: bool,
    /// File of comma-separated values with a line for each average of rank 0
    #[arg(long)]
    pub telemetry: Option<PathBuf>,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shards {
    Mixed,
    Sorted,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// Always the same H
    #[default]
    Every,
    /// The quadratic synchronization rule; H at the highest learning rate
    Quadratic,
    /// 5 % of the time for averages, whatever H is
    Overhead,
    /// No rank's parameters more than 5 % away from the mean, whatever H is
    Divergence,
}

#[derive(ValueEnum, Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// Values in full
    #[default]
    Full,
    Bf16,
    Int8,
}

impl Codec {
    fn compression(self) -> Compression {
        match self {
            Codec::Full => Compression::None,
            Codec::Bf16 => Compression::Bf16,
            Codec::Int8 => Compression::Int8,
        }
    }
}

impl Options {
    pub fn overlap(&self) -> Overlap {
        Overlap::default().fragments(self.fragments).delay(self.delay).alpha(self.alpha)
    }
}

impl Rule {
    fn schedule(self, every: u64, highest_rate: f64) -> Schedule {
        match self {
            Rule::Every => Schedule::every(every),
            Rule::Quadratic => Schedule::quadratic(highest_rate * (every as f64).sqrt(), every),
            Rule::Overhead => Schedule::overhead(Schedule::OVERHEAD),
            Rule::Divergence => Schedule::divergence(Schedule::DIVERGENCE),
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    Seed,
    Candle,
}

/// State of training after so many steps of a rank.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Point {
    pub step: u64,
    pub averages: u64,
    /// Bytes that each rank has sent, by a ring: 2 (n - 1) / n times what an average is made of.
    pub bytes_sent: f64,
    pub test_loss: f32,
    pub test_accuracy: f32,
    /// Median time that a step took on a core so far, averages aside.
    pub step_ms: f64,
}

/// Steps between two tests. A multiple of every H that is plotted, so that a test finds all ranks
/// with one model.
const TEST_EVERY: u64 = 64;

/// Trains as one rank.
pub fn train<T: Task>(
    communicator: Communicator,
    options: &Options,
) -> Result<Vec<Point>, Failure> {
    let (rank, ranks) = (communicator.rank(), communicator.world_size());
    let varmap = VarMap::new();
    let vars = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
    let mut task = T::new(vars, rank, options)?;
    let mut params = VarParams::new(&varmap)?;
    if options.init == Init::Seed {
        initialize(&params, options.seed)?;
    }
    let rate = ParamsAdamW { lr: T::LEARNING_RATE, ..Default::default() };
    let mut optimizer = AdamW::new(varmap.all_vars(), rate)?;

    let has_telemetry = options.telemetry.is_some() || options.schedule == Rule::Divergence;
    let builder = ParamAverager::builder(communicator).outer(options.outer);
    let builder = builder.overlap(options.overlap()).compression(options.codec.compression());
    let averager = builder.telemetry(has_telemetry).build(&mut params)?;
    let mut log = telemetry::Log::new(options.telemetry.as_deref().filter(|_| rank == 0))?;
    let mut sgd =
        LocalSgd::new(averager, options.schedule.schedule(options.every, T::LEARNING_RATE));

    let (mut points, mut times, mut averaged) = (vec![], vec![], 0.0);
    let sent = |report: &Report| report.bytes as f64 * report.compression.ratio();
    let steps = T::steps(options.epochs, ranks);
    for step in 0..=steps {
        if step % TEST_EVERY == 0 || step == steps {
            if step == steps {
                let last = sgd.finish(&mut params)?;
                averaged += last.report().map_or(0.0, sent);
            }
            // Rank 0 reports. Where H is fixed, all ranks hold the same model now.
            let (test_loss, test_accuracy) = if rank == 0 { task.test()? } else { (0.0, 0.0) };
            points.push(Point {
                step,
                averages: sgd.averages(),
                bytes_sent: 2.0 * (ranks - 1) as f64 / ranks as f64 * averaged,
                test_loss,
                test_accuracy,
                step_ms: clock::median(&mut times),
            });
        }
        if step < steps {
            let done = step as f64 / steps as f64;
            let share = if options.cosine { (1.0 + (PI * done).cos()) / 2.0 } else { 1.0 };
            let rate = T::LEARNING_RATE * share;
            optimizer.set_learning_rate(rate);
            let start = clock::busy();
            optimizer.backward_step(&task.next_loss()?)?;
            times.push(clock::busy() - start);
            if let Some(report) = sgd.step_with(&mut params, rate)?.report() {
                averaged += sent(report);
                log.average(step + 1, report)?;
            }
        }
    }
    Ok(points)
}

/// The same weights for the same seed: uniform with the variance that He et al. give, and no bias.
fn initialize(params: &VarParams, seed: u64) -> Candle<()> {
    let mut random = StdRng::seed_from_u64(seed);
    for (name, var) in params.iter() {
        let bound = match var.dims() {
            _ if name.contains("embedding") => 0.05,
            [_, inputs] => (3.0 / *inputs as f32).sqrt(),
            _ if name.ends_with("bias") => 0.0,
            _ => continue, // A gain stays 1.
        };
        let count = var.elem_count();
        let values: Vec<f32> = (0..count).map(|_| random.random_range(-bound..=bound)).collect();
        var.set(&Tensor::from_vec(values, var.dims(), var.device())?)?;
    }
    Ok(())
}
