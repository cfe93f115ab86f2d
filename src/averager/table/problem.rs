//! What can be wrong with a rank's tensors: a code, which the ranks exchange, and its error.

use super::Table;
use crate::tensor::Dtype;
use crate::Error;

/// Problem with the tensors of a call, as `PaRecord.detail` and `found`, so that every rank can
/// report it.
#[derive(Clone, Copy, Debug)]
pub(in crate::averager) struct Problem {
    pub(in crate::averager) tensor: u64,
    pub(in crate::averager) found: u64,
}

impl Problem {
    /// True if the tensors are right for the ring, and not for the direct average.
    pub(in crate::averager) fn is_of_direct(self) -> bool {
        self.found == UNREACHED << SHIFT
    }

    /// Problem of a rank whose `Lend` has lent nothing.
    pub(in crate::averager) const NOT_LENT: Problem =
        Problem { tensor: 0, found: NOT_LENT << SHIFT };
}

/// Kinds of a problem, in the top byte of `Problem::found`; below 16 it is a dtype.
pub(super) const MISSING: u64 = 16;
pub(super) const EXTRA: u64 = 17;
pub(super) const NULL: u64 = 18;
pub(super) const MISALIGNED: u64 = 19;
pub(super) const OVERLAP: u64 = 20;
pub(super) const DEVICE: u64 = 21;
pub(super) const FOREIGN: u64 = 22;
pub(super) const OTHER_CONTEXT: u64 = 23;
pub(super) const UNTRACKED: u64 = 24;
pub(super) const IN_A_GRAPH: u64 = 25;
pub(super) const TOO_LONG: u64 = 26;
pub(super) const NOT_LENT: u64 = 27;
/// The low bits are the place of the tensor that has the name found, or one of the next two.
pub(super) const RENAMED: u64 = 28;
/// Memory that other devices of the world do not reach.
pub(super) const UNREACHED: u64 = 29;
pub(super) const NO_NAME: u64 = u32::MAX as u64;
pub(super) const OTHER_NAME: u64 = NO_NAME - 1;
pub(super) const SHIFT: u32 = 56;

impl Table {
    /// Error for a problem of rank `rank`, whose tensors are the same as this rank's.
    pub(in crate::averager) fn error(&self, rank: usize, problem: Problem) -> Error {
        let index = problem.tensor as usize;
        if problem.found == Problem::NOT_LENT.found {
            let reason = "that rank's own error has the reason".into();
            return Error::LendFailed { rank, reason, source: None };
        }
        let (what, low) = (problem.found >> SHIFT, problem.found & ((1 << SHIFT) - 1));
        let tensor = || self.describe(index);
        let trouble = |problem: &str| Error::InvalidTensor {
            rank,
            tensor: tensor(),
            problem: problem.into(),
        };
        match what {
            NULL => trouble("has a null pointer: pass the address of its first element"),
            TOO_LONG => trouble("is longer than any memory: pass its length in elements"),
            MISALIGNED => trouble(
                "does not lie at a multiple of its element's size: pass the address of its first \
                 element",
            ),
            DEVICE => trouble(&format!(
                "is not on {}, the device of its rank: move it there, or give the rank its device",
                self.layout.device
            )),
            FOREIGN => trouble(&format!(
                "does not lie in memory of {} from its first to its last element: pass a pointer \
                 of that device, and a length in elements",
                self.layout.device
            )),
            UNREACHED => trouble(
                "lies in memory that the devices of other ranks can't access, such as pages of \
                 cuMemMap, or memory of another process: allocate it with cuMemAlloc or from a \
                 pool, or build with Algorithm::Ring",
            ),
            OTHER_CONTEXT => trouble(
                "belongs to another CudaContext than the stream of its average, so cudarc would \
                 not order its uses: take a \
                 stream of the context that it was allocated with",
            ),
            UNTRACKED => trouble(
                "was allocated on another stream than that of its average, and cudarc does not \
                 track its uses: average on \
                 the stream that it was allocated on, or allocate it with event tracking enabled",
            ),
            IN_A_GRAPH => trouble(
                "was last used on a stream that was being captured, and nothing can wait for that: \
                 allocate it anew, and \
                 disable cudarc's event tracking while its uses are captured",
            ),
            OVERLAP => trouble(&format!(
                "shares memory with {}: pass tied parameters once",
                self.describe(low as usize)
            )),
            _ => {
                let count = self.layout.shapes.len();
                let (found, expected) = match what {
                    MISSING => (format!("only {index} tensors"), format!("{count}")),
                    EXTRA => (format!("more than {count} tensors"), format!("{count}")),
                    RENAMED => {
                        let found = match low {
                            NO_NAME => "a tensor without a name".into(),
                            low if low < count as u64 => self.describe(low as usize),
                            _ => "a tensor of another name".into(),
                        };
                        (format!("{found}, as tensor {index}"), tensor())
                    }
                    dtype => (
                        format!("{}, {low} elements, as tensor \
                            {index}", Dtype::ALL[dtype as usize & 3]),
                        tensor(),
                    ),
                };
                Error::LayoutChanged { rank, found, expected }
            }
        }
    }
}
