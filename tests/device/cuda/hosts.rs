//! Ranks on devices of several hosts, each a world of threads: the bits of the same hosts on CPUs,
//! and failures. The link is one within this process.

use std::sync::Mutex;
use std::time::Duration;

use cudarc::driver::{result, sys, CudaContext};
use param_averager::*;
use test_support::ranks_of;

use super::model::{ordinal, Model, Shape};
use super::outer::outers;
use super::stage::{staged, with_stage};
use super::way::{shapes, Way, WAY};

/// Runs ranks on these devices, host by host, and returns their results in that order.
pub fn on_hosts<T: Send>(
    devices: &[Vec<Device>],
    rank: impl Fn(usize, Communicator, ThreadHosts) -> T + Sync,
) -> Vec<T> {
    let links = ThreadHosts::new(devices.len(), devices[0].len());
    std::thread::scope(|scope| {
        let run = |(host, links): (usize, Vec<ThreadHosts>)| {
            let links: Vec<_> = links.into_iter().map(|link| Mutex::new(Some(link))).collect();
            let rank = &rank;
            scope.spawn(move || {
                ranks_of(&devices[host], |communicator| {
                    let link = links[communicator.rank()].lock().unwrap().take().unwrap();
                    rank(host, communicator, link)
                })
            })
        };
        let threads: Vec<_> = links.into_iter().enumerate().map(run).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

/// Averages of an average's options over several hosts.
#[derive(Clone)]
struct Hosted {
    way: Way,
    hierarchy: Hierarchy,
    code: Compression,
}

impl Hosted {
    /// Results of four averages, the same on all ranks after the last of each period.
    fn averages(&self, devices: &[Vec<Device>], shapes: &[Shape]) -> Vec<Vec<u8>> {
        let every = match self.hierarchy {
            Hierarchy::Outer { every } => every as usize,
            _ => 1,
        };
        let all = on_hosts(devices, |host, communicator, link| {
            let (rank, on) = (communicator.rank(), communicator.device());
            let data = host * devices[0].len() + rank;
            // All are freed at the end: that waits for kernels of peers.
            let mut models: Vec<Model> =
                (0..5).map(|round| Model::new(on, shapes, (100 * round + data) as u64)).collect();
            let builder = self.way.builder(communicator).start_from(Start::Rank(0));
            let builder = builder.hosts(link, self.hierarchy).hosts_compression(self.code);
            let mut averager = builder.build(&mut models[0]).unwrap();
            let mut results = vec![];
            for (round, model) in (1..).zip(&mut models[1..]) {
                let model = &mut *model;
                let report = match self.way.weighted {
                    true => averager.average_weighted(model, (data + 1) as f64).unwrap(),
                    false => averager.average(model).unwrap(),
                };
                let is_of_all = round % every == 0;
                assert_eq!(report.hosts, if is_of_all { devices.len() } else { 1 });
                model.download();
                assert!(model.guards_are_whole(), "{:?}: rank {data} on {on}", self.way);
                results.push(model.bytes().to_vec());
            }
            (results, averager)
        });
        let all: Vec<_> = all.into_iter().map(|(results, _)| results).collect();
        for results in &all {
            for round in (every - 1..4).step_by(every) {
                assert!(results[round] == all[0][round], "{:?}: ranks differ", self.way);
            }
        }
        all.concat()
    }

    /// Compares ranks on devices, a device for each host, with ranks on CPUs.
    fn compare(&self, hosts: usize, shapes: &[Shape]) {
        let on = |device: &dyn Fn(usize) -> Device| -> Vec<Vec<Device>> {
            (0..hosts).map(|host| vec![device(host); self.way.ranks]).collect()
        };
        let gpu = self.averages(&on(&|host| Device::cuda(host % 2)), shapes);
        let cpu = self.averages(&on(&|_| Device::cpu()), shapes);
        assert!(gpu == cpu, "{:?}: not the bits of the CPU", self.way);
    }
}

const HOSTED: Hosted =
    Hosted { way: Way { ranks: 2, ..WAY }, hierarchy: Hierarchy::Every, code: Compression::None };

/// Hosts with a device each.
pub fn all() {
    let shapes = shapes();
    let compare = |hosts, hosted: Hosted, shapes: &[Shape]| hosted.compare(hosts, shapes);
    for (hosts, ranks) in [(2, 2), (2, 1), (3, 2), (1, 2)] {
        compare(hosts, Hosted { way: Way { ranks, ..WAY }, ..HOSTED }, &shapes);
    }
    let (weighted, outer, counter) = (true, Outer::diloco(), u32::MAX - 3);
    let way = Way { weighted, reject: true, counter, ..HOSTED.way };
    compare(2, Hosted { way, hierarchy: Hierarchy::Outer { every: 2 }, ..HOSTED }, &shapes[5..]);
    for outer in outers().into_iter().take(2).chain([outer]) {
        compare(2, Hosted { way: Way { outer, ..HOSTED.way }, ..HOSTED }, &shapes[5..]);
    }
    for (outer, code) in [
        (Outer::mean(), Compression::Int8),
        (Outer::diloco(), Compression::Int8),
        (Outer::diloco(), Compression::Bf16),
    ] {
        let way = Way { outer, reject: true, ..HOSTED.way };
        compare(2, Hosted { way, code, ..HOSTED }, &shapes);
    }
    let way = Way { channels: 3, slots: 2, chunk: 128, narrow_wire: true, ..HOSTED.way };
    compare(2, Hosted { way, ..HOSTED }, &shapes[5..]);
}

/// Hosts with two devices each. The sum of two ranks has the same bits in both orders.
pub fn on_four_devices() {
    let devices = [[0, 1], [2, 3]].map(|pair| pair.map(Device::cuda).to_vec());
    for link in [Link::Auto, Link::Host] {
        for stage in [false, true] {
            let hosted = Hosted { way: Way { link, stage, ..HOSTED.way }, ..HOSTED };
            let gpu = hosted.averages(&devices, &shapes());
            let cpu = hosted.averages(&[vec![Device::cpu(); 2], vec![Device::cpu(); 2]], &shapes());
            assert!(gpu == cpu, "{:?}: not the bits of the CPU", hosted.way);
        }
    }
}

/// For the race detector.
pub fn races() {
    let way = Way { slots: 2, chunk: 256, reject: true, stage: true, ..HOSTED.way };
    let devices = [vec![Device::cuda(0); 2], vec![Device::cuda(1); 2]];
    let shapes = [(Dtype::F32, 600, 0), (Dtype::Bf16, 77, 1)];
    Hosted { way, ..HOSTED }.averages(&devices, &shapes);
}

/// A builder with a link to other hosts.
fn hosted(communicator: Communicator, link: ThreadHosts) -> Builder {
    plain(communicator).hosts(link, Hierarchy::Every)
}

fn plain(communicator: Communicator) -> Builder {
    test_support::options(communicator).channels(2).start_from(Start::Rank(0))
}

const SHAPES: [Shape; 2] = [(Dtype::F32, 5000, 0), (Dtype::F16, 1000, 1)];

/// Averages that fail in whatever way, between good ones: nothing changes, and all ranks know why.
pub fn failures() {
    let devices = [vec![Device::cuda(0); 2], vec![Device::cuda(1); 2]];
    for bad in ["value", "veto", "left value", "call"] {
        let errors = on_hosts(&devices, |host, communicator, link| {
            let (rank, on) = (communicator.rank(), communicator.device());
            let is_bad = (host, rank) == (1, 0);
            let mut model = Model::new(on, &SHAPES, 7);
            let mut calls = 0;
            // SAFETY: the stage enqueues work on the values of the shard, on its stream.
            let builder = unsafe {
                hosted(communicator, link).device_stage(move |shard| {
                    calls += 1;
                    match (calls == 2 && host == 1, bad) {
                        (true, "veto") if is_bad => return Err(Veto::new("not this one")),
                        (true, "left value") => {
                            for part in shard.parts().filter(|part| part.tensor == 0) {
                                let (to, on) = (part.pointer, shard.stream().cast());
                                sys::cuMemsetD32Async(to, f32::NAN.to_bits(), 1, on).result()?;
                            }
                        }
                        _ => {}
                    }
                    Ok(())
                })
            };
            let mut averager = builder.build(&mut model).unwrap();
            let mut model = Model::new(on, &SHAPES, 10 * host as u64 + rank as u64);
            if bad == "value" && is_bad {
                model.set(0, 4321, f32::NAN);
            }
            model.download();
            let before = model.bytes().to_vec();
            let failed = match bad == "call" && host == 1 {
                true => averager.average_weighted(&mut model, 2.0),
                false => averager.average(&mut model),
            };
            model.download();
            let (error, kept) = (failed.unwrap_err(), model.bytes() == before);
            assert!(kept && !error.is_fatal(), "{bad}: {kept}, {error}");
            assert_eq!(error.tensors(), TensorState::Unchanged);
            let mut next = Model::new(on, &SHAPES, 3);
            next.download();
            let before = next.bytes().to_vec();
            assert_eq!(averager.average(&mut next).unwrap().hosts, 2);
            next.download();
            assert!(next.bytes() == before, "{bad}: the mean of equal models");
            (error, averager)
        });
        let errors: Vec<Error> = errors.into_iter().map(|(error, _)| error).collect();
        for (at, error) in errors.iter().enumerate() {
            let is_fit = match bad {
                "value" => matches!(
                    error,
                    Error::NonFinite { rank: 0, .. }
                        | Error::StageVetoed { .. }
                        | Error::HostRefused { .. }
                ),
                "call" => matches!(error, Error::HostsDiffer { host: 1, .. }),
                _ => matches!(error, Error::StageVetoed { .. } | Error::HostRefused { host: 1 }),
            };
            assert!(is_fit, "{bad}: {at}: {error}");
        }
        match bad {
            "value" => assert!(errors[2..]
                .iter()
                .all(|error| matches!(error, Error::NonFinite { element: 4321, .. }))),
            "veto" => assert!(errors[2].to_string().contains("not this one"), "{errors:?}"),
            _ => {}
        }
    }
}

/// An average that no rank of any host needs moves nothing, and one of a host without weight gives
/// it the mean of the others.
pub fn unneeded() {
    let devices = [vec![Device::cuda(0); 2], vec![Device::cuda(1); 2]];
    on_hosts(&devices, |host, communicator, link| {
        let on = communicator.device();
        let mut model = Model::new(on, &SHAPES, 7);
        let averager = hosted(communicator, link).build(&mut model).unwrap();
        let mut sgd = LocalSgd::new(averager, Schedule::every(1));
        let mut model = Model::new(on, &SHAPES, host as u64);
        model.download();
        let before = model.bytes().to_vec();
        let made = sgd.finish(&mut model).unwrap();
        assert!(matches!(made, Action::Unneeded), "{made:?}");
        model.download();
        assert!(model.bytes() == before);
        if host == 1 {
            model.set(0, 4321, f32::NAN);
        }
        sgd.step_weighted(&mut model, [1.0, 0.0][host]).unwrap();
        model.download();
        let mut expected = Model::new(on, &SHAPES, 0);
        expected.download();
        assert!(model.bytes() == expected.bytes());
        sgd
    });
}

/// A host that leaves, that aborts, or that is late: fatal errors, and nothing changes.
pub fn losses() {
    let devices = [vec![Device::cuda(0); 2], vec![Device::cuda(1); 2]];
    for how in ["leaves", "aborts", "late"] {
        let ended = std::sync::Barrier::new(4);
        let results = on_hosts(&devices, |host, communicator, link| {
            let (rank, on) = (communicator.rank(), communicator.device());
            let mut model = Model::new(on, &SHAPES, 7);
            // A host that is late is waited for half as long.
            let timeout = if how == "late" { 20 } else { 60 };
            let builder = hosted(communicator, link).timeout(Duration::from_secs(timeout));
            let mut averager = builder.build(&mut model).unwrap();
            let mut model = Model::new(on, &SHAPES, host as u64);
            let before = model.bytes().to_vec();
            if host == 1 {
                match how {
                    "aborts" if rank == 0 => averager.abort_handle().abort(),
                    "leaves" => drop(averager),
                    _ => {}
                }
                ended.wait();
                return None;
            }
            let error = averager.average(&mut model).unwrap_err();
            model.download();
            assert!(model.bytes() == before, "{how}: rank {rank} has written");
            ended.wait();
            Some(error)
        });
        for (rank, error) in results.into_iter().flatten().enumerate() {
            assert!(error.is_fatal(), "{how}: {error}");
            assert_eq!(error.tensors(), TensorState::Unchanged, "{how}: {error}");
            let named = matches!(&error, Error::HostLost { rank: found, .. } if *found == rank);
            assert!(named, "{how}: rank {rank}: {error}");
        }
    }
}

/// Averages that are enqueued are made behind the stream's work, and its later work behind them;
/// none is captured. The copies of the shard are counted.
pub fn streams() {
    const ELEMENTS: usize = 20_000;
    let devices = [vec![Device::cuda(0)], vec![Device::cuda(1)]];
    on_hosts(&devices, |host, communicator, link| {
        let on = communicator.device();
        let mut model = Model::new(on, &[(Dtype::F32, ELEMENTS, 0)], 9);
        let weights = model.tensor_address(0);
        let stream = CudaContext::new(ordinal(on)).unwrap().new_stream().unwrap();
        let raw = stream.cu_stream();
        let set = |value: f32| {
            // SAFETY: own memory and stream, which live until all is done.
            unsafe { sys::cuMemsetD32Async(weights, value.to_bits(), ELEMENTS, raw) }
                .result()
                .unwrap();
        };
        let alone = with_stage(plain(communicator.clone()), on).build(&mut model).unwrap();
        let builder = with_stage(hosted(communicator, link), on);
        let mut averager = builder.build(&mut model).unwrap();
        let more = averager.memory_overhead() - alone.memory_overhead();
        // A copy of the shard, and what the exchange sends, receives, and sums of a half.
        assert!((14 * ELEMENTS..15 * ELEMENTS).contains(&more), "{more}");
        for round in 0..3 {
            set((10 * round + 2 * host) as f32);
            // SAFETY: as above.
            let mut params = unsafe { RawCudaParams::new(raw.cast(), &mut model) };
            averager.start(&mut params).unwrap().wait().unwrap();
            model.download();
            let expected = staged((10 * round + 1) as f32);
            let mut found = model.tensor(0).chunks_exact(4);
            assert!(found.all(|x| x == expected.to_ne_bytes()), "{round}");
        }
        // SAFETY: as above.
        unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            result::stream::begin_capture(raw, mode).unwrap();
            let mut params = RawCudaParams::new(raw.cast(), &mut model);
            let error = averager.start(&mut params).map(drop).unwrap_err();
            assert!(matches!(&error, Error::InvalidOption { option: "stream", .. }), "{error}");
            let graph = result::stream::end_capture(raw).unwrap();
            result::graph::destroy(graph).unwrap();
        }
        averager.average(&mut model).unwrap();
        (averager, alone)
    });
}
