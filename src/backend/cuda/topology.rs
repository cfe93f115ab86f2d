//! What CUDA devices there are, and how they lie to one another.

use std::ffi::{c_char, c_int, CStr};
use std::fmt;

use cudarc::driver::sys::{
    self, CUdevice_P2PAttribute as P2pAttribute, CUdevice_attribute as Attribute,
};
use serde::{Deserialize, Serialize};

use super::driver::{self, call, Failed};
use super::{peer, Context, PeerAccess};
use crate::{Error, Result};

/// A CUDA device of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CudaDevice {
    /// Its number, for [`Device::cuda`](crate::Device::cuda).
    pub ordinal: usize,
    /// Such as "NVIDIA H200".
    pub name: String,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// In bytes.
    pub memory: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Domain, bus, device and function, such as `0000:41:00.0`.
    pub pci: String,
    /// The node of the host's memory that it is next to, if the system says so.
    pub numa_node: Option<u32>,
    /// What lies between the host and it, and itself: a host bridge, PCIe bridges, the device.
    /// Empty: not known.
    path: Vec<String>,
}

/// What lies between two devices, by the names of `nvidia-smi topo`, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Connection {
    /// X: they are the same.
    Same,
    /// NV: NVLink. The driver API does not name it; it does say whether all native atomics work
    /// between two devices, which over PCIe they do not.
    NvLink,
    /// PIX: one PCIe switch, or one bridge.
    Pix,
    /// PXB: several PCIe switches, and no host bridge.
    Pxb,
    /// PHB: a host bridge.
    Phb,
    /// NODE: host bridges of one NUMA node.
    Node,
    /// SYS: the interconnect between NUMA nodes.
    Sys,
    /// ?: the system doesn't say.
    Unknown,
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Connection::Same => "X",
            Connection::NvLink => "NV",
            Connection::Pix => "PIX",
            Connection::Pxb => "PXB",
            Connection::Phb => "PHB",
            Connection::Node => "NODE",
            Connection::Sys => "SYS",
            Connection::Unknown => "?",
        })
    }
}

/// The CUDA devices of this process and what lies between them.
///
/// ```no_run
/// for device in param_averager::Topology::probe()?.devices() {
///     println!("{}: {}", device.ordinal, device.name);
/// }
/// # Ok::<(), param_averager::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Topology {
    driver: String,
    devices: Vec<CudaDevice>,
    connections: Vec<Vec<Connection>>,
    peers: Vec<Vec<PeerAccess>>,
}

impl Topology {
    /// Looks, and tries between every two devices whether each can write and read the other's
    /// memory: that loads this crate's kernels on all of them. Without a driver, without a device,
    /// or with a driver that is too old: [`Error::CudaUnavailable`].
    pub fn probe() -> Result<Topology> {
        Self::find().map_err(|reason| Error::CudaUnavailable { reason })
    }

    fn find() -> Result<Topology, String> {
        let driver = driver::get()?;
        let contexts =
            (0..driver.devices).map(Context::open).collect::<Result<Vec<_>, String>>()?;
        let devices: Vec<CudaDevice> =
            contexts.iter().map(|context| facts(context)).collect::<Result<_, _>>()?;
        let connections = all_pairs(&contexts, |one, other| connection(one, other))?;
        let peers = all_pairs(&contexts, peer::access)?;
        Ok(Topology { driver: driver.version(), devices, connections, peers })
    }

    /// The CUDA version that the driver supports, such as 13.0.
    pub fn driver_version(&self) -> &str {
        &self.driver
    }

    /// All devices, by ordinal.
    pub fn devices(&self) -> &[CudaDevice] {
        &self.devices
    }

    /// What lies between the devices of two ordinals.
    pub fn connection(&self, one: usize, other: usize) -> Connection {
        self.connections[one][other]
    }

    /// Whether they can use each other's memory.
    pub fn peer_access(&self, one: usize, other: usize) -> PeerAccess {
        self.peers[one][other]
    }
}

