//! Identity of a world of processes.

use std::fmt;
use std::time::SystemTime;

/// Identity of a world of processes: its name, and the process that began it. Tells worlds of one
/// name apart. The same on every rank. See [`Communicator::world`](crate::Communicator::world).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorldId {
    pub(super) name: String,
    pub(super) process: String,
    pub(super) pid: Option<u32>,
    pub(super) job: String,
    pub(super) since: SystemTime,
    pub(super) others: usize,
}

impl WorldId {
    /// The name that the ranks gave, or that was made from the variables of their launcher.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The id of the process that was rank 0 when the world began. That process may have ended.
    /// `None` if it belongs to another PID namespace.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// The job of that process, as text: the launcher's job id, or the parent process.
    pub fn job(&self) -> &str {
        &self.job
    }

    /// The time at which all ranks had arrived, by the clock of that process.
    pub fn since(&self) -> SystemTime {
        self.since
    }

    /// The number of other worlds of this name that
    /// [`Communicator::join`](crate::Communicator::join) found.
    ///
    /// Their rank 0 has departed: a rank 0 that lives keeps the name. Always 0 on ranks that did
    /// not join later.
    pub fn others(&self) -> usize {
        self.others
    }
}

impl fmt::Display for WorldId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let WorldId { name, process, job, since, others, .. } = self;
        let seconds = since.elapsed().unwrap_or_default().as_secs();
        write!(f, "the world {name:?} that {process} ({job}) began {seconds} s ago")?;
        match others {
            0 => Ok(()),
            others => write!(f, ", one of {} worlds of this name", others + 1),
        }
    }
}
