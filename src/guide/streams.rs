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
//! | `start` of the same | the earlier work of their stream | when the average is enqueued; later work of the stream sees the mean | of any kind, shared by ranks or not |
//!
//! Streams are non-blocking, blocking, the null stream, or the default stream of a thread. An
//! average runs on a stream of the averager's own, of the highest priority, between events.
//! [`LocalSgd::step`](crate::LocalSgd::step) is a `start`.
//!
//! # Ranks meet, then launch
//! No kernel waits for a rank that has not come: such a kernel would hold up whatever the late
//! rank's trainer does on a device that waits for all kernels, and the driver may end it.
//!
//! | ranks | meet | then |
//! |---|---|---|
//! | threads of one process | on the host, also in `start`, which returns when all have called it | one plain launch a device, with the blocks of all its ranks, behind the work of all their streams |
//! | processes, each with a device, or with MPS | in the front end of their streams, by words in memory (`cuStreamWaitValue32`), so that `start` returns at once; on their hosts if a device lacks that | a launch each |
//! | processes that share a device without MPS | on their hosts, before each of 2n + 1 steps; `start` returns when the average is done | a launch for each step. Kernels of such processes take turns by time slices, so none waits for another. Start MPS (`nvidia-cuda-mps-control -d`) before the ranks, and they run together |
//! | any of these, with a [stage](crate::Builder::device_stage) | the same way twice: before the sum, and behind the stages of all ranks | the launches up to the sum, and those from the vote on |
//! | replays of CUDA graphs | in their kernels, since no host sees them | refused where ranks share a device |
//!
//! A meeting ends with the averager's [`timeout`](crate::Builder::timeout), an abort or a death.
//! After it, kernels wait for one another for microseconds, and for
//! [`device_timeout`](crate::Builder::device_timeout), 1 second, at most. Averages take half of the
//! blocks that fit on a device, and leave the rest to the trainer.
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
//! rank alone. So is, with an outer optimizer or compression, the first average after a recovery or
//! a join, from which the steps and the differences begin; and with a
//! [stage](crate::Builder::device_stage) every average, since the host calls it.
//! `examples/cuda_graph.rs` shows a graph.
//!
//! # What can block
//! Replays of graphs wait for late ranks in their kernels, for as long as `timeout` says, and on a
//! device with a display for `device_timeout`. Meanwhile a peer must not call `cudaMalloc`,
//! `cudaFree` or anything else that waits for all kernels of its device and of devices with access
//! to it: both would wait until the timeout. Averagers whose averages overlap in time must fit on
//! the device together.
//!
//! Averages without graphs work with `CUDA_LAUNCH_BLOCKING=1`, with 1, 3 or 8 hardware queues
//! (`CUDA_DEVICE_MAX_CONNECTIONS`), with lazy loading and on devices with a display:
//! `tests/device/unkind.rs` runs them on a simulator with each of these. MPS and its percentages
//! are detected; nothing has run with them, not even simulated.
//!
//! # Links
//! Between two devices the ring writes straight into the other device's memory (P2P) if a probe
//! finds that this works, whatever the driver says, and that page-locked memory of the host is not
//! much faster; else it goes through the latter. The probe does what the ring does: kernels of both
//! devices run at the same time and exchange up to 64 MiB, data first, then flags. It takes some
//! milliseconds, once for each two devices, and gives up after 200 ms, or what
//! `PARAM_AVERAGER_P2P_LIMIT_MS` says. `PARAM_AVERAGER_P2P=0` forbids the probe and peer access:
//! set it where a link is broken in a way that no program survives. `PARAM_AVERAGER_P2P=1` asks for
//! peer access wherever data arrive, at whatever rate.
//! Between devices that NVLink does not connect, a child process tries it first: a broken link may
//! end the process that uses it. The child is the same program, which exits before `main`.
//! Slots lie in the receiver's memory, which the sender writes; between threads, where reads are
//! 1.5 times as fast, in the sender's, which the receiver reads.
//! [`Builder::link`](crate::Builder::link) insists on one of the three ways. Ranks follow one
//! another around the ring by NVLink, PCIe switch and NUMA node. `allreduce-bench --devices` draws
//! what was found, and [`Topology::probe`](crate::Topology::probe) returns it. By the ring peers
//! touch mailboxes only, never the tensors, which may lie anywhere on their device.
//!
//! Where NVLink connects every two devices of ranks that are threads,
//! [`Algorithm::Auto`](crate::Algorithm::Auto) means
//! [`Algorithm::Direct`](crate::Algorithm::Direct): each device reads its part of all ranks'
//! tensors and writes the result back to all, 2·S·(n − 1)/n bytes each way over its links, as by
//! the ring, with two agreements in the place of 2·(n − 1) hand-offs, and without mailboxes and
//! shards. Tensors lie in memory of `cuMemAlloc` or of a pool then (`cuMemAllocAsync`, as cudarc
//! allocates). A pool is made accessible to the other devices of the world, for good
//! (`cuMemPoolSetAccess`); if other memory is found when the averager is built, all ranks take the
//! ring. A pool that other devices can access may make the driver wait for their kernels when it
//! grows or shrinks; where graphs have averages, which wait for late ranks in kernels, set the
//! pool's release threshold so that it does neither, or use the ring.
//!
//! # candle
//! candle's `Device::new_cuda` uses the per-thread default stream, which is blocking;
//! `Device::new_cuda_with_stream` makes a non-blocking one. `average`, `LocalSgd::step` and `start`
//! take both.
