//! The control plane of a rank in one view of its world: small messages to all ranks, aborts,
//! departures and view changes. Never tensor data.

use std::fmt::Debug;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::exchange::{ExchangeId, Shown};
use super::handshake::{Agreement, Handshake};
use super::placement::Placement;
use super::world_id::WorldId;
use crate::{Error, Result};

/// Name of the call that exchanges handshakes, for notices.
pub(crate) const BUILD: &str = "build an averager";

/// Membership of one rank in one view. Dropping it leaves the world.
pub(crate) trait Bootstrap: Debug + Send + Sync {
    fn rank(&self) -> usize;

    fn placement(&self) -> &Placement;

    /// Exchanges handshakes with all ranks and returns them if they agree. Collective. `number`
    /// identifies an averager that is [built again](Rebuild); `None` stands for the next build of
    /// this view. An error of one rank is an error on every rank. Ranks of one process share the
    /// result.
    fn agree(
        &self,
        handshake: Handshake,
        number: Option<u32>,
        timeout: Duration,
    ) -> Result<Arc<Agreement>>;

    /// Shows a message to all ranks and returns the messages of all, by rank. Collective, for at
    /// most `timeout`. `has_left` tells whether a rank has dropped the averager.
    ///
    /// An error does not end the world; see [`fail`](Self::fail).
    fn all_gather(
        &self,
        id: ExchangeId,
        shown: Shown,
        timeout: Duration,
        has_left: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<Shown>>;

    /// Ends the world for this rank, and for the others that are threads, after an exchange that
    /// only some ranks have completed.
    fn fail(&self, error: &Error);

    /// Registers an averager, so that departures and aborts end its waits. An error if the world
    /// has been aborted and the averager can't be told.
    fn watch(&self, agreement: &Arc<Agreement>) -> Result<()>;

    /// Handle that aborts the world from any thread, while this rank is in it.
    fn abort_handle(&self) -> AbortHandle;

    /// Forms the next view of the surviving ranks. Collective. Admits a joiner if all ranks pass
    /// `admits`. The default is that of worlds whose members never change.
    fn change_view(&self, _timeout: Duration, _admits: bool) -> Result<Arc<dyn Bootstrap>> {
        Err(Error::RecoveryUnsupported { rank: self.rank() })
    }

    /// The part that only worlds with view changes have.
    fn elastic(&self) -> Option<&dyn Elastic> {
        None
    }
}

/// The control plane of a world whose members change.
pub(crate) trait Elastic {
    fn world(&self) -> &WorldId;

    /// Number of this view.
    fn view(&self) -> u32;

    /// True if this process has entered a later view. One relaxed load.
    fn is_superseded(&self) -> bool;

    /// True if a member of this view has departed, or has left the view for the next one, or an
    /// averager of this view has failed for good, as far as this rank knows.
    fn has_lost_a_member(&self) -> bool;

    /// True if a joiner waits to be admitted, as far as this rank knows. One relaxed load.
    fn has_joiner(&self) -> bool;

    /// True if a joiner was admitted with this view.
    fn has_joined(&self) -> bool;

    /// True if this rank is the joiner of this view.
    fn is_new(&self) -> bool;

    /// True if this process has joined and not received a model yet.
    fn lacks_model(&self) -> bool;

    /// Records that the joiner of this view has received the model.
    fn has_model(&self);

    /// Leaves the world, so that peers do not wait for this process.
    fn leave(&self);

    /// Registers an averager of this process, so that a view change can build it again.
    fn register(&self, averager: Weak<dyn Rebuild>);

    /// Builds all averagers of this process again, unless this view has built them already.
    /// Collective. The first averager that recovers calls this for all. `averages` is the ordinal
    /// of the averager that this rank averages next. `own` is this membership.
    fn rebuild(
        &self,
        own: &Arc<dyn Bootstrap>,
        averages: Option<&str>,
        timeout: Duration,
    ) -> Result<()>;
}

/// Content of an [`AbortHandle`]. It does not keep the rank in its world.
pub(crate) trait Abort: Debug + Send + Sync {
    /// Ends the world, unless the rank has left it.
    fn abort(&self);
}

/// Ends a world from any thread. Every rank that waits, or averages later, gets [`Error::Aborted`].
#[derive(Clone, Debug)]
pub struct AbortHandle {
    pub(super) of: Arc<dyn Abort>,
}

impl AbortHandle {
    /// Ends the world. Does not wait for the other ranks. An average that has not been committed
    /// leaves every tensor unchanged. Further calls have no effect.
    pub fn abort(&self) {
        self.of.abort();
    }
}

/// The recipe of an averager, kept by the world for all averagers of the process.
pub(crate) trait Rebuild: Send + Sync + Debug {
    /// Identifier of the averager, the same on every rank and in every view.
    fn ordinal(&self) -> &str;

    /// Builds the averager for the new view. Collective. `number` is the position of the averager
    /// among all that are built again.
    ///
    /// An error means that the view has lost a rank. An error of this averager alone is stored in
    /// it.
    fn rebuild(&self, bootstrap: &Arc<dyn Bootstrap>, number: u32) -> Result<()>;

    /// Records that the averager cannot be built again, since `rank` has dropped its own.
    fn refuse(&self, bootstrap: &Arc<dyn Bootstrap>, rank: usize);
}