/// What the driver and the system say of a device.
pub(crate) fn facts(context: &Context) -> Result<CudaDevice, Failed> {
    const LONGEST: usize = 256;
    let (device, mut bytes) = (context.device(), 0);
    let (mut name, mut pci) = ([0 as c_char; LONGEST], [0 as c_char; LONGEST]);
    // SAFETY: a device of this driver, and room for what it says, which ends in a zero.
    let [name, pci] = unsafe {
        call!(cuDeviceTotalMem_v2(&mut bytes, device))?;
        call!(cuDeviceGetName(name.as_mut_ptr(), LONGEST as c_int, device))?;
        call!(cuDeviceGetPCIBusId(pci.as_mut_ptr(), LONGEST as c_int, device))?;
        [name, pci].map(|text| CStr::from_ptr(text.as_ptr()).to_string_lossy().into_owned())
    };
    let number = |attribute| Ok::<u32, Failed>(context.attribute(attribute)?.max(0) as u32);
    let pci = pci.to_lowercase(); // as in /sys
    let (path, numa_node) = in_the_system(&pci);
    Ok(CudaDevice {
        ordinal: context.ordinal(),
        name,
        compute_capability: (
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory: bytes as u64,
        multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        pci,
        numa_node,
        path,
    })
}

/// Linux's view of a PCI device: its bridges and its NUMA node. Elsewhere, and of a device that is
/// not there: nothing.
fn in_the_system(pci: &str) -> (Vec<String>, Option<u32>) {
    let folder = std::path::Path::new("/sys/bus/pci/devices").join(pci);
    let whole = std::fs::canonicalize(&folder).unwrap_or_default();
    // /sys/devices/pci0000:40/0000:40:01.1/0000:41:00.0
    let parts = whole.iter().map(|part| part.to_string_lossy().into_owned());
    let path = parts.skip_while(|part| !part.starts_with("pci")).collect();
    let node = std::fs::read_to_string(folder.join("numa_node")).ok();
    (path, node.and_then(|text| text.trim().parse().ok())) // -1: none
}

/// What lies between two devices.
pub(crate) fn connection(one: &Context, other: &Context) -> Result<Connection, Failed> {
    if one.ordinal() != other.ordinal() && joined(one.device(), other.device())? {
        return Ok(Connection::NvLink);
    }
    Ok(over_pcie(&facts(one)?.slot(), &facts(other)?.slot()))
}

/// Whether all native atomics work between two devices, both ways.
fn joined(one: sys::CUdevice, other: sys::CUdevice) -> Result<bool, Failed> {
    let attribute = P2pAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED;
    let (mut there, mut back) = (0, 0);
    // SAFETY: two devices of this driver.
    unsafe {
        call!(cuDeviceGetP2PAttribute(&mut there, attribute, one, other))?;
        call!(cuDeviceGetP2PAttribute(&mut back, attribute, other, one))?;
    }
    Ok(there != 0 && back != 0)
}

/// Where a device is plugged in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Slot {
    pci: String,
    numa_node: Option<u32>,
    path: Vec<String>,
}

impl CudaDevice {
    fn slot(&self) -> Slot {
        Slot { pci: self.pci.clone(), numa_node: self.numa_node, path: self.path.clone() }
    }
}

/// A device as all processes of a host know it, whatever number each has for it, and whether they
/// see it or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg(target_os = "linux")]
pub(crate) struct Identity {
    pub(crate) uuid: String,
    slot: Slot,
    /// Of the devices that its process sees: those that it is joined to by NVLink, by UUID.
    joined: Vec<String>,
}

#[cfg(target_os = "linux")]
impl Identity {
    pub(crate) fn of(context: &Context) -> Result<Identity, String> {
        let own = context.device();
        let mut others = vec![];
        for ordinal in 0..driver::get()?.devices {
            let mut other = 0;
            // SAFETY: a device of this driver.
            unsafe { call!(cuDeviceGet(&mut other, ordinal as c_int)) }?;
            if other != own && joined(own, other)? {
                others.push(uuid(other)?);
            }
        }
        Ok(Identity { uuid: uuid(own)?, slot: facts(context)?.slot(), joined: others })
    }

