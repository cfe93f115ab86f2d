//! A rank's tensors with what orders their uses, for what is done in several steps.

use super::{Builder, Call, Outcome, ParamAverager};
use crate::{Parameters, Result};

/// How tensors of a kind are built for and averaged.
pub(crate) trait Tensors {
    /// An averager for them, which has averaged nothing.
    fn assemble(&mut self, options: Builder) -> Result<ParamAverager>;
    /// One average, done when it returns.
    fn average(&mut self, averager: &mut ParamAverager, call: Call) -> Result<Outcome>;
}

/// Those that nobody else uses.
pub(crate) struct Plain<'a, P: ?Sized>(pub(crate) &'a mut P);

impl<P: Parameters + ?Sized> Tensors for Plain<'_, P> {
    fn assemble(&mut self, options: Builder) -> Result<ParamAverager> {
        ParamAverager::assemble(options, self.0)
    }

    fn average(&mut self, averager: &mut ParamAverager, call: Call) -> Result<Outcome> {
        averager.run(self.0, call)
    }
}
