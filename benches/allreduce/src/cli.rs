//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args as Group, Parser, ValueEnum};
use param_averager::{Algorithm, Dtype, Link, Outer};

use crate::number;

const EXAMPLES: &str = "\
Examples:
  allreduce-bench
      what to expect here: GPT-2, then a sweep of sizes; under a minute
  allreduce-bench -b 1K -e 1G -g 4
      sizes doubling from 1K to 1G, 4 ranks
  allreduce-bench -b 64M -e 64M -d all --baseline
      one size in every dtype, against the baselines
  allreduce-bench --layout resnet50 -g 2,4 --algorithm direct,ring --baseline --plot resnet50.svg
      a model, and its bars in a picture
  allreduce-bench --layout gpt2 -g 2,4 --algorithm direct,ring --outer
      what a step of an outer optimizer adds to an average
  allreduce-bench --layout llama3-8b --scale 0.05
      a model that does not fit in memory, at a 20th of its size
  allreduce-bench --layout model.safetensors --csv out.csv
      the tensors of your own checkpoint; only its header is read
  allreduce-bench --backend cuda --layout gpt2 -g 2 --algorithm direct,ring --baseline
      on GPUs, beside NCCL and what copies take
  allreduce-bench --processes --layout gpt2 -g 4
      one process a rank, beside the same ring between threads
  allreduce-bench --devices
      which GPUs there are, and whether they reach each other

Columns are those of nccl-tests' all_reduce_perf, in place, since averaging is in place:
  time     median over iterations, in us: from the release of all ranks to the end of the last one;
           min and max beside it
  algbw    size / time in GB/s (10^9 bytes); busbw = algbw * 2(n-1)/n
  #wrong   elements of any rank that are further from the mean in f64 than rounding allows, or
           differ between ranks
  xlimit   time / time of the one-pass limit: all cores read all replicas once and write the mean
           to all, nothing else

With --backend cuda rank r is on device r, or on r modulo the number of devices where there are
more ranks than devices (CUDA_VISIBLE_DEVICES chooses). What is different there:
  direct   is for ranks on one device; on several, auto is the ring
  time     the slowest rank's, from an event before the call to one behind its last kernel, on a
           stream of its own
  ulp      the largest error of all elements, in ulp of the dtype at the largest of the n inputs,
           against the f64 mean
  xlimit   time / time of the row \"device copy\": every rank reads and writes its size once within
           its device
  flatten  flatten+ring+unflatten moves by one launch of a kernel each way, copies+ring+copies by a
           cuMemcpyDtoDAsync a tensor each way
  NCCL     grouped: in place, all tensors in one group. flatten: by the same kernel. avg: ncclAvg.
           sum+scale: ncclSum, then a kernel of the bench's multiplies by 1/n, on the way out of
           the flat buffer if there is one. The library is libnccl.so.2, libnccl.so, or what
           PA_NCCL_LIB names; it is tried in a process of its own first. Several ranks on one GPU
           need 2.30.3; one process a rank with distinct NCCL_HOSTID, for older ones, isn't built
  pinned host both ways
           every rank copies its size from page-locked memory of the host, and to it at the same
           time
On a simulated device (cudasim) there are no times.

With --processes this program starts a process for each rank, or is one if a launcher started it:
torchrun --no-python, mpirun, srun, or a shell that sets RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. Rank 0 prints. What is different there:
  xthr     time / that of the same ring between threads of one process, in the same run

Exit code: 0 if all is well, 1 if an average failed or #wrong is not 0, 2 if the command line can't
be right.";

/// Times the averaging of model parameters over ranks, in place, with the flags and columns of
/// nccl-tests.
///
/// Without flags: GPT-2's 148 tensors on 2 and 4 ranks, all algorithms and baselines, then a sweep
/// of sizes. Ranks are threads of this process, each with a replica of its own.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Args {
    #[command(flatten)]
    pub sizes: Sizes,
    #[command(flatten)]
    pub what: What,
    #[command(flatten)]
    pub measuring: Measuring,
    #[command(flatten)]
    pub options: Options,

    /// Internal: whether so many ranks can average with NCCL here.
    #[arg(long, hide = true, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub nccl_probe: Option<u16>,
    /// Internal, for tests: one wrong element in every checked result.
    #[arg(long, hide = true)]
    pub corrupt: bool,
}

