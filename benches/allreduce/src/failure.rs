//! What ends the bench early, and its exit code.

use std::io;

/// 2 is for a command line that can't be right, 1 for everything that went wrong, as elsewhere.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The command line.
    #[error("{0}")]
    Usage(String),
    /// A file, memory.
    #[error("{0}")]
    Failed(String),
    /// The library said no.
    #[error("{0}")]
    Library(#[from] param_averager::Error),
    /// A process of one of the ranks has said why it failed, and with which exit code.
    #[error("a rank failed")]
    Told(u8),
    /// Standard output.
    #[error("cannot write to standard output: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) | Failure::Library(param_averager::Error::InvalidOption { .. }) => 2,
            Failure::Told(code) => *code,
            // Whoever reads has seen enough, as in `allreduce-bench | head`.
            Failure::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            _ => 1,
        }
    }

    /// Whether there is anything to tell.
    pub fn is_silent(&self) -> bool {
        match self {
            Failure::Told(_) => true,
            Failure::Output(error) => error.kind() == io::ErrorKind::BrokenPipe,
            _ => false,
        }
    }
}
