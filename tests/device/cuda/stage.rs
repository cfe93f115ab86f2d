//! A user's stages on devices: the bits of the same stages on CPUs, refusals, and what they are
//! told.

use std::ffi::c_void;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use test_support::{options, ranks_of};

use super::links;
use super::model::{ordinal, Model, Shape};
use super::outer::outers;
use super::scenarios::GPU;
use super::way::{shapes, Way, WAY};

/// Kernels that replace each of some values x by 0.75 x + 0.5, each operation rounded.
const KERNELS: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry stage32(.param .u64 values, .param .u64 count) {
  .reg .pred %p;
  .reg .f32 %x;
  .reg .b64 %d<3>;
  ld.param.u64 %d0, [values];
  cvta.to.global.u64 %d1, %d0;
  ld.param.u64 %d2, [count];
again:
  ld.global.f32 %x, [%d1];
  mul.rn.f32 %x, %x, 0f3F400000;
  add.rn.f32 %x, %x, 0f3F000000;
  st.global.f32 [%d1], %x;
  add.s64 %d1, %d1, 4;
  add.s64 %d2, %d2, -1;
  setp.ne.s64 %p, %d2, 0;
  @%p bra again;
  ret;
}
.visible .entry stage64(.param .u64 values, .param .u64 count) {
  .reg .pred %p;
  .reg .f64 %x;
  .reg .b64 %d<3>;
  ld.param.u64 %d0, [values];
  cvta.to.global.u64 %d1, %d0;
  ld.param.u64 %d2, [count];
again:
  ld.global.f64 %x, [%d1];
  mul.rn.f64 %x, %x, 0d3FE8000000000000;
  add.rn.f64 %x, %x, 0d3FE0000000000000;
  st.global.f64 [%d1], %x;
  add.s64 %d1, %d1, 8;
  add.s64 %d2, %d2, -1;
  setp.ne.s64 %p, %d2, 0;
  @%p bra again;
  ret;
}
\0";

/// Result of the stage for a mean.
pub fn staged(mean: f32) -> f32 {
    mean * 0.75 + 0.5
}

/// The kernels of a device, loaded for the life of the process.
#[derive(Clone, Copy)]
struct Kernels([sys::CUfunction; 2]);

// SAFETY: handles, which the driver allows on every thread.
unsafe impl Send for Kernels {}

impl Kernels {
    fn new(device: Device) -> Kernels {
        let context = CudaContext::new(ordinal(device)).unwrap();
        context.bind_to_thread().unwrap();
        std::mem::forget(context);
        // SAFETY: a context is bound; PTX, and names that it has.
        unsafe {
            let module = result::module::load_data(KERNELS.as_ptr().cast()).unwrap();
            let function = |name: &std::ffi::CStr| {
                result::module::get_function(module, name.to_owned()).unwrap()
            };
            Kernels([function(c"stage32"), function(c"stage64")])
        }
    }