    /// As `connection`, as far as the two processes know it.
    pub(crate) fn connection(&self, other: &Identity) -> Connection {
        match self.joined.contains(&other.uuid) || other.joined.contains(&self.uuid) {
            true => Connection::NvLink,
            false => over_pcie(&self.slot, &other.slot),
        }
    }
}

#[cfg(target_os = "linux")]
fn uuid(device: sys::CUdevice) -> Result<String, Failed> {
    let mut uuid = sys::CUuuid_st { bytes: [0; 16] };
    // SAFETY: a device of this driver.
    unsafe { call!(cuDeviceGetUuid_v2(&mut uuid, device)) }?;
    Ok(uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
}

/// A table of something about every two devices.
pub(crate) fn all_pairs<T, C, E>(
    contexts: &[C],
    f: impl Fn(&C, &C) -> Result<T, E>,
) -> Result<Vec<Vec<T>>, E> {
    contexts.iter().map(|one| contexts.iter().map(|other| f(one, other)).collect()).collect()
}

fn over_pcie(one: &Slot, other: &Slot) -> Connection {
    if one.pci == other.pci {
        return Connection::Same;
    }
    if one.path.is_empty() || other.path.is_empty() {
        return Connection::Unknown;
    }
    let common = one.path.iter().zip(&other.path).take_while(|(a, b)| a == b).count();
    match common {
        0 if one.numa_node.is_some() && one.numa_node == other.numa_node => Connection::Node,
        0 => Connection::Sys,
        1 => Connection::Phb,
        // Both hang on the last one that they have in common, each by a port of its own: that is
        // one switch.
        _ if common + 2 >= one.path.len().max(other.path.len()) => Connection::Pix,
        _ => Connection::Pxb,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(pci: &str, path: &str, numa_node: Option<u32>) -> CudaDevice {
        CudaDevice {
            ordinal: 0,
            name: "a device".into(),
            compute_capability: (9, 0),
            memory: 1 << 30,
            multiprocessors: 100,
            pci: pci.into(),
            numa_node,
            path: path.split_whitespace().map(str::to_owned).collect(),
        }
    }

    #[test]
    fn paths_are_those_of_nvidia_smi() {
        let one = device(
            "0000:03:00.0",
            "pci0000:00 0000:00:01.0 0000:01:00.0 0000:02:08.0 0000:03:00.0",
            Some(0),
        );
        let cases = [
            ("0000:03:00.0", "", Some(0), Connection::Same),
            (
                "0000:03:00.1",
                "pci0000:00 0000:00:01.0 0000:01:00.0 0000:02:08.0 0000:03:00.1",
                Some(0),
                Connection::Pix,
            ),
            (
                "0000:04:00.0",
                "pci0000:00 0000:00:01.0 0000:01:00.0 0000:02:10.0 0000:04:00.0",
                Some(0),
                Connection::Pix,
            ),
            (
                "0000:07:00.0",
                "pci0000:00 0000:00:01.0 0000:01:00.0 0000:02:18.0 0000:05:00.0 0000:06:00.0 \
                 0000:07:00.0",
                Some(0),
                Connection::Pxb,
            ),
            ("0000:09:00.0", "pci0000:00 0000:00:03.0 0000:09:00.0", Some(0), Connection::Phb),
            ("0000:41:00.0", "pci0000:40 0000:40:01.0 0000:41:00.0", Some(0), Connection::Node),
            ("0000:81:00.0", "pci0000:80 0000:80:01.0 0000:81:00.0", Some(1), Connection::Sys),
            ("0000:82:00.0", "pci0000:80 0000:80:02.0 0000:82:00.0", None, Connection::Sys),
            ("0000:99:00.0", "", None, Connection::Unknown),
        ];
        for (pci, path, node, expected) in cases {
            let (one, other) = (one.slot(), device(pci, path, node).slot());
            assert_eq!(
                (over_pcie(&one, &other), over_pcie(&other, &one)),
                (expected, expected),
                "{pci}"
            );
        }
    }
}
