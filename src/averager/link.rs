//! Where mailboxes live.

use crate::backend::cuda::PeerAccess;
use crate::backend::{Memory, MemorySpace};
use crate::world::Placement;
use crate::Error;

/// Where the mailbox between two neighbours of the ring lives, on CUDA devices. On CPUs all memory
/// is one. All of it holds for ranks that are threads and for ranks that are processes, which open
/// each other's device memory by CUDA IPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Link {
    /// `Peer` where it works, which is found out by moving bytes, else `Host`: for each two
    /// neighbours by itself.
    Auto,
    /// In the receiver's device memory: the sender writes over NVLink or PCIe (P2P), or has the
    /// same device.
    Peer,
    /// In page-locked memory of the host, which both devices map: the sender writes over PCIe and
    /// the receiver reads over PCIe.
    Host,
}

impl Link {
    /// Whether the mailbox between these ranks is in memory of the host.
    pub(super) fn is_host(self, placement: &Placement, rank: usize, other: usize) -> bool {
        match self {
            Link::Auto => placement.peers(rank, other) != PeerAccess::Verified,
            Link::Peer => false,
            Link::Host => true,
        }
    }

    /// Whether any is.
    pub(super) fn is_host_anywhere(self, placement: &Placement) -> bool {
        neighbours(placement).any(|(rank, next)| self.is_host(placement, rank, next))
    }

    /// Why it can't be had.
    pub(super) fn refusal(
        self,
        placement: &Placement,
        rank: usize,
        space: &MemorySpace,
    ) -> Option<Error> {
        let refuse = |found| {
            let expected = "Auto, or Host, which works everywhere";
            Some(Error::InvalidOption { rank, option: "link", found, expected })
        };
        if self != Link::Peer {
            return None;
        }
        if matches!(space, MemorySpace::Host) {
            return refuse("Peer, which is for CUDA devices".into());
        }
        let (rank, next, access) = neighbours(placement)
            .map(|(rank, next)| (rank, next, placement.peers(rank, next)))
            .find(|&(_, _, access)| access != PeerAccess::Verified)?;
        let why = match access {
            PeerAccess::Broken => {
                "the driver says that they do, but bytes that were moved to try it were lost"
            }
            _ if placement.between_processes() => {
                "the driver says so, or lends no memory to other processes (CUDA IPC)"
            }
            _ => "the driver says so",
        };
        refuse(format!(
            "Peer, but the devices of ranks {rank} and {next} don't reach each other's memory: \
             {why}"
        ))
    }

    /// Memory for what a neighbour writes: zeroed.
    pub(super) fn place(
        is_host: bool,
        placement: &Placement,
        space: &MemorySpace,
        bytes: usize,
    ) -> Result<Memory, String> {
        #[cfg(target_os = "linux")]
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

/// Each rank and the next one.
fn neighbours(placement: &Placement) -> impl Iterator<Item = (usize, usize)> + '_ {
    let order = placement.order();
    (0..order.len()).map(|position| (order[position], order[(position + 1) % order.len()]))
}
