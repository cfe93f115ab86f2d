//! The picture of a [`Topology`], as readers of `nvidia-smi topo -m` expect it.

use std::fmt::{self, Display, Formatter, Write};

use super::topology::Topology;
use crate::backend::proximity::{Connection, PeerAccess, PeerRates};

/// Devices, a matrix of what lies between them, a matrix of peer access, matrices of throughput,
/// and a legend. Lines of text that end in a newline.
impl Display for Topology {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "CUDA {} driver", self.driver_version())?;
        for device in self.devices() {
            let (major, minor) = device.compute_capability;
            let numa = device.numa_node.map_or("unknown".into(), |node| node.to_string());
            writeln!(
                f,
                "cuda:{:<3} {}, compute capability {major}.{minor}, {} multiprocessors, {:.1} GiB, \
                 PCI {}, NUMA node {numa}",
                device.ordinal,
                device.name,
                device.multiprocessors,
                device.memory as f64 / f64::from(1 << 30),
                device.pci,
            )?;
        }
        let count = self.devices().len();
        let connection = |one, other| self.connection(one, other).to_string();
        matrix(f, "between them", count, connection)?;
        matrix(f, "peer access, as tried", count, |one, other| {
            match self.peer_access(one, other) {
                _ if self.connection(one, other) == Connection::Same => "X".into(),
                PeerAccess::Verified => "OK".into(),
                PeerAccess::Pull => "PULL".into(),
                PeerAccess::Slow => "SLOW".into(),
                PeerAccess::Broken => "BAD".into(),
                PeerAccess::Disabled => "OFF".into(),
                PeerAccess::Unsupported => "NO".into(),
            }
        })?;
        let rates = |title, rate: fn(PeerRates) -> f64, f: &mut Formatter<'_>| {
            matrix(f, title, count, |one, other| match self.peer_rates(one, other) {
                Some(rates) => format!("{:.1}", rate(rates)),
                None => "-".into(),
            })
        };
        rates("GB/s, written by a kernel", |rates| rates.push, f)?;
        rates("GB/s, read by a kernel", |rates| rates.pull, f)?;
        rates("GB/s, copied", |rates| rates.copy, f)?;
        rates("GB/s, through the host", |rates| rates.host, f)?;
        f.write_str(LEGEND)
    }
}

fn matrix(
    f: &mut Formatter<'_>,
    title: &str,
    count: usize,
    cell: impl Fn(usize, usize) -> String,
) -> fmt::Result {
    let mut text = format!("\n{title}\n{:8}", "");
    for other in 0..count {
        write!(text, " {:<6}", format!("cuda:{other}"))?;
    }
    for one in 0..count {
        write!(text, "\n{:<8}", format!("cuda:{one}"))?;
        for other in 0..count {
            write!(text, " {:<6}", cell(one, other))?;
        }
    }
    // No blanks at the ends of lines.
    text.lines().try_for_each(|line| writeln!(f, "{}", line.trim_end()))
}

const LEGEND: &str = "
X     the same device                     NV    NVLink: all native atomics work between them
PIX   one PCIe switch or bridge           NODE  host bridges of one NUMA node
PXB   several PCIe switches               SYS   the link between NUMA nodes
PHB   a PCIe host bridge                  ?     the system doesn't say
OK    kernels of both exchanged bytes, by writing and by reading, and all were right: mailboxes are
      in device memory
PULL  the same, but reading is much faster: mailboxes are in the sender's memory
SLOW  the same, but memory of the host is much faster: mailboxes are there
BAD   the driver says that it works, and bytes were lost or late: mailboxes are in memory of the
      host
NO    the driver says that it doesn't: mailboxes are in memory of the host
OFF   PARAM_AVERAGER_P2P=0: mailboxes are in memory of the host
GB/s  10⁹ bytes per second, of the slower direction while both are in use
";
