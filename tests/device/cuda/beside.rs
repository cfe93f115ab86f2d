//! Averages while the device has other work: a trainer's own kernels, and another average, possibly
//! of another world.

use super::model::Model;
use super::scenarios::GPU;
use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use std::ffi::c_void;
use std::sync::Barrier;
use std::time::Duration;
use test_support::ranks_on;

/// Kernel that adds 1 to each of `count` words.
const TRAINER: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry add_one(.param .u64 memory, .param .u32 count) {
  .reg .pred %p;
  .reg .b32 %r<7>;
  .reg .b64 %d<4>;
  ld.param.u64 %d0, [memory];
  ld.param.u32 %r0, [count];
  mov.u32 %r1, %ctaid.x;
  mov.u32 %r2, %ntid.x;
  mov.u32 %r3, %tid.x;
  mad.lo.u32 %r4, %r1, %r2, %r3;
  setp.ge.u32 %p, %r4, %r0;
  @%p bra end;
  cvta.to.global.u64 %d1, %d0;
  mul.wide.u32 %d2, %r4, 4;
  add.u64 %d3, %d1, %d2;
  ld.global.u32 %r5, [%d3];
  add.u32 %r6, %r5, 1;
  st.global.u32 [%d3], %r6;
end:
  ret;
}
\0";

const ELEMENTS: usize = 6000;
const STEPS: usize = 20;

pub fn beside() {
    const RANKS: usize = 3;
    let together = Barrier::new(RANKS);
    ranks_on(GPU, RANKS, |communicator| {
        let rank = communicator.rank();
        let tensors = [(Dtype::F32, ELEMENTS, 0)];
        let mut models = [0, 1].map(|seed| Model::new(GPU, &tensors, seed));
        let mut own = Model::new(GPU, &tensors, 2);
        let (before, counted) = (own.bytes().to_vec(), own.tensor_address(0));
        let context = CudaContext::new(0).unwrap();
        let streams = [0; 3].map(|_| context.new_stream().unwrap());
        let [ring, direct, trainer] = [0, 1, 2].map(|index| streams[index].cu_stream());
        // SAFETY: PTX, and a name that it has. It stays loaded: to unload is to wait for every
        // kernel.
        let add_one = unsafe {
            let module = result::module::load_data(TRAINER.as_ptr().cast()).unwrap();
            result::module::get_function(module, c"add_one".to_owned()).unwrap()
        };
        let build = |algorithm, model: &mut Model| {
            let builder =
                test_support::options(communicator.clone()).algorithm(algorithm).channels(2);
            builder.timeout(Duration::from_secs(60)).build(model).unwrap()
        };
        let mut averagers =
            [build(Algorithm::Ring, &mut models[0]), build(Algorithm::Direct, &mut models[1])];
        together.wait(); // loading may wait for the device
        for round in 0..STEPS {
            let bits = |value: usize| (value as f32).to_bits();
            let [one, other] = &mut averagers;
            let [mine, yours] = &mut models;
            let (first, second) = (mine.tensor_address(0), yours.tensor_address(0));
            // SAFETY: own memory, streams and kernel, which live until all is done.
            let pending = unsafe {
                let (mut memory, mut count) = (counted, ELEMENTS as u32);
                let mut parameters: [*mut c_void; 2] =
                    [(&raw mut memory).cast(), (&raw mut count).cast()];
                let grid = (ELEMENTS as u32).div_ceil(256);
                result::launch_kernel(
                    add_one,
                    (grid, 1, 1),
                    (256, 1, 1),
                    0,
                    trainer,
                    &mut parameters,
                )
                .unwrap();
                sys::cuMemsetD32Async(first, bits(round + rank), ELEMENTS, ring).result().unwrap();
                sys::cuMemsetD32Async(second, bits(7 * round + 3 * rank), ELEMENTS, direct)
                    .result()
                    .unwrap();
                // Both are under way at once.
                [
                    one.start(&mut RawCudaParams::new(ring.cast(), &mut *mine)).unwrap(),
                    other.start(&mut RawCudaParams::new(direct.cast(), &mut *yours)).unwrap(),
                ]
            };
            for pending in pending {
                pending.wait().unwrap();
            }
            for (model, mean) in models.iter_mut().zip([round + 1, 7 * round + 3]) {
                model.download();
                let mean = bits(mean).to_ne_bytes();
                assert!(
                    model.tensor(0).chunks_exact(4).all(|element| element == mean),
                    "rank {rank}, {round}"
                );
                assert!(model.guards_are_whole());
            }
        }
        streams[2].synchronize().unwrap();
        own.download();
        let words = |bytes: &[u8]| -> Vec<u32> {
            bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect()
        };
        let at = own.tensor(0).as_ptr() as usize - own.bytes().as_ptr() as usize;
        let first = words(&before[at..at + 4 * ELEMENTS]);
        assert!(words(own.tensor(0))
            .iter()
            .zip(first)
            .all(|(now, then)| *now == then.wrapping_add(STEPS as u32)));
        together.wait();
        (averagers, models, own) // freed when all ranks are done
    });
}

/// Memory of dropped averagers is kept while others live, since freeing it waits for them; then it
/// is freed.
pub fn memory() {
    let context = CudaContext::new(0).unwrap();
    let free = || context.mem_get_info().unwrap().0;
    let build = |communicator, elements, seed| {
        let mut model = Model::new(GPU, &[(Dtype::F32, elements, 0)], seed);
        let builder = test_support::options(communicator).algorithm(Algorithm::Ring).channels(1);
        (builder.timeout(Duration::from_secs(30)).build(&mut model).unwrap(), model)
    };
    let worlds = [(); 2].map(|()| Communicator::from_devices(&[GPU; 2]).unwrap());
    let before = free();
    let [first, second] = worlds.map(|world| {
        std::thread::scope(|scope| {
            let ranks: Vec<_> = world.into_iter().zip(0..).collect();
            let threads = ranks.into_iter().map(|(communicator, seed)| {
                scope.spawn(move || build(communicator, 100_000, seed))
            });
            let threads: Vec<_> = threads.collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        })
    });
    let [(mut one, mut its), (mut other, mut others)] = <[_; 2]>::try_from(second).ok().unwrap();
    let (averagers, models): (Vec<_>, Vec<_>) = first.into_iter().unzip();
    std::thread::scope(|scope| {
        let waits = scope.spawn(move || {
            one.average(&mut its).unwrap();
            (one, its)
        });
        std::thread::sleep(Duration::from_millis(300));
        drop(averagers); // while the other world's average waits for this thread
        assert!(!waits.is_finished());
        other.average(&mut others).unwrap();
        drop((waits.join().unwrap(), other, others, models));
    });
    // a launch of the simulator's keeps a little for a while; a shard is larger
    const SLACK: usize = 64 << 10;
    assert!(free() + SLACK > before, "{} of {before}", free());
}
