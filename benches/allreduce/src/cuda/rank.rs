//! Work of one rank on a CUDA device in an iteration of each row.

use std::sync::{Arc, OnceLock};

use cudarc::driver::{result, sys};
use param_averager::{Algorithm, Communicator};

use super::flatten::Kernels;
use super::gpu::{Clock, DeviceMemory, Gpu};
use super::nccl::{Comm, Loaded};
use crate::averager::{self, Direction};
use crate::cli::Options;
use crate::crew::Work;
use crate::failure::Failure;
use crate::memory::{Flat, Placed};
use crate::rows::{Kind, Row};

/// Page-locked memory of a rank in each direction, at most: it is used again and again.
const PINNED_BYTES: usize = 64 << 20;

/// A rank, its memory, and what else the rows of a group share.
#[derive(Clone)]
pub struct Rank {
    pub gpu: Gpu,
    pub tensors: Arc<[Placed]>,
    pub flat: Flat,
    /// The replica.
    pub own: Arc<DeviceMemory>,
    /// A second block for flat buffers and copies, if a row needs it.
    pub second: Option<Arc<DeviceMemory>>,
    /// Kernels that move between the two, if a row needs them.
    pub kernels: Option<Arc<Kernels>>,
    pub options: Options,
    /// How many there are.
    pub ranks: usize,
}

/// Enqueues a move of all tensors on the clock's stream.
type Mover = Box<dyn Fn(&Clock, Direction) -> Result<(), Failure>>;

impl Rank {
    /// Makes the work of a row, on its thread. `nccl`: for its rows.
    pub fn work(
        self,
        row: Row,
        communicator: Communicator,
        ran: &OnceLock<Algorithm>,
        nccl: Option<Loaded>,
    ) -> Result<Work, Failure> {
        let (clock, options) = (Clock::new(&self.gpu)?, &self.options);
        let own = self.own.replica(&self.tensors);
        match row.kind {
            Kind::Average { algorithm, commit, step } => {
                let builder = options.builder(communicator, algorithm, commit);
                let weight = options.weight(self.gpu.rank);
                averager::average(clock, builder, step, own, weight, ran)
            }
            Kind::PerTensor => averager::per_tensor(clock, options, communicator, own),
            Kind::Flatten { copies } => {
                let flat = self.second().replica(&self.flat.buffers);
                let moves = if copies { self.copies() } else { self.launches() };
                averager::flatten(clock, options, communicator, flat, moves)
            }
            Kind::Nccl { flat, scale } => {
                self.all_reduce(clock, nccl.expect("loaded for its rows"), flat, scale)
            }
            Kind::DeviceCopy => Ok(self.device_copy(clock)),
            Kind::HostCopies => self.host_copies(clock),
            Kind::OnePass | Kind::TwoPass => {
                unreachable!("{} is a row of --backend cpu", row.label())
            }
        }
    }

    fn second(&self) -> &Arc<DeviceMemory> {
        self.second.as_ref().expect("allocated for this row")
    }

    fn bytes(&self) -> usize {
        self.tensors.iter().map(Placed::bytes).sum()
    }

    /// Moves by one launch for each dtype.
    fn launches(&self) -> Mover {
        let kernels = self.kernels.clone().expect("loaded for this row");
        Box::new(move |clock, direction| kernels.enqueue(direction, None, &clock.stream))
    }

    /// Moves by a copy of the device's for each tensor.
    fn copies(&self) -> Mover {
        let (gpu, own, second) = (self.gpu.clone(), self.own.clone(), self.second().clone());
        let spans = self.flat.spans.clone();
        Box::new(move |clock, direction| {
            for span in spans.iter() {
                let (own, flat) =
                    (own.address + span.tensor as u64, second.address + span.flat as u64);
                let out = direction == Direction::Flatten;
                let (to, from) = if out { (flat, own) } else { (own, flat) };
                let stream = clock.stream.cu_stream();
                // SAFETY: inside of the two blocks, which are this rank's while it works.
                let copied = unsafe { result::memcpy_dtod_async(to, from, span.bytes, stream) };
                gpu.check("cuMemcpyDtoDAsync", copied)?;
            }
            Ok(())
        })
    }

