//! Averages between CPU threads, measured by criterion: `cargo bench --bench average`.
//! `allreduce-bench` compares them with the one-pass limit and with other methods.

mod common;
#[path = "common/ranks.rs"]
mod ranks;

use std::time::Duration;

use criterion::{criterion_group, criterion_main, Criterion, SamplingMode, Throughput};
use param_averager::Algorithm;
use ranks::Ranks;

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
                let ranks = Ranks::new(n, &layout, move |builder| {
                    builder.algorithm(algorithm).all_or_nothing(all_or_nothing)
                });
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
