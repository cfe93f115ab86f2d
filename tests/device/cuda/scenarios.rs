//! Scenarios of child processes.

use super::model::Model;
use super::outer::{self, outers};
use super::steps::steps;
use super::streams::streams;
use super::way::{shapes, Way, WAY};
use super::{any_stream, beside, coded, graphs, hosts, links, overlap};
use super::{reach, stage, strict, telemetry};
use param_averager::*;
use std::sync::Barrier;
use std::time::Duration;
use test_support::{ranks_of, ranks_on};

pub const GPU: Device = Device::cuda(0);

pub fn run(scenario: &str) {
    match scenario {
        "averages" => averages(),
        "races" => races(),
        "refusals" => refusals(),
        "failures" => failures(),
        "trainers" => trainers(),
        "streams" => streams(),
        "any-stream" => any_stream::on_one_device(),
        "any-stream-devices" => any_stream::on_two_devices(),
        "steps" => steps(),
        "beside" => beside::beside(),
        "graphs" => graphs::on_one_device(),
        "graph-refusals" => graphs::refusals(),
        "graphs-devices" => graphs::on_devices(),
        "coded-graphs-devices" => graphs::coded(),
        "host-links" => links::host_links(),
        "outer" => outer::all(),
        "outer-devices" => outer::on_two_devices(),
        "outer-saved" => outer::saved(),
        "outer-calls" => outer::calls(),
        "stage" => stage::all(),
        "stage-devices" => stage::on_two_devices(),
        "stage-races" => stage::races(),
        "stage-vetoes" => stage::vetoes(),
        "stage-failures" => stage::failures(),
        "stage-streams" => stage::streams(),
        "stage-refusals" => stage::refusals(),
        "hosts" => hosts::all(),
        "hosts-devices" => hosts::on_four_devices(),
        "hosts-races" => hosts::races(),
        "hosts-failures" => hosts::failures(),
        "hosts-unneeded" => hosts::unneeded(),
        "hosts-losses" => hosts::losses(),
        "hosts-streams" => hosts::streams(),
        "overlap" => overlap::on_one_device(),
        "overlap-devices" => overlap::on_two_devices(),
        "overlap-streams" => overlap::on_streams(),
        "coded-copies-devices" => overlap::in_code(),
        "coded" => coded::all(),
        "coded-devices" => coded::on_two_devices(),
        "coded-races" => coded::races(),
        "coded-failures" => coded::failures(),
        "telemetry" => telemetry::on_one_device(),
        "telemetry-devices" => telemetry::on_two_devices(),
        "host-failures" => links::host_failures(),
        "links" => links::every_link(),
        "reach" => reach::everywhere(),
        "lost-device" => reach::lost_device(2, true),
        "lost-device-unseen" => reach::lost_device(2, false),
        "lost-device-shared" => reach::lost_device(4, false),
        "pairs" => links::pairs(),
        "no-p2p" => links::not_reached(PeerAccess::Unsupported),
        "broken-p2p" => links::not_reached(PeerAccess::Broken),
        "child-crashes" => links::not_reached(PeerAccess::Broken),
        "child-works" => links::reached(),
        "p2p-off" => links::not_reached(PeerAccess::Disabled),
        "link-races" => links::races(),
        "link-failures" => links::failures(),
        #[cfg(feature = "cuda")]
        "interop" => super::interop::interop(),
        #[cfg(feature = "cuda")]
        "interop-devices" => super::interop::devices(),
        "strict-failures" => strict::failures(),
        #[cfg(feature = "cuda")]
        "strict-ends" => strict::whole_averages_end(),
        #[cfg(feature = "cuda")]
        "strict-slices" => super::interop::captured_slices(),
        "strict-captures" => strict::beside_a_blocking_capture(),
        "strict-peers" => strict::one_peer_each(),
        "memory" => beside::memory(),
        "out-of-memory" => out_of_memory(),
        "no-device" => unavailable(GPU, &["no device", "CUDA_VISIBLE_DEVICES"]),
        "old-driver" => unavailable(GPU, &["CUDA 11.4", "update the driver"]),
        "no-driver" => no_driver(),
        #[cfg(target_os = "linux")]
        unkind if unkind.contains(' ') => crate::unkind::run(unkind),
        other => panic!("no scenario {other}"),
    }
}

