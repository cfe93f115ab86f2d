//! The library's rows: as it is meant to be used, a ring for each tensor, and rings over a flat
//! buffer.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use cudarc::driver::result;
use param_averager::{Algorithm, Builder, Communicator, ParamAverager, RawCudaParams};

use super::device::{Clock, Gpu, Stream};
use super::flat::Span;
use super::kernels::{Kernels, Way};
use super::replica::Replica;
use crate::crew::Work;
use crate::failure::Failure;
use crate::memory::Placed;
use crate::methods::{Options, BASELINES_COMMIT};

/// `ran`: what `Algorithm::Auto` comes to.
pub fn average(
    gpu: Gpu,
    builder: Builder,
    mut replica: Replica,
    weight: Option<f64>,
    ran: Arc<OnceLock<Algorithm>>,
) -> Result<Work, Failure> {
    let clock = Clock::new(&gpu)?;
    let mut averager = builder.build(&mut replica)?;
    let _ = ran.set(averager.algorithm()); // the same on every rank
    Ok(Box::new(move || {
        clock.start()?;
        let stream = clock.stream.raw.cast();
        // SAFETY: the stream is this rank's, and the tensors are nobody else's until the wait
        // below; both live longer.
        let pending = unsafe {
            match weight {
                Some(weight) => {
                    averager.start_weighted(&mut RawCudaParams::new(stream, &mut replica), weight)
                }
                None => averager.start(&mut RawCudaParams::new(stream, &mut replica)),
            }
        }?;
        clock.stop()?; // before the wait, so that the host's wake-up does not count
        pending.wait()?;
        clock.took()
    }))
}

/// Tensors of the same size and dtype share one averager, as its memory is the same for all of
/// them.
pub fn per_tensor(
    gpu: Gpu,
    options: Options,
    communicator: Communicator,
    mut replica: Replica,
) -> Result<Work, Failure> {
    let clock = Clock::new(&gpu)?;
    let mut averagers: Vec<ParamAverager> = vec![];
    let mut known = BTreeMap::new();
    let mut uses = vec![];
    for index in 0..replica.tensors.len() {
        let Placed { elements, dtype, .. } = replica.tensors[index];
        let averager = *known.entry((elements, dtype)).or_insert(averagers.len());
        if averager == averagers.len() {
            let builder = options.builder(communicator.clone(), Algorithm::Ring, BASELINES_COMMIT);
            averagers.push(builder.build(&mut replica.tensor(index))?);
        }
        uses.push(averager);
    }
    Ok(Box::new(move || {
        clock.start()?;
        for (index, &averager) in uses.iter().enumerate() {
            // SAFETY: as in `average`; what is enqueued is over when `took` returns.
            let pending = unsafe {
                averagers[averager].start(&mut RawCudaParams::new(
                    clock.stream.raw.cast(),
                    &mut replica.tensor(index),
                ))
            }?;
            // To drop it is to wait for it. The same averager's next tensor does, and tells what
            // went wrong for good.
            std::mem::forget(pending);
        }
        clock.stop()?;
        clock.took()
    }))
}

/// How tensors get into a flat buffer and out of it.
pub enum Mover {
    /// One launch.
    Kernel(Arc<Kernels>),
    /// A copy of the device's for each tensor.
    Copies { gpu: Gpu, own: Replica, flat: Replica, spans: Vec<Span> },
}

impl Mover {
    fn enqueue(&self, way: Way, stream: &Stream) -> Result<(), Failure> {
        let (gpu, own, flat, spans) = match self {
            Mover::Kernel(kernels) => return kernels.enqueue(way, None, stream),
            Mover::Copies { gpu, own, flat, spans } => (gpu, own, flat, spans),
        };
        for span in spans {
            let (tensor, flat) = (
                own.memory.address() + span.tensor as u64,
                flat.memory.address() + span.flat as u64,
            );
            let (to, from) = if way == Way::Flatten { (flat, tensor) } else { (tensor, flat) };
            // SAFETY: inside of the two blocks of memory, which are this member's while it works.
            let copied = unsafe { result::memcpy_dtod_async(to, from, span.bytes, stream.raw) };
            gpu.check("cuMemcpyDtoDAsync", copied)?;
        }
        Ok(())
    }
}

/// Flatten, ring, unflatten.
pub fn flatten(
    gpu: Gpu,
    options: Options,
    communicator: Communicator,
    mut flat: Replica,
    mover: Mover,
) -> Result<Work, Failure> {
    let clock = Clock::new(&gpu)?;
    let builder = options.builder(communicator, Algorithm::Ring, BASELINES_COMMIT);
    let mut averager = builder.build(&mut flat)?;
    Ok(Box::new(move || {
        clock.start()?;
        mover.enqueue(Way::Flatten, &clock.stream)?;
        // SAFETY: as in `average`: what comes before and after is ordered by the stream.
        let pending =
            unsafe { averager.start(&mut RawCudaParams::new(clock.stream.raw.cast(), &mut flat)) }?;
        mover.enqueue(Way::Unflatten, &clock.stream)?;
        clock.stop()?;
        pending.wait()?;
        clock.took()
    }))
}
