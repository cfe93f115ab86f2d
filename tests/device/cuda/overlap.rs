//! Averages of copies on devices: the bits of the CPU, and their order with a trainer's work.

use std::time::Duration;

use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use test_support::{ranks_of, ranks_on};

use super::links::order_of;
use super::model::Model;
use super::scenarios::GPU;
use super::way::shapes;

/// What each rank's tensors hold after two averages of each fragment, by the model that it began
/// with. Tensors move between the start and the end of an average.
fn averaged(devices: &[Device], case: &Case, order: &[usize]) -> Vec<Vec<u8>> {
    let mut shapes = shapes();
    if case.compression != Compression::None {
        shapes.retain(|(dtype, ..)| *dtype == Dtype::F32);
        shapes.extend([(Dtype::F32, 2000, 1), (Dtype::F32, 900, 0)]); // of the second fragment
    }
    let results = ranks_of(devices, |communicator| {
        let (rank, on) = (communicator.rank(), communicator.device());
        let data = if on == Device::cpu() { order[rank] } else { rank };
        let model = |round: usize| Model::new(on, &shapes, (100 * round + data) as u64);
        let mut models: Vec<Model> = (0..5).map(model).collect();
        let mut averager = test_support::options(communicator)
            .algorithm(case.algorithm)
            .start_from(Start::Rank(0))
            .outer(case.outer)
            .compression(case.compression)
            .overlap(Overlap::default().fragments(2).delay(1).alpha(case.alpha))
            .channels(2)
            .chunk_bytes(4096)
            .timeout(Duration::from_secs(60))
            .build(&mut models[0])
            .unwrap();
        let mut bytes = vec![];
        for (round, pair) in models[1..].chunks_exact_mut(2).enumerate() {
            for fragment in 0..2 {
                let average = averager.start_overlapped(fragment, &mut pair[0]).unwrap();
                averager.finish_overlapped(average, &mut pair[1]).unwrap();
            }
            averager.average(&mut pair[1]).unwrap(); // in place, of the same tables
            let average = averager.start_overlapped(round % 2, &mut pair[1]).unwrap();
            averager.finish_overlapped(average, &mut pair[0]).unwrap();
            for model in pair {
                model.download();
                assert!(model.guards_are_whole(), "{case:?}: rank {rank} on {on}");
                bytes.extend_from_slice(model.bytes());
            }
        }
        (data, bytes, averager)
    });
    let mut results: Vec<_> = results.into_iter().map(|(data, bytes, _)| (data, bytes)).collect();
    results.sort_unstable();
    results.into_iter().map(|(_, bytes)| bytes).collect()
}

#[derive(Debug)]
struct Case {
    algorithm: Algorithm,
    outer: Outer,
    compression: Compression,
    alpha: f64,
}

fn compare(devices: &[Device], algorithm: Algorithm) {
    let order = order_of(devices);
    for (outer, alpha) in [
        (Outer::mean(), 0.0),
        (Outer::mean(), 0.25),
        (Outer::diloco(), 0.0),
        (Outer::adam(0.1, 0.9, 0.99, 1e-3), 0.5),
    ] {
        let case = Case { algorithm, outer, compression: Compression::None, alpha };
        compare_case(devices, &case, &order);
    }
}

fn compare_case(devices: &[Device], case: &Case, order: &[usize]) {
    let gpu = averaged(devices, case, order);
    let cpu = averaged(&vec![Device::cpu(); devices.len()], case, order);
    assert!(gpu == cpu, "{case:?} on {devices:?}: not the bits of the CPU");
}

/// In code, on one device and on two.
pub fn in_code() {
    let algorithm = Algorithm::Ring;
    for devices in [&[0, 0, 0][..], &[0, 0], &[0, 1, 0, 1]] {
        let devices: Vec<Device> = devices.iter().map(|&device| Device::cuda(device)).collect();
        for compression in [Compression::Bf16, Compression::Int8] {
            for (outer, alpha) in [(Outer::mean(), 0.25), (Outer::diloco(), 0.0)] {
                let case = Case { algorithm, outer, compression, alpha };
                compare_case(&devices, &case, &order_of(&devices));
            }
        }
    }
}

pub fn on_one_device() {
    for ranks in [1, 2, 3] {
        for algorithm in [Algorithm::Direct, Algorithm::Ring] {
            compare(&vec![GPU; ranks], algorithm);
        }
    }
}

pub fn on_two_devices() {
    for ranks in [2, 4] {
        let devices: Vec<Device> = (0..ranks).map(|rank| Device::cuda(rank % 2)).collect();
        for algorithm in [Algorithm::Direct, Algorithm::Ring] {
            compare(&devices, algorithm);
        }
    }
}

/// A trainer that enqueues its steps on a stream while averages are under way, and waits for
/// nothing: each average is of what the stream had written when it was started, and its result is
/// added to what the stream has written since.
pub fn on_streams() {
    const ELEMENTS: usize = 20_000;
    let bits = |value: f32| value.to_bits();
    for algorithm in [Algorithm::Ring, Algorithm::Direct] {
        ranks_on(GPU, 3, |communicator| {
            let rank = communicator.rank();
            let mut model = Model::new(GPU, &[(Dtype::F32, ELEMENTS, 0)], 9);
            let mut seen = Model::new(GPU, &[(Dtype::F32, ELEMENTS, 0)], 10);
            let (weights, copy) = (model.tensor_address(0), seen.tensor_address(0));
            let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
            let raw = stream.cu_stream();
            let set = |value: usize| {
                // SAFETY: own memory and stream, which live until all is done.
                unsafe {
                    let value = bits(value as f32);
                    sys::cuMemsetD32Async(weights, value, ELEMENTS, raw).result().unwrap();
                }
            };
            // SAFETY: as above.
            let params =
                |model: &mut Model, with: &mut dyn FnMut(&mut RawCudaParams<&mut Model>)| unsafe {
                    with(&mut RawCudaParams::new(raw.cast(), model));
                };
            let mut averager = test_support::options(communicator)
                .algorithm(algorithm)
                .channels(2)
                .timeout(Duration::from_secs(60))
                .overlap(Overlap::default().delay(1))
                .build(&mut model)
                .unwrap();
            for round in 0..3 {
                set(10 * round + rank);
                let mut average = None;
                params(&mut model, &mut |params| {
                    average = Some(averager.start_overlapped(0, params).unwrap());
                });
                set(100 + rank); // behind the copy
                params(&mut model, &mut |params| {
                    averager.finish_overlapped(average.take().unwrap(), params).unwrap();
                });
                // SAFETY: as above.
                unsafe { result::memcpy_dtod_async(copy, weights, 4 * ELEMENTS, raw) }.unwrap();
                set(7); // behind the addition
                stream.synchronize().unwrap();
                seen.download();
                // The mean is that of the middle rank.
                let expected = bits((100 + 1) as f32).to_ne_bytes();
                let mut elements = seen.tensor(0).chunks_exact(4);
                assert!(elements.all(|element| element == expected), "{algorithm:?}, {round}");
            }
        });
    }
}
