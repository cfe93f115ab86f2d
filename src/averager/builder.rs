//! Options of an averager.

use std::time::Duration;

use super::defaults::{self, Cut};
use super::{Algorithm, Lend, Link, ParamAverager};
use crate::backend::MemorySpace;
use crate::world::{Admission, Communicator};
use crate::{Error, Result};

/// Options of a [`ParamAverager`]; the same on every rank.
#[derive(Clone, Debug)]
#[must_use = "call build"]
pub struct Builder {
    pub(super) communicator: Communicator,
    pub(super) algorithm: Algorithm,
    pub(super) link: Link,
    pub(super) all_or_nothing: bool,
    pub(super) reject_non_finite: bool,
    pub(super) narrow_wire: bool,
    pub(super) timeout: Duration,
    pub(super) channels: Option<u32>,
    pub(super) slots: u32,
    pub(super) chunk_bytes: Option<usize>,
    /// Shown to the others, for whom it may be of use.
    pub(super) schedule_position: u64,
    /// Of this rank, if others are let in.
    pub(super) admission: Admission,
    /// Which averager of the world it is, if it is built anew.
    pub(super) ordinal: Option<String>,
    pub(super) testing: Testing,
}

/// Settings of this crate's own tests.
#[derive(Clone, Debug, Default)]
pub struct Testing {
    /// Where all counters start.
    pub counter: u32,
    /// Fill the slots with NaN first.
    pub poison_slots: bool,
    /// Write slots past the caches if their lines take longer than this to get hold of: 0 always,
    /// `u32::MAX` never.
    pub remote_ns: Option<u32>,
    /// Every block waits at each of its protocol steps, for up to so long.
    pub delay_ns: u32,
    /// An instruction set instead of the best one.
    pub instruction_set: Option<&'static str>,
}

impl Builder {
    pub(super) fn new(communicator: Communicator) -> Self {
        Builder {
            communicator,
            algorithm: Algorithm::Auto,
            link: Link::Auto,
            all_or_nothing: true,
            reject_non_finite: false,
            narrow_wire: false,
            timeout: defaults::TIMEOUT,
            channels: None,
            slots: defaults::SLOTS,
            chunk_bytes: None,
            schedule_position: 0,
            admission: Admission::None,
            ordinal: None,
            testing: Testing::default(),
        }
    }

    /// How the parameters move. Default: [`Algorithm::Auto`].
    pub fn algorithm(mut self, algorithm: Algorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// For the ring on CUDA devices: where mailboxes live. Default: [`Link::Auto`].
    pub fn link(mut self, link: Link) -> Self {
        self.link = link;
        self
    }

    /// For the ring. `true`, the default: a rank writes its tensors only when every rank has its
    /// shard of the mean, so a failure while summing leaves all tensors as they were. `false`:
    /// ranks write as they go, which is faster, needs no memory for a shard, and after a failure on
    /// the way leaves each element either a rank's own or the mean. The direct average decides at
    /// its start.
    pub fn all_or_nothing(mut self, all_or_nothing: bool) -> Self {
        self.all_or_nothing = all_or_nothing;
        self
    }

    /// `true`: if a rank holds a NaN or an infinity, nobody's tensors change and every rank gets
    /// [`Error::NonFinite`]. Costs the direct average, and the ring without all-or-nothing, one
    /// more pass over the tensors. Default: `false`.
    pub fn reject_non_finite(mut self, reject: bool) -> Self {
        self.reject_non_finite = reject;
        self
    }

    /// For the ring, f16 and bf16, with three ranks or more. `false`, the default: partial sums
    /// travel as f32, so that the mean is rounded once, and values that are equal on all ranks stay
    /// as they are. n ranks then send (n − 2) / (2n − 2) more bytes: 33 % for 4 ranks. `true`:
    /// partial sums travel as partial means in the tensors' dtype, and are rounded at each of n − 2
    /// hops more.
    ///
    /// All else travels in the tensors' dtype either way; between two ranks that is everything.
    pub fn narrow_wire(mut self, narrow_wire: bool) -> Self {
        self.narrow_wire = narrow_wire;
        self
    }

    /// True if partial sums of f16 and bf16 travel as f32. Of two ranks none sends any.
    pub(super) fn has_f32_wire(&self) -> bool {
        !self.narrow_wire && self.communicator.world_size() > 2
    }

    /// How long one wait for a peer may last before the average fails on every rank. Default: 10
    /// minutes.
    ///
    /// The direct average never gives up after it began to write: ranks wait for one another to be
    /// off their tensors.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Threads of a rank that each move a part, 1 to 1,024. Default: this machine's cores shared
    /// among the ranks, 8 at most. On a CUDA device: blocks, by default as many as run at the same
    /// time, shared among the ranks, or 16 where the ring goes through memory of the host.
    /// Averagers whose averages overlap in time must fit on it together, which nobody checks.
    pub fn channels(mut self, channels: u32) -> Self {
        self.channels = Some(channels);
        self
    }

    /// For the ring: slots of a mailbox, a power of two from 2 to 1,024. Default: 4.
    pub fn slots(mut self, slots: u32) -> Self {
        self.slots = slots;
        self
    }

    /// For the ring: bytes of parameters in one slot, 128 B to 64 MiB, rounded up to a multiple of
    /// 128. Default: 256 KiB, less where that makes all slots of a rank exceed 2 MiB or where the
    /// model is small; on a CUDA device 32 KiB and 16 MiB.
    pub fn chunk_bytes(mut self, bytes: usize) -> Self {
        self.chunk_bytes = Some(bytes);
        self
    }

    /// For this crate's own tests.
    #[cfg(feature = "__testing")]
    #[doc(hidden)]
    pub fn testing(mut self, testing: Testing) -> Self {
        self.testing = testing;
        self
    }

    /// Builds the averager for these tensors. Collective: returns when every rank has called it,
    /// with the same error on every rank if options or tensors differ. The tensors' values and
    /// addresses may change afterwards, their number, order, dtypes and sizes may not.
    ///
    /// In a process that [joined](crate::Communicator::join) it gives the tensors the values that the
    /// others have.
    pub fn build<P: Lend + ?Sized>(self, params: &mut P) -> Result<ParamAverager> {
        ParamAverager::build(self, params)
    }

    pub(super) fn check(&self) -> Result<()> {
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
            _ if self.algorithm == Algorithm::Direct
                && !self.communicator.placement().one_memory() =>
            {
                refuse(
                    "algorithm",
                    "Direct, on several devices or between processes".into(),
                    "Auto or Ring, unless all ranks are threads of one process, on CPUs or on one \
                     device",
                )
            }
            _ => match (self.crowd(), self.link_refusal()) {
                (Some(found), _) => refuse(
                    "channels",
                    found,
                    "so few that the blocks of all ranks on a device run at the same time",
                ),
                (None, Some(refusal)) => Err(refusal),
                (None, None) => Ok(()),
            },
        }
    }