fn averages() {
    let shapes = shapes();
    let ring = |all_or_nothing, ranks| Way { all_or_nothing, ranks, ..WAY };
    let direct = |ranks| Way { algorithm: Algorithm::Direct, ranks, ..WAY };
    for ranks in [2, 3, 4, 8] {
        for way in [direct(ranks), ring(true, ranks), ring(false, ranks)] {
            way.compare(&shapes);
        }
    }
    for way in [ring(true, 3), ring(false, 3), direct(3)] {
        Way { weighted: true, counter: u32::MAX - 3, ..way.clone() }.compare(&shapes);
        for delay_ns in [20_000, 300_000] {
            Way { delay_ns, slots: 2, channels: 3, ..way.clone() }.compare(&shapes);
        }
        Way { reject: true, slots: 2, chunk: 128, channels: 3, ..way.clone() }
            .compare(&shapes[10..]);
        Way { narrow_wire: true, channels: 1, ..way }.compare(&shapes[5..]);
    }
    Way { algorithm: Algorithm::Direct, ranks: 1, ..WAY }.run(&shapes);
    // The defaults of a device, and two averagers at once.
    ranks_on(GPU, 4, |communicator| {
        let mut model = Model::new(GPU, &shapes, communicator.rank() as u64);
        let mut ring = test_support::options(communicator.clone())
            .algorithm(Algorithm::Ring)
            .build(&mut model)
            .unwrap();
        let mut auto = test_support::options(communicator).build(&mut model).unwrap();
        assert_eq!(auto.algorithm(), Algorithm::Direct);
        ring.average(&mut model).unwrap();
        auto.average(&mut model).unwrap();
        drop(ring);
        auto.average(&mut model).unwrap();
    });
}

fn races() {
    let shapes = [(Dtype::F32, 600, 0), (Dtype::Bf16, 77, 1)];
    for ranks in [2, 3] {
        for (algorithm, all_or_nothing) in
            [(Algorithm::Direct, true), (Algorithm::Ring, true), (Algorithm::Ring, false)]
        {
            let way = Way { ranks, algorithm, all_or_nothing, slots: 2, chunk: 256, ..WAY };
            way.run(&shapes);
            if all_or_nothing {
                for outer in outers() {
                    Way { outer, ..way.clone() }.run(&shapes);
                }
            }
        }
    }
}

fn refusals() {
    // More blocks than can be resident at once: an error before anything is launched, on every
    // rank.
    let errors = ranks_on(GPU, 4, |communicator| {
        let mut model = Model::new(GPU, &shapes(), 0);
        let builder = test_support::options(communicator).channels(1000);
        builder.build(&mut model).map(drop).unwrap_err()
    });
    for error in &errors {
        let Error::InvalidOption { rank: 0, option: "channels", found, .. } = error else {
            panic!("{error}")
        };
        assert!(found.contains("1000, on each of 4 ranks") && found.contains("fit"), "{error}");
    }
    // A stage for CPUs is refused before any tensor is read; alone, too.
    for world in [1, 2] {
        let errors = ranks_on(GPU, world, |communicator| {
            let mut model = Model::new(GPU, &shapes(), 0);
            let builder = test_support::options(communicator).stage(|_| Ok(()));
            builder.build(&mut model).map(drop).unwrap_err()
        });
        for error in &errors {
            let is_named = matches!(error, Error::InvalidOption { option: "stage", .. });
            assert!(is_named && error.to_string().contains("Builder::device_stage"), "{error}");
        }
    }
    // Memory of the host, at build and later.
    let host = |model: &mut Vec<f32>| {
        let pointer = model.as_mut_ptr().cast();
        // SAFETY: the claim is false, which is found out before the memory is read.
        unsafe { TensorMut::from_raw_parts(pointer, model.len(), Dtype::F32, GPU) }
    };
    let check = |error: Error| {
        let Error::InvalidTensor { rank: 1, problem, .. } = &error else { panic!("{error}") };
        assert!(problem.contains("does not lie in memory of cuda:0"), "{error}");
    };
    ranks_on(GPU, 2, |communicator| {
        let (rank, mut wrong) = (communicator.rank(), vec![1.0f32; 50]);
        let mut right = Model::new(GPU, &[(Dtype::F32, 50, 0)], 0);
        let builder = test_support::options(communicator.clone());
        check(
            if rank == 1 {
                builder.build(&mut host(&mut wrong))
            } else {
                builder.build(&mut right)
            }
            .unwrap_err(),
        );
        // Memory that ends before the tensor does.
        let builder = test_support::options(communicator.clone());
        let (longer, pointer) = (1 << 40, right.tensor_address(0) as *mut u8);
        // SAFETY: as above.
        let mut longer = unsafe { TensorMut::from_raw_parts(pointer, longer, Dtype::F32, GPU) };
        check(
            if rank == 1 { builder.build(&mut longer) } else { builder.build(&mut right) }
                .unwrap_err(),
        );
        let mut averager = test_support::options(communicator).build(&mut right).unwrap();
        let before = right.bytes().to_vec();
        check(
            if rank == 1 {
                averager.average(&mut host(&mut wrong))
            } else {
                averager.average(&mut right)
            }
            .unwrap_err(),
        );
        right.download();
        assert!(right.bytes() == before);
        averager.average(&mut right).unwrap(); // nothing is broken
    });
    // A tensor that says it is on the CPU, and a device that is not there.
    ranks_on(GPU, 2, |communicator| {
        let error =
            test_support::options(communicator).build(&mut vec![vec![0.0f32; 5]]).unwrap_err();
        assert!(error.to_string().contains("is not on cuda:0"), "{error}");
    });
    unavailable(Device::cuda(99), &["CUDA devices, numbered from 0"]);
}

