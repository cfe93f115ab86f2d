//! Communicators of worlds whose members change. In other worlds nobody joins or departs, and no
//! view follows the first.

use std::sync::Weak;
use std::time::Duration;

use super::{Communicator, Elastic, Rebuild};
use crate::{Error, Result};

impl Communicator {
    pub(super) fn elastic(&self) -> Option<&dyn Elastic> {
        self.bootstrap.elastic()
    }

    pub(crate) fn has_joiner(&self) -> bool {
        self.elastic().is_some_and(Elastic::has_joiner)
    }

    pub(crate) fn has_joined(&self) -> bool {
        self.elastic().is_some_and(Elastic::has_joined)
    }

    pub(crate) fn has_lost_a_member(&self) -> bool {
        self.elastic().is_some_and(Elastic::has_lost_a_member)
    }

    pub(crate) fn view(&self) -> u32 {
        self.elastic().map_or(0, Elastic::view)
    }

    pub(crate) fn register(&self, averager: Weak<dyn Rebuild>) {
        self.elastic().into_iter().for_each(|elastic| elastic.register(averager.clone()));
    }

    pub(crate) fn rebuild(&self, averages: Option<&str>, timeout: Duration) -> Result<()> {
        match self.elastic() {
            Some(elastic) => elastic.rebuild(self, averages, timeout),
            None => Err(Error::RecoveryUnsupported { rank: self.rank() }),
        }
    }

    pub(crate) fn is_superseded(&self) -> bool {
        self.elastic().is_some_and(Elastic::is_superseded)
    }

    pub(crate) fn is_new(&self) -> bool {
        self.elastic().is_some_and(Elastic::is_new)
    }

    pub(crate) fn lacks_model(&self) -> bool {
        self.elastic().is_some_and(Elastic::lacks_model)
    }

    pub(crate) fn has_model(&self) {
        self.elastic().into_iter().for_each(Elastic::has_model);
    }

    /// Leaves the world after a failure that this process cannot recover from.
    pub(crate) fn leave(&self) {
        self.elastic().into_iter().for_each(Elastic::leave);
    }

    pub(crate) fn not_admitted(&self) -> Error {
        let reason = "the members have built an averager without admitting this process: call \
            ParamAverager::admit_joiner on every member"
            .into();
        let rendezvous = self.elastic().map(|elastic| elastic.world().name().to_owned());
        Error::JoinRefused { rendezvous: rendezvous.unwrap_or_default(), reason }
    }
}
