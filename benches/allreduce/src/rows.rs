//! The rows of a table: the ways to average that are measured, and what they are compared with.

use param_averager::Algorithm;

use crate::cli::{Options, Step};
use crate::layout::Layout;
use crate::verify::{Roundings, Wire};

/// A row: what is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub kind: Kind,
    /// Kind of the ranks, with `--processes`.
    pub ranks_are: Option<RanksAre>,
}

/// Ranks of a row of `--processes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RanksAre {
    Processes,
    Threads,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The library, on the tensors where they are. `commit`: all or nothing, which makes a
    /// difference for the ring only. `step`: that of an outer optimizer.
    Average { algorithm: Algorithm, commit: bool, step: Option<Step> },
    /// A ring for each tensor, one tensor after the other, as a loop over `all_reduce` does.
    PerTensor,
    /// All tensors moved into a flat buffer, one ring, all moved back. `copies`: by a copy of the
    /// device's for each tensor.
    Flatten { copies: bool },
    /// NCCL, on the tensors in one group, or on a flat buffer between flatten and unflatten.
    /// `scale`: ncclSum, multiplied by 1/n by a kernel of the bench's; else ncclAvg.
    Nccl { flat: bool, scale: bool },
    /// No averager can be faster; see limit.rs.
    OnePass,
    /// No averager that is all or nothing can be faster; see limit.rs.
    TwoPass,
    /// Every rank copies as many bytes as it has parameters within its device.
    DeviceCopy,
    /// … from page-locked memory of the host, and to it at the same time.
    HostCopies,
}

impl RanksAre {
    pub fn name(self) -> &'static str {
        match self {
            RanksAre::Processes => "processes",
            RanksAre::Threads => "threads",
        }
    }
}

impl From<Kind> for Row {
    fn from(kind: Kind) -> Row {
        Row { kind, ranks_are: None }
    }
}

/// The ring between processes, and the same between threads of one process.
pub fn of_processes(commit: bool) -> [Row; 2] {
    let kind = Row::average(Algorithm::Ring, commit).kind;
    [RanksAre::Processes, RanksAre::Threads].map(|are| Row { kind, ranks_are: Some(are) })
}

/// Rows of NCCL: grouped, then flat.
pub const NCCL: [Kind; 4] = [
    Kind::Nccl { flat: false, scale: false },
    Kind::Nccl { flat: false, scale: true },
    Kind::Nccl { flat: true, scale: false },
    Kind::Nccl { flat: true, scale: true },
];

impl Row {
    /// Row of the library's average.
    pub fn average(algorithm: Algorithm, commit: bool) -> Row {
        Kind::Average { algorithm, commit, step: None }.into()
    }

    /// The same average with a step of an outer optimizer, which is all or nothing.
    pub fn with_step(mut self, outer: Step) -> Row {
        if let Kind::Average { commit, step, .. } = &mut self.kind {
            (*commit, *step) = (true, Some(outer));
        }
        self
    }

