//! Placement of mailboxes.

use crate::backend::proximity::PeerAccess;
use crate::backend::{Memory, MemorySpace};
use crate::world::{Communicator, Placement};
use crate::Error;

/// Placement of the mailbox between two neighbours of the ring, on CUDA devices. The same for
/// threads and for processes, which open each other's device memory by CUDA IPC. On CPUs there is
/// nothing to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Link {
    /// [`Peer`](Self::Peer) where a probe that does what an average does succeeds, and is not much
    /// slower than other paths; else [`Pull`](Self::Pull), between threads where that is much
    /// faster, or [`Host`](Self::Host). Decided for each two neighbours. The environment variable
    /// `PARAM_AVERAGER_P2P=0` forbids the probe and peer access.
    Auto,
    /// The receiver's device memory: the sender writes over NVLink or PCIe (P2P), or has the same
    /// device.
    Peer,
    /// The sender's device memory: the receiver reads over NVLink or PCIe (P2P), or has the same
    /// device. For fabrics that read faster than they write.
    Pull,
    /// Page-locked memory of the host, mapped by both devices: the sender writes over PCIe, and the
    /// receiver reads over PCIe.
    Host,
}

impl Link {
    /// True if the mailbox between these ranks is in memory of the host.
    pub(super) fn is_host(self, placement: &Placement, rank: usize, other: usize) -> bool {
        match self {
            Link::Auto => {
                !matches!(placement.peers(rank, other), PeerAccess::Verified | PeerAccess::Pull)
            }
            Link::Peer | Link::Pull => false,
            Link::Host => true,
        }
    }

    /// True if the slots between these ranks are in memory of the one that writes them.
    pub(super) fn is_pull(self, placement: &Placement, rank: usize, other: usize) -> bool {
        match self {
            Link::Auto => placement.peers(rank, other) == PeerAccess::Pull,
            Link::Pull => true,
            Link::Peer | Link::Host => false,
        }
    }

    /// True if any mailbox is in memory of the host.
    pub(super) fn is_host_anywhere(self, placement: &Placement) -> bool {
        neighbours(placement).any(|(rank, next)| self.is_host(placement, rank, next))
    }

    /// Error of a link that these devices do not have.
    pub(super) fn refusal(self, communicator: &Communicator) -> Option<Error> {
        let (placement, rank) = (communicator.placement(), communicator.rank());
        let refuse = |found| {
            let expected = "Auto, or Host, which works everywhere";
            Some(Error::InvalidOption { rank, option: "link", found, expected })
        };
        if !matches!(self, Link::Peer | Link::Pull) {
            return None;
        }
        if matches!(communicator.space(), MemorySpace::Host) {
            return refuse(format!("{self:?}, which is for CUDA devices"));
        }
        let (rank, next, access) = neighbours(placement)
            .map(|(rank, next)| (rank, next, placement.peers(rank, next)))
            .find(|&(_, _, access)| !access.works())?;
        let why = match access {
            PeerAccess::Broken => {
                "the driver says that they do, but bytes that were moved to try it were lost"
            }
            PeerAccess::Disabled => "PARAM_AVERAGER_P2P=0 forbids it",
            _ if placement.between_processes() => {
                "the driver says so, or lends no memory to other processes (CUDA IPC)"
            }
            _ => "the driver says so",
        };
        refuse(format!(
            "{self:?}, but the devices of ranks {rank} and {next} don't reach each other's memory: \
             {why}"
        ))
    }

    /// Zeroed memory that a neighbour accesses.
    pub(super) fn place(
        is_host: bool,
        placement: &Placement,
        space: &MemorySpace,
        bytes: usize,
    ) -> Result<Memory, String> {
        #[cfg(processes)]
        if placement.between_processes() {
            return match space {
                MemorySpace::Cuda(context) if !is_host => Memory::exportable(context, bytes),
                space => Memory::between_processes(space, bytes),
            };
        }
        if is_host {
            Memory::of_the_host(space, bytes)
        } else {
            Memory::new(space, bytes)
        }
    }
}

/// Pairs of each rank and the next one in the ring.
fn neighbours(placement: &Placement) -> impl Iterator<Item = (usize, usize)> + '_ {
    let order = placement.order();
    (0..order.len()).map(|position| (order[position], order[(position + 1) % order.len()]))
}
