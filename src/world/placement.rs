//! The placement of a world's ranks: their devices, the distances between them, and the ring order.

use std::collections::{BTreeMap, BTreeSet};

use crate::backend::cuda::{self, Context};
use crate::backend::proximity::{all_pairs, Connection, PeerAccess};
use crate::backend::{MemorySpace, ProcessWay};
use crate::{Device, Error, Result};

/// Placement of all ranks, computed once for a view.
#[derive(Debug)]
pub(crate) struct Placement {
    devices: Vec<Device>,
    /// Memory space of each rank. For processes, every entry is the space of this process.
    spaces: Vec<MemorySpace>,
    /// Peer access between every two ranks, indexed by rank and rank.
    peers: Vec<Vec<PeerAccess>>,
    /// True if every two ranks share a device, or have devices that NVLink connects.
    joined: bool,
    /// True if the direct average is possible: the ranks are threads, and every device can access
    /// the memory of every other.
    reaches_all: bool,
    /// Ranks in ring order.
    order: Vec<usize>,
    /// What processes have in common. `None` for threads.
    processes: Option<Common>,
    /// Occupancy of the most oversubscribed CUDA device. `None` on CPUs.
    occupancy: Option<Occupancy>,
}

/// Properties of a world of processes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Common {
    /// Cores available to each process: the minimum over all ranks.
    pub(super) cores: usize,
    /// Way in which ranks on devices meet.
    pub(super) way: ProcessWay,
}

/// The ranks on a device and the blocks that they may have there at once.
#[derive(Clone, Debug)]
pub(crate) struct Occupancy {
    pub(crate) device: String,
    pub(crate) ranks: u32,
    pub(crate) blocks: u32,
    /// True if this or another device has several ranks.
    pub(crate) shared: bool,
}

impl Placement {
    pub(super) fn find(devices: &[Device]) -> Result<Placement> {
        let unavailable = |rank: usize, reason: String| Error::DeviceUnavailable {
            rank,
            device: devices[rank].to_string(),
            reason,
        };
        let mut spaces: Vec<MemorySpace> = vec![];
        for (rank, device) in devices.iter().enumerate() {
            if device.ordinal().is_none() != devices[0].ordinal().is_none() {
                let reason = format!(
                    "rank 0 is on {}, but the ranks of a world are all on CPUs or all on CUDA \
                        devices: give every rank the same kind",
                    devices[0]
                );
                return Err(unavailable(rank, reason));
            }
            spaces.push(match device.ordinal() {
                None => MemorySpace::Host,
                Some(ordinal) => MemorySpace::Cuda(
                    Context::open(ordinal).map_err(|reason| unavailable(rank, reason))?,
                ),
            });
        }
        let failed = |failed: cuda::Failed| Error::DeviceFailed {
            rank: 0,
            source: String::from(failed).into(),
        };
        let peers = all_pairs(&spaces, |one, other| match (one, other) {
            (MemorySpace::Cuda(one), MemorySpace::Cuda(other)) => cuda::peer::access(one, other),
            _ => Ok(PeerAccess::Verified),
        });
        let peers = peers.map_err(failed)?;
        let direct = all_pairs(&spaces, |one, other| match (one, other) {
            (MemorySpace::Cuda(one), MemorySpace::Cuda(other)) => cuda::peer::is_direct(one, other),
            _ => Ok(true),
        });
        let reaches_all = direct.map_err(failed)?.iter().flatten().all(|&direct| direct);
        let connections = all_pairs(&spaces, |one, other| match (one, other) {
            (MemorySpace::Cuda(one), MemorySpace::Cuda(other)) => cuda::connection(one, other),
            _ => Ok(Connection::Same),
        });
        let connections = connections.map_err(failed)?;
        let order = ring_order(&distances(&connections, &peers));
        let occupancies = spaces.iter().zip(devices).filter_map(|(space, device)| match space {
            MemorySpace::Host => None,
            MemorySpace::Cuda(context) => {
                Some((context.ordinal(), device.to_string(), context.usable_blocks()))
            }
        });
        let occupancy = most_oversubscribed(occupancies);
        Ok(Placement {
            devices: devices.to_vec(),
            spaces,
            joined: connections.iter().flatten().all(|&way| way <= Connection::NvLink),
            reaches_all,
            peers,
            order,
            processes: None,
            occupancy,
        })
    }