    /// Enqueues the stage on a shard.
    fn enqueue(self, shard: &DeviceShard<'_>) {
        for part in shard.parts() {
            let [mut pointer, mut count] = [part.pointer, part.len as u64];
            let mut parameters = [&raw mut pointer, &raw mut count].map(|p| p.cast::<c_void>());
            let kernel = self.0[usize::from(part.dtype == Dtype::F64)];
            // SAFETY: a kernel for values of this type, on the stream of the shard.
            unsafe {
                sys::cuLaunchKernel(
                    kernel,
                    1,
                    1,
                    1,
                    1,
                    1,
                    1,
                    0,
                    shard.stream().cast(),
                    parameters.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
            .result()
            .unwrap();
        }
    }
}

/// A builder with that stage, on a device or on CPUs.
pub fn with_stage(builder: Builder, on: Device) -> Builder {
    if on != Device::cpu() {
        let kernels = Kernels::new(on);
        return on_device(builder, move |shard| {
            assert_eq!(shard.device(), ordinal(on));
            if !shard.sets_values() {
                kernels.enqueue(shard);
            }
            Ok(())
        });
    }
    builder.stage(|shard| {
        let changes = !shard.sets_values();
        for part in shard.parts().filter(|_| changes) {
            match part.values {
                Values::F32(values) => values.iter_mut().for_each(|x| *x = staged(*x)),
                Values::F64(values) => values.iter_mut().for_each(|x| *x = *x * 0.75 + 0.5),
                other => panic!("{other:?}"),
            }
        }
        Ok(())
    })
}

fn on_device(
    builder: Builder,
    stage: impl FnMut(&mut DeviceShard<'_>) -> Result<(), Veto> + Send + 'static,
) -> Builder {
    // SAFETY: the stages of these tests enqueue work on the values of the shard, on its stream.
    unsafe { builder.device_stage(stage) }
}

const STAGE: Way = Way { stage: true, ..WAY };

/// Worlds of any size on one device.
pub fn all() {
    let shapes = shapes();
    for ranks in [1, 2, 3, 5] {
        Way { ranks, ..STAGE }.compare(&shapes);
        for outer in outers() {
            Way { ranks, outer, ..STAGE }.compare(&shapes[5..]);
        }
    }
    Way { weighted: true, counter: u32::MAX - 3, reject: true, ..STAGE }.compare(&shapes);
    Way { channels: 3, slots: 2, chunk: 128, delay_ns: 100_000, narrow_wire: true, ..STAGE }
        .compare(&shapes[5..]);
}

pub fn on_two_devices() {
    let stage =
        |ranks, link| Way { stage: true, reject: true, ..links::ring(ranks, &[0, 1], link) };
    for ranks in [2, 4] {
        links::compare(stage(ranks, Link::Auto), &shapes());
        let outer = Outer::diloco();
        links::compare(Way { outer, ..stage(ranks, Link::Host) }, &shapes()[5..]);
    }
}

/// One world, for the race detector.
pub fn races() {
    let shapes = [(Dtype::F32, 600, 0), (Dtype::Bf16, 77, 1)];
    Way { ranks: 2, slots: 2, chunk: 256, reject: true, ..STAGE }.run(&shapes);
}

const SHAPES: [Shape; 2] = [(Dtype::F32, 5000, 0), (Dtype::F16, 1000, 1)];

/// Sets an element of a tensor, if it lies in the shard. 16 bits are f32 there.
fn set(shard: &DeviceShard<'_>, tensor: usize, element: usize, value: f32) {
    for part in shard.parts() {
        if part.tensor == tensor && part.elements().contains(&element) {
            let to = part.pointer + 4 * (element - part.first) as u64;
            // SAFETY: a value of the shard, on its stream.
            unsafe { sys::cuMemsetD32Async(to, value.to_bits(), 1, shard.stream().cast()) }
                .result()
                .unwrap();
        }
    }
}

/// Averages that the stage of a rank refuses, in whatever way, between good ones: every rank gets
/// the error with its reason, nothing changes, and stages are told.
pub fn vetoes() {
    const ENDS: [&str; 7] = ["good", "veto", "good", "nan", "large", "good", "panic"];
    for devices in [&[0][..], &[0, 0], &[0, 1, 0], &[0, 1]] {
        let world = devices.len();
        let devices: Vec<Device> = devices.iter().copied().map(Device::cuda).collect();
        let bad = world - 1;
        ranks_of(&devices, |communicator| {
            let (rank, on) = (communicator.rank(), communicator.device());
            let mut model = Model::new(on, &SHAPES, rank as u64);
            let before = model.bytes().to_vec();
            let (seen, kernels) = (Arc::new(Mutex::new(vec![])), Kernels::new(on));
            let (log, mut call) = (seen.clone(), 0);
            let builder = on_device(options(communicator).channels(2), move |shard| {
                assert_eq!((shard.rank(), shard.world_size(), shard.layout()), (rank, world, 0));
                log.lock().unwrap().push(shard.was_committed());
                kernels.enqueue(shard);
                call += 1;
                match ENDS[call - 1] {
                    // Any rank may have the element.
                    "nan" => set(shard, 0, 4321, f32::NAN),
                    "large" => set(shard, 1, 99, 65520.0),
                    "veto" if rank == bad => return Err(Veto::new("too far")),
                    "panic" if rank == bad => std::panic::resume_unwind(Box::new("as it should")),
                    _ => {}
                }
                Ok(())
            });
            let mut averager = builder.build(&mut model).unwrap();
            let mut good: Option<Vec<u8>> = None;
            for end in ENDS {
                let mut fresh = Model::new(on, &SHAPES, rank as u64);
                let averaged = averager.average(&mut fresh);
                fresh.download();
                let reason = match end {
                    "veto" => "too far",
                    "nan" => "tensor 0 (f32, 5000 elements), element 4321",
                    "large" => "element 99",
                    "panic" => "its function has panicked: as it should",
                    _ => {
                        assert!(averaged.is_ok(), "{averaged:?}");
                        let bytes = fresh.bytes().to_vec();
                        assert!(*good.get_or_insert(bytes.clone()) == bytes && bytes != before);
                        continue;
                    }
                };
                assert!(fresh.bytes() == before, "{end}: rank {rank} of {devices:?} has written");
                match averaged.unwrap_err() {
                    Error::StageVetoed { rank: named, reason: found } => {
                        assert!(found.contains(reason), "{end}: {found}");
                        assert!(named == bad || matches!(end, "nan" | "large"), "{end}: {named}");
                    }
                    error => panic!("{end}: {error}"),
                }
            }
            let seen = seen.lock().unwrap();
            assert_eq!(*seen, [false, true, false, true, false, false, true]);
            averager // dropped when all have ended
        });
    }
}

/// The rank that holds a NaN is named, although the stage of each rank gets it; a stage that
/// changes the values that ranks begin with is refused; one that takes too long is a timeout.
pub fn failures() {
    for devices in [[GPU; 2], [GPU, Device::cuda(1)]] {
        ranks_of(&devices, |communicator| {
            let (rank, on) = (communicator.rank(), communicator.device());
            let mut model = Model::new(on, &SHAPES, 0);
            let builder = with_stage(options(communicator).channels(2), on);
            let mut averager = builder.build(&mut model).unwrap();
            if rank == 1 {
                model.set(0, 4321, f32::NAN);
            }
            let error = averager.average(&mut model).unwrap_err();
            let named = matches!(error, Error::NonFinite { rank: 1, element: 4321, .. });
            assert!(named, "{error}");
            averager
        });
        ranks_of(&devices, |communicator| {
            let on = communicator.device();
            let mut model = Model::new(on, &SHAPES, 0);
            let builder = options(communicator).channels(2).start_from(Start::Rank(0));
            let builder = on_device(builder, |shard| {
                set(shard, 1, 500, 2.0);
                Ok(())
            });
            let error = builder.build(&mut model).map(drop).unwrap_err();
            let Error::StageVetoed { reason, .. } = &error else { panic!("{error}") };
            assert!(reason.contains("all ranks begin with"), "{error}");
        });
        ranks_of(&devices, |communicator| {
            let (rank, on) = (communicator.rank(), communicator.device());
            let mut model = Model::new(on, &SHAPES, 0);
            let before = model.bytes().to_vec();
            let builder = options(communicator).channels(2).timeout(Duration::from_secs(3));
            let builder = on_device(builder, move |shard| {
                if rank == 1 {
                    std::thread::sleep(Duration::from_secs(6));
                }
                set(shard, 0, 0, 3.0);
                Ok(())
            });
            let mut averager = builder.build(&mut model).unwrap();
            let error = averager.average(&mut model).unwrap_err();
            assert!(matches!(error, Error::Timeout { rank: 1, committed: false, .. }), "{error}");
            model.download();
            assert!(model.bytes() == before);
            averager
        });
    }
}

/// Averages that are enqueued: stages are called before they return, behind the stream's work, and
/// a rank that looks at the outcome much later than another costs the other the text of a veto.
pub fn streams() {
    const ELEMENTS: usize = 20_000;
    for devices in [[GPU; 2], [GPU, Device::cuda(1)]] {
        let looked = std::sync::Barrier::new(2);
        ranks_of(&devices, |communicator| {
            let (rank, on) = (communicator.rank(), communicator.device());
            let mut model = Model::new(on, &[(Dtype::F32, ELEMENTS, 0)], 9);
            let (weights, kernels) = (model.tensor_address(0), Kernels::new(on));
            let stream = CudaContext::new(ordinal(on)).unwrap().new_stream().unwrap();
            let raw = stream.cu_stream();
            let set = |value: usize| {
                // SAFETY: own memory and stream, which live until all is done.
                unsafe { sys::cuMemsetD32Async(weights, (value as f32).to_bits(), ELEMENTS, raw) }
                    .result()
                    .unwrap();
            };
            let builder = options(communicator).channels(2).timeout(Duration::from_secs(4));
            let mut call = 0;
            let builder = on_device(builder, move |shard| {
                kernels.enqueue(shard);
                call += 1;
                match call == 4 && rank == 1 {
                    true => Err(Veto::new("the fourth")),
                    false => Ok(()),
                }
            });
            let mut averager = builder.build(&mut model).unwrap();
            for round in 0..4 {
                set(10 * round + 2 * rank);
                // SAFETY: as above.
                let mut params = unsafe { RawCudaParams::new(raw.cast(), &mut model) };
                let pending = averager.start(&mut params).unwrap();
                if round < 3 {
                    pending.wait().unwrap();
                } else {
                    if rank == 1 {
                        looked.wait();
                    }
                    let error = pending.wait().unwrap_err();
                    if rank == 0 {
                        looked.wait();
                    }
                    let Error::StageVetoed { rank: 1, reason } = &error else { panic!("{error}") };
                    assert_eq!(reason == "the fourth", rank == 1, "{reason}");
                }
                model.download();
                let expected = match round {
                    3 => 30.0 + 2.0 * rank as f32,
                    _ => staged((10 * round + 1) as f32),
                };
                let mut found = model.tensor(0).chunks_exact(4);
                assert!(found.all(|x| x == expected.to_ne_bytes()), "{round}");
            }
            averager
        });
    }
}

/// Uses of a stage that are refused: nothing is captured or read.
pub fn refusals() {
    ranks_of(&[0, 1].map(Device::cuda), |communicator| {
        let on = communicator.device();
        let mut model = Model::new(on, &SHAPES, 1);
        let stream = CudaContext::new(ordinal(on)).unwrap().new_stream().unwrap();
        let raw = stream.cu_stream();
        let builder = with_stage(options(communicator).channels(2), on);
        let mut averager = builder.build(&mut model).unwrap();
        // SAFETY: own memory and stream, which live until all is done.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
            result::stream::begin_capture(raw, mode).unwrap();
            let mut params = RawCudaParams::new(raw.cast(), &mut model);
            let error = averager.start(&mut params).map(drop).unwrap_err();
            let Error::InvalidOption { option: "stream", found, .. } = &error else {
                panic!("{error}")
            };
            assert!(found.contains("with a stage"), "{found}");
            let graph = result::stream::end_capture(raw).unwrap();
            let mut nodes = usize::MAX;
            sys::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut nodes).result().unwrap();
            assert_eq!(nodes, 0);
            result::graph::destroy(graph).unwrap();
        }
        averager.average(&mut model).unwrap();
        averager
    });
}
