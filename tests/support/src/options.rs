//! Options of an averager in tests.

use param_averager::{Builder, Communicator, ParamAverager, Start};

/// Options with which every rank keeps its own values, so that an average of them can be checked,
/// and tensors need no names.
pub fn options(communicator: Communicator) -> Builder {
    ParamAverager::builder(communicator).start_from(Start::Own).allow_unnamed()
}
