//! Host information of ranks, exchanged at the rendezvous, and the peer access between them.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::cuda::{self, Context};
use crate::backend::proximity::{Connection, Identity, PeerAccess};
use crate::backend::{MemorySpace, ProcessWay};
use crate::device::Device;
use crate::world::placement::{Common, Placement};

/// Host information of a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct HostInfo {
    /// Device as the rank's process numbers it. Other processes may number it differently.
    pub(crate) device: String,
    /// Number of cores that the process may use.
    pub(crate) cores: usize,
    pub(crate) gpu: Option<Gpu>,
}

/// The CUDA device of a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Gpu {
    pub(crate) identity: Identity,
    /// Blocks that averages may have on the device at once.
    pub(crate) resident_blocks: u32,
    /// True if streams can wait for words in memory.
    pub(crate) stream_waits: bool,
    /// True if kernels of different processes run at the same time (MPS).
    pub(crate) mps: bool,
    /// True if the process has a share of the device to itself, and `resident_blocks` are of that.
    pub(crate) own_share: bool,
}

/// Set for clients of MPS that see a part of a device's multiprocessors.
const SHARE: &str = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE";

impl HostInfo {
    /// Host information of a process whose device has not been opened.
    pub(crate) fn unknown(device: Device) -> HostInfo {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        HostInfo { device: device.to_string(), cores, gpu: None }
    }

    /// The reason, if this rank can't be in one world with rank 0.
    pub(crate) fn refusal(&self, rank: usize, first: &HostInfo) -> Option<String> {
        (self.gpu.is_some() != first.gpu.is_some()).then(|| {
            format!(
                "rank {rank} is on {} and rank 0 on {}, but the ranks of a world are all on CPUs \
                    or all on CUDA devices: give every rank the same kind",
                self.device, first.device
            )
        })
    }

    /// Connection between the devices of two ranks.
    pub(crate) fn connection(&self, other: &HostInfo) -> Connection {
        match (&self.gpu, &other.gpu) {
            (Some(one), Some(other)) => one.identity.connection(&other.identity),
            _ => Connection::Same,
        }
    }
}

/// The device of this process.
#[derive(Clone, Debug)]
pub(crate) struct LocalDevice {
    pub(crate) host_info: HostInfo,
    device: Device,
    space: MemorySpace,
}

impl LocalDevice {
    /// Opens the device.
    pub(crate) fn find(device: Device) -> Result<LocalDevice, String> {
        let (mut host_info, mut space) = (HostInfo::unknown(device), MemorySpace::Host);
        if let Some(ordinal) = device.ordinal() {
            let context = Context::open(ordinal)?;
            let identity = cuda::identity(&context)?;
            host_info.gpu = Some(Gpu {
                identity,
                resident_blocks: context.usable_blocks(),
                stream_waits: context.has_stream_waits(),
                mps: context.has_mps(),
                own_share: context.has_mps() && std::env::var_os(SHARE).is_some(),
            });
            space = MemorySpace::Cuda(context);
        }
        Ok(LocalDevice { host_info, device, space })
    }

    /// Context of the device, if it is a CUDA device.
    pub(crate) fn context(&self) -> Option<&Arc<Context>> {
        match &self.space {
            MemorySpace::Host => None,
            MemorySpace::Cuda(context) => Some(context),
        }
    }
}

/// The device of this process, and the peer access between ranks. All processes know the same
/// access.
#[derive(Clone, Debug)]
pub(crate) struct P2pMatrix {
    own: LocalDevice,
    /// Access of pairs of peers that were tested, the lower id first.
    reach: BTreeMap<(usize, usize), PeerAccess>,
}

impl P2pMatrix {
    pub(crate) fn new(own: LocalDevice) -> P2pMatrix {
        P2pMatrix { own, reach: BTreeMap::new() }
    }

    pub(crate) fn own(&self) -> &LocalDevice {
        &self.own
    }

    /// Records the access between two peers.
    pub(crate) fn know(&mut self, one: usize, other: usize, access: PeerAccess) {
        self.reach.insert((one.min(other), one.max(other)), access);
    }

    /// Placement of these peers, by rank. Pairs that were not tested have no peer access.
    pub(crate) fn placement(&self, members: &[(usize, &HostInfo)]) -> Placement {
        let host_infos: Vec<&HostInfo> = members.iter().map(|&(_, host_info)| host_info).collect();
        let access = |one: usize, other: usize| {
            let (one, other) = (members[one].0, members[other].0);
            let known = self.reach.get(&(one.min(other), one.max(other)));
            match known {
                _ if self.own.context().is_none() || one == other => PeerAccess::Verified,
                Some(&access) => access,
                None => PeerAccess::Unsupported,
            }
        };
        let connections = host_infos
            .iter()
            .map(|one| host_infos.iter().map(|other| one.connection(other)).collect())
            .collect();
        let occupancies = host_infos.iter().enumerate().filter_map(|(rank, host_info)| {
            let gpu = host_info.gpu.as_ref()?;
            let share = gpu.own_share.then_some(rank); // which no other rank uses
            let key = (gpu.identity.uuid.as_str(), share);
            Some((key, host_info.device.clone(), gpu.resident_blocks))
        });
        let cores = host_infos.iter().map(|host_info| host_info.cores).min().unwrap_or(1);
        let common = Common { cores, way: way_of(&host_infos) };
        let own = (self.own.device, &self.own.space);
        Placement::of_processes(own, common, connections, access, occupancies)
    }
}

/// Way in which processes with these devices meet: the same on every rank.
fn way_of(host_infos: &[&HostInfo]) -> ProcessWay {
    let gpus = || host_infos.iter().filter_map(|host_info| host_info.gpu.as_ref());
    let is_alone = |uuid: &str| gpus().filter(|gpu| gpu.identity.uuid == uuid).count() == 1;
    match () {
        _ if gpus().any(|gpu| !gpu.mps && !is_alone(&gpu.identity.uuid)) => ProcessWay::Sequenced,
        _ if gpus().all(|gpu| gpu.stream_waits) => ProcessWay::InStreams,
        _ => ProcessWay::OnHosts,
    }
}
