//! A framework's tensors: names and order, equal initial weights, and loans of locked storage.
//!
//! # One order, with names
//! Every rank passes the same tensors in the same order. **The order of a `HashMap` is no order**:
//! it differs from process to process, and from map to map. candle's `VarMap` and tch's `VarStore`
//! keep their variables in one. Sort by name, and name every tensor
//! ([`TensorMut::named`](crate::TensorMut::named)): ranks compare names, dtypes and sizes when the
//! averager is built, and a difference is [`Error::LayoutsDiffer`](crate::Error::LayoutsDiffer).
//! Every average compares the names again with those of the build
//! ([`Error::LayoutChanged`](crate::Error::LayoutChanged)). Names are unique, and several unnamed
//! tensors of one dtype and size are refused, unless the builder has
//! [`allow_unnamed`](crate::Builder::allow_unnamed), for a list whose order is fixed. Pass tied
//! parameters once.
//!
//! # Equal initial weights
//! Averages of ranks that began with different weights mix unrelated models, which costs accuracy:
//! 97 % became 94 % for an MLP on scikit-learn's digits, 4 ranks. So `build` gives every rank rank
//! 0's values; a checkpoint need be loaded on rank 0 only.
//! [`start_from`](crate::Builder::start_from) has other ways. A process that joins gets the model
//! that its peers train.
//!
//! # Tensors behind a lock
//! [`Parameters`](crate::Parameters) is for tensors that can be borrowed at once.
//! [`Lend`](crate::Lend) is for all others: `lend` takes locks or assembles tensors, calls
//! `average` while it holds them, and is called only if an average is made. An error that it
//! returns reaches every rank as [`Error::LendFailed`](crate::Error::LendFailed), and no tensor
//! changes.
//!
//! ```
//! use std::collections::HashMap;
//! use std::sync::Mutex;
//! use param_averager::*;
//!
//! /// A trainer's variables, in a map that other threads read.
//! struct Variables(HashMap<String, Mutex<Vec<f32>>>);
//!
//! impl Lend for Variables {
//!     fn lend(&mut self, average: &mut dyn FnMut(Loan<'_>)) -> Result<(), LendError> {
//!         let mut locked = vec![];
//!         for (name, values) in &self.0 {
//!             let poisoned = |_| LendError::new(format!("the lock of {name} is poisoned"));
//!             locked.push((name, values.lock().map_err(poisoned)?));
//!         }
//!         locked.sort_by_key(|(name, _)| *name); // the order is the same on every rank
//!         let lent = locked.iter_mut().map(|(name, v)| TensorMut::from(&mut v[..]).named(name));
//!         average(Loan::new(&mut lent.collect::<Vec<_>>()));
//!         Ok(())
//!     }
//! }
//!
//! fn train(communicator: Communicator) -> Result<f32> {
//!     let rank = communicator.rank();
//!     let layer = |name: &str| (name.to_owned(), Mutex::new(vec![rank as f32; 64]));
//!     let mut variables = Variables(HashMap::from(["q", "k", "v", "o"].map(layer)));
//!     let averager = ParamAverager::builder(communicator).build(&mut variables)?;
//!     let mut sgd = LocalSgd::new(averager, Schedule::every(8));
//!     for _batch in 0..100 {
//!         // train_step(&variables, batch);
//!         sgd.step(&mut variables)?;
//!     }
//!     sgd.finish(&mut variables)?;
//!     let q = variables.0["q"].lock().unwrap();
//!     Ok(q[0])
//! }
//!
//! assert_eq!(Communicator::run(&[Device::cpu(), Device::cpu()], train)?, [0.0, 0.0]);
//! # Ok::<(), Error>(())
//! ```
//!
//! # candle
//! The package `param-averager-candle` (`adapters/candle` in the repository) lends the variables of
//! a `VarMap`, sorted by name, without a copy and without unsafe code: `VarParams::new(&varmap)` is
//! the model of every call. `VarMap` hides its storage behind locks, but an in-place operation
//! lends it; operations that nest in one another hold all locks during the average.
//!
//! # burn
//! The package `param-averager-burn` (`adapters/burn` in the repository) has `BurnParams`, which
//! holds a module and lends its float parameters, named by their paths. On the flex backend of burn
//! 0.22 no byte is copied; GPU backends copy to the host and back. The module comes back with an
//! error, too.
//!
//! ```text
//! let mut params = BurnParams::new(model);
//! let averager = ParamAverager::builder(communicator).build(&mut params)?;
//! let mut sgd = LocalSgd::new(averager, Schedule::every(8));
//! for batch in batches {
//!     let loss = params.module().loss(batch);
//!     let grads = GradientsParams::from_grads(loss.backward(), params.module());
//!     params.update(|model| optim.step(1e-3, model, grads));
//!     sgd.step(&mut params)?;
//! }
//! ```
//!
//! # tch, and raw pointers
//! For memory that Rust sees as an address only (`Tensor::data_ptr` of tch, another runtime's
//! allocations), [`TensorMut::from_raw_parts`](crate::TensorMut::from_raw_parts) makes a tensor,
//! unsafely. With a CUDA stream that orders its uses it goes into
//! [`RawCudaParams`](crate::RawCudaParams), or into a [`Lend`](crate::Lend) of your own:
//! `examples/cuda_raw.rs` is a trainer with a CUDA runtime of its own.
//!
//! # cudarc
#![cfg_attr(
    feature = "cuda",
    doc = "Slices of cudarc are safe to average, on a stream: [`CudaParams`](crate::CudaParams)."
)]
#![cfg_attr(not(feature = "cuda"), doc = "Slices of cudarc need the feature `cuda`.")]
//!
//! # What is not averaged
//! Buffers and the optimizer's state stay local unless they are passed as tensors;
//! [`guide::practice`](crate::guide::practice) says what becomes of them, and how to divide the
//! data. Count **optimizer steps**, not micro-batches: call
//! [`LocalSgd::step`](crate::LocalSgd::step) after `optimizer.step()`, and
//! [`skip`](crate::LocalSgd::skip) where a loss scaler left it out. Ranks with different numbers of
//! batches end each epoch by [`done`](crate::LocalSgd::done).