    fn link_refusal(&self) -> Option<Error> {
        self.link.refusal(
            self.communicator.placement(),
            self.communicator.rank(),
            self.communicator.space(),
        )
    }

    /// All blocks of all ranks wait for one another: those that share a device must be resident
    /// together. If they can't be, how many there are.
    fn crowd(&self) -> Option<String> {
        let occupancy = self.communicator.placement().occupancy()?;
        let channels = self.channel_count();
        (channels * occupancy.ranks > occupancy.blocks).then(|| {
            format!(
                "{channels}, on each of {} ranks of {}, but only {} blocks fit on it",
                occupancy.ranks, occupancy.device, occupancy.blocks
            )
        })
    }

    /// What `Auto` stands for.
    pub(super) fn chosen_algorithm(&self) -> Algorithm {
        match self.algorithm {
            Algorithm::Auto if self.communicator.placement().one_memory() => Algorithm::Direct,
            Algorithm::Auto => Algorithm::Ring,
            chosen => chosen,
        }
    }

    pub(super) fn cut(&self) -> Cut {
        let host = || self.link.is_host_anywhere(self.communicator.placement());
        match self.communicator.space() {
            MemorySpace::Host => defaults::CPU,
            MemorySpace::Cuda(_) if self.chosen_algorithm() == Algorithm::Ring && host() => {
                defaults::HOST
            }
            MemorySpace::Cuda(_) => defaults::PEER,
        }
    }

    pub(super) fn channel_count(&self) -> u32 {
        self.channels.unwrap_or_else(|| {
            let at_once = match self.communicator.placement().occupancy() {
                Some(occupancy) => occupancy.blocks / occupancy.ranks,
                None => {
                    (self.communicator.placement().cores() / self.communicator.world_size()) as u32
                }
            };
            at_once.clamp(1, self.cut().channels)
        })
    }

    /// What must be the same on every rank.
    pub(super) fn shown(&self) -> Vec<(String, String)> {
        let shown = [
            ("algorithm", format!("{:?}", self.algorithm)),
            ("link", format!("{:?}", self.link)),
            ("all_or_nothing", self.all_or_nothing.to_string()),
            ("reject_non_finite", self.reject_non_finite.to_string()),
            ("narrow_wire", self.narrow_wire.to_string()),
            ("timeout", format!("{:?}", self.timeout)),
            ("channels", self.channel_count().to_string()),
            ("slots", self.slots.to_string()),
            (
                "chunk_bytes",
                self.chunk_bytes.map_or("the default".into(), |bytes| bytes.to_string()),
            ),
            ("counter", self.testing.counter.to_string()),
        ];
        shown.map(|(name, value)| (name.to_owned(), value)).into()
    }
}
