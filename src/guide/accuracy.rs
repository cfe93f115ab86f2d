//! Accuracy: bounds of the mean, equal values, and runs with the same bits.
//!
//! # Bounds
//! Sums are made in f32 (f64 for f64) in a fixed order. ulp is the distance of two neighbouring
//! numbers of the dtype at the largest input of the element, or at 2⁻¹²¹ (f64: 2⁻¹⁰¹⁷) if that is
//! larger.
//!
//! | dtype | error of a mean over n ranks |
//! |---|---|
//! | f32, f64 | at most n ulp; n + 3 ulp with weights that differ |
//! | f16, bf16 | one rounding of such a sum in f32 |
//! | f16, bf16 with [`narrow_wire`](crate::Builder::narrow_wire), by the ring, n > 2 | one more rounding at each of n − 2 hops |
//!
//! A mean next to the largest finite f32 or f64 may be infinite.
//!
//! With [compression](super::compression) the bounds are others, and so are those of equal values.
//!
//! These are the bounds of the mean. The step of an [outer optimizer](super::outer) is computed in
//! the type of sums, from a mean in that type and from state in that type; each operation is
//! rounded. Its result is rounded once to the dtype of the tensors.
//!
//! # Equal values
//! A value that is the same on all ranks with a positive weight stays as it is, unless an outer
//! optimizer makes a step:
//!
//! | | plain mean | weights that differ | one rank with a weight |
//! |---|---|---|---|
//! | direct, every dtype | every bit, NaN included | every bit, NaN included | every bit |
//! | ring, f16 and bf16 | exactly; NaN stays NaN | exactly; NaN stays NaN | exactly |
//! | ring, f32 and f64 | within n / 4 ulp, rounded up; 2 and 4 ranks: exactly | within n + 2 ulp | exactly |
//!
//! # The same bits
//! After an average **every rank of that average holds the same bits**, unless an outer optimizer
//! lets ranks [keep a share](crate::Outer::keeping). Two *runs* have the same bits if all of these
//! are the same:
//!
//! * the number of ranks, their inputs and their weights;
//! * the outer optimizer, if there is one, with all earlier averages;
//! * the algorithm, which [`Algorithm::Auto`](crate::Algorithm::Auto) chooses by placement: direct
//!   between threads of one process, unless they are on CUDA devices that NVLink does not connect;
//!   else the ring;
//! * the [compression](super::compression);
//! * directly, with three ranks or more on several CUDA devices:
//!   [`ring_order`](crate::ParamAverager::ring_order);
//! * with three ranks or more by the ring, or with compression:
//!   [`channels`](crate::Builder::channels), [`chunk_bytes`](crate::Builder::chunk_bytes),
//!   [`narrow_wire`](crate::Builder::narrow_wire) and
//!   [`ring_order`](crate::ParamAverager::ring_order). They decide which rank sums which element
//!   first, and the default of `channels` is the machine's cores divided by the ranks.
//!
//! [`Report`](crate::Report) tells the algorithm, the channels and the bytes of a chunk. With
//! [`reproducible`](crate::Builder::reproducible) none of the three depends on the machine, and
//! processes in the place of threads, or another number of cores, give the same model:
//!
//! ```
//! use param_averager::{Algorithm, Communicator, Device, ParamAverager, Start};
//!
//! let models = Communicator::run(&[Device::cpu(); 3], |communicator| {
//!     let scale = 0.1 * (communicator.rank() + 1) as f32;
//!     let mut model: Vec<f32> = (0..1000).map(|i| scale * i as f32).collect();
//!     let builder = ParamAverager::builder(communicator).start_from(Start::Own);
//!     let report = builder.reproducible(true).build(&mut model)?.average(&mut model)?;
//!     assert_eq!((report.algorithm, report.channels), (Algorithm::Ring, 4));
//!     Ok::<_, param_averager::Error>(model.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
//! })?;
//! assert!(models.windows(2).all(|pair| pair[0] == pair[1]));
//! # Ok::<(), param_averager::Error>(())
//! ```
//!
//! # NaN and infinities
//! A NaN on one rank is a NaN of the mean on every rank. With
//! [`reject_non_finite`](crate::Builder::reject_non_finite) the average fails instead, on every
//! rank, and names the rank, the tensor and the element; no tensor changes. It is the default of
//! the ring with its commit, which looks at every element anyway; the direct average needs one more
//! pass. A rank of weight 0 spreads nothing.
