//! Communicators: the membership of a rank in its world, by threads of one process or by processes
//! of one host.

mod bootstrap;
mod communicator;
mod control;
mod exchange;
mod gather;
mod handshake;
mod host_place;
mod in_process;
#[cfg(processes)]
#[cfg_attr(docsrs, doc(cfg(all(target_os = "linux", feature = "processes"))))]
mod launched;
mod placement;
#[cfg(processes)]
mod processes;
mod run;
#[cfg_attr(docsrs, doc(cfg(all(target_os = "linux", feature = "processes"))))]
mod world_id;

pub use bootstrap::AbortHandle;
pub(crate) use bootstrap::{Bootstrap, Rebuild};
pub use communicator::Communicator;
pub(crate) use control::{Control, MetWeight};
pub(crate) use exchange::{ExchangeId, Shown, MOST_WORDS};
pub(crate) use handshake::{Admission, Agreement, Handshake};
pub(crate) use host_place::HostPlace;
#[cfg(processes)]
pub use launched::CommunicatorBuilder;
pub(crate) use placement::Placement;
#[cfg(all(processes, feature = "__testing"))]
pub use processes::testing;
pub use world_id::WorldId;
