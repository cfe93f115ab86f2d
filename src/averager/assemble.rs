//! Assembly of an averager: its memory, the handshake with its peers, and the arguments that all of
//! its launches share.

use std::sync::Arc;

use super::coded::Reference;
use super::lend::with_tensors;
use super::memory::{check_room, RankMemory, Sizes, LINE_BYTES};
use super::outer_state::{AnchorState, Launches};
use super::rebuild::Blueprint;
use super::stage::RankStage;
use super::table::{Layout, Problem, Table};
use super::watch::Watch;
use super::{defaults, flag, spins, start, Algorithm, Builder, Call, Lend, ParamAverager, Start};
use crate::abi::*;
use crate::backend::{Memory, MemorySpace};
use crate::overlap::MOST_FRAGMENTS;
use crate::plan::End;
use crate::world::{Admission, Handshake};
use crate::{Compression, Error, LendError, Result};

impl ParamAverager {
    /// Builds the averager; if the view contains a joiner, runs the average that transfers the
    /// model to it.
    pub(crate) fn build<P: Lend + ?Sized>(options: Builder, params: &mut P) -> Result<Self> {
        let communicator = options.communicator.clone();
        let built = ParamAverager::assemble(options, params).and_then(|mut averager| {
            averager.average_with_joiner(params)?;
            Ok(averager)
        });
        built.inspect_err(|_| {
            if communicator.is_new() {
                communicator.leave();
            }
        })
    }

    fn assemble<P: Lend + ?Sized>(mut options: Builder, params: &mut P) -> Result<Self> {
        let (rank, world) = (options.communicator.rank(), options.communicator.world_size());
        let (device, space) = (options.communicator.device(), options.communicator.space().clone());
        let fragments = options.overlap.fragments.clamp(1, MOST_FRAGMENTS);
        let readers = options.readers();
        let (mut made, mut digest, mut is_unreached) = (None, None, false);
        let lent = with_tensors(params, rank, &mut |params| {
            let (mut tensors, mut names) = (0, 0);
            params.visit(&mut |tensor| {
                tensors += 1;
                let identity = tensor.identity();
                names += identity.name.len() + identity.outer.map_or(0, str::len);
            });
            made = Some(check_room(tensors, names, rank, world).map(|()| {
                let mut new =
                    |readers| Table::new(params, device, space.clone(), readers, fragments);
                let (mut table, mut problem) = new(readers.clone());
                let is_auto = options.algorithm == Algorithm::Auto;
                is_unreached = is_auto && problem.is_some_and(Problem::is_of_direct);
                if is_unreached {
                    (table, problem) = new(vec![]);
                }
                let refusal = problem.map(|problem| table.error(rank, problem));
                let refusal = refusal.or_else(|| table.ambiguity(rank, options.allow_unnamed));
                let mut refusal = refusal.or_else(|| options.uncoded(&table));
                let compares = options.start == Start::Own && options.admission == Admission::None;
                if refusal.is_none() && compares && world > 1 {
                    // SAFETY: the table has the addresses of tensors that are lent now.
                    match unsafe { start::digest(&table, &space) } {
                        Ok(found) => digest = Some(found),
                        Err(reason) => {
                            refusal = Some(Error::DeviceFailed { rank, source: reason.into() })
                        }
                    }
                }
                (table, refusal)
            }));
        });
        let panicked = || LendError::panicked().of_rank(rank);
        let is_on_device = !matches!(space, MemorySpace::Host);
        options.on_stream = is_on_device && lent.as_ref().is_ok_and(|&on_stream| on_stream);
        let found = lent.and_then(|_| made.unwrap_or_else(|| Err(panicked())));
        // The handshake tells peers of a refusal, so this rank takes part in it all the same.
        let (table, refusal) = found.unwrap_or_else(|error| {
            (Table::of(Layout::none(device, space.clone()).into()), Some(error))
        });
        options.is_unreached = is_unreached;
        let mut averager = ParamAverager::assemble_for(options, table, refusal, digest, None)?;
        averager.blueprint = Some(Blueprint::of(&averager));
        Ok(averager)
    }

