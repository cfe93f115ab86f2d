//! On flex, an average copies no parameter: nothing as large as one is allocated.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use crate::model::{builder, ranks};
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Tensor};
use param_averager::{LocalSgd, Schedule};
use param_averager_burn::BurnParams;

/// Bytes of the smallest parameter that is looked for.
const LARGE: usize = 256 * 256 * 4;

struct Counting;
thread_local! {
    /// Large allocations of this thread.
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

fn count(bytes: usize) {
    if bytes >= LARGE {
        COUNT.set(COUNT.get() + 1);
    }
}

// SAFETY: the system's allocator, counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        count(bytes);
        // SAFETY: the caller's.
        unsafe { System.realloc(pointer, layout, bytes) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(pointer, layout) }
    }
}
#[global_allocator]
static COUNTING: Counting = Counting;

#[derive(Module, Debug)]
struct Mlp {
    layers: Vec<Linear>,
}

#[test]
fn an_average_copies_no_parameter() {
    let device = Device::flex().autodiff();
    ranks(2, |communicator| {
        let layer = || LinearConfig::new(256, 256).init(&device);
        let mut params = BurnParams::new(Mlp { layers: vec![layer(), layer(), layer()] });
        let averager = builder(communicator).build(&mut params).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        let mut optim = SgdConfig::new().init();
        for _ in 0..3 {
            let x = Tensor::<2>::full([4, 256], 0.1, &device);
            let forward = |x: Tensor<2>, layer: &Linear| layer.forward(x);
            let loss = params.module().layers.iter().fold(x, forward).mean();
            let grads = GradientsParams::from_grads(loss.backward(), params.module());
            params.update(|model| optim.step(0.1, model, grads));
            let before = COUNT.get();
            sgd.step(&mut params).unwrap();
            assert_eq!(COUNT.get() - before, 0, "an average allocates as much as a parameter");
            // Values that a clone shares are copied, so this test sees copies.
            let clone = params.module().clone();
            let before = COUNT.get();
            sgd.step(&mut params).unwrap();
            assert!(COUNT.get() - before >= 3);
            drop(clone);
        }
    });
}
