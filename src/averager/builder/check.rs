//! Options that a rank can't have, and those that all ranks must have alike.

use super::Builder;
use crate::averager::{Algorithm, Start};
use crate::{Error, Result};

impl Builder {
    /// Error of an option that this rank can't have.
    pub(in crate::averager) fn check(&self) -> Result<()> {
        let refuse = |option, found: String, expected| {
            Err(Error::InvalidOption { rank: self.communicator.rank(), option, found, expected })
        };
        match (self.channels, self.chunk_bytes) {
            (Some(channels), _) if !(1..=1024).contains(&channels) => {
                refuse("channels", channels.to_string(), "1 to 1024 threads")
            }
            (_, Some(bytes)) if !(128..=64 << 20).contains(&bytes) => {
                refuse("chunk_bytes", bytes.to_string(), "128 B to 64 MiB")
            }
            _ if !self.slots.is_power_of_two() || !(2..=1024).contains(&self.slots) => {
                refuse("slots", self.slots.to_string(), "a power of two from 2 to 1024")
            }
            _ if self.timeout.is_zero() => refuse("timeout", "0".into(), "longer than nothing"),
            _ if self.device_timeout.is_zero() => {
                refuse("device_timeout", "0".into(), "longer than nothing")
            }
            _ if self.outer.refusal().is_some() => {
                let (found, expected) = self.outer.refusal().expect("just seen");
                refuse("outer", found, expected)
            }
            _ if self.start == Start::Own && !self.outer.is_mean() => refuse(
                "start_from",
                "Own, with an outer optimizer".into(),
                "Rank or Mean: an outer step begins from parameters that all ranks have had",
            ),
            _ if self.overlap_refusal().is_some() => {
                let (option, found, expected) = self.overlap_refusal().expect("just seen");
                refuse(option, found, expected)
            }
            _ if self.compression_refusal().is_some() => {
                let (option, found, expected) = self.compression_refusal().expect("just seen");
                refuse(option, found, expected)
            }
            _ if self.hosts_refusal().is_some() => {
                let (option, found, expected) = self.hosts_refusal().expect("just seen");
                refuse(option, found, expected)
            }
            _ if self.stage.is_some() && self.stage_refusal().is_some() => {
                let (option, found, expected) = self.stage_refusal().expect("just seen");
                refuse(option, found.into(), expected)
            }
            _ if self.algorithm == Algorithm::Direct
                && !self.communicator.placement().reaches_all() =>
            {
                refuse(
                    "algorithm",
                    "Direct, between processes or devices without peer access".into(),
                    "Auto or Ring, unless all ranks are threads of one process, on CPUs, on one \
                     device, or on devices that reach each other's memory",
                )
            }
            _ => match (self.crowd(), self.link.refusal(&self.communicator)) {
                (Some(found), _) => refuse(
                    "channels",
                    found,
                    "so few that the blocks of all ranks on a device leave room for other work",
                ),
                (None, Some(refusal)) => Err(refusal),
                (None, None) => Ok(()),
            },
        }
    }

    /// Blocks that do not fit, in words. All blocks of all ranks wait for one another, so those
    /// that share a device must be resident together.
    fn crowd(&self) -> Option<String> {
        let occupancy = self.communicator.placement().occupancy()?;
        let channels = self.channel_count();
        (channels * occupancy.ranks > occupancy.blocks).then(|| {
            format!(
                "{channels}, on each of {} ranks of {}, but only {} blocks, half of what fits on \
                    it, may wait there",
                occupancy.ranks, occupancy.device, occupancy.blocks
            )
        })
    }

    /// Options that must be the same on every rank.
    pub(in crate::averager) fn shown(&self) -> Vec<(String, String)> {
        let shown = [
            ("algorithm", format!("{:?}", self.algorithm)),
            ("link", format!("{:?}", self.link)),
            ("all_or_nothing", self.all_or_nothing.to_string()),
            ("reject_non_finite", self.rejects_non_finite().to_string()),
            ("reproducible", self.reproducible.to_string()),
            ("narrow_wire", self.narrow_wire.to_string()),
            ("start_from", format!("{:?}", self.start)),
            ("outer", self.outer.to_string()),
            ("share_outer_state", self.share_outer_state.to_string()),
            ("compression", format!("{:?}", self.compression)),
            ("telemetry", self.telemetry.to_string()),
            ("overlap", self.overlap.to_string()),
            ("stage", self.stage.as_ref().map_or("none".into(), |stage| format!("{stage:?}"))),
            ("hosts", self.hosts_in_words()),
            ("hosts_compression", format!("{:?}", self.hosts_compression)),
            ("timeout", format!("{:?}", self.timeout)),
            ("device_timeout", format!("{:?}", self.device_timeout)),
            ("channels", self.channel_count().to_string()),
            ("slots", self.slots.to_string()),
            (
                "chunk_bytes",
                self.chunk_bytes.map_or("the default".into(), |bytes| bytes.to_string()),
            ),
            ("tensors", if self.on_stream { "on a stream" } else { "without a stream" }.into()),
            ("counter", self.testing.counter.to_string()),
        ];
        shown.map(|(name, value)| (name.to_owned(), value)).into()
    }
}
