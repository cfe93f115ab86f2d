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
    /// End without a text: the process of another rank has failed with this exit code and printed
    /// why, or (0) the reader of standard output has seen enough, as in `allreduce-bench | head`.
    #[error("another rank failed")]
    Silent(u8),
}

impl From<io::Error> for Failure {
    /// Failure of standard output.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::Silent(0),
            _ => Failure::Failed(format!("cannot write to standard output: {error}")),
        }
    }
}

impl Failure {
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) | Failure::Library(param_averager::Error::InvalidOption { .. }) => 2,
            Failure::Silent(code) => *code,
            _ => 1,
        }
    }
}
