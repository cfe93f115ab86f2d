//! The threads of each method on a group's devices, and what they share.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use param_averager::{Algorithm, Communicator};

use super::average::{self, Mover};
use super::device::{DeviceMemory, Gpu, Pinned};
use super::flat::Flat;
use super::kernels::Kernels;
use super::limits;
use super::nccl::Member;
use super::nccl_rows::Row;
use super::replica::Replica;
use crate::crew::{Crew, Make};
use crate::failure::Failure;
use crate::memory::Placed;
use crate::methods::{Method, Options};

/// What a group's crews share. Freed when all of them are gone.
pub struct Shared {
    pub gpus: Vec<Gpu>,
    pub tensors: Arc<[Placed]>,
    pub own: Vec<Arc<DeviceMemory>>,
    pub flat: Flat,
    pub flats: Vec<Arc<DeviceMemory>>,
    pub kernels: Vec<Arc<Kernels>>,
    pub pinned: Vec<[Arc<Pinned>; 2]>,
    pub members: Vec<Arc<Member>>,
}

/// A method's threads, ready to run.
pub fn crew(
    method: Method,
    options: Options,
    limit: Duration,
    shared: &Shared,
    ran: &Arc<OnceLock<Algorithm>>,
) -> Result<Crew, Failure> {
    let ranks = shared.gpus.len();
    let on: Vec<_> = shared.gpus.iter().map(|gpu| gpu.device()).collect();
    let mut world = Communicator::from_devices(&on)?.into_iter();
    let bytes = shared.tensors.iter().map(|tensor| tensor.elements * tensor.dtype.size()).sum();
    let mut members: Vec<Make> = vec![];
    for (rank, gpu) in shared.gpus.iter().enumerate() {
        let (gpu, own) = (gpu.clone(), shared.own[rank].clone());
        let replica =
            Replica { memory: own.clone(), tensors: shared.tensors.clone(), device: gpu.device() };
        let flat = || Replica {
            memory: shared.flats[rank].clone(),
            tensors: shared.flat.buffers.clone(),
            device: gpu.device(),
        };
        let communicator = world.next().expect("one for each rank");
        members.push(match method {
            Method::Average { algorithm, commit } => {
                let ran = ran.clone();
                let weight = options.weighted.then_some(rank as f64 + 1.0);
                Box::new(move || {
                    gpu.bind()?;
                    average::average(
                        gpu,
                        options.builder(communicator, algorithm, commit),
                        replica,
                        weight,
                        ran,
                    )
                })
            }
            Method::PerTensorRing => Box::new(move || {
                gpu.bind()?;
                average::per_tensor(gpu, options, communicator, replica)
            }),
            Method::FlattenRing => {
                let (flat, mover) = (flat(), Mover::Kernel(shared.kernels[rank].clone()));
                Box::new(move || {
                    gpu.bind()?;
                    average::flatten(gpu, options, communicator, flat, mover)
                })
            }
            Method::CopiesRing => {
                let (flat, spans) = (flat(), shared.flat.spans.clone());
                let mover =
                    Mover::Copies { gpu: gpu.clone(), own: replica, flat: flat.clone(), spans };
                Box::new(move || {
                    gpu.bind()?;
                    average::flatten(gpu, options, communicator, flat, mover)
                })
            }
            Method::Nccl { flat, sum } => {
                let (memory, tensors) = match flat {
                    true => (&shared.flats[rank], &shared.flat.buffers),
                    false => (&own, &shared.tensors),
                };
                let buffer = |tensor: &Placed| {
                    (memory.address() + tensor.offset as u64, tensor.elements, tensor.dtype)
                };
                let row = Row {
                    member: shared.members[rank].clone(),
                    buffers: tensors
                        .iter()
                        .filter(|tensor| tensor.elements > 0)
                        .map(buffer)
                        .collect(),
                    flat,
                    scale: sum.then_some(1.0 / ranks as f64),
                    kernels: shared.kernels[rank].clone(),
                    limit,
                };
                Box::new(move || {
                    gpu.bind()?;
                    row.work(gpu)
                })
            }
            Method::DeviceCopy => {
                let flat = shared.flats[rank].clone();
                Box::new(move || {
                    gpu.bind()?;
                    limits::device_copy(gpu, own, flat, bytes)
                })
            }
            Method::HostCopies => {
                let (flat, pinned) = (shared.flats[rank].clone(), shared.pinned[rank].clone());
                Box::new(move || {
                    gpu.bind()?;
                    limits::host_copies(gpu, own, flat, pinned, bytes)
                })
            }
            Method::OnePassLimit | Method::TwoPassLimit => {
                return Err(Failure::Failed(format!("{} is a limit of CPUs", method.label())))
            }
        });
    }
    Crew::new(members)
}