#[derive(Clone, Debug, Group)]
#[command(next_help_heading = "Sizes")]
pub struct Sizes {
    /// Smallest size of a sweep, in bytes a rank: 1024, 64K, 32M, 1G [default: 32M]
    #[arg(short = 'b', long = "minbytes", value_name = "SIZE", value_parser = size)]
    pub min: Option<u64>,
    /// Largest size [default: 32M, or the smallest if larger]
    #[arg(short = 'e', long = "maxbytes", value_name = "SIZE", value_parser = size)]
    pub max: Option<u64>,
    /// Fixed increment between sizes
    #[arg(short = 'i', long = "stepbytes", value_name = "SIZE", value_parser = size)]
    #[arg(conflicts_with = "factor")]
    pub step: Option<u64>,
    /// Factor between sizes [default: 2]
    #[arg(short = 'f', long = "stepfactor", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u64).range(2..))]
    pub factor: Option<u64>,
    /// A model instead of sizes: gpt2, resnet50, llama3-8b, FILE.json (a list of {"name", "shape",
    /// "dtype"}) or FILE.safetensors (a checkpoint, of which only the header is read; tensors of
    /// integers are left out)
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["min", "max", "step", "factor"])]
    pub layout: Option<String>,
    /// Shrinks the first dimension of every tensor of the model by this factor, to at least 1: for
    /// what does not fit
    #[arg(long, value_name = "FACTOR", value_parser = scale)]
    #[arg(conflicts_with_all = ["min", "max", "step", "factor"])]
    pub scale: Option<f64>,
}

#[derive(Clone, Debug, Group)]
#[command(next_help_heading = "What is averaged, and how")]
pub struct What {
    /// Ranks, 1 to 16; several with commas [default: 2; 2 and 4 without flags]
    #[arg(short = 'g', long = "ranks", alias = "ngpus", value_name = "N", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=16))]
    pub ranks: Vec<u16>,
    /// float (f32), double (f64), half (f16), bfloat16 (bf16) or all; several with commas [default:
    /// float, or the model's own]
    #[arg(short = 'd', long = "datatype", value_name = "TYPE", value_delimiter = ',')]
    #[arg(value_parser = datatype)]
    pub datatype: Vec<Datatype>,
    /// The reduction: there is one
    #[arg(short = 'o', long = "op", value_name = "OP", default_value = "avg")]
    #[arg(value_parser = ["avg"], hide_possible_values = true)]
    pub op: String,
    /// Where the parameters are: cpu or cuda
    #[arg(long, value_name = "BACKEND", default_value = "cpu", hide_possible_values = true)]
    pub backend: Backend,
    /// Prints the CUDA devices that there are, what lies between them and how much it carries, and
    /// ends: peer access counts as OK when kernels of both exchanged bytes and all were right
    #[arg(long)]
    pub devices: bool,
    /// Every rank is a process of its own, on this host, beside threads: the ring only. -g has one
    /// number, or is the launcher's
    #[arg(long)]
    pub processes: bool,
    /// auto, ring or direct; several with commas. auto is direct where ranks share an address space
    /// [default: auto]
    #[arg(long, value_name = "NAME", value_delimiter = ',', hide_possible_values = true)]
    #[arg(value_parser = PossibleValuesParser::new(["auto", "ring", "direct"]).map(algorithm))]
    pub algorithm: Vec<Algorithm>,
    /// Adds rows measured in the same run: limit (the one-pass limit), two-pass (the same for
    /// averagers that write only when all is summed), per-tensor (a ring for each tensor), flatten
    /// (flatten, ring, unflatten in separate passes), nccl (on CUDA devices), all or none; several
    /// with commas. Without a value: all
    #[arg(long, value_name = "ROWS", value_delimiter = ',', num_args = 0..=1)]
    #[arg(require_equals = true, default_missing_value = "all", hide_possible_values = true)]
    pub baseline: Vec<Baseline>,
    /// Adds rows with an outer optimizer after each average, of ranks that are threads on CPUs:
    /// nesterov or adam; several with commas. Without a value: both. Their numbers make each step
    /// end at the mean, so that the result can be checked; what a step costs does not depend on
    /// them
    #[arg(long, value_name = "NAMES", value_delimiter = ',', num_args = 0..=1)]
    #[arg(require_equals = true, default_missing_values = ["nesterov", "adam"])]
    #[arg(hide_possible_values = true)]
    pub outer: Vec<Step>,
}

