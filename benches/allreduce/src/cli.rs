//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Parser, ValueEnum};
use param_averager::Dtype;

use crate::number;

const EXAMPLES: &str = "\
Examples:
  allreduce-bench                                  what to expect here: GPT-2, then a sweep of sizes; under a minute
  allreduce-bench -b 1K -e 1G -g 4                 sizes doubling from 1K to 1G, 4 ranks
  allreduce-bench -b 64M -e 64M -d all --baseline  one size in every dtype, against the baselines
  allreduce-bench --layout resnet50 -g 2,4 --algorithm direct,ring --baseline
  allreduce-bench --layout llama3-8b --scale 0.05  a model that does not fit in memory, at a 20th of its size
  allreduce-bench --layout model.safetensors --csv out.csv
                                                   the tensors of your own checkpoint; only its header is read
  allreduce-bench --backend cuda --layout gpt2 -g 2 --algorithm direct,ring --baseline
                                                   on GPUs, beside NCCL and what copies take
  allreduce-bench --processes --layout gpt2 -g 4   one process a rank, beside the same ring between threads
  allreduce-bench --devices                        which GPUs there are, and whether they reach each other

Columns are those of nccl-tests' all_reduce_perf, in place, since averaging is in place:
  time     median over iterations, in us: from the release of all ranks to the end of the last one; min and max beside it
  algbw    size / time in GB/s (10^9 bytes); busbw = algbw * 2(n-1)/n
  #wrong   elements of any rank that are further from the mean in f64 than rounding allows, or differ between ranks
  xlimit   time / time of the one-pass limit: all cores read all replicas once and write the mean to all, nothing else

With --backend cuda rank r is on device r, or on r modulo the number of devices where there are more ranks than devices
(CUDA_VISIBLE_DEVICES chooses). What is different there:
  direct   is for ranks on one device; on several, auto is the ring
  time     the slowest rank's, from an event before the call to one behind its last kernel, on a stream of its own
  ulp      the largest error of all elements, in ulp of the dtype at the largest of the n inputs, against the f64 mean
  xlimit   time / time of the row \"device copy\": every rank reads and writes its size once within its device
  flatten  flatten+ring+unflatten moves by one launch of a kernel each way, copies+ring+copies by a cuMemcpyDtoDAsync a
           tensor each way
  NCCL     grouped: in place, all tensors in one group. flatten: by the same kernel. avg: ncclAvg. sum+scale: ncclSum,
           then a kernel of the bench's multiplies by 1/n, on the way out of the flat buffer if there is one. The library is
           libnccl.so.2, libnccl.so, or what PA_NCCL_LIB names; it is tried in a process of its own first. Several ranks on
           one GPU need 2.30.3; one process a rank with distinct NCCL_HOSTID, for older ones, isn't built
  pinned host both ways
           every rank copies its size from page-locked memory of the host, and to it at the same time
On a simulated device (cudasim) there are no times.

With --processes this program starts a process for each rank, or is one if a launcher started it: torchrun --no-python, mpirun, srun, or a
shell that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Rank 0 prints. What is different there:
  xthr     time / that of the same ring between threads of one process, in the same run

Exit code: 0 if all is well, 1 if an average failed or #wrong is not 0, 2 if the command line can't be right.";

/// Times the averaging of model parameters over ranks, in place, with the flags and columns of
/// nccl-tests.
///
/// Without flags: GPT-2's 148 tensors on 2 and 4 ranks, all algorithms and baselines, then a sweep
/// of sizes. Ranks are threads of this process, each with a replica of its own.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = EXAMPLES, max_term_width = 110)]
pub struct Args {
    /// Smallest size of a sweep, in bytes a rank: 1024, 64K, 32M, 1G [default: 32M]
    #[arg(short = 'b', long = "minbytes", value_name = "SIZE", value_parser = size, help_heading = "Sizes")]
    pub min: Option<u64>,
    /// Largest size [default: 32M, or the smallest if larger]
    #[arg(short = 'e', long = "maxbytes", value_name = "SIZE", value_parser = size, help_heading = "Sizes")]
    pub max: Option<u64>,
    /// Fixed increment between sizes
    #[arg(short = 'i', long = "stepbytes", value_name = "SIZE", value_parser = size, help_heading = "Sizes")]
    #[arg(conflicts_with = "factor")]
    pub step: Option<u64>,
    /// Factor between sizes [default: 2]
    #[arg(short = 'f', long = "stepfactor", value_name = "N", help_heading = "Sizes")]
    #[arg(value_parser = clap::value_parser!(u64).range(2..))]
    pub factor: Option<u64>,
    /// A model instead of sizes: gpt2, resnet50, llama3-8b, FILE.json (a list of {"name", "shape",
    /// "dtype"}) or FILE.safetensors (a checkpoint, of which only the header is read; tensors of
    /// integers are left out)
    #[arg(long, value_name = "MODEL", help_heading = "Sizes", conflicts_with_all = ["min", "max", "step", "factor"])]
    pub layout: Option<String>,
    /// Shrinks the first dimension of every tensor of the model by this factor, to at least 1: for
    /// what does not fit
    #[arg(long, value_name = "FACTOR", value_parser = scale, help_heading = "Sizes")]
    #[arg(conflicts_with_all = ["min", "max", "step", "factor"])]
    pub scale: Option<f64>,

