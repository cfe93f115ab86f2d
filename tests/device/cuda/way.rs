//! Options of an average, and its comparison with the same average on CPUs.

use std::time::Duration;

use param_averager::__testing::Testing;
use param_averager::*;
use test_support::ranks_of;

use super::model::{Model, Shape};
use super::stage::with_stage;

/// Options of an average.
#[derive(Clone, Debug)]
pub struct Way {
    pub ranks: usize,
    /// Ordinals by rank, repeated for more ranks.
    pub devices: &'static [usize],
    pub link: Link,
    pub algorithm: Algorithm,
    pub all_or_nothing: bool,
    pub reject: bool,
    pub narrow_wire: bool,
    pub weighted: bool,
    pub outer: Outer,
    /// True with the stage of `stage::with_stage`.
    pub stage: bool,
    pub compression: Compression,
    pub channels: u32,
    pub chunk: usize,
    pub slots: u32,
    pub counter: u32,
    pub delay_ns: u32,
}

pub const WAY: Way = Way {
    ranks: 3,
    devices: &[0],
    link: Link::Auto,
    algorithm: Algorithm::Ring,
    all_or_nothing: true,
    reject: false,
    narrow_wire: false,
    weighted: false,
    outer: Outer::mean(),
    stage: false,
    compression: Compression::None,
    channels: 2,
    chunk: 4096,
    slots: 4,
    counter: 0,
    delay_ns: 0,
};

impl Way {
    pub fn devices(&self) -> Vec<Device> {
        self.devices.iter().cycle().take(self.ranks).map(|&ordinal| Device::cuda(ordinal)).collect()
    }

    pub fn builder(&self, communicator: Communicator) -> Builder {
        let link = if communicator.device() == Device::cpu() { Link::Auto } else { self.link };
        let is_mean = self.outer == Outer::mean();
        let on = communicator.device();
        let mut builder = test_support::options(communicator);
        if self.stage {
            builder = with_stage(builder, on);
        }
        builder
            .algorithm(self.algorithm)
            .start_from(if is_mean { Start::Own } else { Start::Rank(0) })
            .outer(self.outer)
            .compression(self.compression)
            .link(link)
            .all_or_nothing(self.all_or_nothing)
            .reject_non_finite(self.reject)
            .narrow_wire(self.narrow_wire)
            .channels(self.channels)
            .chunk_bytes(self.chunk)
            .slots(self.slots)
            .timeout(Duration::from_secs(60))
            .testing(Testing {
                counter: self.counter,
                delay_ns: self.delay_ns,
                poison_slots: true,
                ..Testing::default()
            })
    }

    /// Results of two averages of fresh models, or of four with an outer optimizer or a code. The
    /// model of rank `order[p]` of a ring on devices is that of rank p of one on CPUs, so that both
    /// make their sums in the same order.
    pub fn averages(&self, devices: &[Device], shapes: &[Shape], order: &[usize]) -> Vec<Vec<u8>> {
        let is_plain = self.outer == Outer::mean() && self.compression == Compression::None;
        let rounds = if is_plain { 3 } else { 5 };
        let results = ranks_of(devices, |communicator| {
            let (rank, on) = (communicator.rank(), communicator.device());
            let data = if on == Device::cpu() { order[rank] } else { rank };
            // Pointers may change between calls. All are freed at the end: that waits for every
            // kernel on the device, and so for a peer's average that waits for this rank.
            let mut models: Vec<Model> = (0..rounds)
                .map(|round| Model::new(on, shapes, (100 * round + data) as u64))
                .collect();
            let mut averager = self.builder(communicator).build(&mut models[0]).unwrap();
            let mut results = vec![];
            for model in &mut models[1..] {
                let model = &mut *model;
                let report = match self.weighted {
                    true => averager.average_weighted(model, data as f64).unwrap(),
                    false => averager.average(model).unwrap(),
                };
                assert_eq!((report.world_size, report.algorithm), (self.ranks, self.algorithm));
                model.download();
                assert!(
                    model.guards_are_whole(),
                    "{self:?}: rank {rank} wrote beside its tensors on {on}"
                );
                results.push(model.bytes().to_vec());
            }
            // its drop publishes the exit by a copy, which the race detector takes for a race
            (data, results, averager)
        });
        let mut results: Vec<_> =
            results.into_iter().map(|(data, results, _)| (data, results)).collect();
        results.sort_unstable(); // by the model that a rank began with
        let results: Vec<_> = results.into_iter().map(|(_, results)| results).collect();
        if self.outer != self.outer.keeping(0.0) {
            return results.concat(); // ranks keep a part of what they had
        }
        for (rank, result) in results.iter().enumerate() {
            assert!(
                *result == results[0],
                "{self:?}: rank {rank} differs from rank 0 on {}",
                devices[rank]
            );
        }
        results.into_iter().next().unwrap()
    }

    /// Compares devices with CPUs, for ranks in this order around the ring.
    pub fn compare_in_order(&self, shapes: &[Shape], order: &[usize]) {
        let gpu = self.averages(&self.devices(), shapes, order);
        let cpu = self.averages(&vec![Device::cpu(); self.ranks], shapes, order);
        assert!(gpu == cpu, "{self:?}: not the bits of the CPU");
    }

    pub fn compare(&self, shapes: &[Shape]) {
        self.compare_in_order(shapes, &Vec::from_iter(0..self.ranks));
    }

    /// Averages on devices alone.
    pub fn run(&self, shapes: &[Shape]) {
        self.averages(&self.devices(), shapes, &[]);
    }
}

/// All dtypes, empty, tiny, misaligned and larger than a round.
pub fn shapes() -> Vec<Shape> {
    let mut shapes = vec![];
    for (index, dtype) in Dtype::ALL.into_iter().enumerate() {
        shapes.extend([
            (dtype, 1000, 0),
            (dtype, 0, 0),
            (dtype, 1, index % 2),
            (dtype, 3001, 1),
            (dtype, 64, 0),
        ]);
    }
    shapes
}