    /// Placement of processes of this host, by rank. `own` is this process's device and memory
    /// space, which stand for those of all ranks. `access` returns the peer access of two ranks,
    /// the same on every rank. `occupancies` has the key, the name and the blocks of each rank's
    /// CUDA device.
    pub(super) fn of_processes<K: Ord>(
        own: (Device, &MemorySpace),
        common: Common,
        connections: Vec<Vec<Connection>>,
        access: impl Fn(usize, usize) -> PeerAccess,
        occupancies: impl Iterator<Item = (K, String, u32)>,
    ) -> Placement {
        let ranks = || 0..connections.len();
        let peers: Vec<Vec<_>> =
            ranks().map(|one| ranks().map(|other| access(one, other)).collect()).collect();
        Placement {
            devices: vec![own.0; peers.len()],
            spaces: vec![own.1.clone(); peers.len()],
            order: ring_order(&distances(&connections, &peers)),
            joined: false,
            reaches_all: false,
            peers,
            processes: Some(common),
            occupancy: most_oversubscribed(occupancies),
        }
    }

    /// Way in which ranks on devices meet, if they are processes.
    pub(crate) fn process_way(&self) -> Option<ProcessWay> {
        self.processes.map(|common| common.way)
    }

    /// True if every rank is a process.
    pub(crate) fn between_processes(&self) -> bool {
        self.processes.is_some()
    }

    /// Number of cores that the ranks share. Meaningful on CPUs only.
    pub(crate) fn cores(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, |cores| cores.get());
        self.processes.map_or_else(all, |common| common.cores)
    }

    pub(super) fn size(&self) -> usize {
        self.devices.len()
    }

    pub(super) fn device(&self, rank: usize) -> Device {
        self.devices[rank]
    }

    pub(super) fn space(&self, rank: usize) -> &MemorySpace {
        &self.spaces[rank]
    }

    /// True if every rank can address the memory of every other directly: threads on CPUs, or
    /// threads on one device.
    pub(crate) fn one_memory(&self) -> bool {
        !self.between_processes() && self.devices.iter().all(|device| *device == self.devices[0])
    }

    /// True if the direct average is possible.
    pub(crate) fn reaches_all(&self) -> bool {
        self.reaches_all
    }

    /// True if the direct average is the fast one: where there is one memory, or NVLink with
    /// verified access between every two devices. Over PCIe reads are slow.
    pub(crate) fn is_joined(&self) -> bool {
        let is_verified = |&access: &PeerAccess| access == PeerAccess::Verified;
        self.joined && self.reaches_all && self.peers.iter().flatten().all(is_verified)
    }

    /// CUDA devices of the other ranks, without that of this rank.
    pub(crate) fn other_devices(&self, rank: usize) -> Vec<usize> {
        let ordinals = self.devices.iter().filter(|&&device| device != self.devices[rank]);
        let ordinals: BTreeSet<usize> = ordinals.filter_map(|device| device.ordinal()).collect();
        ordinals.into_iter().collect()
    }

    pub(crate) fn peers(&self, rank: usize, other: usize) -> PeerAccess {
        self.peers[rank][other]
    }

    pub(crate) fn order(&self) -> &[usize] {
        &self.order
    }

    /// Position of a rank in the ring.
    pub(crate) fn position(&self, rank: usize) -> usize {
        self.order.iter().position(|&other| other == rank).expect("every rank is in the ring")
    }

    /// Ranks before and after this one in the ring.
    pub(crate) fn neighbours(&self, rank: usize) -> [usize; 2] {
        let (position, world) = (self.position(rank), self.order.len());
        [position + world - 1, position + 1].map(|position| self.order[position % world])
    }

    /// True if two ranks share a CUDA device.
    pub(crate) fn shares_device(&self) -> bool {
        self.occupancy.as_ref().is_some_and(|occupancy| occupancy.shared)
    }

    /// True if this rank is the first one of its process on its device, in ring order.
    pub(crate) fn leads(&self, rank: usize) -> bool {
        let is_on_it = |&&other: &&usize| self.devices[other] == self.devices[rank];
        self.between_processes() || self.order.iter().find(is_on_it) == Some(&rank)
    }

    /// Occupancy of the most oversubscribed CUDA device. `None` on CPUs.
    pub(crate) fn occupancy(&self) -> Option<&Occupancy> {
        self.occupancy.as_ref()
    }
}

