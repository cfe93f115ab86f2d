//! How large the shared memory is, and what it holds before the first average.

use super::builder::{self, Builder, Testing};
use super::table::Table;
use crate::abi::*;
use crate::bucket;
use crate::world::Region;

/// Bytes between two counters that different ranks write.
pub(super) const LINE_BYTES: usize = PA_LINE_WORDS as usize * 4;

/// What one slot holds.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// Data packs.
    pub(super) chunk: u32,
    /// Packs on the wire.
    pub(super) slot_packs: u32,
    slots: u32,
}

impl Sizes {
    pub(super) fn of(options: &Builder, table: &Table, channels: u32) -> Sizes {
        let pack = PA_PACK_BYTES as usize;
        let widest = if options.f32_wire && table.buckets.iter().any(|bucket| bucket.dtype.size() == 2) {
            2
        } else {
            1
        };
        let most = builder::SLOT_BUDGET_BYTES / (channels as usize * options.slots.max(1) as usize * widest);
        let bytes = options.chunk_bytes.unwrap_or_else(|| builder::DEFAULT_CHUNK_BYTES.min(most).max(128));
        // No more than the largest bucket has for one rank in one round.
        let world = options.communicator.world_size() as u64;
        let packs = table.buckets.iter().map(|bucket| bucket.packs).max().unwrap_or(1);
        let needed = bucket::align_up(bucket::channel_packs(packs, channels).div_ceil(world));
        let chunk = bucket::align_up(bytes.div_ceil(pack) as u64).min(needed) as u32;
        Sizes { chunk, slot_packs: chunk * widest as u32, slots: options.slots }
    }

    /// Counters and slots: `filled` lines, `drained` lines, then the inbox.
    pub(super) fn mailbox(&self, channels: u32, testing: &Testing) -> Region {
        let counters = 2 * channels as usize;
        let slots = (channels * self.slots) as usize * self.slot_packs as usize * PA_PACK_BYTES as usize;
        let region = Region::new(counters * LINE_BYTES + slots);
        let bytes: *mut u8 = region.as_ptr();
        // SAFETY: inside of the region, which nobody else has yet.
        unsafe {
            for line in 0..counters {
                bytes.add(line * LINE_BYTES).cast::<u32>().write(testing.counter);
            }
            if testing.poison_slots {
                bytes.add(counters * LINE_BYTES).write_bytes(0xff, slots);
            }
        }
        region
    }
}

/// The channels' states before the first average.
pub(super) fn channel_states(channels: u32, counter: u32) -> Region {
    let region = Region::new(channels as usize * size_of::<PaChannel>());
    let states: *mut PaChannel = region.as_ptr();
    for channel in 0..channels as usize {
        // SAFETY: so many are in the region, zeroed, and nobody else has it yet.
        let state = unsafe { &mut *states.add(channel) };
        (state.recv_seq, state.send_seq, state.epoch) = (counter, counter, counter);
    }
    region
}
