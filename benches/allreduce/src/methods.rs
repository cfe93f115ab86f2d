//! The ways to average that are measured, each as the members of a crew.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use param_averager::{Algorithm, Builder, Communicator, Device, Link, ParamAverager, Parameters};

use crate::crew::{Crew, Make, Work};
use crate::failure::Failure;
use crate::layout::Layout;
use crate::limit::Pass;
use crate::memory::{cores, place_flat, Arena, Placed, Replica};

/// What one row measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The library, on the tensors where they are. `commit`: all or nothing, which only the ring
    /// makes a difference of.
    Average { algorithm: Algorithm, commit: bool },
    /// No averager can be faster; see limit.rs.
    OnePassLimit,
    /// No averager that is all or nothing can be faster; see limit.rs.
    TwoPassLimit,
    /// One ring for each tensor, one tensor after the other, as a loop over `all_reduce` does.
    PerTensorRing,
    /// All tensors copied into one flat buffer, one ring, all copied back.
    FlattenRing,
    /// The same, by a copy of the device's for each tensor instead of a kernel. On CUDA devices
    /// only, as all below.
    CopiesRing,
    /// NCCL, on the tensors in one group, or on a flat buffer between flatten and unflatten. `sum`:
    /// ncclSum, multiplied by 1/n by a kernel of the bench's; else ncclAvg.
    Nccl { flat: bool, sum: bool },
    /// Every rank copies as many bytes as it has parameters within its device.
    DeviceCopy,
    /// … from page-locked memory of the host, and to it at the same time.
    HostCopies,
}

/// The builder's options, as the command line gives them.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub link: Link,
    pub channels: Option<u32>,
    pub chunk: Option<u64>,
    pub slots: Option<u32>,
    pub narrow_wire: bool,
    pub reject_non_finite: bool,
    pub timeout: Option<Duration>,
    /// Rank r has the weight r + 1. For the library's own rows.
    pub weighted: bool,
}

impl Options {
    /// A builder with these.
    pub fn builder(
        &self,
        communicator: Communicator,
        algorithm: Algorithm,
        commit: bool,
    ) -> Builder {
        let mut builder = ParamAverager::builder(communicator)
            .algorithm(algorithm)
            .link(self.link)
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

    /// Threads of one rank, as the library's default has it.
    pub fn threads(&self, ranks: usize) -> u32 {
        self.channels.unwrap_or(((cores() / ranks) as u32).clamp(1, 8))
    }
}

impl Method {
    pub const DIRECT: Method = Method::Average { algorithm: Algorithm::Direct, commit: true };
    pub const RING: Method = Method::Average { algorithm: Algorithm::Ring, commit: true };
    pub const RING_WITHOUT_COMMIT: Method =
        Method::Average { algorithm: Algorithm::Ring, commit: false };

    /// Its name in records.
    pub fn name(self) -> &'static str {
        match self {
            Method::Average { commit: false, algorithm: Algorithm::Ring } => "average_no_commit",
            Method::Average { .. } => "average",
            Method::OnePassLimit => "one_pass_limit",
            Method::TwoPassLimit => "two_pass_limit",
            Method::PerTensorRing => "per_tensor_ring",
            Method::FlattenRing => "flatten_ring_unflatten",
            Method::CopiesRing => "copies_ring_copies",
            Method::Nccl { flat: false, sum: false } => "nccl_grouped_avg",
            Method::Nccl { flat: false, sum: true } => "nccl_grouped_sum_scale",
            Method::Nccl { flat: true, sum: false } => "nccl_flatten_avg",
            Method::Nccl { flat: true, sum: true } => "nccl_flatten_sum_scale",
            Method::DeviceCopy => "device_copy",
            Method::HostCopies => "pinned_host_both_ways",
        }
    }

