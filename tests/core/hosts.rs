//! Averages over several hosts, each of which is a world of threads: the mean of all ranks, and the
//! same bits on all of them.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use param_averager::{
    Builder, Communicator, Dtype, Error, Hierarchy, LocalSgd, Outer, ParamAverager, Report,
    Schedule, Start, ThreadHosts,
};
use proptest::prelude::*;
use test_support::{count, layout, mean, ranks, ulp, Guarded, Random};

/// Runs the ranks of several hosts, and returns their results by host and rank.
pub fn on_hosts<T: Send>(
    hosts: usize,
    each: usize,
    rank: impl Fn(usize, Communicator, ThreadHosts) -> T + Sync,
) -> Vec<Vec<T>> {
    std::thread::scope(|scope| {
        let links = ThreadHosts::new(hosts, each);
        let run = |(host, links): (usize, Vec<ThreadHosts>)| {
            let rank = &rank;
            let links: Vec<_> = links.into_iter().map(|link| Mutex::new(Some(link))).collect();
            scope.spawn(move || {
                ranks(each, |communicator| {
                    let link = links[communicator.rank()].lock().unwrap().take().unwrap();
                    rank(host, communicator, link)
                })
            })
        };
        let threads: Vec<_> = links.into_iter().enumerate().map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Counts this rank, and waits until `all` ranks are counted, or for a minute: then a rank has
/// failed, and says why.
pub fn meet(count: &AtomicUsize, all: usize) {
    let end = Instant::now() + Duration::from_secs(60);
    count.fetch_add(1, Ordering::SeqCst);
    while count.load(Ordering::SeqCst) < all && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn builder(communicator: Communicator, link: ThreadHosts) -> Builder {
    let builder = ParamAverager::builder(communicator).hosts(link, Hierarchy::Every);
    builder.timeout(Duration::from_secs(60))
}

pub type Average = (Result<Report, Error>, Vec<f32>);

/// The first average of 2 hosts with 2 ranks, of a model with the values 0, 1, 2, 3, and the one
/// after it.
pub fn two_averages(
    first: impl Fn(usize, usize, &mut ParamAverager, &mut Vec<f32>) -> Result<Report, Error> + Sync,
) -> Vec<Vec<[Average; 2]>> {
    on_hosts(2, 2, |host, communicator, link| {
        let rank = communicator.rank();
        let mut model = vec![0.0f32; 1000];
        let mut averager = builder(communicator, link).build(&mut model).unwrap();
        model.fill((2 * host + rank) as f32);
        let failed = (first(host, rank, &mut averager, &mut model), model.clone());
        model.fill((2 * host + rank) as f32);
        let next = (averager.average(&mut model), model);
        [failed, next]
    })
}

#[derive(Clone, Debug)]
struct Case {
    hosts: usize,
    each: usize,
    layout: Vec<layout::Shape>,
    chunk_bytes: usize,
    weights: Option<Vec<f64>>,
    seed: u64,
}

fn cases() -> impl Strategy<Value = Case> {
    (1usize..=3, 1usize..=3).prop_flat_map(|(hosts, each)| {
        let all = hosts * each;
        let weight = prop::sample::select(vec![0.0, 0.3, 1.0, 7.0]);
        let weights = prop::option::of(prop::collection::vec(weight, all));
        let layout = prop::collection::vec(layout::shapes(all, 900), 1..4);
        (Just((hosts, each)), layout, layout::chunks(), weights, any::<u64>()).prop_map(
            |((hosts, each), layout, chunk_bytes, weights, seed)| Case {
                hosts,
                each,
                layout,
                chunk_bytes,
                weights,
                seed,
            },
        )
    })
}

impl Case {
    /// False where no rank has weight.
    fn is_accepted(&self) -> bool {
        let mut weights = self.weights.iter();
        weights.all(|weights| weights.iter().any(|&weight| weight > 0.0))
    }

    fn check(&self) {
        let results = on_hosts(self.hosts, self.each, |host, communicator, link| {
            let rank = host * self.each + communicator.rank();
            let mut model = layout::model(&self.layout, rank);
            let mut averager = builder(communicator, link)
                .allow_unnamed()
                .chunk_bytes(self.chunk_bytes)
                .build(&mut model)
                .unwrap();
            let mut random = Random(self.seed.wrapping_add(rank as u64));
            model.iter_mut().for_each(|tensor| tensor.fill_random(&mut random));
            let values: Vec<Vec<f64>> = model.iter().map(values_of).collect();
            let report = match &self.weights {
                Some(weights) => averager.average_weighted(&mut model, weights[rank]),
                None => averager.average(&mut model),
            };
            assert_eq!(report.unwrap().hosts, self.hosts);
            assert!(model.iter().all(Guarded::guards_are_whole));
            (values, model.iter().map(values_of).collect::<Vec<_>>())
        });
        let all: Vec<_> = results.into_iter().flatten().collect();
        let weights = self.weights.clone().unwrap_or(vec![1.0; all.len()]);
        for (tensor, &(dtype, elements, _)) in self.layout.iter().enumerate() {
            for element in 0..elements {
                let values: Vec<f64> = all.iter().map(|(own, _)| own[tensor][element]).collect();
                let (expected, size) = mean(&values, &weights);
                let found = all[0].1[tensor][element];
                // The mean of a host has an error of its sum, in f32, and all have one rounding.
                let wide = if dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 };
                let bound = ulp(dtype, expected.abs()) + (self.each + 2) as f64 * ulp(wide, size);
                assert!((found - expected).abs() <= bound, "{self:?}: {found}, not {expected}");
                let same = |(_, theirs): &(_, Vec<Vec<f64>>)| {
                    theirs[tensor][element].to_bits() == found.to_bits()
                };
                assert!(all.iter().all(same), "{self:?}: other bits, tensor {tensor}");
            }
        }
    }
}

fn values_of(tensor: &Guarded) -> Vec<f64> {
    (0..tensor.elements).map(|element| tensor.get(element)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(count(24, 300) as u32))]
    #[test]
    fn hosts_average_as_one_world(case in cases()) {
        prop_assume!(case.is_accepted());
        case.check();
    }
}

#[test]
fn all_ranks_begin_with_the_values_of_host_0() {
    let of = |start, each: usize| {
        on_hosts(2, each, |host, communicator, link| {
            let mut model = vec![(each * host + communicator.rank()) as f32; 100];
            let builder = builder(communicator, link).start_from(start);
            let mut averager = builder.build(&mut model).unwrap();
            let began = model[0];
            assert_eq!(model, [began; 100]);
            model.fill((each * host + averager.rank()) as f32);
            averager.broadcast(each - 1, &mut model).unwrap();
            assert_eq!(model, [(each - 1) as f32; 100]);
            began
        })
        .concat()
    };
    assert_eq!(of(Start::Rank(0), 2), [0.0; 4]);
    assert_eq!(of(Start::Rank(1), 2), [1.0; 4]);
    assert_eq!(of(Start::Mean, 2), [1.5; 4]);
    assert_eq!(of(Start::Rank(0), 1), [0.0; 2]);
    assert_eq!(of(Start::Mean, 1), [0.5; 2]);
}

#[test]
fn averages_between_those_of_all_hosts_are_of_one() {
    on_hosts(3, 2, |host, communicator, link| {
        let own = (2 * host + communicator.rank()) as f32;
        let mut model = vec![0.0f32; 100];
        let hierarchy = Hierarchy::Outer { every: 3 };
        let builder = ParamAverager::builder(communicator).hosts(link, hierarchy);
        let mut averager = builder.build(&mut model).unwrap();
        for round in 1..=6 {
            model.fill(own);
            let report = averager.average(&mut model).unwrap();
            let (hosts, mean) =
                if round % 3 == 0 { (3, 2.5) } else { (1, 2.0 * host as f32 + 0.5) };
            assert_eq!((report.hosts, model[0]), (hosts, mean));
        }
    });
}

#[test]
fn values_that_are_equal_on_all_hosts_stay_as_they_are() {
    let averages = two_averages(|_, _, averager, model| {
        model.fill(f32::MAX); // whose sum is too large
        model[1] = 0.1;
        averager.average(model)
    });
    for [made, _] in averages.iter().flatten() {
        assert!(made.0.is_ok() && made.1[0] == f32::MAX && made.1[1] == 0.1);
    }
}

#[test]
fn outer_steps_come_after_the_mean_of_all_hosts() {
    let train = |averager: ParamAverager, model: &mut Vec<f32>, place: usize| {
        let mut sgd = LocalSgd::new(averager, Schedule::every(4));
        for step in 0..18 {
            let gradient = |i: usize| ((i + 7 * place + 13 * step) % 11) as f32 * 0.01;
            model.iter_mut().enumerate().for_each(|(i, value)| *value -= gradient(i));
            sgd.step(model).unwrap();
        }
        sgd.finish(model).unwrap();
    };
    let of_hosts = on_hosts(2, 2, |host, communicator, link| {
        let place = 2 * host + communicator.rank();
        let mut model = vec![1.0f32; 1001];
        let builder = builder(communicator, link).outer(Outer::diloco());
        train(builder.build(&mut model).unwrap(), &mut model, place);
        model
    })
    .concat();
    let of_one = ranks(4, |communicator| {
        let place = communicator.rank();
        let mut model = vec![1.0f32; 1001];
        let builder = ParamAverager::builder(communicator).outer(Outer::diloco());
        train(builder.build(&mut model).unwrap(), &mut model, place);
        model
    });
    assert!(of_hosts.iter().all(|model| *model == of_hosts[0]));
    for (a, b) in of_hosts[0].iter().zip(&of_one[0]) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

/// H from what each rank has measured: all hosts agree on it.
#[test]
fn schedules_that_adapt_decide_alike_on_all_hosts() {
    for (schedule, each) in [
        (Schedule::overhead(0.2), 1),
        (Schedule::overhead(0.2), 2),
        (Schedule::budget(1e5), 1),
        (Schedule::divergence(0.01), 2),
    ] {
        let results = on_hosts(2, each, |host, communicator, link| {
            let mut model = vec![0.0f32; 500];
            let mut random = Random(host as u64 + 7 * communicator.rank() as u64);
            let builder = builder(communicator, link).telemetry(true);
            let mut sgd = LocalSgd::new(builder.build(&mut model).unwrap(), schedule);
            let mut steps = vec![];
            for step in 0..60 {
                // Unequal on all ranks.
                std::thread::sleep(Duration::from_micros(100 * host as u64 + 50));
                model.iter_mut().for_each(|value| *value += random.value() as f32);
                if sgd.step(&mut model).unwrap().report().is_some() {
                    steps.push(step);
                }
            }
            sgd.finish(&mut model).unwrap();
            (steps, model)
        })
        .concat();
        assert!(!results[0].0.is_empty() && results.iter().all(|result| *result == results[0]));
    }
}

/// Values of another host than 0 do not count where all begin with those of host 0.
#[test]
fn a_broadcast_mends_a_host_with_values_that_are_not_finite() {
    on_hosts(2, 2, |host, communicator, link| {
        let start = if host == 1 { f32::NAN } else { 3.0 };
        let mut model = vec![start; 100];
        let mut averager = builder(communicator, link).build(&mut model).unwrap();
        assert_eq!(model, [3.0; 100]);
        model.fill(start);
        averager.broadcast(1, &mut model).unwrap();
        assert_eq!(model, [3.0; 100]);
    });
}
