//! Roles of ranks on CUDA devices, and the bits that ranks on CPUs give for the same tensors.

use std::time::Duration;

use param_averager::*;

use crate::cuda::model::{self, Model, Shape};
use test_support::rank::{builder, bytes_used, device, join, say, Used};
use test_support::{fnv1a, mean, ranks, ulp};

const SHAPES: [Shape; 6] = [
    (Dtype::F32, 5000, 0),
    (Dtype::Bf16, 3001, 1),
    (Dtype::F32, 0, 0),
    (Dtype::F32, 1, 1),
    (Dtype::Bf16, 64, 0),
    (Dtype::F32, 777, 3),
];
const ROUNDS: u64 = 4;

fn fresh(on: Device, rank: usize, round: u64) -> Model {
    Model::new(on, &SHAPES, 100 * round + rank as u64)
}

pub fn hash(bytes: &[u8]) -> u64 {
    fnv1a(bytes.iter().map(|&byte| u64::from(byte)))
}

/// Runs a role, and returns the exit code. Without another role: averages, checks every element,
/// prints the bits, and drops all.
pub fn rank(role: &str) -> i32 {
    let result = match role {
        "abort" => abort(),
        "threads" => threads(),
        "captures" => super::outer::captures(),
        "coded-copies" => super::coded::rank(),
        "shared-bits" => super::shared_state::bits(),
        "shared-dies" => super::shared_state::dies(),
        _ => averages(),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            say(&format!("error {error}"));
            3
        }
    }
}

fn averages() -> Result<()> {
    let communicator = join()?;
    let (rank, world, on) = (communicator.rank(), communicator.world_size(), device());
    assert_eq!(communicator.device(), on);
    // All are allocated before and freed after all averages: a device frees when its kernels are
    // done, including a kernel that waits for a peer.
    let mut models: Vec<Model> = (0..ROUNDS).map(|round| fresh(on, rank, round)).collect();
    let mut other = fresh(on, rank, ROUNDS);
    let context = cudarc::driver::CudaContext::new(model::ordinal(on)).unwrap();
    let used = || Used::now(bytes_used(&context));
    // Exports no memory; when it is built, all ranks have closed their imports.
    let host = |model: &mut Model| -> Result<()> {
        let builder = test_support::options(communicator.clone()).link(Link::Host).channels(1);
        builder.timeout(Duration::from_secs(50)).build(model).map(drop)
    };
    host(&mut other)?; // a driver keeps some of what it takes at first
    let before = used();
    let mut averager = builder(communicator.clone()).build(&mut models[0])?;
    say(&format!("order {:?}", averager.ring_order()));
    for (round, model) in models.iter_mut().enumerate() {
        let report = averager.average(model)?;
        assert_eq!((report.world_size, report.algorithm), (world, Algorithm::Ring));
        model.download();
        assert!(model.guards_are_whole());
        check(model, world, round as u64);
        say(&format!("bits {:x}", hash(model.bytes())));
    }
    // As many channels as fit, while the first averager lives.
    let mut defaults = test_support::options(communicator.clone())
        .timeout(Duration::from_secs(50))
        .build(&mut other)?;
    defaults.average(&mut other)?;
    averager.average(&mut models[0])?; // equal values stay as they are
    models[0].download();
    say(&format!("again {:x}", hash(models[0].bytes())));
    other.download();
    check(&other, world, ROUNDS);
    drop((averager, defaults));
    host(&mut other)?;
    let after = used();
    assert!(after.is_no_more_than(&before), "{after:?}, there were {before:?}");
    say("done");
    Ok(())
}

/// Two ranks of a world of processes in one process: a driver opens no IPC handle in the process
/// that exported it.
fn threads() -> Result<()> {
    let rank = |rank: usize| {
        let world = Communicator::builder().rank(rank).world_size(2).device(device());
        let communicator = world.rendezvous(std::env::var("PA_TEST_NAME").unwrap()).build()?;
        let mut model = fresh(device(), rank, 0);
        let builder = |link| builder(communicator.clone()).link(link);
        let error = builder(Link::Peer).build(&mut model).map(drop).unwrap_err();
        assert!(error.to_string().contains("ranks 0 and 1 don't reach"), "{error}");
        let mut averager = builder(Link::Auto).build(&mut model)?;
        averager.average(&mut model)?;
        model.download();
        check(&model, 2, 0);
        Ok((averager, model)) // freed when both are done
    };
    let other = std::thread::spawn(move || rank(1));
    let both = [rank(0)?, other.join().unwrap()?];
    drop(both);
    Ok(())
}

/// Rank 1 aborts while the kernels of the others wait for it.
fn abort() -> Result<()> {
    let communicator = join()?;
    let (rank, handle) = (communicator.rank(), communicator.abort_handle());
    let mut model = fresh(device(), rank, 0);
    let before = model.bytes().to_vec();
    let mut averager = builder(communicator).build(&mut model)?;
    if rank == 1 {
        std::thread::sleep(Duration::from_millis(300));
        handle.abort();
    }
    let result = averager.average(&mut model);
    model.download();
    assert!(model.bytes() == before);
    result.map(drop)
}

/// Asserts that every element is the mean over all ranks, as exactly as by the ring.
fn check(model: &Model, world: usize, round: u64) {
    let before: Vec<Model> = (0..world).map(|rank| fresh(Device::cpu(), rank, round)).collect();
    for (tensor, &(dtype, elements, _)) in SHAPES.iter().enumerate() {
        let element = |model: &Model, i: usize| -> f64 {
            let bytes = &model.tensor(tensor)[i * dtype.size()..][..dtype.size()];
            match dtype {
                Dtype::F32 => f32::from_ne_bytes(bytes.try_into().unwrap()).into(),
                _ => half::bf16::from_ne_bytes(bytes.try_into().unwrap()).into(),
            }
        };
        for i in 0..elements {
            let values: Vec<f64> = before.iter().map(|model| element(model, i)).collect();
            let (mean, largest) = mean(&values, &vec![1.0; world]);
            let found = element(model, i);
            let most = world as f64 * ulp(dtype, largest);
            assert!(
                (found - mean).abs() <= most,
                "{round}: element {i} of tensor {tensor} is {found}, not {mean}"
            );
        }
    }
}

/// Hashes of the same averages by threads on CPUs.
pub fn bits_of_the_cpu(world: usize) -> Vec<String> {
    let mut all = ranks(world, |communicator| {
        let rank = communicator.rank();
        let mut models: Vec<Model> =
            (0..ROUNDS).map(|round| fresh(Device::cpu(), rank, round)).collect();
        let builder = test_support::options(communicator).algorithm(Algorithm::Ring);
        let mut averager = builder.channels(2).chunk_bytes(1 << 10).build(&mut models[0]).unwrap();
        let bits = |model: &mut Model| {
            averager.average(model).unwrap();
            format!("{:x}", hash(model.bytes()))
        };
        models.iter_mut().map(bits).collect::<Vec<_>>()
    });
    all.swap_remove(0)
}
