//! Coded averages on devices: the bits of the CPU, without a race, and failures.

use param_averager::*;
use test_support::ranks_on;

use super::links;
use super::model::{Model, Shape};
use super::scenarios::GPU;
use super::way::{Way, WAY};

const CODES: [Compression; 2] = [Compression::Bf16, Compression::Int8];

/// Tiny, misaligned and larger than a round; blocks of a code span several tensors.
fn shapes() -> Vec<Shape> {
    [(1000, 0), (0, 0), (1, 1), (3001, 1), (64, 0), (9, 2)]
        .map(|(elements, misaligned)| (Dtype::F32, elements, misaligned))
        .into()
}

fn way(compression: Compression, ranks: usize) -> Way {
    Way { ranks, compression, reject: true, ..WAY }
}

/// On one device, with every number of slots, delay, weight and outer optimizer in some.
pub fn all() {
    let shapes = shapes();
    for code in CODES {
        for ranks in [2, 3, 4] {
            let way = way(code, ranks);
            way.compare(&shapes);
            Way { weighted: true, counter: u32::MAX - 3, slots: 2, chunk: 640, ..way.clone() }
                .compare(&shapes);
            Way { outer: Outer::diloco(), channels: 3, chunk: 128, delay_ns: 50_000, ..way }
                .compare(&shapes);
        }
    }
}

/// Between devices, through either's memory and through the host's.
pub fn on_two_devices() {
    for code in CODES {
        for link in [Link::Peer, Link::Host] {
            links::compare(Way { devices: &[0, 1], link, chunk: 1024, ..way(code, 3) }, &shapes());
        }
    }
}

pub fn races() {
    for code in CODES {
        for outer in [Outer::mean(), Outer::diloco()] {
            let way = Way { outer, slots: 2, chunk: 256, ..way(code, 3) };
            way.run(&[(Dtype::F32, 900, 0), (Dtype::F32, 77, 1)]);
        }
    }
}

/// A value without a code: no tensor changes, the rank is named, and the next average works.
pub fn failures() {
    let shapes = [(Dtype::F32, 700, 0)];
    for code in CODES {
        ranks_on(GPU, 3, |communicator| {
            let rank = communicator.rank();
            let way = way(code, 3);
            let mut models: Vec<Model> =
                (0..4).map(|at| Model::new(GPU, &shapes, (10 * at + rank) as u64)).collect();
            let mut averager = way.builder(communicator).build(&mut models[0]).unwrap();
            averager.average(&mut models[1]).unwrap();
            if rank == 2 {
                models[2].set(0, 300, f32::NAN);
            }
            let before = models[2].bytes().to_vec();
            let error = averager.average(&mut models[2]).unwrap_err();
            assert!(matches!(error, Error::NonFinite { rank: 2, element: 300, .. }), "{error}");
            models[2].download();
            assert!(models[2].bytes() == before, "{error}, and tensors changed");
            averager.average(&mut models[3]).unwrap();
            (averager, models) // freed when all ranks are done
        });
    }
}
