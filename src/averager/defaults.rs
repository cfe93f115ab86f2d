//! Every default that is a number, in one table, each with where it comes from. What `measured` was
//! measured on is in benches/record/; what is `reasoned` no GPU has confirmed yet.

use std::time::Duration;

/// How a rank's part of the ring is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// Channels (threads, or blocks), if as many can run at the same time.
    pub(super) channels: u32,
    /// One slot's bytes of parameters.
    pub(super) chunk_bytes: usize,
    /// All slots of a rank together, at most, unless options ask for more.
    pub(super) slot_budget_bytes: usize,
}

/// Threads on CPUs.
///
/// * 8 threads a rank move no less than more of them do on one memory. (Reasoned: the machine
///   measured on has 2 cores.)
/// * 256 KiB: a mailbox of four is then as large as a core's second-level cache, so that its chunks
///   have moved on to the cache that cores share by the time the next rank reads them. With 64 KiB
///   the reader fetches them out of the writer's own cache, and the ring takes twice as long.
///   (Measured.)
pub(super) const CPU: Cut = Cut { channels: 8, chunk_bytes: 256 << 10, slot_budget_bytes: 2 << 20 };

/// Blocks of a device whose mailboxes are in memory of devices.
///
/// * Every block that can run: each adds its own to what is in flight to memory, of which a device
///   needs all it can get.
/// * 32 KiB are 4 packs for each of 512 threads, as many as each has in flight.
/// * 16 MiB are 4 slots of that for each of 128 blocks; they stay in the second-level cache of an
///   H100 or H200, which has 50 MiB.
///
/// (All reasoned.)
pub(super) const PEER: Cut = Cut { channels: 1024, chunk_bytes: DEEP, slot_budget_bytes: 16 << 20 };

/// The same where some mailboxes are in memory of the host.
///
/// * PCIe 5.0 x16 moves 55 GB/s each way and answers in 2 µs or so: 110 KiB in flight keep it busy,
///   which 4 blocks with 32 KiB each have. 16 leave room for hand-offs, and the other processors to
///   whatever else runs.
/// * Chunks as above: 4 slots of them are more than a flag's way there and back takes to fill.
///
/// (All reasoned.)
pub(super) const HOST: Cut = Cut { channels: 16, chunk_bytes: DEEP, slot_budget_bytes: 16 << 20 };

/// What a block has in flight.
const DEEP: usize = 4 * 16 * crate::backend::cuda::THREADS as usize;

/// A rank may be so many chunks ahead of the next one. Two let one be written while the other is
/// read; four even out how long each takes. (Measured on CPUs: 2 to 8 differ by less than the
/// noise.)
pub(super) const SLOTS: u32 = 4;

/// Slots whose lines take longer than this each to get hold of are written past the caches. 64 at
/// once: 1 to 5 ns between cores with a common third-level cache, 12 to 21 between others (the
/// middle 80 % on an EPYC of the fourth generation; measured). A wrong guess costs one turn of the
/// mailbox.
pub(super) const REMOTE_NS: u32 = 8;

/// As long as torch.distributed waits for NCCL.
pub(super) const TIMEOUT: Duration = Duration::from_secs(600);
