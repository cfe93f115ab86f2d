//! Memory of a rank besides its tensors: its sizes, and its contents before the first average.

use std::sync::Arc;

use super::builder::{Builder, Testing};
use super::coded;
use super::defaults;
use super::link::Link;
use super::outer_state::OuterState;
use super::table::Table;
use super::telemetry;
use crate::abi::*;
use crate::backend::cpu::instruction_sets;
use crate::backend::{limits, Copied, Engine, Memory, MemorySpace};
use crate::bucket;
use crate::world::Control;
use crate::{Compression, DeviceError, Error, Result};

/// Bytes between two counters that different ranks write.
pub(super) const LINE_BYTES: usize = PA_LINE_WORDS as usize * 4;

/// Sizes of a slot.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// Data packs.
    pub(super) chunk: u32,
    /// Packs on the wire.
    pub(super) slot_packs: u32,
    /// Slots of a mailbox.
    pub(super) slots: u32,
}

impl Sizes {
    pub(super) fn of(options: &Builder, table: &Table, channels: u32) -> Sizes {
        let pack = PA_PACK_BYTES as usize;
        let widest = if options.has_f32_wire()
            && table.buckets.iter().any(|bucket| bucket.dtype.size() == 2)
        {
            2
        } else {
            1
        };
        let cut = options.cut();
        let most =
            cut.slot_budget_bytes / (channels as usize * options.slots.max(1) as usize * widest);
        let pinned = options.reproducible.then_some(defaults::REPRODUCIBLE.chunk_bytes);
        let bytes = options.chunk_bytes.or(pinned);
        let bytes = bytes.unwrap_or_else(|| cut.chunk_bytes.min(most).max(128));
        // No more than the largest bucket has for one rank in one round.
        let world = options.communicator.world_size() as u64;
        let packs = table.buckets.iter().map(|bucket| bucket.packs).max().unwrap_or(1);
        let needed = bucket::align_up(bucket::channel_packs(packs, channels).div_ceil(world));
        let chunk = bucket::align_up(bytes.div_ceil(pack) as u64).min(needed) as u32;
        let slots = match options.is_sequenced() {
            false => options.slots,
            // Each launch makes one step for all chunks, and no chunk waits for room: those of one
            // step are written while those of the step before are read.
            true => {
                let rounds = |packs| {
                    let packs = bucket::channel_packs(packs, channels);
                    packs.div_ceil(u64::from(chunk.max(1)) * world)
                };
                let all: u64 = table.buckets.iter().map(|bucket| rounds(bucket.packs)).sum();
                (2 * all.max(1) as u32).next_power_of_two()
            }
        };
        Sizes { chunk, slot_packs: chunk * widest as u32, slots }
    }

    /// Bytes of one end of a link: its counters, followed by the slots if they are there.
    pub(super) fn end_bytes(&self, has_slots: bool, channels: u32) -> usize {
        let slots = if has_slots { (channels * self.slots) as usize } else { 0 };
        channels as usize * LINE_BYTES + slots * self.slot_packs as usize * PA_PACK_BYTES as usize
    }

    /// Memory of one end of a link.
    fn end(
        &self,
        (is_host, has_slots): (bool, bool),
        options: &Builder,
        channels: u32,
    ) -> Result<Memory, String> {
        let (testing, communicator) = (&options.testing, &options.communicator);
        let bytes = self.end_bytes(has_slots, channels);
        let mut memory =
            Link::place(is_host, communicator.placement(), communicator.space(), bytes)?;
        memory.set(0, bytemuck::cast_slice(&counters(channels, testing)))?;
        if testing.poison_slots && has_slots {
            memory.fill_from(channels as usize * LINE_BYTES, 0xff)?;
        }
        Ok(memory)
    }
}

impl Builder {
    /// Bytes of the inbox of the next rank in the ring, and of the credits of the previous one.
    pub(super) fn neighbours_bytes(&self, sizes: Sizes, channels: u32) -> [usize; 2] {
        let (placement, rank) = (self.communicator.placement(), self.communicator.rank());
        let [previous, next] = placement.neighbours(rank);
        let is_pull = |other| self.link.is_pull(placement, rank, other);
        [!is_pull(next), is_pull(previous)].map(|has_slots| sizes.end_bytes(has_slots, channels))
    }
}

/// Lines of counters before the first average.
fn counters(channels: u32, testing: &Testing) -> Vec<u32> {
    let mut lines = vec![0; (channels * PA_LINE_WORDS) as usize];
    lines.iter_mut().step_by(PA_LINE_WORDS as usize).for_each(|counter| *counter = testing.counter);
    lines
}

