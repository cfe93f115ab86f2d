//! Makes n copies of a model agree: averages their parameters across ranks, in place, every so many
//! optimizer steps (Local SGD).
//!
//! ```
//! use param_averager::{Communicator, Device, LocalSgd, ParamAverager, Result, Schedule};
//!
//! fn train(communicator: Communicator) -> Result<()> {
//!     let rank = communicator.rank() as f32;
//!     let mut params = vec![vec![0.0f32; 1000], vec![0.0; 10]];
//!     // Every rank begins with rank 0's values.
//!     let averager = ParamAverager::builder(communicator).build(&mut params)?;
//!     params[1].fill(rank);
//!     let mut sgd = LocalSgd::new(averager, Schedule::every(8));
//!     for _batch in 0..100 {
//!         // train_step(&mut params, batch);
//!         sgd.step(&mut params)?; // averages when due
//!     }
//!     sgd.finish(&mut params)?; // the last average
//!     assert_eq!(params[1], [0.5; 10]);
//!     Ok(())
//! }
//!
//! // Two ranks that are threads of this process, each with a model of its own.
//! Communicator::run(&[Device::cpu(), Device::cpu()], train)?;
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! * [`Communicator`] is one rank's membership of a world, whose ranks are threads
//!   ([`from_devices`](Communicator::from_devices)) or processes
//!   ([`from_env`](Communicator#method.from_env)).
//! * [`ParamAverager`] averages a model's tensors, plainly or weighted. A list of tensors
//!   ([`Parameters`], [`TensorMut`]) is a model; a framework's tensors are lent ([`Lend`]).
//! * [`LocalSgd`] counts optimizer steps and averages when its [`Schedule`] says so. An [`Outer`]
//!   optimizer makes a step from the mean.
#![cfg_attr(
    feature = "cuda",
    doc = "* [`adapters::cudarc`]: cudarc's slices, averaged on a cudarc stream ([`CudaParams`])."
)]
//! * [`Error`] names the rank and the tensor, and says what to do. If an average fails before any
//!   rank wrote, no tensor of any rank has changed.
//! * [`guide`] has short pages on frameworks, processes, streams, failures, joining, several hosts,
//!   Local SGD in practice, outer optimizers and accuracy.
//!
//! Sums are made in f32 (f64 for f64) in a fixed order, so all ranks end with the same bits, unless
//! they [keep a share](Outer::keeping) of their own values. Nothing is allocated and no system call
//! is made while averaging on CPUs, waiting and other hosts aside; [`guide`] has one exception
//! more.
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `cuda` | yes | ranks on CUDA devices: the dependencies cudarc and libloading, the GPU kernels, `adapters::cudarc` |
//! | `processes` | yes | ranks that are processes of one host; Linux only |
//! | `tracing` | yes | averages, and notices of long waits, as events of the crate `tracing`; without it, notices are lines on standard error |
//! | `metrics` | no | averages as counters, gauges and histograms of the crate `metrics` |
//! | `mpi` | no | `MpiHosts`, the link between hosts over MPI: an MPI with its compiler wrapper, and libclang, to build |
//! | `nccl` | no | `NcclHosts`, the link between hosts over NCCL 2.27.3 or later, loaded at run time; brings `cuda` |
//! | `serde` | no | `SavedState`, a state of [`LocalSgd`] as a field of a trainer's own checkpoint |
//! | `half` | yes | slices of `half::f16` and `half::bf16`; tensors of raw parts need no feature |
//!
//! Without any of them this is a CPU library for threads, f32 and f64. With `cuda`, the GPU kernels
//! are compiled if nvcc is found: in `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `PATH`, `/usr/local/cuda` or
//! the active virtual environment (`pip install
//! "cuda-toolkit[nvcc,cudart,cccl,crt,nvvm]==13.0.2"`). Without nvcc the crate builds with a
//! warning, and CUDA devices are [`Error::DeviceUnavailable`]; `NVCC=` (empty) says that this is
//! meant, without a warning, and `PARAM_AVERAGER_REQUIRE_NVCC=1` makes it an error.
//! `CUDA_COMPUTE_CAP=90` (or a list, `80,9.0`) chooses architectures; the default are those of 80,
//! 90, 100 and 120 that nvcc knows, and PTX of the oldest and the newest. `build.rs` has all
//! variables.
//!
//! # Platforms
//!
//! | ranks | Linux x86-64 | Linux aarch64 | macOS, Windows |
//! |---|---|---|---|
//! | threads, on CPUs | tested | not run | not tried |
//! | processes, on CPUs | tested | not run | no |
//! | processes of several hosts | tested in network namespaces of one machine | not run | no |
//! | threads, on CUDA devices | simulated only: no GPU has run it | not run | not tried |
//! | processes, on CUDA devices | simulated only: no GPU has run it | not run | no |
//!
//! A C++ compiler (g++ or clang++) is needed to build. x86-64 chooses AVX-512, AVX2 or the baseline
//! when it runs; aarch64 has plain vector code.
//!
//! # What blocks, and what can deadlock
//!
//! | call | waits for | limit |
//! |---|---|---|
//! | `Communicator::from_env`, `CommunicatorBuilder::build` | all ranks to start | `CommunicatorBuilder::timeout` |
//! | `MpiHosts::new` | all ranks of all hosts | MPI's own |
//! | an average of all hosts ([`Builder::hosts`]) | the ranks of its number on all hosts | half of [`Builder::timeout`], or seven eighths with the exchange |
//! | `Communicator::join` | the members to admit this process | `CommunicatorBuilder::timeout` |
//! | [`Builder::build`], [`ParamAverager::average`] and `start`, [`LocalSgd::finish`], a due [`LocalSgd::step`] or `skip`, `admit_joiner` | every other rank to make the same call | [`Builder::timeout`] for each wait |
//! | `recover` | the ranks that are left to call it | some times [`Builder::timeout`] |
//! | [`Pending::wait`], dropping a [`Pending`] or an averager | enqueued averages to end | as above |
//! | `start` on a CUDA stream that is being captured, or of a process with a device of its own; a step that is not due; `from_devices` | nothing | |
//!
//! Every rank makes the same collective calls in the same order. A rank that waits for a call that
//! can't come gets [`Error::Timeout`], with the name of the late rank, after 10 minutes unless
//! [`Builder::timeout`] says otherwise. It can't come if
//!
//! * two ranks run one after the other on one thread, or on a pool with fewer threads than ranks;
//! * a rank holds a lock in [`Lend::lend`], or elsewhere, that a peer needs before its own call:
//!   give each rank locks of its own;
//! * ranks use two averagers in different orders;
//! * one rank averages and another has left the loop without [`LocalSgd::finish`] but keeps its
//!   averager (a rank that returns or panics drops it, and its peers get [`Error::PeerLost`]).
//!
//! On CUDA devices ranks meet before anything runs there, so no kernel waits for a late rank, and
//! nothing that a trainer calls meanwhile (`cudaMalloc`, `cudaFree`, the first launch of a kernel)
//! waits for an average that waits for it; CUDA graphs aside, see [`guide::streams`].
//!
//! A wait of more than 10 seconds (to meet, join, build, recover or average) is told of, once, with
//! the rank that waits and the ranks that it waits for: as a warning of `tracing`, target
//! `param_averager`, or on standard error if the program has no subscriber. Of averages only waits
//! are told that are twice as long as the longest before, since ranks of unequal speed wait at
//! each. Two more warnings go to `tracing` alone: the ranks that a recovery left out, and the error
//! of an average whose [`Pending`] was dropped.
//!
//! One wait has no limit: once a direct average has begun to write, ranks wait for one another,
//! since a peer may still be writing into their tensors.
//!
//! # What to do with an error
//!
//! ```
//! use param_averager::{Error, ErrorKind, TensorState};
//!
//! /// True if training goes on after `sgd.recover(&mut params)`, by ranks that are processes.
//! fn can_recover(error: &Error) -> bool {
//!     if error.tensors() == TensorState::Unknown {
//!         return false; // the device failed: restore a checkpoint in a new world
//!     }
//!     match error.kind() {
//!         ErrorKind::Peer => error.is_fatal() && !matches!(error, Error::Excluded { .. }),
//!         // A mistake of this program, a difference between ranks, a limit of this machine: no
//!         // retry mends it, and the error says what does.
//!         _ => false,
//!     }
//! }
//! # let lost = Error::Excluded { rank: 1, timeout: std::time::Duration::ZERO };
//! # assert!(!can_recover(&lost));
//! ```
//!
//! [`Error::is_fatal`] tells whether the averager can average again without recovering,
//! [`Error::tensors`] what this rank's tensors hold, and [`guide::failures`] has the rest.

