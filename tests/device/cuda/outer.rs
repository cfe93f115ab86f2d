//! Outer optimizers: the bits of their steps, their states, and calls that differ.

use param_averager::*;
use test_support::ranks_on;

use super::links;
use super::model::Model;
use super::scenarios::GPU;
use super::way::{shapes, Way, WAY};

/// Steps of worlds of any size on one device.
pub fn all() {
    let shapes = shapes();
    for ranks in [1, 2, 3, 5] {
        for algorithm in [Algorithm::Direct, Algorithm::Ring] {
            if ranks == 1 && algorithm == Algorithm::Ring {
                continue;
            }
            for outer in outers() {
                Way { ranks, algorithm, outer, ..WAY }.compare(&shapes);
            }
        }
    }
    let way = Way { outer: Outer::diloco(), channels: 3, slots: 2, chunk: 128, ..WAY };
    for algorithm in [Algorithm::Direct, Algorithm::Ring] {
        let way = Way { algorithm, ..way.clone() };
        Way { weighted: true, counter: u32::MAX - 3, reject: true, ..way.clone() }
            .compare(&shapes[10..]);
        Way { delay_ns: 100_000, narrow_wire: true, ..way }.compare(&shapes[5..]);
    }
}

/// Ranks of one device whose calls end differently, and so have different launches.
pub fn calls() {
    for algorithm in [Algorithm::Direct, Algorithm::Ring] {
        let way = Way { ranks: 2, algorithm, outer: Outer::diloco(), ..WAY };
        let errors = ranks_on(GPU, 2, |communicator| {
            let mut model = Model::new(GPU, &shapes(), communicator.rank() as u64);
            let mut averager = way.builder(communicator).build(&mut model).unwrap();
            let error = match averager.rank() {
                0 => averager.broadcast(0, &mut model).unwrap_err(),
                _ => averager.average(&mut model).unwrap_err(),
            };
            averager.average(&mut model).unwrap();
            error
        });
        assert!(
            errors.iter().all(|error| matches!(error, Error::CallsDiffer { .. })),
            "{algorithm:?}: {errors:?}"
        );
    }
}

/// A world that saves, ends and loads goes on as one that ran through, on devices as on CPUs.
pub fn saved() {
    let shapes = shapes();
    for (algorithm, outer) in [
        (Algorithm::Direct, outers()[0]),
        (Algorithm::Ring, outers()[0]),
        (Algorithm::Ring, outers()[1]),
    ] {
        let way = Way { ranks: 2, algorithm, outer, ..WAY };
        // The models after two steps more, from the states of a world before or from its begin.
        let run = |on: Device, states: Option<&[Vec<u8>]>| -> Vec<(Vec<u8>, Vec<u8>)> {
            ranks_on(on, 2, |communicator| {
                let rank = communicator.rank();
                let mut models: Vec<Model> = (0..5)
                    .map(|round| Model::new(on, &shapes, 100 * round + rank as u64))
                    .collect();
                let averager = way.builder(communicator).build(&mut models[0]).unwrap();
                let mut sgd = LocalSgd::new(averager, Schedule::every(1));
                match states {
                    Some(states) => sgd.load(&states[rank]).unwrap(),
                    None => models[1..3].iter_mut().for_each(|model| {
                        sgd.step(model).unwrap();
                    }),
                }
                let state = sgd.save().unwrap();
                models[3..].iter_mut().for_each(|model| {
                    sgd.step(model).unwrap();
                });
                sgd.wait().unwrap();
                models[4].download();
                (state, models[4].bytes().to_vec())
            })
        };
        let (gpu, cpu) = (run(GPU, None), run(Device::cpu(), None));
        assert!(gpu == cpu, "{way:?}: not the states and bits of the CPU");
        let states: Vec<Vec<u8>> = gpu.iter().map(|(state, _)| state.clone()).collect();
        assert!(run(GPU, Some(&states)) == gpu, "{way:?}: loaded");
        assert!(run(Device::cpu(), Some(&states)) == gpu, "{way:?}: loaded on CPUs");
    }
}

/// One outer optimizer of each kind.
pub fn outers() -> [Outer; 3] {
    [Outer::diloco(), Outer::adam(0.1, 0.9, 0.99, 1e-3), Outer::momentum(0.9, 0.5).keeping(0.25)]
}

/// Outer optimizers of ranks on two devices, which some of them share.
pub fn on_two_devices() {
    for ranks in [2, 4] {
        for outer in outers() {
            links::compare(
                Way { outer, ..links::ring(ranks, &[0, 1], Link::Auto) },
                &shapes()[5..],
            );
        }
    }
    let outer = Outer::diloco();
    links::compare(
        Way { outer, narrow_wire: true, ..links::ring(4, &[0, 1], Link::Host) },
        &shapes()[5..],
    );
}
