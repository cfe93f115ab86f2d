//! The rows that average with the library. All calls of its averager are here.

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use param_averager::{
    Algorithm, Builder, Communicator, Device, Link, ParamAverager, Parameters, Pending,
    RawCudaParams, Start, TensorMut,
};

use crate::cli::{Options, Step};
use crate::crew::Work;
use crate::failure::Failure;
use crate::memory::{cores, Arena, Placed};

/// The rings of baselines run in their faster mode, without a commit.
const BASELINES_COMMIT: bool = false;

impl Options {
    pub fn builder(&self, of: Communicator, algorithm: Algorithm, commit: bool) -> Builder {
        let mut builder = ParamAverager::builder(of)
            .start_from(Start::Own)
            .allow_unnamed()
            .algorithm(algorithm)
            .link(self.link.unwrap_or(Link::Auto))
            .all_or_nothing(commit)
            .narrow_wire(self.narrow_wire)
            .reject_non_finite(self.reject_non_finite);
        if let Some(channels) = self.channels {
            builder = builder.channels(channels);
        }
        if let Some(slots) = self.slots {
            builder = builder.slots(slots);
        }
        if let Some(bytes) = self.chunk {
            builder = builder.chunk_bytes(usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        if let Some(timeout) = self.timeout {
            builder = builder.timeout(timeout);
        }
        builder
    }

    /// Weight of a rank in the library's own rows.
    pub fn weight(&self, rank: usize) -> Option<f64> {
        self.weighted.then_some(rank as f64 + 1.0)
    }

    /// Threads of one rank on CPUs, by the library's default.
    pub fn threads(&self, ranks: usize) -> u32 {
        self.channels.unwrap_or(((cores() / ranks) as u32).clamp(1, 8))
    }
}

/// One rank's tensors, in memory of the host or of a device.
#[derive(Clone)]
pub struct Replica {
    pub start: *mut u8,
    pub tensors: Arc<[Placed]>,
    pub device: Device,
    /// Owner of the memory.
    _memory: Arc<dyn Any + Send + Sync>,
}

// SAFETY: an address of memory that may be used by any thread, by one at a time; see `Arena`.
unsafe impl Send for Replica {}

impl Replica {
    /// `memory` keeps what lies at `start`.
    pub fn new(
        start: *mut u8,
        tensors: &Arc<[Placed]>,
        device: Device,
        memory: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Replica { start, tensors: tensors.clone(), device, _memory: memory }
    }

    pub fn on_host(arena: &Arc<Arena>, tensors: &Arc<[Placed]>) -> Self {
        Replica::new(arena.as_mut_ptr(), tensors, Device::cpu(), arena.clone())
    }

    /// One of its tensors, without its name: tensors of one size share an averager.
    pub fn tensor(&mut self, index: usize) -> TensorMut<'_> {
        self.placed(index)
    }

    /// The same; within one borrow of the replica, each is used once.
    fn placed(&self, index: usize) -> TensorMut<'_> {
        let Placed { offset, elements, dtype, .. } = &self.tensors[index];
        let start = self.start.wrapping_add(*offset);
        // SAFETY: placed inside of the memory, which is initialised and kept; one crew runs at a
        // time, and its member has its rank's memory to itself.
        unsafe { TensorMut::from_raw_parts(start, *elements, *dtype, self.device) }
    }
}

impl Parameters for Replica {
    fn visit<'a>(&'a mut self, visit: &mut dyn FnMut(TensorMut<'a>)) {
        let replica: &'a Replica = self;
        for (index, tensor) in replica.tensors.iter().enumerate() {
            visit(replica.placed(index).named(&tensor.name));
        }
    }
}

/// How a rank's iteration is ordered and timed: on the host, by the crew; on a device, by events on
/// a stream.
pub trait Clock {
    /// The stream that work is enqueued on, if there is one.
    fn stream(&self) -> Option<*mut c_void> {
        None
    }
    fn start(&self) -> Result<(), Failure> {
        Ok(())
    }
    fn stop(&self) -> Result<(), Failure> {
        Ok(())
    }
    /// Waits for the end. `None`: by the clock of the crew.
    fn took(&self) -> Result<Option<Duration>, Failure> {
        Ok(None)
    }
}

/// Ranks on CPUs.
pub struct Host;
impl Clock for Host {}

