//! Which world a rank is in, among those that may have its name.

use std::fmt;
use std::time::SystemTime;

/// Identity of a world of processes: its name, and the process that began it. The same on every
/// rank. See [`Communicator::world`](crate::Communicator::world).
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
    /// The name that its ranks gave, or that was made of their launcher's variables.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process that was rank 0 when the world began, which may have ended. `None`: it is in
    /// another PID namespace, where numbers mean other processes.
    pub fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// The job of that process, in words: its launcher's name for it, or the process that has
    /// started it.
    pub fn job(&self) -> &str {
        &self.job
    }

    /// When all ranks had met, by that process's clock.
    pub fn since(&self) -> SystemTime {
        self.since
    }

    /// Other worlds of the name that [`Communicator::join`](crate::Communicator::join) found beside the one that
    /// it entered: those whose rank 0 is gone, since a rank 0 keeps the name. 0 on ranks that have
    /// begun a world.
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
