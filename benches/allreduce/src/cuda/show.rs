//! `--devices`: what CUDA devices there are, and what lies between them, as readers of `nvidia-smi
//! topo -m` expect it.

use std::fmt::Write;

use param_averager::{Connection, PeerAccess, Topology};

use crate::failure::Failure;

/// Text, in lines.
pub fn devices() -> Result<String, Failure> {
    Ok(draw(&Topology::probe()?))
}

fn draw(topology: &Topology) -> String {
    let mut text = format!("CUDA {} driver\n", topology.driver_version());
    for device in topology.devices() {
        let (major, minor) = device.compute_capability;
        let numa = device.numa_node.map_or("unknown".into(), |node| node.to_string());
        let _ = writeln!(
            text,
            "cuda:{:<3} {}, compute capability {major}.{minor}, {} multiprocessors, {:.1} GiB, PCI \
             {}, NUMA node {numa}",
            device.ordinal,
            device.name,
            device.multiprocessors,
            device.memory as f64 / f64::from(1 << 30),
            device.pci,
        );
    }
    let count = topology.devices().len();
    text +=
        &matrix("between them", count, |one, other| topology.connection(one, other).to_string());
    text +=
        &matrix("peer access, as tried", count, |one, other| peers(topology, one, other).into());
    text.push_str(LEGEND);
    text
}

fn peers(topology: &Topology, one: usize, other: usize) -> &'static str {
    match topology.peer_access(one, other) {
        _ if topology.connection(one, other) == Connection::Same => "X",
        PeerAccess::Verified => "OK",
        PeerAccess::Broken => "BAD",
        _ => "NO",
    }
}

fn matrix(title: &str, count: usize, cell: impl Fn(usize, usize) -> String) -> String {
    let mut text = format!("\n{title}\n{:8}", "");
    for other in 0..count {
        let _ = write!(text, " {:<6}", format!("cuda:{other}"));
    }
    for one in 0..count {
        let _ = write!(text, "\n{:<8}", format!("cuda:{one}"));
        for other in 0..count {
            let _ = write!(text, " {:<6}", cell(one, other));
        }
    }
    // No blanks at the ends of lines.
    text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}

const LEGEND: &str = "
X     the same device                     NV    NVLink: all native atomics work between them
PIX   one PCIe switch or bridge           NODE  host bridges of one NUMA node
PXB   several PCIe switches               SYS   the link between NUMA nodes
PHB   a PCIe host bridge                  ?     the system doesn't say
OK    bytes were moved both ways, by writing and by reading, and were right: mailboxes are in \
device memory
BAD   the driver says that it works, and bytes were lost: mailboxes are in memory of the host
NO    the driver says that it doesn't: mailboxes are in memory of the host
";
