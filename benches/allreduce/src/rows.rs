//! The rows of a table: the ways to average that are measured, and what they are compared with.

use param_averager::Algorithm;

use crate::cli::Step;
use crate::layout::Layout;
use crate::verify::Wire;

/// A row's names, and what it does.
#[derive(Debug)]
pub struct Row {
    /// In records.
    pub name: &'static str,
    /// In the table.
    pub label: &'static str,
    pub algorithm: &'static str,
    /// The reduction, as nccl-tests names it.
    pub redop: &'static str,
    pub kind: Kind,
    /// Something to compare with. Unweighted, and printed dim.
    pub baseline: bool,
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

const fn baseline(
    name: &'static str,
    label: &'static str,
    algorithm: &'static str,
    kind: Kind,
) -> Row {
    let redop = if matches!(kind, Kind::Nccl { scale: true, .. }) { "sum" } else { "avg" };
    Row { name, label, algorithm, redop, kind, baseline: true }
}

const fn average(label: &'static str, algorithm: Algorithm, commit: bool) -> Row {
    let ring = matches!(algorithm, Algorithm::Ring);
    let name = if ring && !commit { "average_no_commit" } else { "average" };
    let kind = Kind::Average { algorithm, commit, step: None };
    let algorithm = if ring { "ring" } else { "direct" };
    Row { name, label, algorithm, redop: "avg", kind, baseline: false }
}

const fn stepped(label: &'static str, algorithm: Algorithm, step: Step) -> Row {
    let name = match step {
        Step::Nesterov => "average_nesterov",
        Step::Adam => "average_adam",
    };
    let kind = Kind::Average { algorithm, commit: true, step: Some(step) };
    Row { name, kind, ..average(label, algorithm, true) }
}

/// `Auto` stands for `direct` where ranks share an address space.
static AVERAGES: [Row; 6] = [
    average("direct", Algorithm::Auto, true),
    average("direct", Algorithm::Auto, false),
    average("direct", Algorithm::Direct, true),
    average("direct", Algorithm::Direct, false),
    average("ring", Algorithm::Ring, true),
    average("ring, no commit", Algorithm::Ring, false),
];

/// The library's row of these.
pub fn of(algorithm: Algorithm, commit: bool) -> &'static Row {
    let kind = Kind::Average { algorithm, commit, step: None };
    AVERAGES.iter().find(|row| row.kind == kind).expect("a row for every algorithm")
}

/// An average with an outer optimizer is all or nothing.
static STEPS: [Row; 6] = [
    stepped("direct, nesterov", Algorithm::Auto, Step::Nesterov),
    stepped("direct, adam", Algorithm::Auto, Step::Adam),
    stepped("direct, nesterov", Algorithm::Direct, Step::Nesterov),
    stepped("direct, adam", Algorithm::Direct, Step::Adam),
    stepped("ring, nesterov", Algorithm::Ring, Step::Nesterov),
    stepped("ring, adam", Algorithm::Ring, Step::Adam),
];

/// The same average with a step of an outer optimizer.
pub fn with_step(row: &Row, step: Step) -> Option<&'static Row> {
    let Kind::Average { algorithm, .. } = row.kind else { return None };
    let kind = Kind::Average { algorithm, commit: true, step: Some(step) };
    STEPS.iter().find(|row| row.kind == kind)
}

/// The ring between processes, and the same between threads of one process.
pub fn of_processes(commit: bool) -> [&'static Row; 2] {
    const RING: Algorithm = Algorithm::Ring;
    static COMMIT: [Row; 2] = [
        average("ring, processes", RING, true),
        Row { baseline: true, ..average("ring, threads", RING, true) },
    ];
    static NO_COMMIT: [Row; 2] = [
        average("no commit, processes", RING, false),
        Row { baseline: true, ..average("no commit, threads", RING, false) },
    ];
    (if commit { &COMMIT } else { &NO_COMMIT }).each_ref()
}

pub static PER_TENSOR: Row =
    baseline("per_tensor_ring", "ring per tensor", "ring", Kind::PerTensor);
pub static FLATTEN: Row = baseline(
    "flatten_ring_unflatten",
    "flatten+ring+unflatten",
    "ring",
    Kind::Flatten { copies: false },
);
pub static COPIES: Row =
    baseline("copies_ring_copies", "copies+ring+copies", "ring", Kind::Flatten { copies: true });
/// Grouped, then flat.
pub static NCCL: [Row; 4] = [
    baseline("nccl_grouped_avg", "NCCL grouped avg", "nccl", nccl(false, false)),
    baseline("nccl_grouped_sum_scale", "NCCL grouped sum+scale", "nccl", nccl(false, true)),
    baseline("nccl_flatten_avg", "NCCL flatten avg", "nccl", nccl(true, false)),
    baseline("nccl_flatten_sum_scale", "NCCL flatten sum+scale", "nccl", nccl(true, true)),
];
pub static ONE_PASS: Row = baseline("one_pass_limit", "one-pass limit", "one_pass", Kind::OnePass);
pub static TWO_PASS: Row = baseline("two_pass_limit", "two-pass limit", "two_pass", Kind::TwoPass);
pub static DEVICE_COPY: Row = baseline("device_copy", "device copy", "copy", Kind::DeviceCopy);
pub static HOST_COPIES: Row =
    baseline("pinned_host_both_ways", "pinned host both ways", "copy", Kind::HostCopies);

const fn nccl(flat: bool, scale: bool) -> Kind {
    Kind::Nccl { flat, scale }
}

impl Row {
    /// A multiple of its time is in the last column of the others.
    pub fn is_yardstick(&self) -> bool {
        let average = matches!(self.kind, Kind::Average { .. }) && self.baseline;
        average || matches!(self.kind, Kind::OnePass | Kind::DeviceCopy)
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

    /// True if its result is rounded on the way through the step of an outer optimizer.
    pub fn is_stepped(&self) -> bool {
        matches!(self.kind, Kind::Average { step: Some(_), .. })
    }

    /// How its partial sums travel. `narrow`: the averager's option.
    pub fn wire(&self, narrow: bool) -> Wire {
        match self.algorithm {
            "nccl" => Wire::NarrowAndScaled,
            "ring" if narrow => Wire::Narrow,
            _ => Wire::Wide,
        }
    }

    /// Roundings besides those of a plain sum and one division.
    pub fn more_roundings(&self, weighted: bool) -> u8 {
        match self.kind {
            Kind::Average { .. } if weighted => 3,
            Kind::OnePass | Kind::TwoPass | Kind::Nccl { .. } => 1,
            _ => 0,
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