fn failures() {
    for (algorithm, all_or_nothing) in
        [(Algorithm::Ring, true), (Algorithm::Ring, false), (Algorithm::Direct, true)]
    {
        fail(&[GPU; 3], Link::Auto, algorithm, all_or_nothing);
    }
}

/// Runs every fault of rank 2 of 3 before the commit.
pub fn fail(devices: &[Device], link: Link, algorithm: Algorithm, all_or_nothing: bool) {
    let shapes = [(Dtype::F32, 5000, 0), (Dtype::F16, 100, 1)];
    {
        for fault in ["late", "abort", "gone", "nan"] {
            let over = Barrier::new(devices.len());
            ranks_of(devices, |communicator| {
                let on = communicator.device();
                let (rank, abort) = (communicator.rank(), communicator.abort_handle());
                let mut model = Model::new(on, &shapes, rank as u64);
                if fault == "nan" && rank == 2 {
                    model.set(0, 4321, f32::NAN);
                }
                let before = model.bytes().to_vec();
                // Longer than a busy machine delays a rank.
                let timeout = Duration::from_secs(if fault == "late" { 5 } else { 50 });
                let builder =
                    test_support::options(communicator).algorithm(algorithm).timeout(timeout);
                let builder = builder.link(link);
                let builder = builder
                    .all_or_nothing(all_or_nothing)
                    .reject_non_finite(fault == "nan")
                    .channels(2);
                let mut averager = builder.build(&mut model).unwrap();
                if rank == 2 && fault != "nan" {
                    std::thread::sleep(Duration::from_millis(300)); // the others wait by now
                    match fault {
                        "late" => drop(over.wait()), // when the others have failed
                        "abort" => abort.abort(),
                        _ => return drop(averager),
                    }
                }
                let error = averager.average(&mut model).unwrap_err();
                if fault == "late" && rank != 2 {
                    over.wait();
                }
                let text = format!("{algorithm:?} {all_or_nothing} {fault}, rank {rank}: {error}");
                let right = match fault {
                    "late" => {
                        matches!(
                            error,
                            Error::Timeout { rank: 2, phase: Phase::Meet, committed: false, .. }
                        )
                    }
                    "abort" => matches!(error, Error::Aborted { rank: 2, committed: false, .. }),
                    "gone" => {
                        matches!(
                            error,
                            Error::PeerLost { rank: 2, phase: Phase::Meet, committed: false }
                        )
                    }
                    _ => matches!(error, Error::NonFinite { rank: 2, element: 4321, .. }),
                };
                assert!(right, "{text}");
                model.download();
                assert!(
                    error.tensors() == TensorState::Unchanged && model.bytes() == before,
                    "{text}"
                );
                if error.is_fatal() {
                    assert!(
                        matches!(averager.average(&mut model), Err(Error::Poisoned { .. })),
                        "{text}"
                    );
                }
            });
        }
    }
    // The devices still work.
    let way = WAY;
    way.averages(devices, &shapes, &[]);
}

fn trainers() {
    let shapes = shapes();
    let run = |on| {
        ranks_on(on, 3, |communicator| {
            let mut model = Model::new(on, &shapes, communicator.rank() as u64);
            let averager = WAY.builder(communicator).build(&mut model).unwrap();
            let mut sgd = LocalSgd::new(averager, Schedule::every(3).after_warmup(2));
            for step in 0..7u8 {
                model.download();
                model.set(0, 7, f32::from(step));
                sgd.step(&mut model).unwrap();
            }
            sgd.finish(&mut model).unwrap();
            model.download();
            model.bytes().to_vec()
        })
    };
    assert!(run(GPU) == run(Device::cpu()));
}

fn out_of_memory() {
    let shapes = [(Dtype::F32, 1 << 20, 0)]; // 4 MiB a rank
    let errors = ranks_on(GPU, 2, |communicator| {
        let mut model = Model::new(GPU, &shapes, 0);
        let builder = test_support::options(communicator).algorithm(Algorithm::Ring).channels(1);
        builder.chunk_bytes(2 << 20).slots(32).build(&mut model).map(drop)
    });
    for error in errors {
        let error = error.unwrap_err();
        let Error::DeviceFailed { source, .. } = &error else { panic!("{error}") };
        let reason = source.to_string();
        assert!(reason.contains("cuMemAlloc") && reason.contains("OUT_OF_MEMORY"), "{error}");
    }
}

fn unavailable(on: Device, says: &[&str]) {
    let error = Communicator::from_devices(&[on; 2]).unwrap_err();
    let Error::DeviceUnavailable { rank: 0, .. } = &error else { panic!("{error}") };
    for words in says {
        assert!(error.to_string().contains(words), "{words}: {error}");
    }
}

fn no_driver() {
    match Communicator::from_devices(&[GPU]) {
        Err(error) if error.to_string().contains("no NVIDIA driver") => {}
        other => panic!("a libcuda is installed here: {other:?}"),
    }
}