#![deny(unsafe_op_in_unsafe_fn, missing_docs)]
// A build without one of these has code that nothing calls, and types without values.
#![cfg_attr(
    not(all(processes, feature = "cuda")),
    allow(dead_code, unreachable_code, unused_imports, unused_variables),
    allow(rustdoc::broken_intra_doc_links)
)]
#![cfg_attr(docsrs, feature(doc_cfg))]

#[allow(missing_docs, dead_code, clippy::all)]
#[rustfmt::skip]
mod abi;
pub mod adapters;
mod averager;
mod backend;
mod bucket;
mod compression;
mod deadline;
mod device;
mod error;
pub mod guide;
mod hash;
mod hosts;
mod local_sgd;
mod notice;
mod outer;
mod overlap;
mod parameters;
mod plan;
mod saved;
mod schedule;
mod stage;
mod sync;
mod tensor;
mod world;

#[cfg(feature = "cuda")]
pub use adapters::cudarc::{CudaParams, CudaTensorMut};
pub use averager::{
    Algorithm, Builder, Lend, LendError, Link, Loan, Overlapped, ParamAverager, Pending,
    RawCudaParams, Reduction, Report, Start, Telemetry,
};
#[cfg(feature = "cuda")]
pub use backend::cuda::{CudaDevice, Topology};
#[cfg(feature = "cuda")]
pub use backend::proximity::{Connection, PeerAccess, PeerRates};
pub use compression::Compression;
pub use device::Device;
pub use error::{
    DeviceError, Error, ErrorKind, LendSource, Phase, Result, StateError, TensorState,
};
#[cfg(feature = "mpi")]
#[cfg_attr(docsrs, doc(cfg(feature = "mpi")))]
pub use hosts::MpiHosts;
pub use hosts::{Hierarchy, Hosts, HostsError, HostsLimit, ThreadHosts};
#[cfg(feature = "nccl")]
#[cfg_attr(docsrs, doc(cfg(feature = "nccl")))]
pub use hosts::{NcclHosts, NcclId};
#[cfg(feature = "serde")]
#[cfg_attr(docsrs, doc(cfg(feature = "serde")))]
pub use local_sgd::SavedState;
pub use local_sgd::{Action, LocalSgd};
pub use outer::{Outer, ParseOuterError};
pub use overlap::Overlap;
pub use parameters::Parameters;
pub use schedule::Schedule;
pub use stage::{DevicePart, DeviceShard, Part, Shard, Values, Veto};
pub use tensor::{Dtype, Element, TensorMut};
pub use world::{AbortHandle, Communicator};
#[cfg(processes)]
#[cfg_attr(docsrs, doc(cfg(all(target_os = "linux", feature = "processes"))))]
pub use world::{CommunicatorBuilder, WorldId};

