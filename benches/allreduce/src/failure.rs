//! Failures that end a run early, and their exit codes.

use std::io;
use std::time::Duration;

/// Exit code 2 is for a command line that can't be right, 1 for everything else.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line.
    #[error("{0}")]
    Usage(String),
    /// A file, memory, a device.
    #[error("{0}")]
    Failed(String),
    /// An error of the library.
    #[error("{0}")]
    Library(#[from] param_averager::Error),
    /// A rank's thread did not return within the limit of NCCL's rows, which alone have one.
    #[error(
        "a rank did not come back within {0:?}; --baseline=limit,per-tensor,flatten is without \
             NCCL"
    )]
    Late(Duration),
    /// The row can't be measured here, which is no failure of the run.
    #[error("{0}")]
    Unmeasured(String),
    /// The process of another rank has failed with this exit code and printed why.
    #[error("another rank failed")]
    Peer(u8),
    /// Standard output.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) | Failure::Library(param_averager::Error::InvalidOption { .. }) => 2,
            Failure::Peer(code) => *code,
            // The reader has seen enough, as in `allreduce-bench | head`.
            Failure::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            _ => 1,
        }
    }

    /// True where there is nothing to print.
    pub fn is_silent(&self) -> bool {
        match self {
            Failure::Peer(_) => true,
            Failure::Output(error) => error.kind() == io::ErrorKind::BrokenPipe,
            _ => false,
        }
    }
}
