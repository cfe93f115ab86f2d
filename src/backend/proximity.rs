//! Proximity of devices: what lies between two of them, and whether each can use the other's
//! memory. Plain data, the same in builds without CUDA.

use std::fmt;

/// Connection between two devices, named as in `nvidia-smi topo`, ordered from near to far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Connection {
    /// X: the same device.
    Same,
    /// NV: NVLink. Derived from native atomics between the devices, which the driver reports and
    /// PCIe lacks.
    NvLink,
    /// PIX: one PCIe switch, or one bridge.
    Pix,
    /// PXB: several PCIe switches, without a host bridge.
    Pxb,
    /// PHB: one host bridge.
    Phb,
    /// NODE: several host bridges of one NUMA node.
    Node,
    /// SYS: the interconnect between NUMA nodes.
    Sys,
    /// ?: not reported by the system.
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

/// Peer access (P2P) between two devices, as a probe has shown that does what an average does:
/// kernels on both devices at the same time, each of which writes data and then a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PeerAccess {
    /// The driver reports no access, in one direction at least.
    Unsupported,
    /// The environment variable `PARAM_AVERAGER_P2P` is `0`. Parameters go through host memory.
    Disabled,
    /// The driver reports access, but transferred bytes were wrong or came too late. Parameters go
    /// through host memory.
    Broken,
    /// Access works, but host memory is much faster. Parameters go through host memory, unless
    /// [`Link::Peer`](crate::Link::Peer) or [`Link::Pull`](crate::Link::Pull) is asked for, or the
    /// environment variable `PARAM_AVERAGER_P2P` is `1`.
    Slow,
    /// Access works, and reads are much faster than writes. Parameters are read from the sender's
    /// memory.
    Pull,
    /// Bytes transferred in both directions, by writes and by reads, were right.
    Verified,
}

impl PeerAccess {
    /// True if devices can use each other's memory.
    pub(crate) fn works(self) -> bool {
        matches!(self, PeerAccess::Slow | PeerAccess::Pull | PeerAccess::Verified)
    }
}

/// Throughput of the paths between two devices in GB/s (10⁹ bytes per second), for each direction
/// while both are in use. Of the slower direction.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct PeerRates {
    /// A kernel writes to the other device's memory.
    pub push: f64,
    /// A kernel reads from the other device's memory.
    pub pull: f64,
    /// Copies by the driver.
    pub copy: f64,
    /// A kernel writes to page-locked memory of the host, from where a kernel of the other device
    /// reads.
    pub host: f64,
}

/// PCI position of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(processes, derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Slot {
    pub(crate) pci: String,
    pub(crate) numa_node: Option<u32>,
    pub(crate) path: Vec<String>,
}

impl Slot {
    /// Connection of two devices over PCIe.
    pub(crate) fn connection(&self, other: &Slot) -> Connection {
        if self.pci == other.pci {
            return Connection::Same;
        }
        if self.path.is_empty() || other.path.is_empty() {
            return Connection::Unknown;
        }
        let common = self.path.iter().zip(&other.path).take_while(|(a, b)| a == b).count();
        match common {
            0 if self.numa_node.is_some() && self.numa_node == other.numa_node => Connection::Node,
            0 => Connection::Sys,
            1 => Connection::Phb,
            // Both devices are below the last common bridge, each behind a port of its own: one
            // switch.
            _ if common + 2 >= self.path.len().max(other.path.len()) => Connection::Pix,
            _ => Connection::Pxb,
        }
    }
}

/// Identity of a device, the same in all processes of a host, whichever ordinal each has for it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[cfg(processes)]
pub(crate) struct Identity {
    pub(crate) uuid: String,
    pub(crate) slot: Slot,
    /// UUIDs of the devices visible to its process that NVLink connects it to.
    pub(crate) joined: Vec<String>,
}

#[cfg(processes)]
impl Identity {
    /// Connection between two devices, as far as either process knows it.
    pub(crate) fn connection(&self, other: &Identity) -> Connection {
        match self.joined.contains(&other.uuid) || other.joined.contains(&self.uuid) {
            true => Connection::NvLink,
            false => self.slot.connection(&other.slot),
        }
    }
}

/// Calls `f` for every two elements and returns a table of the results.
pub(crate) fn all_pairs<T, C, E>(
    contexts: &[C],
    f: impl Fn(&C, &C) -> Result<T, E>,
) -> Result<Vec<Vec<T>>, E> {
    contexts.iter().map(|one| contexts.iter().map(|other| f(one, other)).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(pci: &str, path: &str, numa_node: Option<u32>) -> Slot {
        let path = path.split_whitespace().map(str::to_owned).collect();
        Slot { pci: pci.into(), numa_node, path }
    }

    #[test]
    fn paths_are_those_of_nvidia_smi() {
        let one = slot(
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
            let other = slot(pci, path, node);
            assert_eq!(
                (one.connection(&other), other.connection(&one)),
                (expected, expected),
                "{pci}"
            );
        }
    }
}
