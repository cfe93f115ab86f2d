//! The rows of a table: the ways to average that are measured, and what they are compared with.

use param_averager::Algorithm;

use crate::cli::{Options, Step};
use crate::layout::Layout;
use crate::verify::{Roundings, Wire};

/// A row: what is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub kind: Kind,
    /// Kind of the ranks with `--processes`: `PROCESSES` or `THREADS`.
    pub ranks_are: Option<&'static str>,
}

pub const PROCESSES: &str = "processes";
pub const THREADS: &str = "threads";

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

impl From<Kind> for Row {
    fn from(kind: Kind) -> Row {
        Row { kind, ranks_are: None }
    }
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
    pub fn name(&self) -> String {
        self.names().0
    }

    /// Name in the table.
    pub fn label(&self) -> String {
        self.names().1
    }

    pub fn algorithm(&self) -> &'static str {
        self.names().2
    }

    fn names(&self) -> (String, String, &'static str) {
        let (name, label, algorithm) = match self.kind {
            Kind::Average { algorithm, commit, step } => {
                let ring = algorithm == Algorithm::Ring;
                // `Auto` stands for `direct` where ranks share an address space.
                let algorithm = if ring { "ring" } else { "direct" };
                let more = match step {
                    Some(Step::Nesterov) => Some("nesterov"),
                    Some(Step::Adam) => Some("adam"),
                    None => (ring && !commit).then_some("no commit"),
                };
                let name = [Some("average"), more].into_iter().flatten().collect::<Vec<_>>();
                let label: Vec<_> =
                    [Some(algorithm), more, self.ranks_are].into_iter().flatten().collect();
                // Three words are wider than the column.
                let label = label[label.len().saturating_sub(2)..].join(", ");
                return (name.join("_").replace(' ', "_"), label, algorithm);
            }
            Kind::PerTensor => ("per_tensor_ring", "ring per tensor", "ring"),
            Kind::Flatten { copies: false } => {
                ("flatten_ring_unflatten", "flatten+ring+unflatten", "ring")
            }
            Kind::Flatten { copies: true } => ("copies_ring_copies", "copies+ring+copies", "ring"),
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
        };
        (name.into(), label.into(), algorithm)
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
        self.ranks_are == Some(THREADS) || !matches!(self.kind, Kind::Average { .. })
    }

    /// A multiple of its time is in the last column of the others.
    pub fn is_yardstick(&self) -> bool {
        self.ranks_are == Some(THREADS) || matches!(self.kind, Kind::OnePass | Kind::DeviceCopy)
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

    /// Blocks of a replica's size that so many ranks need besides their own.
    pub fn spare_blocks(&self, ranks: usize) -> usize {
        match self.kind {
            Kind::Average { .. } | Kind::PerTensor | Kind::OnePass => 0,
            Kind::TwoPass => 1,
            _ => ranks,
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
            _ => self.spare_blocks(ranks) as u64 * bytes,
        }
    }
}