    /// Name in records.
    pub fn name(&self) -> &'static str {
        self.names().0
    }

    /// Name in the table.
    pub fn label(&self) -> &'static str {
        self.names().1
    }

    pub fn algorithm(&self) -> &'static str {
        self.names().2
    }

    fn names(&self) -> (&'static str, &'static str, &'static str) {
        use RanksAre::{Processes, Threads};
        use Step::{Adam, Nesterov};
        match self.kind {
            Kind::Average { algorithm: Algorithm::Ring, commit, step } => {
                let (name, label) = match (commit, step, self.ranks_are) {
                    (true, None, None) => ("average", "ring"),
                    (true, None, Some(Processes)) => ("average", "ring, processes"),
                    (true, None, Some(Threads)) => ("average", "ring, threads"),
                    (false, None, None) => ("average_no_commit", "ring, no commit"),
                    (false, None, Some(Processes)) => ("average_no_commit", "no commit, processes"),
                    (false, None, Some(Threads)) => ("average_no_commit", "no commit, threads"),
                    (_, Some(Nesterov), _) => ("average_nesterov", "ring, nesterov"),
                    (_, Some(Adam), _) => ("average_adam", "ring, adam"),
                };
                (name, label, "ring")
            }
            // `Auto` stands for `direct` where ranks share an address space.
            Kind::Average { step, .. } => match step {
                None => ("average", "direct", "direct"),
                Some(Nesterov) => ("average_nesterov", "direct, nesterov", "direct"),
                Some(Adam) => ("average_adam", "direct, adam", "direct"),
            },
            Kind::PerTensor => ("per_tensor_ring", "ring per tensor", "ring"),
            Kind::Flatten { copies } => match copies {
                false => ("flatten_ring_unflatten", "flatten+ring+unflatten", "ring"),
                true => ("copies_ring_copies", "copies+ring+copies", "ring"),
            },
            Kind::Nccl { flat, scale } => match (flat, scale) {
                (false, false) => ("nccl_grouped_avg", "NCCL grouped avg", "nccl"),
                (false, true) => ("nccl_grouped_sum_scale", "NCCL grouped sum+scale", "nccl"),
                (true, false) => ("nccl_flatten_avg", "NCCL flatten avg", "nccl"),
                (true, true) => ("nccl_flatten_sum_scale", "NCCL flatten sum+scale", "nccl"),
            },
            Kind::OnePass => ("one_pass_limit", "one-pass limit", "one_pass"),
            Kind::TwoPass => ("two_pass_limit", "two-pass limit", "two_pass"),
            Kind::DeviceCopy => ("device_copy", "device copy", "copy"),
            Kind::HostCopies => ("pinned_host_both_ways", "pinned host both ways", "copy"),
        }
    }

    /// The reduction, as nccl-tests names it.
    pub fn redop(&self) -> &'static str {
        if matches!(self.kind, Kind::Nccl { scale: true, .. }) {
            "sum"
        } else {
            "avg"
        }
    }

    /// Something to compare with. Unweighted, and printed dim.
    pub fn is_baseline(&self) -> bool {
        self.ranks_are == Some(RanksAre::Threads) || !matches!(self.kind, Kind::Average { .. })
    }

    /// A multiple of its time is in the last column of the others.
    pub fn is_yardstick(&self) -> bool {
        self.ranks_are == Some(RanksAre::Threads)
            || matches!(self.kind, Kind::OnePass | Kind::DeviceCopy)
    }

    pub fn is_nccl(&self) -> bool {
        matches!(self.kind, Kind::Nccl { .. })
    }

    /// It moves bytes and averages nothing.
    pub fn is_copy(&self) -> bool {
        matches!(self.kind, Kind::DeviceCopy | Kind::HostCopies)
    }

    /// On a CUDA device: it needs the kernels of `flatten.cu`.
    pub fn needs_kernels(&self) -> bool {
        matches!(self.kind, Kind::Flatten { copies: false } | Kind::Nccl { .. })
    }

    /// On a CUDA device: it needs a second block of a replica's size.
    pub fn needs_second(&self) -> bool {
        self.is_copy() || self.is_nccl() || matches!(self.kind, Kind::Flatten { .. })
    }

    /// The limits of CPUs average flat buffers.
    pub fn is_flat(&self) -> bool {
        matches!(self.kind, Kind::OnePass | Kind::TwoPass)
    }

    pub fn is_weighted(&self) -> bool {
        matches!(self.kind, Kind::Average { .. })
    }

    /// Roundings of its result, with these options of the averager.
    pub fn roundings(&self, options: &Options) -> Roundings {
        Roundings {
            more: match self.kind {
                Kind::Average { .. } if options.weighted => 3,
                Kind::OnePass | Kind::TwoPass | Kind::Nccl { .. } => 1,
                _ => 0,
            },
            wire: match self.algorithm() {
                "nccl" => Wire::NarrowAndScaled,
                "ring" if options.narrow_wire => Wire::Narrow,
                _ => Wire::Wide,
            },
            stepped: matches!(self.kind, Kind::Average { step: Some(_), .. }),
        }
    }

    /// Blocks of a replica's size that ranks on CPUs need besides their own.
    pub fn spare_arenas(&self, ranks: usize) -> usize {
        match self.kind {
            Kind::Flatten { .. } => ranks,
            Kind::TwoPass => 1,
            _ => 0,
        }
    }

    /// Bytes that all ranks on CPUs need besides their tensors: the second copies, the mean that
    /// waits for a commit, and an outer optimizer's state.
    pub fn memory_overhead(&self, layout: &Layout, ranks: usize) -> u64 {
        let (bytes, sums) = (layout.bytes(), layout.bytes_of_sums());
        match self.kind {
            Kind::Average { algorithm, commit, step } => {
                let waits = algorithm == Algorithm::Ring && commit;
                let state = step.map_or(0, |step| step.state() + u64::from(waits));
                u64::from(waits) * bytes + sums.saturating_mul(state)
            }
            _ => self.spare_arenas(ranks) as u64 * bytes,
        }
    }
}
