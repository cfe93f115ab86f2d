//! Local SGD for [burn](burn_core): lends a module's parameters to
//! [param-averager](param_averager), which averages them across ranks every so many optimizer
//! steps.
//!
//! [`BurnParams`] holds a module and implements [`Lend`], so that every call of
//! [`LocalSgd`](param_averager::LocalSgd) and [`ParamAverager`](param_averager::ParamAverager)
//! takes it. A whole program, with two ranks that are threads:
//!
//! ```
//! use burn::module::Module;
//! use burn::nn::{Linear, LinearConfig};
//! use burn::optim::{AdamWConfig, GradientsParams};
//! use burn::tensor::{Device, Tensor};
//! use param_averager::{Communicator, LocalSgd, ParamAverager, Schedule};
//! use param_averager_burn::BurnParams;
//!
//! #[derive(Module, Debug)]
//! struct Model {
//!     hidden: Linear,
//!     out: Linear,
//! }
//!
//! impl Model {
//!     fn loss(&self, x: Tensor<2>, y: Tensor<2>) -> Tensor<1> {
//!         let error = self.out.forward(self.hidden.forward(x).tanh()) - y;
//!         error.powf_scalar(2.0).mean()
//!     }
//! }
//!
//! fn train(communicator: Communicator) -> param_averager::Result<Vec<f32>> {
//!     let device = Device::flex().autodiff();
//!     let shift = communicator.rank() as f32; // each rank sees another part of the data
//!     let hidden = LinearConfig::new(1, 8).init(&device);
//!     let out = LinearConfig::new(8, 1).init(&device);
//!     let mut optim = AdamWConfig::new().init();
//!     let mut params = BurnParams::new(Model { hidden, out });
//!     let averager = ParamAverager::builder(communicator).build(&mut params)?; // rank 0's values
//!     let mut sgd = LocalSgd::new(averager, Schedule::every(8));
//!     for _batch in 0..20 {
//!         let x = Tensor::<2>::from_data([[0.1 + shift], [0.6 + shift]], &device);
//!         let y = x.clone() * 3.0 + 1.0;
//!         let loss = params.module().loss(x, y);
//!         let grads = GradientsParams::from_grads(loss.backward(), params.module());
//!         params.update(|model| optim.step(1e-2, model, grads));
//!         sgd.step(&mut params)?; // averages every 8 steps
//!     }
//!     sgd.finish(&mut params)?;
//!     let model: Model = params.into_module();
//!     Ok(model.out.weight.val().into_data().try_into_vec().expect("f32"))
//! }
//!
//! let weights = Communicator::run(&[param_averager::Device::cpu(); 2], train)?;
//! assert_eq!(weights[0], weights[1]); // the same bits
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! Where the module goes by value through a loop, [`with_module`] takes it and gives it back, with
//! an error too.
//!
//! # What is averaged
//! All float parameters ([`Param`](burn_core::module::Param)) of dtype f32, f64, f16 and bf16,
//! named by their paths (`layers.0.weight`), in the module's order, which its type decides, so that
//! it is the same on every rank. Their ids, devices, dtypes and gradient requirements stay, and so
//! do mappers and LoRA adapters, which are parameters themselves. [`BurnParams::filter`] leaves
//! parameters out. A parameter of integers, booleans or quantised values that is not left out is an
//! error with its name, on every rank. Plain tensors of a module, which are no `Param`, and the
//! optimizer's state stay local.
//!
//! **Statistics of `BatchNorm`** are `RunningState`s, which keep this thread's newest value beside
//! the one that is averaged: the next forward pass in training puts it in place. They stay local
//! while training goes on. At the end, `params.update(|model| model.valid())` and then
//! `sgd.averager().average(&mut params)` average them; but an outer optimizer would make its step
//! from them.
//!
//! # Copies
//! | device of the parameters | an average copies |
//! |---|---|
//! | flex | nothing |
//! | ndarray (deprecated by burn) | nothing |
//! | all others, such as CUDA, WGPU, burn-cpu | each parameter to the host and back |
//!
//! Where nothing is copied, that holds for parameters whose values are contiguous and belong to
//! this module alone: after an optimizer step they do. Values that are shared with a clone of the
//! module are copied, and the clone keeps its own. The communicator is one of CPU ranks
//! (`param_averager::Device::cpu()`), whatever burn's device is.
//!
//! # When something fails
//! An average that fails gives back the module as it was, or as
//! [`Error::tensors`](param_averager::Error::tensors) says, since it stays in `BurnParams`. If the
//! averager panics, the module is put back while the panic unwinds. If a closure of
//! [`BurnParams::update`] or burn itself panics while it has the module, the module is gone:
//! [`BurnParams::module`] panics and says so, and an average is an error on every rank.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod params;
mod values;

pub use param_averager::Lend;
pub use params::{with_module, BurnParams};
