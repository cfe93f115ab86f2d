//! A module that lends its parameters.

use std::fmt;

use burn_core::module::Module;
use param_averager::{Lend, LendError, Loan};

use crate::values::{check, Keep, Lending, GONE};

/// A burn module that lends its float parameters to averages.
///
/// It is the model of [`LocalSgd`](param_averager::LocalSgd) and
/// [`ParamAverager`](param_averager::ParamAverager); [the crate's page](crate) has a program.
pub struct BurnParams<M> {
    /// `None`: gone.
    module: Option<M>,
    keep: Box<Keep>,
}

impl<M: Module> BurnParams<M> {
    /// All float parameters of a module.
    pub fn new(module: M) -> Self {
        BurnParams { module: Some(module), keep: Box::new(|_| true) }
    }

    /// The same module, of which only parameters are averaged whose path (`layers.0.weight`) makes
    /// `keep` true. The others stay local. It must be the same on every rank: a difference is
    /// [`Error::LayoutsDiffer`](param_averager::Error::LayoutsDiffer) when the averager is built.
    ///
    /// ```
    /// # use burn::{module::Module, nn::{Linear, LinearConfig}, tensor::Device};
    /// # let module: Linear = LinearConfig::new(2, 2).init(&Device::flex());
    /// let params = param_averager_burn::BurnParams::new(module).filter(|path| path != "bias");
    /// ```
    pub fn filter(mut self, keep: impl Fn(&str) -> bool + Send + 'static) -> Self {
        self.keep = Box::new(keep);
        self
    }

    /// The module.
    ///
    /// # Panics
    /// If the module is gone: see [the crate's page](crate#when-something-fails).
    pub fn module(&self) -> &M {
        self.module.as_ref().expect(GONE)
    }

    /// The module, at the end of the training.
    ///
    /// # Panics
    /// As [`module`](Self::module).
    pub fn into_module(self) -> M {
        self.module.expect(GONE)
    }

    /// Passes the module through `step`, such as an optimizer's:
    /// `params.update(|model| optim.step(lr, model, grads))`.
    ///
    /// # Panics
    /// As [`module`](Self::module). If `step` panics, the module is gone.
    pub fn update(&mut self, step: impl FnOnce(M) -> M) {
        self.module = Some(step(self.module.take().expect(GONE)));
    }

    /// Puts another module in the place of this one, which is returned unless it is gone. Its
    /// parameters have the same paths, dtypes and sizes.
    pub fn replace(&mut self, module: M) -> Option<M> {
        self.module.replace(module)
    }
}

impl<M: Module> Lend for BurnParams<M> {
    fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
        check(self.module.as_ref().ok_or_else(|| LendError::new(GONE))?, &self.keep)?;
        // Dropped last, also while a panic unwinds: it puts the values back into the module.
        let mut lending = Lending::begin(&mut self.module, &self.keep)?;
        let mut tensors = lending.tensors()?;
        average(Loan::new(&mut tensors));
        Ok(())
    }
}

impl<M: fmt::Debug> fmt::Debug for BurnParams<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BurnParams").field("module", &self.module).finish_non_exhaustive()
    }
}

/// Calls `call` with a module's parameters, and returns the module with what `call` returned: also
/// with an error, and then with the values that
/// [`Error::tensors`](param_averager::Error::tensors) tells.
///
/// ```
/// # use burn::{module::Module, nn::{Linear, LinearConfig}, tensor::Device};
/// # use param_averager::{Communicator, LocalSgd, ParamAverager, Schedule};
/// # use param_averager_burn::with_module;
/// # let cpu = param_averager::Device::cpu();
/// # let communicator = Communicator::from_devices(&[cpu])?.remove(0);
/// # let model: Linear = LinearConfig::new(2, 2).init(&Device::flex());
/// let (mut model, averager) =
///     with_module(model, |params| ParamAverager::builder(communicator).build(params));
/// let mut sgd = LocalSgd::new(averager?, Schedule::every(8));
/// for _batch in 0..20 {
///     // model = optim.step(lr, model, grads);
///     let made;
///     (model, made) = with_module(model, |params| sgd.step(params));
///     made?;
/// }
/// # drop(model);
/// # Ok::<(), param_averager::Error>(())
/// ```
///
/// # Panics
/// If the module is gone: see [the crate's page](crate#when-something-fails).
pub fn with_module<M: Module, R>(module: M, call: impl FnOnce(&mut BurnParams<M>) -> R) -> (M, R) {
    let mut params = BurnParams::new(module);
    let returned = call(&mut params);
    (params.into_module(), returned)
}