    /// What it runs on: `auto` stands for `direct` where ranks share an address space, which here
    /// they do.
    pub fn algorithm(self) -> &'static str {
        match self {
            Method::Average { algorithm: Algorithm::Ring, .. }
            | Method::PerTensorRing
            | Method::FlattenRing
            | Method::CopiesRing => "ring",
            Method::Average { .. } => "direct",
            Method::OnePassLimit => "one_pass",
            Method::TwoPassLimit => "two_pass",
            Method::Nccl { .. } => "nccl",
            Method::DeviceCopy | Method::HostCopies => "copy",
        }
    }

    /// Its name in the table.
    pub fn label(self) -> &'static str {
        match self {
            Method::Average { commit: false, algorithm: Algorithm::Ring } => "ring, no commit",
            Method::Average { algorithm: Algorithm::Ring, .. } => "ring",
            Method::Average { .. } => "direct",
            Method::OnePassLimit => "one-pass limit",
            Method::TwoPassLimit => "two-pass limit",
            Method::PerTensorRing => "ring per tensor",
            Method::FlattenRing => "flatten+ring+unflatten",
            Method::CopiesRing => "copies+ring+copies",
            Method::Nccl { flat: false, sum: false } => "NCCL grouped avg",
            Method::Nccl { flat: false, sum: true } => "NCCL grouped sum+scale",
            Method::Nccl { flat: true, sum: false } => "NCCL flatten avg",
            Method::Nccl { flat: true, sum: true } => "NCCL flatten sum+scale",
            Method::DeviceCopy => "device copy",
            Method::HostCopies => "pinned host both ways",
        }
    }

    pub fn is_baseline(self) -> bool {
        !matches!(self, Method::Average { .. })
    }

    pub fn is_limit(self) -> bool {
        matches!(
            self,
            Method::OnePassLimit | Method::TwoPassLimit | Method::DeviceCopy | Method::HostCopies
        )
    }

    /// It moves bytes and averages nothing.
    pub fn is_copy(self) -> bool {
        matches!(self, Method::DeviceCopy | Method::HostCopies)
    }

    pub fn is_nccl(self) -> bool {
        matches!(self, Method::Nccl { .. })
    }

    /// On a CUDA device: it needs a second copy of the parameters, or the kernels that make one,
    /// which also scale.
    pub fn needs_flat(self) -> bool {
        self.is_copy() || self.is_nccl() || matches!(self, Method::FlattenRing | Method::CopiesRing)
    }

    /// What is reduced with, as nccl-tests has it.
    pub fn redop(self) -> &'static str {
        match self {
            Method::Nccl { sum: true, .. } => "sum",
            _ => "avg",
        }
    }

    pub fn is_ring(self) -> bool {
        self.algorithm() == "ring"
    }

    /// Arenas that it needs besides the ranks' own.
    pub fn spare_arenas(self, ranks: usize) -> usize {
        match self {
            Method::FlattenRing => ranks,
            Method::TwoPassLimit => 1,
            _ => 0,
        }
    }

    /// Bytes that all ranks together need besides their tensors: the second copies, and the mean
    /// that waits for a commit.
    pub fn memory_overhead(self, layout: &Layout, ranks: usize) -> u64 {
        match self {
            Method::Average { algorithm: Algorithm::Ring, commit: true } => layout.bytes(),
            _ => self.spare_arenas(ranks) as u64 * layout.bytes(),
        }
    }

    /// The tensors that it averages: the limits' are flat.
    pub fn tensors(self, layout: &Layout, placed: &Arc<[Placed]>) -> Arc<[Placed]> {
        if matches!(self, Method::OnePassLimit | Method::TwoPassLimit) {
            place_flat(layout)
        } else {
            placed.clone()
        }
    }

    /// Its threads, ready to run. `spare`: its `spare_arenas` at least.
    pub fn crew(
        self,
        options: Options,
        layout: &Layout,
        placed: &Arc<[Placed]>,
        arenas: &[Arc<Arena>],
        spare: &[Arc<Arena>],
    ) -> Result<Crew, Failure> {
        if matches!(self, Method::OnePassLimit | Method::TwoPassLimit) {
            let between = (self == Method::TwoPassLimit).then(|| spare[0].clone());
            return Crew::new(passes(layout, arenas, between));
        }
        let world = Communicator::from_devices(&vec![Device::cpu(); arenas.len()])?;
        let members = world.into_iter().zip(arenas).enumerate().map(
            |(rank, (communicator, arena))| -> Make {
                let replica = Replica { arena: arena.clone(), tensors: placed.clone() };
                match self {
                    Method::Average { algorithm, commit } => Box::new(move || {
                        let builder = options.builder(communicator, algorithm, commit);
                        average(builder, replica, options.weighted.then_some(rank as f64 + 1.0))
                    }),
                    Method::PerTensorRing => {
                        Box::new(move || per_tensor(options, communicator, replica))
                    }
                    Method::CopiesRing
                    | Method::Nccl { .. }
                    | Method::DeviceCopy
                    | Method::HostCopies => {
                        let what = format!("{} is measured on CUDA devices only", self.label());
                        Box::new(|| Err(Failure::Failed(what)))
                    }
                    Method::FlattenRing | Method::OnePassLimit | Method::TwoPassLimit => {
                        let flat =
                            Replica { arena: spare[rank].clone(), tensors: place_flat(layout) };
                        Box::new(move || flatten(options, communicator, replica, flat))
                    }
                }
            },
        );
        Crew::new(members.collect())
    }
}