/// Distance between every two ranks. Only the order of distances matters.
fn distances(connections: &[Vec<Connection>], peers: &[Vec<PeerAccess>]) -> Vec<Vec<u32>> {
    const DETOUR: u32 = 100; // longer than any direct connection
    let distance = |(&way, &access): (&Connection, &PeerAccess)| {
        let is_straight = matches!(access, PeerAccess::Verified | PeerAccess::Pull);
        way as u32 + if is_straight { 0 } else { DETOUR }
    };
    connections
        .iter()
        .zip(peers)
        .map(|(ways, peers)| ways.iter().zip(peers).map(distance).collect())
        .collect()
}

/// Returns the most oversubscribed device: the minimum of resident blocks per rank, grouped by
/// device key. Takes one (key, name, resident blocks) for each rank.
fn most_oversubscribed<K: Ord>(
    devices: impl Iterator<Item = (K, String, u32)>,
) -> Option<Occupancy> {
    let mut occupancies: BTreeMap<K, Occupancy> = BTreeMap::new();
    for (key, device, blocks) in devices {
        let none = Occupancy { device, ranks: 0, blocks, shared: false };
        occupancies.entry(key).or_insert(none).ranks += 1;
    }
    let shared = occupancies.values().any(|occupancy| occupancy.ranks > 1);
    let most = occupancies.into_values().min_by_key(|occupancy| occupancy.blocks / occupancy.ranks);
    most.map(|most| Occupancy { shared, ..most })
}

/// Ring order: begins at rank 0 and continues with the nearest rank that is left, the lowest of
/// several. Ranks on one switch, and ranks next to one NUMA node, then follow one another, so the
/// ring crosses between such groups as seldom as possible.
fn ring_order(distances: &[Vec<u32>]) -> Vec<usize> {
    let mut left: Vec<usize> = (1..distances.len()).collect();
    let mut order = vec![0];
    while let Some(nearest) =
        left.iter().copied().min_by_key(|&rank| (distances[order[order.len() - 1]][rank], rank))
    {
        left.retain(|&rank| rank != nearest);
        order.push(nearest);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_go_through_one_switch_and_one_node_after_the_other() {
        // Ranks 0 … 7 on switches 0 1 0 1 2 3 2 3. Switches 0 and 1 are on one NUMA node, 2 and 3
        // on the other.
        let switch = [0, 1, 0, 1, 2, 3, 2, 3];
        let distance = |a: usize, b: usize| match (switch[a], switch[b]) {
            _ if a == b => 0,
            (a, b) if a == b => 1,
            (a, b) if a / 2 == b / 2 => 4,
            _ => 5,
        };
        let distances: Vec<Vec<u32>> =
            (0..8).map(|a| (0..8).map(|b| distance(a, b)).collect()).collect();
        assert_eq!(ring_order(&distances), [0, 2, 1, 3, 4, 6, 5, 7]);
        // Only ranks 0 and 2, and ranks 1 and 3, have peer access to each other.
        let distances: Vec<Vec<u32>> = (0..4)
            .map(|a| (0..4).map(|b| if a % 2 == b % 2 { 3 } else { 103 }).collect())
            .collect();
        assert_eq!(ring_order(&distances), [0, 2, 1, 3]);
        assert_eq!(ring_order(&vec![vec![0; 3]; 3]), [0, 1, 2]);
        assert_eq!(ring_order(&[vec![0]]), [0]);
    }
}