/// An iteration of work that is over when the clock has its end.
pub fn timed<C: Clock + 'static>(
    clock: C,
    mut work: impl FnMut(&C) -> Result<(), Failure> + 'static,
) -> Work {
    Box::new(move || {
        clock.start()?;
        work(&clock)?;
        clock.stop()?;
        clock.took()
    })
}

/// Averages on the host, or enqueues an average on a stream.
fn start<'a, P: Parameters + ?Sized>(
    averager: &'a mut ParamAverager,
    params: &mut P,
    weight: Option<f64>,
    stream: Option<*mut c_void>,
) -> Result<Option<Pending<'a>>, Failure> {
    let Some(stream) = stream else {
        match weight {
            None => averager.average(params)?,
            Some(weight) => averager.average_weighted(params, weight)?,
        };
        return Ok(None);
    };
    // SAFETY: the stream is this rank's and outlives the wait, as do the tensors, which only this
    // rank uses until then.
    let mut params = unsafe { RawCudaParams::new(stream, params) };
    Ok(Some(match weight {
        None => averager.start(&mut params)?,
        Some(weight) => averager.start_weighted(&mut params, weight)?,
    }))
}

/// One average of all tensors, with a step of an outer optimizer if one is asked for. `ran`: what
/// `Algorithm::Auto` comes to, the same on every rank.
pub fn average(
    clock: impl Clock + 'static,
    mut builder: Builder,
    step: Option<Step>,
    mut replica: Replica,
    weight: Option<f64>,
    ran: &OnceLock<Algorithm>,
) -> Result<Work, Failure> {
    if let Some(step) = step {
        builder = builder.start_from(Start::Rank(0)).outer(step.outer());
    }
    let mut averager = builder.build(&mut replica)?;
    let _ = ran.set(averager.algorithm());
    // The bytes that it was built with may be no numbers, and then steps from there are none.
    let mut needs_anchor = step.is_some();
    Ok(Box::new(move || {
        if std::mem::take(&mut needs_anchor) {
            averager.broadcast(0, &mut replica)?;
        }
        clock.start()?;
        let pending = start(&mut averager, &mut replica, weight, clock.stream())?;
        clock.stop()?; // before the wait, so that the host's wake-up does not count
        pending.map(Pending::wait).transpose()?;
        clock.took()
    }))
}

/// A ring for each tensor. Tensors of the same size and dtype share one averager, as its memory and
/// threads are the same for all of them.
pub fn per_tensor(
    clock: impl Clock + 'static,
    options: &Options,
    communicator: Communicator,
    mut replica: Replica,
) -> Result<Work, Failure> {
    let (mut averagers, mut known, mut uses) = (vec![], BTreeMap::new(), vec![]);
    for index in 0..replica.tensors.len() {
        let Placed { elements, dtype, .. } = replica.tensors[index];
        let averager = *known.entry((elements, dtype)).or_insert(averagers.len());
        if averager == averagers.len() {
            let of = communicator.clone();
            let builder = options.builder(of, Algorithm::Ring, BASELINES_COMMIT);
            averagers.push(builder.build(&mut replica.tensor(index))?);
        }
        uses.push(averager);
    }
    Ok(timed(clock, move |clock| {
        for (index, &averager) in uses.iter().enumerate() {
            let averager = &mut averagers[averager];
            let pending = start(averager, &mut replica.tensor(index), None, clock.stream())?;
            // Dropping it would wait for it. The same averager's next tensor waits, and returns
            // its error; what is enqueued is over when `took` returns.
            std::mem::forget(pending);
        }
        Ok(())
    }))
}

/// A way between tensors and a flat buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Flatten,
    Unflatten,
    /// From the tensors to themselves, to scale them.
    InPlace,
}

/// Flatten, ring, unflatten. `moves`: moves all tensors, in the order of the clock's stream.
pub fn flatten<C: Clock + 'static>(
    clock: C,
    options: &Options,
    communicator: Communicator,
    mut flat: Replica,
    moves: impl Fn(&C, Direction) -> Result<(), Failure> + 'static,
) -> Result<Work, Failure> {
    let builder = options.builder(communicator, Algorithm::Ring, BASELINES_COMMIT);
    let mut averager = builder.build(&mut flat)?;
    Ok(Box::new(move || {
        clock.start()?;
        moves(&clock, Direction::Flatten)?;
        let pending = start(&mut averager, &mut flat, None, clock.stream())?;
        moves(&clock, Direction::Unflatten)?;
        clock.stop()?;
        pending.map(Pending::wait).transpose()?;
        clock.took()
    }))
}