fn average(builder: Builder, mut replica: Replica, weight: Option<f64>) -> Result<Work, Failure> {
    let mut averager = builder.build(&mut replica)?;
    Ok(Box::new(move || {
        match weight {
            Some(weight) => averager.average_weighted(&mut replica, weight)?,
            None => averager.average(&mut replica)?,
        };
        Ok(None)
    }))
}

fn passes(layout: &Layout, arenas: &[Arc<Arena>], between: Option<Arc<Arena>>) -> Vec<Make> {
    let (buffers, parts) = (place_flat(layout), cores());
    let pass = |part| -> Make {
        let (arenas, buffers, between) = (arenas.to_vec(), buffers.clone(), between.clone());
        let pass = Pass { arenas, buffers, part, parts, between };
        Box::new(move || {
            Ok(Box::new(move || {
                pass.run();
                Ok(None)
            }))
        })
    };
    (0..parts).map(pass).collect()
}

/// Baselines run in the ring's faster mode: they ask for no commit.
pub const BASELINES_COMMIT: bool = false;

/// Tensors of the same size and dtype share one averager, as its memory and threads are the same
/// for all of them.
fn per_tensor(
    options: Options,
    communicator: Communicator,
    mut replica: Replica,
) -> Result<Work, Failure> {
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
        for (index, &averager) in uses.iter().enumerate() {
            averagers[averager].average(&mut replica.tensor(index))?;
        }
        Ok(None)
    }))
}

fn flatten(
    options: Options,
    communicator: Communicator,
    replica: Replica,
    mut flat: Replica,
) -> Result<Work, Failure> {
    let mut averager =
        options.builder(communicator, Algorithm::Ring, BASELINES_COMMIT).build(&mut flat)?;
    // Where each tensor goes in the flat buffer of its dtype.
    let mut ends: Vec<(_, usize)> =
        flat.tensors.iter().map(|buffer| (buffer.dtype, buffer.offset)).collect();
    let copies = replica.tensors.iter().filter(|tensor| tensor.elements > 0).map(|tensor| {
        let bytes = tensor.elements * tensor.dtype.size();
        let (_, end) = ends
            .iter_mut()
            .find(|(dtype, _)| *dtype == tensor.dtype)
            .expect("a buffer for each dtype");
        *end += bytes;
        (tensor.offset, *end - bytes, bytes)
    });
    let copies: Vec<(usize, usize, usize)> = copies.collect();
    Ok(Box::new(move || {
        let (own, buffer) = (replica.arena.start(), flat.arena.start());
        for &(at, to, bytes) in &copies {
            // SAFETY: inside of the two arenas, which this member has to itself.
            unsafe { buffer.add(to).copy_from_nonoverlapping(own.add(at), bytes) };
        }
        averager.average(&mut flat as &mut dyn Parameters)?;
        for &(at, to, bytes) in &copies {
            // SAFETY: as above.
            unsafe { own.add(at).copy_from_nonoverlapping(buffer.add(to), bytes) };
        }
        Ok(None)
    }))
}
