//! Where a process is.

use serde::{Deserialize, Serialize};

use crate::world::Device;

/// What the others need to know of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Home {
    pub(super) device: String,
    /// That it may use.
    pub(super) cores: usize,
}

impl Home {
    /// This process's.
    pub(super) fn of(device: Device) -> Home {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        Home { device: device.to_string(), cores }
    }
    /// What all ranks of a world have in common.
    pub(super) fn kind(&self) -> &str {
        self.device.split(':').next().unwrap_or_default()
    }
}