    /// Ranks, 1 to 16; several with commas [default: 2; 2 and 4 without flags]
    #[arg(short = 'g', long = "ranks", alias = "ngpus", value_name = "N", value_delimiter = ',')]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=16), help_heading = "What is averaged, and how")]
    pub ranks: Vec<u16>,
    /// float (f32), double (f64), half (f16), bfloat16 (bf16) or all; several with commas [default:
    /// float, or the model's own]
    #[arg(short = 'd', long = "datatype", value_name = "TYPE", value_delimiter = ',', value_parser = datatype)]
    #[arg(help_heading = "What is averaged, and how")]
    pub datatype: Vec<Datatype>,
    /// The reduction: there is one
    #[arg(
        short = 'o',
        long = "op",
        value_name = "OP",
        default_value = "avg",
        hide_possible_values = true
    )]
    #[arg(help_heading = "What is averaged, and how")]
    pub op: Op,
    /// Where the parameters are: cpu or cuda
    #[arg(long, value_name = "BACKEND", default_value = "cpu", hide_possible_values = true)]
    #[arg(help_heading = "What is averaged, and how")]
    pub backend: Backend,
    /// Prints the CUDA devices that there are and what lies between them, and ends: peer access
    /// counts as OK when bytes were moved both ways and were right
    #[arg(long, help_heading = "What is averaged, and how")]
    pub devices: bool,
    /// Every rank is a process of its own, on this host, beside threads: the ring only. -g has one
    /// number, or is the launcher's
    #[arg(long, help_heading = "What is averaged, and how")]
    pub processes: bool,
    /// On CUDA devices, where the ring's mailboxes are: auto, peer (device memory) or host
    /// (page-locked memory of the host) [default: auto]
    #[arg(
        long,
        value_name = "LINK",
        hide_possible_values = true,
        help_heading = "What is averaged, and how"
    )]
    pub link: Option<Link>,
    /// auto, ring or direct; several with commas. auto is direct where ranks share an address space
    /// [default: auto]
    #[arg(long, value_name = "NAME", value_delimiter = ',', hide_possible_values = true)]
    #[arg(help_heading = "What is averaged, and how")]
    pub algorithm: Vec<Algorithm>,
    /// Adds rows measured in the same run: limit (the one-pass limit), two-pass (the same for
    /// averagers that write only when all is summed), per-tensor (a ring for each tensor), flatten
    /// (flatten, ring, unflatten in separate passes), nccl (on CUDA devices), all or none; several
    /// with commas. Without a value: all
    #[arg(long, value_name = "ROWS", value_delimiter = ',', num_args = 0..=1, require_equals = true)]
    #[arg(
        default_missing_value = "all",
        hide_possible_values = true,
        help_heading = "What is averaged, and how"
    )]
    pub baseline: Vec<Baseline>,

    /// Iterations that are timed [default: 20; 9 for the models without flags]
    #[arg(short = 'n', long = "iters", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    #[arg(help_heading = "Measuring")]
    pub iterations: Option<u32>,
    /// Iterations before them [default: 5; 1 for the models without flags]
    #[arg(
        short = 'w',
        long = "warmup_iters",
        alias = "warmup-iters",
        value_name = "N",
        help_heading = "Measuring"
    )]
    #[arg(value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    pub warmup: Option<u32>,
    /// Checks every row's result on fresh random data: 1, or 0 to leave it out
    #[arg(short = 'c', long, value_name = "0|1", default_value_t = 1, value_parser = clap::value_parser!(u8).range(..=1))]
    #[arg(help_heading = "Measuring")]
    pub check: u8,
    /// Writes the rows to a JSON file, a list with one object a row
    #[arg(long, value_name = "FILE", help_heading = "Measuring")]
    pub json: Option<PathBuf>,
    /// Writes the rows to a CSV file
    #[arg(long, value_name = "FILE", help_heading = "Measuring")]
    pub csv: Option<PathBuf>,

    /// The ring writes as it goes, without the vote that makes it all or nothing
    #[arg(long, help_heading = "The averager's options")]
    pub no_commit: bool,
    /// Threads of each rank, 1 to 1024 [default: cores / ranks, at most 8]
    #[arg(long, value_name = "N", help_heading = "The averager's options")]
    pub channels: Option<u32>,
    /// Size of one slot of the ring's mailboxes, 128 to 64M [default: 256K, less for small models]
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "The averager's options")]
    pub chunk: Option<u64>,
    /// Slots of a mailbox, a power of two from 2 to 1024 [default: 4]
    #[arg(long, value_name = "N", help_heading = "The averager's options")]
    pub slots: Option<u32>,
    /// The ring's partial sums of half and bfloat16 travel in their dtype, not as f32
    #[arg(long, help_heading = "The averager's options")]
    pub narrow_wire: bool,
    /// Looks for NaN and infinity before anything is written
    #[arg(long, help_heading = "The averager's options")]
    pub reject_non_finite: bool,
    /// A weighted mean: rank r has the weight r + 1. Baselines stay unweighted
    #[arg(long, help_heading = "The averager's options")]
    pub weighted: bool,
    /// How long a rank waits for another, in seconds [default: 600; 60 for NCCL]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "The averager's options")]
    pub timeout: Option<Duration>,

    /// For this bench itself: whether so many ranks can average with NCCL here.
    #[arg(long, hide = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    pub nccl_probe: Option<u16>,
    /// For this bench's own tests: one wrong element in every checked result.
    #[arg(long, hide = true, action = ArgAction::SetTrue)]
    pub sabotage: bool,
}