#[derive(Clone, Debug, Group)]
#[command(next_help_heading = "Measuring")]
pub struct Measuring {
    /// Iterations that are timed [default: 20; 9 for the models without flags]
    #[arg(short = 'n', long = "iters", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub iterations: Option<u32>,
    /// Iterations before them [default: 5; 1 for the models without flags]
    #[arg(short = 'w', long = "warmup_iters", alias = "warmup-iters", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub warmup: Option<u32>,
    /// Checks every row's result on fresh random data: 1, or 0 to leave it out
    #[arg(short = 'c', long, value_name = "0|1", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u8).range(..=1))]
    pub check: u8,
    /// Writes the rows to a JSON file, a list with one object a row
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Writes the rows to a CSV file
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Draws the rows in an SVG file: bandwidth over size with a line for each method of a sweep,
    /// and a bar for each method of a model
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
}

/// The averager's options, for all rows that use one.
#[derive(Clone, Debug, Default, Group)]
#[command(next_help_heading = "The averager's options")]
pub struct Options {
    /// On CUDA devices, where the ring's mailboxes are: auto, peer (the receiver's memory), pull
    /// (the sender's) or host (page-locked memory of the host) [default: auto]
    #[arg(long, value_name = "LINK", hide_possible_values = true)]
    #[arg(value_parser = PossibleValuesParser::new(["auto", "peer", "pull", "host"]).map(link))]
    pub link: Option<Link>,
    /// The ring writes as it goes, without the vote that makes it all or nothing
    #[arg(long)]
    pub no_commit: bool,
    /// Threads of each rank, 1 to 1024 [default: cores / ranks, at most 8]
    #[arg(long, value_name = "N")]
    pub channels: Option<u32>,
    /// Size of one slot of the ring's mailboxes, 128 to 64M [default: 256K, less for small models]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub chunk: Option<u64>,
    /// Slots of a mailbox, a power of two from 2 to 1024 [default: 4]
    #[arg(long, value_name = "N")]
    pub slots: Option<u32>,
    /// The ring's partial sums of half and bfloat16 travel in their dtype, not as f32
    #[arg(long)]
    pub narrow_wire: bool,
    /// Looks for NaN and infinity before anything is written
    #[arg(long)]
    pub reject_non_finite: bool,
    /// A weighted mean: rank r has the weight r + 1. Baselines stay unweighted
    #[arg(long)]
    pub weighted: bool,
    /// How long a rank waits for another, in seconds [default: 600; 60 for NCCL]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
}

/// A value of `-d`: one, or all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datatype(pub Vec<Dtype>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Baseline {
    All,
    None,
    Limit,
    TwoPass,
    PerTensor,
    Flatten,
    Nccl,
}

/// The step of an outer optimizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Step {
    Nesterov,
    Adam,
}

impl Step {
    /// The optimizer, with numbers by which its result is the mean: θ − (θ − w̄), with the
    /// roundings of two subtractions. Adam's τ absorbs √s, and is absorbed by the rate.
    pub fn outer(self) -> Outer {
        const TAU: f64 = (1u64 << 60) as f64;
        match self {
            Step::Nesterov => Outer::nesterov(1.0, 0.0),
            Step::Adam => Outer::adam(TAU, 0.0, 0.0, TAU),
        }
    }

