//! Averages between CPU threads, measured by criterion: `cargo bench --bench average`.
//! `allreduce-bench` compares them with the one-pass limit and with other methods.

mod common;

use std::hint::black_box;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use criterion::{criterion_group, criterion_main, Criterion, SamplingMode, Throughput};
use param_averager::{Algorithm, Communicator, Device, ParamAverager, Start};

/// Rank threads that average one layout of f32 tensors repeatedly. All start together, and rank 0
/// measures the time.
struct Ranks {
    orders: Vec<Sender<u64>>,
    times: Receiver<Duration>,
    threads: Vec<JoinHandle<()>>,
}

impl Ranks {
    fn new(n: usize, layout: &[usize], algorithm: Algorithm, all_or_nothing: bool) -> Self {
        let barrier = Arc::new(Barrier::new(n));
        let (done, times) = channel();
        let (mut orders, mut threads) = (vec![], vec![]);
        for communicator in Communicator::from_devices(&vec![Device::cpu(); n]).unwrap() {
            let (order, ordered) = channel();
            let (barrier, done, layout) = (barrier.clone(), done.clone(), layout.to_vec());
            orders.push(order);
            threads.push(std::thread::spawn(move || {
                let rank = communicator.rank();
                let mut model: Vec<Vec<f32>> =
                    layout.iter().map(|&len| vec![rank as f32; len]).collect();
                let builder = ParamAverager::builder(communicator)
                    .start_from(Start::Own)
                    .allow_unnamed()
                    .algorithm(algorithm)
                    .all_or_nothing(all_or_nothing);
                let mut averager = builder.build(&mut model).unwrap();
                for iterations in ordered {
                    barrier.wait();
                    let start = Instant::now();
                    for _ in 0..iterations {
                        black_box(averager.average(&mut model).unwrap());
                    }
                    barrier.wait(); // ends with the slowest rank
                    if rank == 0 {
                        done.send(start.elapsed()).unwrap();
                    }
                }
            }));
        }
        Ranks { orders, times, threads }
    }

    fn time(&self, iterations: u64) -> Duration {
        self.orders.iter().for_each(|order| order.send(iterations).unwrap());
        self.times.recv().unwrap()
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        self.orders.clear();
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
    }
}

fn average(criterion: &mut Criterion) {
    let ways = [
        ("direct", Algorithm::Direct, true),
        ("ring", Algorithm::Ring, true),
        ("ring_no_commit", Algorithm::Ring, false),
    ];
    for (name, layout) in common::layouts() {
        for n in [2, 4] {
            let mut group = criterion.benchmark_group(format!("{name}/f32/{n}_ranks"));
            group.throughput(Throughput::Bytes(4 * layout.iter().sum::<usize>() as u64));
            group
                .sampling_mode(SamplingMode::Flat)
                .sample_size(10)
                .measurement_time(Duration::from_secs(3));
            for (way, algorithm, all_or_nothing) in ways {
                let ranks = Ranks::new(n, &layout, algorithm, all_or_nothing);
                group.bench_function(way, |bencher| {
                    bencher.iter_custom(|iterations| ranks.time(iterations))
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, average);
criterion_main!(benches);
