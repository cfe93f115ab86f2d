//! CUDA: streams, graphs, and links between devices. Simulated only: no GPU has run it, and the
//! defaults of grids and chunks are reasoned, not measured.
//!
//! # Ranks and tensors
//! `Communicator::from_devices(&[Device::cuda(0), Device::cuda(1)])` makes one rank a device;
//! several ranks may share one: `&[Device::cuda(0); 2]`. Tensors are slices of cudarc
//! ([`CudaParams`](crate::CudaParams), safe) or device pointers
//! ([`TensorMut::from_raw_parts`](crate::TensorMut::from_raw_parts), unsafe).
//!
//! # Order on a stream
//!
//! | call | runs behind | returns | streams |
//! |---|---|---|---|
//! | `average` of tensors without a stream | the null stream and every blocking stream, none under capture | when the average is done | none: work of non-blocking streams on the tensors must be done before |
//! | `average` of [`RawCudaParams`](crate::RawCudaParams) or [`CudaParams`](crate::CudaParams) | the earlier work of their stream | when the average is done | of any kind, shared by ranks or not |
//! | `start` of the same | the earlier work of their stream | at once; later work of the stream sees the mean | of any kind, of this rank alone |
//!
//! Streams are non-blocking, blocking, the null stream, or the default stream of a thread. An
//! average runs on a stream of the averager's own, between two events, except where `start` gets a
//! non-blocking stream: it runs there. `start` makes the stream wait for the peers, which two ranks
//! on one device must not do to each other: [`RawCudaParams`](crate::RawCudaParams) has the rules,
//! and what is refused. With a stream of their own each, non-blocking, ranks follow them all.
//! [`LocalSgd::step`](crate::LocalSgd::step) is a `start`, unless a rule could be broken: it waits
//! if the stream is not non-blocking and a second rank of the process is on the device.
//!
//! If an average fails, later work of the stream runs all the same, on unchanged tensors;
//! [`Pending::wait`](crate::Pending::wait) returns the report or the error. cudarc's events order
//! an average of its slices with their uses on all other streams, freeing them included; see
//! [`adapters::cudarc`](crate::adapters::cudarc).
//!
//! ```no_run
//! use std::ffi::c_void;
//! use param_averager::*;
//!
//! /// One step that is enqueued and not waited for. `pointer` is device memory of `n` floats.
//! unsafe fn step(averager: &mut ParamAverager, stream: *mut c_void, pointer: *mut u8, n: usize)
//!     -> Result<()> {
//!     // train_step(stream, pointer);
//!     // SAFETY: the caller's pointer and stream live until the average is done, and all uses of
//!     // the tensor are ordered on this stream.
//!     let mut params = unsafe {
//!         let tensor = TensorMut::from_raw_parts(pointer, n, Dtype::F32, Device::cuda(0));
//!         RawCudaParams::new(stream, tensor.named("weights"))
//!     };
//!     let pending = averager.start(&mut params)?;
//!     // What the stream is given from here on sees the mean.
//!     let report = pending.wait()?;
//!     println!("{} bytes in {:?}", report.bytes, report.elapsed);
//!     Ok(())
//! }
//! ```
//!
//! # Graphs
//! While the stream is being captured, [`start`](crate::ParamAverager::start) makes the average a
//! part of the CUDA graph, with the tensors' addresses of that moment. Every rank captures a graph
//! of its own and replays it as often as the others; each replay is one average.
//! [`graph_outcome`](crate::ParamAverager::graph_outcome) waits for the stream and returns the
//! result of the last replay. Wrong tensors or a wrong weight are refused while capturing, on that
//! rank alone. `examples/cuda_graph.rs` shows it.
//!
//! # What can block
//! A rank's average waits for its peers on the device itself. While it runs, its peers on the same
//! device must not call `cudaFree` or anything else that waits for every kernel: the average and
//! that call would wait for each other, until the average's timeout. With many streams, set
//! `CUDA_DEVICE_MAX_CONNECTIONS=32`: streams that share one of 8 hardware queues wait for one
//! another. Averagers whose averages overlap in time must fit on the device together.
//!
//! # Links
//! Between two devices the ring writes straight into the other device's memory (P2P) if a probe
//! finds that this works, whatever the driver says, and that page-locked memory of the host is not
//! much faster; else it goes through the latter. The probe does what the ring does: kernels of both
//! devices run at the same time and exchange up to 64 MiB, data first, then flags. It takes some
//! milliseconds, once for each two devices, and gives up after 200 ms, or what
//! `PARAM_AVERAGER_P2P_LIMIT_MS` says. `PARAM_AVERAGER_P2P=0` forbids the probe and peer access:
//! set it where a link is broken in a way that no program survives.
//! [`Builder::link`](crate::Builder::link) insists on one of the two. Ranks follow one another
//! around the ring by NVLink, PCIe switch and NUMA node. [`Topology::probe`](crate::Topology::probe)
//! returns what was found, and `allreduce-bench --devices` draws it. Peers touch mailboxes only,
//! never the tensors (by the ring), so tensors of `cuMemAllocAsync` pools work across devices and
//! processes.
//!
//! # candle
//! candle's `Device::new_cuda` uses the per-thread default stream, which is blocking;
//! `Device::new_cuda_with_stream` makes a non-blocking one. `average`, `LocalSgd::step` and `start`
//! take both.
