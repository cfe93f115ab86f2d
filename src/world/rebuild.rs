//! Averagers that a process has to build again in the next view of its world.

use super::Communicator;
use crate::Result;

/// Everything that an averager can be built from again. The world knows those of its process.
pub(crate) trait Rebuild: Send + Sync + std::fmt::Debug {
    /// Identifies the averager: the same on every rank and in every view.
    fn ordinal(&self) -> &str;

    /// Builds its successor. Collective. `number` is its place among all that are built again.
    ///
    /// An error means that the view has lost a rank. What concerns this averager alone is kept for
    /// it.
    fn rebuild(&self, communicator: &Communicator, number: u32) -> Result<()>;

    /// Notes that there is no successor, since rank `rank` does not have the averager any more.
    fn refuse(&self, communicator: &Communicator, rank: usize);
}