/// Of `-d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datatype {
    All,
    One(Dtype),
}

/// Of `-o`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Op {
    Avg,
}

/// Of `--backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    Cpu,
    Cuda,
}

/// Of `--link`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Link {
    Auto,
    Peer,
    Host,
}

/// Of `--algorithm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Algorithm {
    Auto,
    Ring,
    Direct,
}

/// Of `--baseline`.
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

/// Bytes: a number, and K, M, G or T for powers of 1024, as nccl-tests reads them; KB and KiB mean
/// the same.
pub fn size(text: &str) -> Result<u64, String> {
    let bare = text.trim_end_matches(['b', 'B']).trim_end_matches('i');
    let digits = bare.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match bare[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("a size is a number and K, M, G or nothing, such as 64K".into()),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "a size is a whole number and K, M, G or nothing, such as 64K")?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err("a size is at least 1 byte".into()),
        Some(bytes) if bytes < 1 << 48 => Ok(bytes),
        _ => Err("larger than any memory".into()),
    }
}

fn datatype(text: &str) -> Result<Datatype, String> {
    match text {
        "all" => Ok(Datatype::All),
        _ => number::dtype(text).map(Datatype::One).ok_or_else(|| {
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
        for text in
            ["", "K", "0", "-1", "1.5M", "1X", "1KK", "999999999999999999999", "17592186044416T"]
        {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn lists_and_optional_values() {
        let parse = |line: &str| Args::try_parse_from(line.split_whitespace());
        let args =
            parse("bench -g 2,4 -d half,f64 --algorithm ring,direct --baseline --layout gpt2")
                .unwrap();
        assert_eq!(args.ranks, [2, 4]);
        assert_eq!(args.datatype, [Datatype::One(Dtype::F16), Datatype::One(Dtype::F64)]);
        assert_eq!((args.algorithm.len(), &args.baseline[..]), (2, &[Baseline::All][..]));
        assert_eq!(parse("bench --baseline=limit,flatten").unwrap().baseline.len(), 2);
        for line in [
            "-g 0",
            "-g 17",
            "-d int8",
            "-o sum",
            "-c 2",
            "-n 0",
            "-f 1",
            "-i 1K -f 2",
            "--layout gpt2 -b 1K",
            "--scale 0",
            "--scale 2",
            "--scale 0.5 -b 1K",
            "--timeout 0",
            "--backend tpu",
            "--nonsense",
        ] {
            assert!(parse(&format!("bench {line}")).is_err(), "{line}");
        }
    }
}