/// Checks that there is memory for everything that grows with the number of tensors: this rank's
/// tables, and a line for each tensor from every rank. It is allocated later, in small pieces,
/// whose failure would abort the process. `names` is the number of bytes of all names.
pub(super) fn check_room(tensors: usize, names: usize, rank: usize, world: usize) -> Result<()> {
    // Bytes for a tensor besides its name: in tables, which double as they grow; and in a line, of
    // which this rank has 5, and 2 from each peer.
    const TABLES: usize = 768;
    const LINE: usize = 96;
    let lines = (tensors * LINE + names) * (5 + 2 * world);
    limits::spare_for_all(tensors * TABLES + names + lines)
        .map_err(|reason| Error::Memory { rank, reason })
}

/// Memory and threads of a rank besides its tensors.
pub(super) struct RankMemory {
    pub(super) engine: Engine,
    /// This rank's shard of the mean, for each bucket.
    pub(super) shards: Vec<Memory>,
    /// The mean before the commit, for each bucket where a stage has it wider than the tensors.
    pub(super) means: Vec<Memory>,
    /// State of the outer optimizer, if there is one.
    pub(super) outer: Option<Arc<OuterState>>,
    /// References and residuals of coded averages, for each bucket; empty without compression.
    pub(super) coded: Vec<[Memory; 2]>,
    /// Samples for telemetry, for each bucket.
    samples: Vec<Memory>,
    /// Waits of all ranks, for telemetry.
    pub(super) waits: Option<Memory>,
    /// Copy of one fragment, where averages are made of copies.
    copy: Option<Memory>,
    /// Memory that neighbours access; see `Handshake`.
    pub(super) inbox: Option<Arc<Memory>>,
    pub(super) credits: Option<Arc<Memory>>,
    /// State of the outer optimizer, if the next rank of the ring maps it.
    pub(super) shared_state: Option<Arc<Memory>>,
    /// Control block of all ranks. Rank 0 has it.
    pub(super) control: Option<Arc<Control>>,
}