    /// Values of its state for each element: θ, and what the optimizer remembers.
    pub fn state(self) -> u64 {
        match self {
            Step::Nesterov => 2,
            Step::Adam => 3,
        }
    }
}

fn algorithm(name: String) -> Algorithm {
    match name.as_str() {
        "ring" => Algorithm::Ring,
        "direct" => Algorithm::Direct,
        _ => Algorithm::Auto,
    }
}

fn link(name: String) -> Link {
    match name.as_str() {
        "peer" => Link::Peer,
        "pull" => Link::Pull,
        "host" => Link::Host,
        _ => Link::Auto,
    }
}

/// Bytes: a number, and K, M, G or T for powers of 1024, as nccl-tests reads them; KB and KiB mean
/// the same.
pub fn size(text: &str) -> Result<u64, String> {
    match parse_size::Config::new().with_binary().parse_size(text) {
        Ok(0) => Err("a size is at least 1 byte".into()),
        Ok(bytes) if bytes < 1 << 48 => Ok(bytes),
        Ok(_) | Err(parse_size::Error::PosOverflow) => Err("larger than any memory".into()),
        Err(_) => Err("a size is a number and K, M, G or nothing, such as 64K".into()),
    }
}

fn datatype(text: &str) -> Result<Datatype, String> {
    match text {
        "all" => Ok(Datatype(Dtype::ALL.to_vec())),
        _ => number::dtype(text).map(|dtype| Datatype(vec![dtype])).ok_or_else(|| {
            "use float (f32), double (f64), half (f16), bfloat16 (bf16) or all".into()
        }),
    }
}

fn scale(text: &str) -> Result<f64, String> {
    let scale: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if scale > 0.0 && scale <= 1.0 {
        Ok(scale)
    } else {
        Err("it shrinks: larger than 0 and at most 1, such as 0.1".into())
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|e| format!("{e}"))?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err("a number of seconds larger than 0, such as 30 or 0.5".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("1", 1),
            ("1000", 1000),
            ("1K", 1024),
            ("1k", 1024),
            ("64KB", 65536),
            ("32M", 32 << 20),
            ("2MiB", 2 << 20),
            ("1G", 1 << 30),
            ("3T", 3 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "0", "-1", "1X", "1KK", "999999999999999999999", "17592186044416T"] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lists_and_optional_values() {
        let parse = |line: &str| Args::try_parse_from(line.split_whitespace());
        let line = "bench -g 2,4 -d half,f64 --algorithm ring,direct --baseline --layout gpt2";
        let What { ranks, datatype, algorithm, baseline, .. } = parse(line).unwrap().what;
        assert_eq!(ranks, [2, 4]);
        assert_eq!(datatype, [Dtype::F16, Dtype::F64].map(|dtype| Datatype(vec![dtype])));
        assert_eq!(
            (&algorithm[..], &baseline[..]),
            (&[Algorithm::Ring, Algorithm::Direct][..], &[Baseline::All][..])
        );
        assert_eq!(parse("bench --outer").unwrap().what.outer, [Step::Nesterov, Step::Adam]);
        assert_eq!(parse("bench --outer=adam").unwrap().what.outer, [Step::Adam]);
        assert_eq!(parse("bench --baseline=limit,flatten").unwrap().what.baseline.len(), 2);
        let wrong = "-g 0;-g 17;-d int8;-o sum;-c 2;-n 0;-f 1;-i 1K -f 2;--layout gpt2 -b 1K;\
            --scale 0;--scale 2;--scale 0.5 -b 1K;--timeout 0;--backend tpu;--link tcp;--outer=sgd;\
            --nonsense";
        for line in wrong.split(';') {
            assert!(parse(&format!("bench {line}")).is_err(), "{line}");
        }
    }
}
