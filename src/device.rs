//! The device of a rank.

use std::fmt;

/// The device that a rank's parameters are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Cpu,
    Cuda(usize),
}

impl Device {
    /// The memory and the cores of this host.
    pub const fn cpu() -> Self {
        Device(Kind::Cpu)
    }

    /// The CUDA device with this ordinal, as this process numbers its devices.
    pub const fn cuda(ordinal: usize) -> Self {
        Device(Kind::Cuda(ordinal))
    }

    /// The ordinal of a CUDA device. `None` for the CPU.
    pub(crate) fn ordinal(self) -> Option<usize> {
        match self.0 {
            Kind::Cpu => None,
            Kind::Cuda(ordinal) => Some(ordinal),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Cpu => f.write_str("cpu"),
            Kind::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}
