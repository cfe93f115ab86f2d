//! Makes n copies of a model agree: averages their parameters across ranks, in place, every so many
//! optimizer steps (Local SGD).
//!
//! ```
//! use param_averager::{Device, LocalSgd, ParamAverager, Schedule, Communicator};
//!
//! // Two ranks that are threads of this process, each with a model of its own.
//! let world = Communicator::from_devices(&[Device::cpu(), Device::cpu()])?;
//! std::thread::scope(|scope| {
//!     for communicator in world {
//!         scope.spawn(move || -> param_averager::Result<()> {
//!             let mut params = vec![vec![0.0f32; 1000], vec![communicator.rank() as f32; 10]];
//!             let averager = ParamAverager::builder(communicator).build(&mut params)?;
//!             let mut sgd = LocalSgd::new(averager, Schedule::every(8));
//!             for _batch in 0..100 {
//!                 // train_step(&mut params, batch);
//!                 sgd.step(&mut params)?; // averages when due
//!             }
//!             sgd.finish(&mut params)?; // the last average
//!             assert_eq!(params[1], [0.5; 10]);
//!             Ok(())
//!         });
//!     }
//! });
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! * [`Communicator`] is one rank's membership of a world, whose ranks are threads
//!   ([`Communicator::from_devices`]) or processes ([`Communicator::from_env`]).
//! * [`ParamAverager`] averages a list of tensors ([`Parameters`], [`TensorMut`]): plainly, or
//!   weighted.
//! * [`LocalSgd`] counts optimizer steps and averages when its [`Schedule`] says so.
#![cfg_attr(
    feature = "cuda",
    doc = "* [`adapters::cudarc`]: cudarc's slices, averaged on a cudarc stream ([`CudaParams`])."
)]
//! * [`Error`] says which rank and which tensor, and what to do. If an average fails before any
//!   rank wrote, no tensor of any rank has changed.
//!
//! Sums are made in f32 (f64 for f64) in a fixed order, so all ranks end with the same bits.
//! Nothing is allocated and no system call is made while averaging on CPUs, waiting aside.

#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

#[allow(missing_docs, dead_code, clippy::all)]
#[rustfmt::skip]
mod abi;
pub mod adapters;
mod averager;
mod backend;
mod bucket;
mod deadline;
mod error;
mod hash;
mod local_sgd;
mod parameters;
mod schedule;
mod sync;
mod tensor;
mod world;

#[cfg(feature = "cuda")]
pub use adapters::cudarc::{CudaParams, CudaTensorMut};
pub use averager::{
    Algorithm, Builder, Lend, LendError, Link, Loan, ParamAverager, Pending, RawCudaParams, Report,
};
pub use backend::cuda::{Connection, CudaDevice, PeerAccess, Topology};
pub use error::{DeviceError, Error, ErrorKind, Phase, Result, TensorState};
pub use local_sgd::{Action, LocalSgd};
pub use parameters::Parameters;
pub use schedule::Schedule;
pub use tensor::{Dtype, Element, TensorMut};
pub use world::{AbortHandle, Communicator, Device};
#[cfg(target_os = "linux")]
pub use world::{CommunicatorBuilder, WorldId};

/// For `fuzz/` in the repository.
#[cfg(all(fuzzing, target_os = "linux"))]
#[doc(hidden)]
pub use world::fuzz as __fuzz;

/// What this build of the crate runs on this machine: for a line in a log or a bug report.
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

    /// The structures that the kernels share with Rust.
    pub mod abi {
        pub use crate::abi::*;
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
    /// What `args` points at is as `kernels/abi.h` describes it.
    pub unsafe fn run_block_cpu(args: &crate::abi::PaArgs, kernel: u32, channel: u32) {
        let best = crate::backend::cpu::instruction_sets()[0];
        // SAFETY: the caller's.
        unsafe { best.run_block(args, kernel, channel) }
    }
}
