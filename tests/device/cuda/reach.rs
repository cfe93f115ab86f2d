//! The direct average between devices, which access one another's tensors.

use std::sync::Barrier;

use cudarc::driver::CudaContext;
use param_averager::*;
use test_support::ranks_of;

use super::links::compare;
use super::model::{ordinal, Kind, Model};
use super::outer::outers;
use super::way::{shapes, Way, WAY};

pub fn direct(ranks: usize, devices: &'static [usize]) -> Way {
    Way { ranks, devices, algorithm: Algorithm::Direct, ..WAY }
}

/// Four devices with access between every two.
pub fn everywhere() {
    let shapes = shapes();
    for (ranks, devices) in [(2, &[0usize, 1][..]), (3, &[2, 0, 1]), (4, &[0, 1, 2, 3])] {
        compare(direct(ranks, devices), &shapes);
    }
    // More ranks than devices.
    for delay_ns in [20_000, 300_000] {
        compare(Way { delay_ns, channels: 3, ..direct(5, &[0, 1]) }, &shapes[5..]);
    }
    compare(Way { weighted: true, counter: u32::MAX - 3, ..direct(3, &[3, 1]) }, &shapes);
    compare(Way { reject: true, channels: 3, ..direct(4, &[0, 1, 2, 3]) }, &shapes[10..]);
    for outer in outers() {
        compare(Way { outer, ..direct(3, &[0, 1]) }, &shapes);
    }
    chosen();
    memory();
}

/// `Algorithm::Auto` on two devices.
fn chosen() {
    let is_joined = Topology::probe().unwrap().connection(2, 0) == Connection::NvLink;
    let expected = if is_joined { Algorithm::Direct } else { Algorithm::Ring };
    ranks_of(&[Device::cuda(2), Device::cuda(0)], |communicator| {
        let mut model = Model::new(communicator.device(), &shapes(), communicator.rank() as u64);
        let mut built = |set: fn(Builder) -> Builder| {
            let builder = set(test_support::options(communicator.clone()));
            builder.build(&mut model).unwrap().algorithm()
        };
        assert_eq!(built(|builder| builder), expected);
        assert_eq!(built(|builder| builder.link(Link::Peer)), expected);
        assert_eq!(built(|builder| builder.link(Link::Host)), Algorithm::Ring);
        assert_eq!(built(|builder| builder.reproducible(true)), Algorithm::Ring);
    });
}

/// Tensors in memory of a pool, and where other devices can't access them.
fn memory() {
    let shapes = shapes();
    let devices = [0, 1, 0].map(Device::cuda);
    // A pool of each rank's device, and of one device only.
    for kinds in [[Kind::Pool; 3], [Kind::Plain, Kind::Pool, Kind::Plain]] {
        let results = ranks_of(&devices, |communicator| {
            let (on, rank) = (communicator.device(), communicator.rank());
            let of = |seed| Model::of(kinds[rank], on, &shapes, seed);
            let mut models = [of(rank as u64), of(10 + rank as u64), of(20 + rank as u64)];
            let builder = WAY.builder(communicator).algorithm(Algorithm::Direct);
            let mut averager = builder.build(&mut models[0]).unwrap();
            for model in &mut models {
                averager.average(model).unwrap();
                model.download();
                assert!(model.guards_are_whole());
            }
            models.map(|model| model.bytes().to_vec())
        });
        assert!(results.iter().all(|result| *result == results[0]));
    }
    // One rank's tensors are out of reach: the ring for all, unless direct is asked for.
    ranks_of(&devices, |communicator| {
        let (on, rank) = (communicator.device(), communicator.rank());
        let mut own = Model::new(on, &shapes, rank as u64);
        let mut managed = Model::of(Kind::Managed, on, &shapes, rank as u64);
        let unreached = |error: Error| {
            let Error::InvalidTensor { rank: 1, problem, .. } = &error else { panic!("{error}") };
            assert!(problem.contains("Algorithm::Ring"), "{error}");
            assert_eq!(error.tensors(), TensorState::Unchanged);
        };
        let first = if rank == 1 { &mut managed } else { &mut own };
        let builder = || test_support::options(communicator.clone());
        unreached(builder().algorithm(Algorithm::Direct).build(first).map(drop).unwrap_err());
        let mut averager = builder().build(first).unwrap();
        assert_eq!(averager.algorithm(), Algorithm::Ring);
        averager.average(first).unwrap();
        // Such tensors at a later average: an error of that one.
        let mut averager = builder().algorithm(Algorithm::Direct).build(&mut own).unwrap();
        for _ in 0..2 {
            let first = if rank == 1 { &mut managed } else { &mut own };
            unreached(averager.average(first).unwrap_err());
            averager.average(&mut own).unwrap();
        }
    });
}

/// Two devices, of which one fails while it writes: the other does not wait for its exit, whether a
/// rank there looks at the failure or not. The device fails since a tensor was freed, which only a
/// simulated one notices for certain.
pub fn lost_device(ranks: usize, looks: bool) {
    let devices: Vec<Device> = (0..ranks).map(|rank| Device::cuda(rank % 2)).collect();
    let noticed = Barrier::new(ranks);
    let errors = ranks_of(&devices, |communicator| {
        let (rank, on) = (communicator.rank(), communicator.device());
        let stream = CudaContext::new(ordinal(on)).unwrap().new_stream().unwrap();
        // One pack, which is rank 0's part.
        let mut model = Model::new(on, &[(Dtype::F32, 4, 0)], rank as u64);
        let builder = test_support::options(communicator).algorithm(Algorithm::Direct);
        let mut averager = builder.build(&mut model).unwrap();
        averager.average(&mut model).unwrap();
        if rank == 0 {
            model.free();
        }
        // SAFETY: own memory and stream, of which nothing is freed.
        let pending = unsafe {
            averager.start(&mut RawCudaParams::new(stream.cu_stream().cast(), &mut model))
        };
        let on_lost_device = rank % 2 == 0;
        if on_lost_device && !looks {
            noticed.wait();
        }
        let error = pending.unwrap().wait().unwrap_err();
        if !on_lost_device || looks {
            noticed.wait();
        }
        let next = averager.average(&mut model).unwrap_err();
        assert!(matches!(next, Error::Poisoned { .. }), "{next}");
        std::mem::forget((stream, model, averager)); // a context that has failed frees nothing
        error
    });
    for (rank, error) in errors.iter().enumerate() {
        match (rank % 2, error) {
            (0, Error::DeviceFailed { rank: at, .. }) if *at == rank => {}
            (1, Error::PeerLost { committed: true, .. }) => {
                assert_eq!(error.tensors(), TensorState::MayBeMixed);
            }
            _ => panic!("rank {rank}: {error}"),
        }
    }
}
