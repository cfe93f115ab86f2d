//! Shared parts of the test programs: the harness, ranks as threads and as processes, data between
//! guard bytes, the oracle, and the simulated CUDA driver. `tests/README.md` says which program a
//! test belongs in.

mod guarded;
mod harness;
pub mod layout;
mod needs;
#[cfg(target_os = "linux")]
pub mod network;
pub mod notices;
mod options;
mod oracle;
#[cfg(target_os = "linux")]
pub mod process;
mod random;
#[cfg(target_os = "linux")]
pub mod rank;
pub mod simulator;
mod supervise;
mod threads;

pub use guarded::{bits, guards_are_whole, put, Guarded, GUARD};
pub use harness::{main, main_with_threads, partly, says_more, Skip, Test};
pub use needs::{compiler, gpu_kernels, shared_library, tool};
pub use options::options;
pub use oracle::{fnv1a, format, mean, ulp};
pub use random::{count, seed, stress, Random};
pub use supervise::{output_within, Ended};
pub use threads::{ranks, ranks_of, ranks_on};