    /// Builds an averager from its table. `refusal` is this rank's reason not to build, which is
    /// shown to all ranks. `digest` is that of the tensors' values, if ranks compare them. `number`
    /// is the averager's place among the averagers that are built again; `None`: the next one of
    /// its view.
    pub(super) fn assemble_for(
        mut options: Builder,
        mut table: Table,
        refusal: Option<Error>,
        digest: Option<u64>,
        number: Option<u32>,
    ) -> Result<Self> {
        let communicator = options.communicator.clone();
        let world = communicator.world_size();
        let algorithm = options.chosen_algorithm();
        let ring = algorithm == Algorithm::Ring && (world > 1 || options.has_stage());
        // From here on nothing returns before the peers know: a refusal is part of the handshake.
        let refusal = options.check().err().or(refusal);
        let channels = if refusal.is_none() { options.channel_count() } else { 1 };
        let sizes = Sizes::of(&options, &table, channels);
        let own = match refusal {
            None => RankMemory::new(&options, &mut table, sizes, channels, ring),
            Some(refusal) => Err(refusal),
        };
        let handshake = Handshake {
            refusal: own.as_ref().err().cloned(),
            options: options.shown(),
            tensors: table.describe_all(),
            course: options.course,
            admission: options.admission,
            ordinal: options.ordinal.clone(),
            digest,
            is_unreached: options.is_unreached,
            neighbours: options.neighbours_bytes(sizes, channels),
            inbox: own.as_ref().ok().and_then(|own| own.inbox.clone()),
            credits: own.as_ref().ok().and_then(|own| own.credits.clone()),
            state: own.as_ref().ok().and_then(|own| own.shared_state.clone()),
            control: own.as_ref().ok().and_then(|own| own.control.clone()),
        };
        let patience = if options.timeout.is_zero() { defaults::TIMEOUT } else { options.timeout };
        // A refusal of any rank is this call's error.
        let agreement = communicator.agree(handshake, number, patience)?;
        let mut own = own?;
        if agreement.handshakes.iter().any(|handshake| handshake.is_unreached) {
            // All ranks come here, with what they have built for the direct average.
            drop((own, agreement));
            options.algorithm = Algorithm::Ring;
            options.is_unreached = false;
            let table = Table::of(table.layout.without_readers().into());
            return Self::assemble_for(options, table, None, digest, number);
        }
        if let (Some(outer), true) = (&mut own.outer, world > 1) {
            let placement = communicator.placement();
            let position = placement.position(communicator.rank());
            let previous = placement.order()[(position + world - 1) % world];
            let outer = Arc::get_mut(outer).expect("this averager's alone, until it is built");
            outer.set_previous(agreement.handshakes[previous].state.clone());
        }

        let mut averager = ParamAverager {
            args: bytemuck::Zeroable::zeroed(),
            launches: Launches::new(&options, ring),
            chunk: sizes.chunk,
            timeout: options.timeout,
            options: Builder {
                ordinal: agreement.ordinal.clone(),
                inherited: None,
                ..options.clone()
            },
            // Also in a joiner, which has nothing to inherit, and takes what its peers show.
            anchor: match agreement.is_again() {
                true => AnchorState::ToInherit,
                false => AnchorState::Missing,
            },
            inherited: options.inherited.clone(),
            end: End::Mean,
            reference: Reference::Missing,
            compression: Compression::None,
            captured: None,
            mixed: false,
            lost_state: 0.0,
            leaves_hosts: false,
            #[cfg(feature = "metrics")]
            metrics: super::telemetry::Metrics::new(communicator.rank(), world),
            stage: RankStage::new(&options, &table, sizes.chunk, channels),
            failed: None,
            exchanges: 0,
            call: Call::by_hand(None),
            under_way: None,
            late: None,
            admitted: None,
            blueprint: None,
            stream: None,
            watch: Watch::new(&communicator, &agreement, options.timeout, options.hosts.is_some()),
            communicator,
            agreement,
            algorithm,
            table,
            own,
        };
        averager.args = averager.launch_args(&options, sizes, channels);
        Ok(averager)
    }

    /// Arguments that stay the same for all launches.
    fn launch_args(&self, options: &Builder, sizes: Sizes, channels: u32) -> PaArgs {
        let (position, world) = (self.position(), self.world_size());
        let placement = self.communicator.placement();
        let order = placement.order();
        let handshake = |position: usize| &self.agreement.handshakes[order[position % world]];
        let address =
            |memory: &Option<Arc<Memory>>| memory.as_ref().map_or(0, |memory| memory.address());
        let own = handshake(position);
        let [previous, next] = [position + world - 1, position + 1];
        let is_pull =
            |other: usize| options.link.is_pull(placement, self.rank(), order[other % world]);
        // The end of a link where its reader polls, and the one where its writer does.
        let link = |reads: &Handshake, writes: &Handshake, is_pull| {
            let (filled, drained) = (address(&reads.inbox), address(&writes.credits));
            let slots = if is_pull { drained } else { filled };
            // behind the counters
            PaLink { slots: slots + u64::from(channels) * LINE_BYTES as u64, filled, drained }
        };
        let longest_wait = match options.communicator.space() {
            MemorySpace::Host => options.timeout,
            MemorySpace::Cuda(_) => options.timeout.min(options.device_timeout),
        };
        PaArgs {
            control: self.agreement.control.address(),
            host: self.agreement.control.host_address(),
            status: self.own.engine.status(),
            waits: self.own.waits.as_ref().map_or(0, Memory::address),
            channel: self.own.engine.channels(),
            links: [
                link(own, handshake(previous), is_pull(previous)),
                link(handshake(next), own, is_pull(next)),
            ],
            timeout_ns: u64::try_from(longest_wait.as_nanos()).unwrap_or(u64::MAX),
            rank: position as u32,
            world: world as u32,
            channels,
            slots: sizes.slots,
            slot_packs: sizes.slot_packs,
            spins: spins(world * channels as usize),
            remote_ns: options.testing.remote_ns.unwrap_or(defaults::REMOTE_NS),
            delay_ns: options.testing.delay_ns,
            // A stage has its shard in the type of sums, as an outer step does.
            flags: flag(PA_FLAG_REJECT_NON_FINITE, options.rejects_non_finite())
                | flag(PA_FLAG_STAGE | PA_FLAG_STEP, options.has_stage()),
            ..bytemuck::Zeroable::zeroed()
        }
    }
}
