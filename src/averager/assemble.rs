//! How an averager is put together: what it needs, what the others show, and what is the same in all of its launches.

use std::sync::Arc;

use super::memory::{check_room, Own, Sizes, LINE_BYTES};
use super::table::Table;
use super::{defaults, flag, phases, spins, Admission, Algorithm, Builder, ParamAverager, Tensors};
use crate::abi::*;
use crate::backend::Memory;
use crate::world::Card;
use crate::{Parameters, Result};

impl ParamAverager {
    /// With the first average in it, if a process joins.
    pub(crate) fn build(options: Builder, tensors: &mut impl Tensors) -> Result<Self> {
        let communicator = options.communicator.clone();
        let built = tensors.assemble(options).and_then(|mut averager| {
            averager.average_with_joiner(tensors)?;
            Ok(averager)
        });
        built.inspect_err(|_| {
            if communicator.is_new() {
                communicator.leave();
            }
        })
    }

    pub(super) fn assemble<P: Parameters + ?Sized>(options: Builder, params: &mut P) -> Result<Self> {
        let communicator = options.communicator.clone();
        let (rank, world) = (communicator.rank(), communicator.world_size());
        let (device, site) = (communicator.device(), communicator.site().clone());
        let room = check_room(params, rank, world);
        let (mut table, problem) = match &room {
            Ok(()) => Table::new(params, device, site),
            Err(_) => Table::new(&mut [] as &mut [Vec<f32>], device, site),
        };
        let algorithm = options.chosen_algorithm();
        let ring = algorithm == Algorithm::Ring && world > 1;
        // From here on nothing returns before the peers know: what is refused here is shown to them as such.
        let refusal =
            room.err().or(options.check().err()).or(problem.map(|problem| table.error(rank, problem)));
        let channels = if refusal.is_none() { options.channel_count() } else { 1 };
        let sizes = Sizes::of(&options, &table, channels);
        let own = match refusal {
            None => Own::new(&options, &mut table, sizes, channels, ring),
            Some(refusal) => Err(refusal),
        };
        let card = Card {
            refusal: own.as_ref().err().cloned(),
            options: options.shown(),
            tensors: table.describe_all(),
            schedule_position: options.schedule_position,
            admits: options.admission != Admission::None,
            ordinal: options.ordinal.clone(),
            inbox: own.as_ref().ok().and_then(|own| own.inbox.clone()),
            credits: own.as_ref().ok().and_then(|own| own.credits.clone()),
            control: own.as_ref().ok().and_then(|own| own.control.clone()),
        };
        let patience = if options.timeout.is_zero() { defaults::TIMEOUT } else { options.timeout };
        let agreement = communicator.agree(card, patience)?; // a refusal comes back from here
        let own = own?;

        let mut averager = ParamAverager {
            args: bytemuck::Zeroable::zeroed(),
            phases: phases(algorithm, options.all_or_nothing, options.reject_non_finite),
            timeout: options.timeout,
            options: Builder { ordinal: agreement.ordinal.clone(), ..options.clone() },
            failed: None,
            let_in: None,
            #[cfg(feature = "cudarc")]
            stream: None,
            communicator,
            agreement,
            algorithm,
            table,
            own,
        };
        averager.args = averager.launch_args(&options, sizes, channels);
        Ok(averager)
    }

    /// The arguments that stay the same for all launches.
    fn launch_args(&self, options: &Builder, sizes: Sizes, channels: u32) -> PaArgs {
        let (position, world) = (self.position(), self.world_size());
        let order = self.communicator.places().order();
        let card = |position: usize| &self.agreement.cards[order[position % world]];
        let address = |memory: &Option<Arc<Memory>>| memory.as_ref().map_or(0, |memory| memory.address());
        let own = card(position);
        let (own_inbox, own_credits) = (address(&own.inbox), address(&own.credits));
        let next = address(&card(position + 1).inbox);
        let slots = u64::from(channels) * LINE_BYTES as u64; // behind the counters
        PaArgs {
            control: self.agreement.control.address(),
            channel: self.own.engine.channels(),
            buckets: self.own.buckets,
            inbox: own_inbox + slots,
            outbox: next + slots,
            filled_in: own_inbox,
            filled_out: next,
            drained_in: own_credits,
            drained_out: address(&card(position + world - 1).credits),
            timeout_ns: u64::try_from(options.timeout.as_nanos()).unwrap_or(u64::MAX),
            rank: position as u32,
            world: world as u32,
            channels,
            slots: options.slots,
            slot_packs: sizes.slot_packs,
            bucket_count: self.table.raw.len() as u32,
            spins: spins(world * channels as usize),
            far_ns: options.testing.far_ns.unwrap_or(defaults::FAR_NS),
            delay_ns: options.testing.delay_ns,
            flags: flag(PA_FLAG_REJECT_NON_FINITE, options.reject_non_finite)
                | flag(PA_FLAG_THROUGH, self.agreement.control.has_through()),
            ..bytemuck::Zeroable::zeroed()
        }
    }
}