    /// All-reduces in place, or on the flat buffers. With `scale`, ncclSum and a multiplication by
    /// 1/n by the kernels, on the way out of the flat buffers if there are any.
    fn all_reduce(
        self,
        clock: Clock,
        nccl: Loaded,
        flat: bool,
        scale: bool,
    ) -> Result<Work, Failure> {
        let comm = Comm::join(nccl, self.ranks, self.gpu.rank)?;
        let (memory, tensors) = match flat {
            true => (self.second(), &self.flat.buffers),
            false => (&self.own, &self.tensors),
        };
        let tensors = tensors.iter().filter(|tensor| tensor.elements > 0);
        let buffers = tensors.map(|t| (memory.address + t.offset as u64, t.elements, t.dtype));
        let buffers: Vec<_> = buffers.collect();
        let kernels = self.kernels.clone().expect("loaded for this row");
        let by = scale.then_some(1.0 / self.ranks as f64);
        Ok(averager::timed(clock, move |clock| {
            if flat {
                kernels.enqueue(Direction::Flatten, None, &clock.stream)?;
            }
            // SAFETY: memory of `self`, which is this rank's while it works, until the end.
            unsafe { comm.all_reduce(&buffers, scale, &clock.stream) }?;
            if flat || scale {
                let to = if flat { Direction::Unflatten } else { Direction::InPlace };
                kernels.enqueue(to, by, &clock.stream)?;
            }
            let _ = &self; // owner of the memory
            Ok(())
        }))
    }

    /// Reads the rank's bytes once and writes them once within the device, as the direct average
    /// does at best.
    fn device_copy(self, clock: Clock) -> Work {
        averager::timed(clock, move |clock| {
            let (to, from) = (self.second().address, self.own.address);
            let stream = clock.stream.cu_stream();
            // SAFETY: both hold so many bytes, and are this rank's while it works.
            let copied = unsafe { result::memcpy_dtod_async(to, from, self.bytes(), stream) };
            self.gpu.check("cuMemcpyDtoDAsync", copied)
        })
    }

    /// Copies the rank's bytes from page-locked memory of the host to the device, and as many back
    /// at the same time.
    fn host_copies(self, clock: Clock) -> Result<Work, Failure> {
        let (bytes, most) = (self.bytes(), PINNED_BYTES.min(self.bytes().max(1)));
        let mut pinned = [self.gpu.pinned(most)?, self.gpu.pinned(most)?];
        let back = self.gpu.check("cuStreamCreate", self.gpu.context.new_stream())?;
        Ok(averager::timed(clock, move |clock| {
            let gpu = &self.gpu;
            gpu.check("cuStreamWaitEvent", back.join(&clock.stream))?;
            for at in (0..bytes).step_by(most) {
                let (size, at) = (most.min(bytes - at), at as u64);
                let (to, from) = (self.second().address + at, self.own.address + at);
                let [there, here] = pinned.each_mut().map(|pinned| pinned.as_mut_ptr());
                let there = gpu.check("cuEventSynchronize", there)?.cast();
                let here = gpu.check("cuEventSynchronize", here)?.cast();
                let (out, back) = (clock.stream.cu_stream(), back.cu_stream());
                // SAFETY: inside of all four, which are this rank's while it works.
                unsafe {
                    let out = sys::cuMemcpyHtoDAsync_v2(to, there, size, out);
                    gpu.check("cuMemcpyHtoDAsync", out.result())?;
                    let back = sys::cuMemcpyDtoHAsync_v2(here, from, size, back);
                    gpu.check("cuMemcpyDtoHAsync", back.result())?;
                }
            }
            gpu.check("cuStreamWaitEvent", clock.stream.join(&back))
        }))
    }
}
