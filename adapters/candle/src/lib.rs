//! Local SGD for [candle](candle_core): lends the variables of a `VarMap` to
//! [`param_averager`], in place.
//!
//! ```
//! use candle_core::{DType, Device, Module, Tensor};
//! use candle_nn::{linear, loss, Optimizer, VarBuilder, VarMap, SGD};
//! use param_averager::{Communicator, LocalSgd, ParamAverager, Schedule};
//! use param_averager_candle::VarParams;
//!
//! type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
//!
//! /// Fits y = 3 x + 1, each rank on a half of the samples.
//! fn train(communicator: Communicator) -> Result<f32> {
//!     let (rank, ranks) = (communicator.rank(), communicator.world_size());
//!     let varmap = VarMap::new();
//!     let vars = VarBuilder::from_varmap(&varmap, DType::F32, &Device::Cpu);
//!     let model = linear(1, 1, vars.pp("line"))?;
//!     let mut optimizer = SGD::new(varmap.all_vars(), 0.3)?;
//!
//!     let mut params = VarParams::new(&varmap)?;
//!     let averager = ParamAverager::builder(communicator).build(&mut params)?;
//!     let mut sgd = LocalSgd::new(averager, Schedule::every(8));
//!     let mine = (0..16).filter(|sample| sample % ranks == rank);
//!     let x: Vec<f32> = mine.map(|sample| sample as f32 / 8.0 - 1.0).collect();
//!     let x = Tensor::from_vec(x, (16 / ranks, 1), &Device::Cpu)?;
//!     let y = x.affine(3.0, 1.0)?;
//!     for _batch in 0..200 {
//!         optimizer.backward_step(&loss::mse(&model.forward(&x)?, &y)?)?;
//!         sgd.step(&mut params)?; // averages at every eighth step
//!     }
//!     sgd.finish(&mut params)?;
//!     Ok(model.weight().to_vec2::<f32>()?[0][0])
//! }
//!
//! let world = Communicator::from_devices(&[param_averager::Device::cpu(); 2])?;
//! let ranks: Vec<_> = world.into_iter().map(|rank| std::thread::spawn(|| train(rank))).collect();
//! let weights: Vec<f32> = ranks.into_iter().map(|it| it.join().unwrap()).collect::<Result<_>>()?;
//! assert!((weights[0] - 3.0).abs() < 0.01);
//! assert_eq!(weights[0].to_bits(), weights[1].to_bits()); // the same bits on every rank
//! # Ok::<(), Box<dyn std::error::Error + Send + Sync>>(())
//! ```
//!
//! # What is lent
//! All variables, or those that [`VarParams::filter`] keeps, sorted by name. The mean is written
//! into candle's own storage: nothing is copied, and no variable changes its address. Names go to
//! the averager, which compares them across ranks.
//!
//! # Locks
//! During an average the write lock of every variable is held. An operation of another thread on
//! one variable waits for the average. An operation on two variables at once (a normalisation with
//! weight and bias, say) takes two locks in an order of its own, which can deadlock with an average
//! that begins at the same moment: **a thread that evaluates the model while it trains needs a copy
//! of the variables**. Each rank has a `VarMap` of its own; variables that two ranks share are an
//! error.
//!
//! # CUDA
//! With the feature `cuda`, variables on one CUDA device are averaged on their `Device`'s stream.
//! `Device::new_cuda` and `Device::new_cuda_with_stream` both serve. Threads on one GPU need a
//! `Device` each: `Device::new_cuda_with_stream`. Simulated only: no GPU has run it.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod lend;
mod lent;

use std::fmt;

use candle_core::{DType, Var};
use candle_nn::VarMap;
use param_averager::LendError;

pub use param_averager;

const POISONED: &str =
    "the lock of the VarMap is poisoned: another thread has panicked while it held it";

/// Variables of a candle model, sorted by name, which an average borrows in place.
///
/// [`ParamAverager`](param_averager::ParamAverager) and [`LocalSgd`](param_averager::LocalSgd) take
/// it as a model. It holds the variables themselves, not copies, so the model and its optimizer see
/// the mean. Make it when the model is complete: a `VarMap` that gets further variables later is an
/// error.
///
/// # Errors of an average
/// [`Error::LendFailed`](param_averager::Error::LendFailed) on every rank, with the variable's name
/// and what to do, and unchanged variables, if on one rank
/// * a variable holds no f32, f64, f16 or bf16,
/// * a variable is not contiguous,
/// * two variables share one storage (tied weights), or have one name,
/// * variables are on different devices, or on a device that this build does not serve,
/// * a variable is lent to another average at the same time: two ranks share a `VarMap`,
/// * there are no variables, or the `VarMap` has others by now, or its lock is poisoned.
#[derive(Clone)]
pub struct VarParams {
    vars: Vec<Named>,
    /// Map of the variables, and how many it had.
    map: Option<(VarMap, usize)>,
    /// Places in `vars` by address of the storage: the order in which candle's own in-place
    /// operations take their locks.
    locking: Vec<usize>,
}

#[derive(Clone)]
struct Named {
    name: String,
    var: Var,
    /// Address of the storage, which lives as long as `var`.
    storage: usize,
}