impl RankMemory {
    /// Allocates everything, and completes the table of buckets with its addresses.
    pub(super) fn new(
        options: &Builder,
        table: &mut Table,
        sizes: Sizes,
        channels: u32,
        ring: bool,
    ) -> Result<RankMemory> {
        let (rank, world) = (options.communicator.rank(), options.communicator.world_size() as u32);
        let (space, testing) = (options.communicator.space(), &options.testing);
        let processes = options.communicator.placement().between_processes();
        let own_failed = |reason| match space {
            MemorySpace::Host => Error::Memory { rank, reason },
            MemorySpace::Cuda(_) => Error::DeviceFailed { rank, source: DeviceError::from(reason) },
        };
        let failed = |reason| match processes {
            true => Error::SharedMemory { rank, reason },
            false => own_failed(reason),
        };
        let (mut shards, mut means, mut samples) = (vec![], vec![], vec![]);
        let mut coded = vec![];
        let mut outer = match options.outer.is_mean() {
            true => None,
            false => {
                let division = (sizes.chunk, channels, ring);
                Some(OuterState::new(options, table, division, failed, own_failed)?)
            }
        };
        for (index, (bucket, raw)) in table.buckets.iter().zip(&mut table.raw).enumerate() {
            let channel_packs = bucket::channel_packs(bucket.packs, channels);
            let shard_packs = bucket::shard_packs(channel_packs, world, sizes.chunk);
            if ring && options.commits_late() {
                let bytes = (shard_packs * u64::from(channels)) as usize * PA_PACK_BYTES as usize;
                shards.push(Memory::new(space, bytes).map_err(own_failed)?);
            }
            *raw = PaBucket {
                segments: 0, // set for every average
                packs: bucket.packs,
                channel_packs,
                shard: shards.last().map_or(0, Memory::address),
                shard_packs,
                segment_count: bucket.segments.len() as u32,
                dtype: bucket.dtype.code(),
                chunk: sizes.chunk,
                wire_f32: u32::from(options.has_f32_wire() && bucket.dtype.size() == 2),
                ..bytemuck::Zeroable::zeroed()
            };
            if ring && options.compression != Compression::None {
                coded.push(coded::memory(space, raw, channels).map_err(own_failed)?);
            }
            if options.telemetry {
                let sample = bucket::Sample::of(bucket.packs, channels);
                let bytes = (sample.packs * u64::from(channels)) as usize * PA_PACK_BYTES as usize;
                let memory = Memory::new(space, bytes).map_err(own_failed)?;
                (raw.sample, raw.sample_packs) = (memory.address(), sample.packs);
                raw.sample_period = sample.period;
                samples.push(memory);
            }
            if let Some(outer) = &mut outer {
                outer.complete(index, raw, options.outer.coefficients());
            } else if options.has_stage() {
                raw.mean = raw.shard;
                if bucket.dtype.size() == 2 {
                    let bytes = 2 * shards.last().map_or(0, Memory::bytes);
                    means.push(Memory::new(space, bytes).map_err(own_failed)?);
                    raw.mean = means.last().map_or(0, Memory::address);
                }
            }
        }
        let waits = options.telemetry.then(|| telemetry::waits::memory(space));
        let waits = waits.transpose().map_err(own_failed)?;
        let mut copy = None;
        if options.overlap.copies() {
            let (bytes, places) = places_of_copies(table);
            let memory = Memory::new(space, bytes).map_err(own_failed)?;
            let addresses: Vec<u64> = places.iter().map(|at| memory.address() + at).collect();
            table.add_copies(&addresses);
            copy = Some(memory);
        }
        let (mut inbox, mut credits) = (None, None);
        if ring {
            let (placement, link) = (options.communicator.placement(), options.link);
            let [previous, next] = placement.neighbours(rank);
            let is_host = |other| link.is_host(placement, rank, other);
            let is_pull = |other| link.is_pull(placement, rank, other);
            let ends = [(previous, !is_pull(previous)), (next, is_pull(next))];
            let [from_previous, to_next] = ends.map(|(other, has_slots)| {
                sizes.end((is_host(other), has_slots), options, channels).map_err(failed)
            });
            (inbox, credits) = (Some(from_previous?), Some(to_next?));
        }
        let control = (rank == 0).then(|| {
            // In memory of the host where not all ranks can address that of one device, and where
            // the hosts of the ranks need the weights of all.
            let placement = options.communicator.placement();
            let is_host =
                !placement.one_memory() || options.link == Link::Host || options.hosts.is_some();
            let memory = Link::place(is_host, placement, space, Control::BYTES)?;
            let words = match memory.host_pointer() {
                Some(_) => None,
                None => Some(Memory::of_the_host(space, Control::HOST_BYTES)?),
            };
            Control::new(memory, words, testing.counter)
        });
        let control = control.transpose().map_err(failed)?;
        let mut state: PaChannel = bytemuck::Zeroable::zeroed();
        (state.recv_seq, state.send_seq, state.status.epoch) =
            (testing.counter, testing.counter, testing.counter);
        let sets = instruction_sets();
        let named = |name| {
            sets.iter().find(|set| set.name == name).copied().expect("a set this machine has")
        };
        let isa = testing.instruction_set.map_or(sets[0], named);
        let states = vec![state; channels as usize];
        let leads = options.communicator.placement().leads(rank);
        let capacity = (table.raw.len(), table.segment_count());
        let mut engine = Engine::new(space, &states, capacity, isa, leads, rank)?;
        if options.overlap.copies() {
            engine.prepare_to_run_aside(rank)?;
        }
        if options.has_stage() {
            let mut copied = vec![];
            for (raw, shard) in table.raw.iter().zip(&shards) {
                // A shard's means, and its anchors, are as wide.
                let bytes = shard.bytes() * if raw.mean == raw.shard { 1 } else { 2 };
                copied.push(Copied { address: raw.mean, bytes, is_anchor: false });
                if options.needs_anchors() {
                    copied.push(Copied { address: raw.state, bytes, is_anchor: true });
                }
            }
            engine.prepare_for_stage(rank, options.hosts.is_some().then_some(&copied[..]))?;
        }
        let shared_state = outer.as_ref().filter(|_| options.shares_state());
        Ok(RankMemory {
            shared_state: shared_state.map(|outer| outer.memory().clone()),
            engine,
            shards,
            means,
            outer: outer.map(Arc::new),
            coded,
            samples,
            waits,
            copy,
            inbox: inbox.map(Arc::new),
            credits: credits.map(Arc::new),
            control: control.map(Arc::new),
        })
    }

    /// Number of bytes in all.
    pub(super) fn bytes(&self, table: &Table) -> usize {
        let own = self
            .shards
            .iter()
            .chain(&self.means)
            .chain(&self.samples)
            .chain(&self.waits)
            .chain(&self.copy);
        let own = own.chain(self.coded.as_flattened());
        let own: usize = own.map(Memory::bytes).sum();
        let mailbox: usize =
            [&self.inbox, &self.credits].into_iter().flatten().map(|memory| memory.bytes()).sum();
        let segments = table.segment_count();
        let outer = self.outer.as_ref().map_or(0, |outer| outer.bytes());
        own + outer + mailbox + self.engine.bytes(segments * size_of::<PaSegment>())
    }
}

/// Bytes of a copy of the largest fragment, and where each bucket has its copy in them: one
/// fragment is copied at a time.
fn places_of_copies(table: &Table) -> (usize, Vec<u64>) {
    let (mut most, mut places) = (0, vec![]);
    for range in &table.fragments {
        let mut end = 0;
        for bucket in &table.buckets[range.clone()] {
            places.push(end);
            end += bucket::align_up(bucket.packs) * u64::from(PA_PACK_BYTES);
        }
        most = most.max(end);
    }
    (most as usize, places)
}
