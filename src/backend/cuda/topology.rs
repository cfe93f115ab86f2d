//! CUDA devices of this process and the connections between them.

use super::driver;
use super::facts::{connection, facts, CudaDevice};
use super::peer::{self, Link};
use super::Context;
use crate::backend::proximity::{all_pairs, Connection, PeerAccess, PeerRates};
use crate::{Error, Result};

/// The CUDA devices of this process and the connections between them.
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
    peers: Vec<Vec<Link>>,
}

impl Topology {
    /// Finds all devices and tests the peer access between every two of them, with up to 64 MiB.
    ///
    /// Loads this crate's kernels on every device. [`Error::CudaUnavailable`] is returned without a
    /// driver, without a device, or if the driver is too old.
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
        let peers = all_pairs(&contexts, peer::link)?;
        Ok(Topology { driver: driver.version(), devices, connections, peers })
    }

    /// The CUDA version that the driver supports, such as 13.0.
    pub fn driver_version(&self) -> &str {
        &self.driver
    }

    /// The devices, by ordinal.
    pub fn devices(&self) -> &[CudaDevice] {
        &self.devices
    }

    /// The connection between two devices, given by ordinal. Panics if an ordinal is out of range.
    pub fn connection(&self, one: usize, other: usize) -> Connection {
        self.connections[one][other]
    }

    /// The peer access between two devices, given by ordinal. Panics if an ordinal is out of range.
    pub fn peer_access(&self, one: usize, other: usize) -> PeerAccess {
        self.peers[one][other].access
    }

    /// The throughput between two devices, given by ordinal. `None` for a device and itself, and
    /// where there is no peer access. Panics if an ordinal is out of range.
    pub fn peer_rates(&self, one: usize, other: usize) -> Option<PeerRates> {
        self.peers[one][other].rates
    }
}
