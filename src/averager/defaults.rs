//! Numeric defaults in one table, each with its source. `Measured`: benches/record/ names the
//! machine. `Reasoned`: no GPU has confirmed it yet.

use std::time::Duration;

/// Tiling of a rank's part of the ring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// Most channels (threads, or blocks), if as many can run at the same time.
    pub(super) channels: u32,
    /// Bytes of parameters in one slot.
    pub(super) chunk_bytes: usize,
    /// Most bytes of all slots of a rank together, unless options ask for more.
    pub(super) slot_budget_bytes: usize,
}

/// Tiling for threads on CPUs.
///
/// * 8 threads a rank saturate one memory: more of them move no more. (Reasoned: the machine
///   measured on has 2 cores.)
/// * 256 KiB: a mailbox of four is then as large as a core's second-level cache, so that its chunks
///   have moved on to the cache that cores share by the time the next rank reads them. With 64 KiB
///   the reader fetches them out of the writer's own cache, and the ring takes twice as long.
///   (Measured.)
pub(super) const CPU: Cut = Cut { channels: 8, chunk_bytes: 256 << 10, slot_budget_bytes: 2 << 20 };

/// Tiling for blocks of a device whose mailboxes are in memory of devices.
///
/// * Half of the blocks that fit, which is one for each multiprocessor: each adds to the bytes in
///   flight to memory, of which 11 KiB a multiprocessor are enough, and a block has 16 KiB.
/// * 32 KiB are 8 packs for each of 256 threads, which have 4 in flight.
/// * 16 MiB are 4 slots of that for each of 128 blocks; they stay in the second-level cache of an
///   H100 or H200, which has 50 MiB.
///
/// (All reasoned.)
pub(super) const PEER: Cut = Cut { channels: 1024, chunk_bytes: DEEP, slot_budget_bytes: 16 << 20 };

/// Tiling for blocks of a device where some mailboxes are in memory of the host.
///
/// * PCIe 5.0 x16 moves 55 GB/s each way with a latency of about 2 µs: 110 KiB in flight keep it
///   busy, which is 4 blocks with 32 KiB each. 16 blocks leave room for hand-offs, and the other
///   multiprocessors to other work.
/// * Chunks as above: filling 4 slots of them takes longer than a flag's round trip.
///
/// (All reasoned.)
pub(super) const HOST: Cut = Cut { channels: 16, chunk_bytes: DEEP, slot_budget_bytes: 16 << 20 };

/// Twice the bytes that a block has in flight.
const DEEP: usize = 2 * 4 * 16 * crate::backend::cuda::THREADS as usize;

/// Tiling that is the same on every machine, for `Builder::reproducible`: 4 threads or blocks run
/// at once nearly everywhere, and 64 KiB fit every budget above. (Reasoned.)
pub(super) const REPRODUCIBLE: Cut =
    Cut { channels: 4, chunk_bytes: 64 << 10, slot_budget_bytes: 2 << 20 };

/// Slots of a mailbox: how many chunks a rank may be ahead of the next one. With two, one is
/// written while the other is read; four even out different speeds. (Measured on CPUs: 2 to 8
/// differ by less than the noise.)
pub(super) const SLOTS: u32 = 4;

/// Latency of a slot's cache line, in nanoseconds, above which slots are written past the caches.
/// With 64 lines at once: 1 to 5 ns between cores with a common third-level cache, 12 to 21 between
/// others (the middle 80 % on a fourth-generation EPYC; measured). A wrong guess costs one turn of
/// the mailbox.
pub(super) const REMOTE_NS: u32 = 8;

/// Longest wait for a peer: that of torch.distributed with NCCL.
pub(super) const TIMEOUT: Duration = Duration::from_secs(600);

/// Longest wait for a peer within a kernel. Drivers kill kernels on devices with a display after 2
/// s (Windows) to 7 s (Linux); ranks that have come are microseconds apart. (Reasoned.)
pub(super) const DEVICE_TIMEOUT: Duration = Duration::from_secs(1);