/// The programs of README.md, compiled and run by `cargo test --doc`.
#[cfg(all(doctest, target_os = "linux", feature = "processes"))]
#[doc = include_str!("../README.md")]
mod readme {}

/// Kernels that this build of the crate runs on this machine: for a line in a log or a bug report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BuildInfo {
    /// Instruction set of the kernels on CPUs, such as `avx2`: the best that this machine has.
    pub instruction_set: &'static str,
    /// Why the crate was built without the kernels for CUDA devices, if it was.
    pub gpu_kernels: Result<(), &'static str>,
}

impl BuildInfo {
    /// The kernels of this build and this machine.
    pub fn get() -> BuildInfo {
        BuildInfo {
            instruction_set: backend::cpu::instruction_sets()[0].name,
            gpu_kernels: backend::cuda::fatbin().map(drop),
        }
    }
}

/// Hooks of this crate's own tests. Not part of the API.
#[cfg(feature = "__testing")]
#[doc(hidden)]
pub mod __testing {
    pub use crate::averager::Testing;
    pub use crate::notice::testing::set_patience;
    #[cfg(processes)]
    pub use crate::world::testing as rendezvous;

    /// The structures that the kernels share with Rust.
    pub mod abi {
        pub use crate::abi::*;
    }

    /// The checksum of a saved state.
    pub fn checksum(bytes: &[u8]) -> u64 {
        crate::hash::Digest::of(bytes)
    }

    /// The GPU kernels, or why there are none.
    pub fn fatbin() -> Result<&'static [u8], &'static str> {
        crate::backend::cuda::fatbin()
    }

    /// Names of the instruction sets that this machine has, best first.
    pub fn instruction_sets() -> Vec<&'static str> {
        crate::backend::cpu::instruction_sets().into_iter().map(|set| set.name).collect()
    }

    /// Runs one block of one kernel on this thread.
    ///
    /// # Safety
    /// `args` points at memory as `kernels/abi.h` describes it.
    pub unsafe fn run_block_cpu(args: &crate::abi::PaArgs, kernel: u32, channel: u32) {
        let best = crate::backend::cpu::instruction_sets()[0];
        // SAFETY: the caller's.
        unsafe { best.run_block(args, kernel, channel) }
    }
}
