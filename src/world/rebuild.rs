//! Interface to the averagers that a process builds again after a view change.

use super::Communicator;
use crate::Result;

/// The recipe of an averager, kept by the world for all averagers of the process.
pub(crate) trait Rebuild: Send + Sync + std::fmt::Debug {
    /// Identifier of the averager, the same on every rank and in every view.
    fn ordinal(&self) -> &str;

    /// Builds the averager for the new view. Collective. `number` is the position of the averager
    /// among all that are built again.
    ///
    /// An error means that the view has lost a rank. An error of this averager alone is stored in
    /// it.
    fn rebuild(&self, communicator: &Communicator, number: u32) -> Result<()>;

    /// Records that the averager cannot be built again, since `rank` has dropped its own.
    fn refuse(&self, communicator: &Communicator, rank: usize);
}