impl VarParams {
    /// All variables of the map.
    ///
    /// # Errors
    /// An error if another thread has panicked while it held the map's lock.
    pub fn new(map: &VarMap) -> candle_core::Result<Self> {
        let Ok(vars) = map.data().lock() else { candle_core::bail!("{POISONED}") };
        let all = Self::from_vars(vars.iter().map(|(name, var)| (name.clone(), var.clone())))?;
        Ok(VarParams { map: Some((map.clone(), vars.len())), ..all })
    }

    /// These variables, in any order. Names are the same on every rank.
    ///
    /// # Errors
    /// None today: what can't be averaged is an error of the average, which reaches every rank.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, Var)>) -> candle_core::Result<Self> {
        let address = |var: &Var| std::ptr::from_ref(&*var.storage_and_layout().0).addr();
        let vars = vars.into_iter().map(|(name, var)| Named { storage: address(&var), name, var });
        Ok(Self::sorted(vars.collect(), None))
    }

    /// Only the variables for which `keep` returns true. Keep the same ones on every rank.
    ///
    /// ```
    /// # use candle_nn::VarMap;
    /// # use param_averager_candle::VarParams;
    /// # let varmap = VarMap::new();
    /// let floats = VarParams::new(&varmap)?.filter(|_name, var| var.dtype().is_float());
    /// let adapters = VarParams::new(&varmap)?.filter(|name, _var| name.contains("lora"));
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn filter(self, mut keep: impl FnMut(&str, &Var) -> bool) -> Self {
        let vars = self.vars.into_iter().filter(|it| keep(&it.name, &it.var)).collect();
        Self::sorted(vars, self.map)
    }

    /// Names and variables, in the order of an average.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Var)> {
        self.vars.iter().map(|it| (it.name.as_str(), &it.var))
    }

    /// Number of variables.
    pub fn len(&self) -> usize {
        self.vars.len()
    }

    /// True without variables.
    pub fn is_empty(&self) -> bool {
        self.vars.is_empty()
    }

    fn sorted(mut vars: Vec<Named>, map: Option<(VarMap, usize)>) -> Self {
        vars.sort_by(|a, b| a.name.cmp(&b.name));
        let mut locking: Vec<usize> = (0..vars.len()).collect();
        locking.sort_by_key(|&place| vars[place].storage);
        VarParams { vars, map, locking }
    }

    /// Variables in the order of their locks.
    fn locking(&self) -> impl Iterator<Item = &Named> {
        self.locking.iter().map(|&place| &self.vars[place])
    }

    /// Checks all that would make an average wrong, or a lock wait for itself.
    fn check(&self) -> Result<(), LendError> {
        let refuse = |reason: String| Err(LendError::new(reason));
        if let Some((map, before)) = &self.map {
            let now = map.data().lock().map_err(|_| LendError::new(POISONED))?.len();
            if now != *before {
                return refuse(format!(
                    "the VarMap has {now} variables and had {before} when VarParams was made: make \
                     it when the model is complete"
                ));
            }
        }
        let Some(first) = self.vars.first() else {
            return refuse(
                "there are no variables: make VarParams when the model is complete, and keep some \
                 with VarParams::filter"
                    .to_owned(),
            );
        };
        for Named { name, var, .. } in &self.vars {
            if !matches!(var.dtype(), DType::F32 | DType::F64 | DType::F16 | DType::BF16) {
                return refuse(format!(
                    "the variable `{name}` holds {}, and an average takes f32, f64, f16 and bf16: \
                     leave it out with VarParams::filter",
                    var.dtype().as_str()
                ));
            }
            let device = var.device();
            if device.is_metal() || device.is_cuda() && cfg!(not(feature = "cuda")) {
                return refuse(format!(
                    "the variable `{name}` is on {:?}, which this build does not serve: use the \
                     CPU, or CUDA with the feature `cuda` of param-averager-candle",
                    device.location()
                ));
            }
            if !device.same_device(first.var.device()) {
                return refuse(format!(
                    "the variable `{name}` is on {:?}, and `{}` on {:?} or another `Device` of it: \
                     make all variables with one `Device`, or clones of it",
                    device.location(),
                    first.name,
                    first.var.device().location()
                ));
            }
        }
        if let Some(two) = self.vars.windows(2).find(|two| two[0].name == two[1].name) {
            let name = &two[0].name;
            return refuse(format!(
                "two variables have the name `{name}`, so ranks could not tell them apart: give \
                 each its own"
            ));
        }
        let mut before: Option<&Named> = None;
        for each in self.locking() {
            if let Some(before) = before.filter(|before| before.storage == each.storage) {
                return refuse(format!(
                    "the variables `{}` and `{}` share one storage: leave one of them out with \
                     VarParams::filter",
                    before.name, each.name
                ));
            }
            before = Some(each);
        }
        Ok(())
    }
}

impl fmt::Debug for VarParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown =
            |it: &Named| format!("{}: {} {:?}", it.name, it.var.dtype().as_str(), it.var.dims());
        f.debug_list().entries(self.vars.iter().map(shown)).finish()
    }
}
