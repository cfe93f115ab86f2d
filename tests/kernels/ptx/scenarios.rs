//! Scenarios that a child process runs under one setting of the simulator.

use super::case::{Case, How, Outcome};
use super::machines::{Cpu, Cuda};
use param_averager::__testing::abi::*;
use param_averager::Dtype::{self, Bf16, F16, F32, F64};

pub fn run(name: &str, fatbin: &[u8]) {
    match name {
        "streams" => same_bits(fatbin, false),
        "devices" => same_bits(fatbin, true),
        "failures" => failures(fatbin),
        "race" => racing().iter().for_each(|case| compare(case, fatbin, case.world == 3)),
        "mutant" => compare(&racing()[0], fatbin, false),
        "probe" => super::probe::run(fatbin),
        "no-device" => no_device(),
        "no-driver" => no_driver(),
        _ => panic!("no scenario {name}"),
    }
}

const ALL: [Dtype; 4] = [F32, F64, F16, Bf16];

/// Tensors of one dtype: one that fills the loops, small ones with ragged ends, and on request one
/// that no rank has at a multiple of 16 bytes, or that lies differently on each.
fn tensors(dtype: Dtype, misaligned: bool) -> Vec<(Dtype, usize, usize, usize)> {
    let n = 16 / dtype.size();
    vec![
        (dtype, 560 * n + 1, 0, 0),
        (dtype, 1, 0, 0),
        (dtype, 40 * n, if misaligned { 1 } else { 0 }, 0),
        (dtype, 0, 0, 0),
        (dtype, 20 * n + n - 1, 0, if misaligned { 1 } else { 0 }),
        (dtype, n, 0, 0),
    ]
}

/// Every dtype, phase, number of ranks, and every other property in some of them.
fn good() -> Vec<Case> {
    let mut cases = vec![];
    for how in [How::Direct, How::Ring, How::Commit] {
        for (i, dtype) in ALL.into_iter().enumerate() {
            for (world, wire_f32) in
                [(2, false), (3, false), (4, false), (2, true), (3, true), (4, true)]
            {
                if wire_f32 && (how == How::Direct || dtype.size() != 2) {
                    continue;
                }
                let j = i + world + usize::from(wire_f32);
                cases.push(Case {
                    world,
                    tensors: tensors(dtype, j % 2 == 0),
                    how,
                    wire_f32,
                    channels: 1 + (j as u32) % 3,
                    slots: if j % 4 == 2 { 4 } else { 2 },
                    chunk: [136, 160, 24, 8][(j + how as usize) % 4],
                    threads: [32, 64][j / 2 % 2],
                    weights: (j % 3 == 1).then(|| [0.0, 1.5, 3.0, 0.25][..world].to_vec()),
                    counter: if j % 2 == 0 { u32::MAX - 2 } else { 7 },
                    reject: j / 2 % 2 == 1,
                    ..Case::default()
                });
            }
        }
        if how != How::Direct {
            let all = ALL.iter().map(|&dtype| (dtype, 300, 0, 1)).collect();
            let weights = Some(vec![1.0, 0.0, 0.0]); // as where a process joins
            cases.push(Case {
                world: 3,
                tensors: all,
                how,
                weights,
                keeps: Some(1),
                ..Case::default()
            });
        }
        // All dtypes at once; several averages, across the wrap of every counter, without a gap.
        let all =
            ALL.iter().flat_map(|&dtype| vec![(dtype, 500, 0, 0), (dtype, 77, 1, 1)]).collect();
        let counter = u32::MAX - 1;
        cases.push(Case {
            world: 3,
            tensors: all,
            how,
            wire_f32: true,
            averages: 4,
            counter,
            chunk: 16,
            ..Case::default()
        });
    }
    // The block size of a GPU, every rank's tensors in the loop that has four packs in flight.
    let tensors = vec![(F32, 4 * 2048 * 4, 0, 0)];
    cases.push(Case {
        world: 2,
        tensors,
        threads: 512,
        channels: 1,
        chunk: 2048,
        counter: 3,
        ..Case::default()
    });
    cases.extend(sequenced());
    // Five ranks: more than Direct unrolls.
    let tensors = vec![(Bf16, 5 * 8 * 40 + 3, 0, 0), (Bf16, 99, 3, 0)];
    cases.push(Case { world: 5, tensors, how: How::Direct, channels: 2, ..Case::default() });
    cases
}

/// Segment by segment, with room for the chunks of two segments: nothing waits.
fn sequenced() -> Vec<Case> {
    let case = Case { how: How::Sequenced, slots: 16, chunk: 64, ..Case::default() };
    let tensors = vec![(Bf16, 8 * 300, 0, 1), (F32, 4 * 200 + 3, 1, 0), (Bf16, 77, 0, 0)];
    vec![
        case.clone(),
        Case { world: 3, tensors: tensors.clone(), wire_f32: true, averages: 2, ..case.clone() },
        Case { world: 4, tensors, channels: 1, reject: true, counter: u32::MAX, ..case },
    ]
}

fn compare(case: &Case, fatbin: &[u8], own_devices: bool) {
    let inputs = case.inputs();
    let got = case.run(&Cuda::new(fatbin, case.world, own_devices), &inputs);
    let want = case.run(&Cpu, &inputs);
    for rank in 0..case.world {
        assert!(
            got.tensors[rank] == want.tensors[rank],
            "rank {rank}: PTX and CPU differ, {case:?}"
        );
        for (got, want) in got.channels[rank].iter().zip(&want.channels[rank]) {
            let all = |c: &PaChannel| {
                let s = &c.status;
                let how = (s.outcome, s.peer, s.phase, s.committed, c.bad, s.step);
                (how, (c.recv_seq, c.send_seq, s.epoch), (c.divisor, c.divisor_f32))
            };
            assert_eq!(all(got), all(want), "rank {rank}, {case:?}");
            let status = &got.status;
            assert_eq!(
                (status.outcome, status.committed),
                (PA_COMMITTED, 1),
                "rank {rank}, {case:?}"
            );
            // Launches of several devices overlap: no host orders the segments here.
            if case.how == How::Sequenced && !own_devices {
                assert_eq!(status.waited_ns, 0, "rank {rank} has waited, {case:?}");
            }
        }
    }
    if case.averages == 1 {
        case.check_mean(&inputs, &got);
    }
}

fn same_bits(fatbin: &[u8], own_devices: bool) {
    // Several devices differ in where memory lies: fewer cases show it.
    let cases = good()
        .into_iter()
        .enumerate()
        .filter(|(i, case)| !own_devices || (i % 3 != 1 && case.world <= 4));
    let mut count = 0;
    for (_, case) in cases {
        compare(&case, fatbin, own_devices);
        count += 1;
    }
    println!("{count} cases");
}

/// Small cases, since the race detector is slow: each kernel, two warps a block, two channels.
fn racing() -> Vec<Case> {
    let tensors = || vec![(F32, 4 * 260 + 1, 0, 0), (F32, 30, 1, 0)];
    let case = Case { tensors: tensors(), threads: 64, chunk: 64, ..Case::default() };
    let halves = vec![(Bf16, 8 * 100 + 3, 0, 1)];
    vec![
        case.clone(),
        Case { how: How::Commit, world: 3, reject: true, ..case.clone() },
        Case { how: How::Direct, world: 3, reject: true, averages: 2, ..case.clone() },
        Case { how: How::Sequenced, slots: 16, reject: true, ..case.clone() },
        Case { how: How::Direct, tensors: tensors(), ..case.clone() },
        Case { how: How::Ring, world: 3, tensors: halves, wire_f32: true, averages: 2, ..case },
    ]
}

/// A deadline that passes. The simulator's clock is 30 times slower, and the simulator ends kernels
/// that wait for a minute.
const SOON_MS: u64 = 200;

fn failures(fatbin: &[u8]) {
    let run = |case: &Case| {
        let inputs = case.inputs();
        let outcome = case.run(&Cuda::new(fatbin, case.world, false), &inputs);
        for (rank, tensors) in outcome.tensors.iter().enumerate() {
            for (got, input) in tensors.iter().zip(&inputs[rank]) {
                assert!(got == input.bytes(), "rank {rank}: a tensor has changed, {case:?}");
            }
        }
        outcome
    };
    let expect = |case: &Case,
                  outcome: &Outcome,
                  silent: Option<usize>,
                  kind: u32,
                  peer: u32,
                  phases: &[u32]| {
        for (rank, channels) in
            outcome.channels.iter().enumerate().filter(|&(rank, _)| silent != Some(rank))
        {
            for c in channels.iter().map(|channel| &channel.status) {
                assert_eq!(
                    (c.outcome, c.peer, c.committed),
                    (kind, peer, 0),
                    "rank {rank}, {case:?}"
                );
                assert!(phases.contains(&c.phase), "rank {rank}: phase {}, {case:?}", c.phase);
            }
        }
    };
    for how in [How::Direct, How::Ring, How::Commit, How::Sequenced] {
        let case = Case { world: 3, how, slots: 64, ..Case::default() };
        let missing = Case { missing: Some(2), timeout_ms: SOON_MS, ..case.clone() };
        expect(&missing, &run(&missing), Some(2), PA_TIMEOUT, 2, &[PA_AT_MEET]);
        let aborted = Case { missing: Some(2), abort: true, ..case.clone() };
        expect(&aborted, &run(&aborted), Some(2), PA_ABORTED, 1, &[PA_AT_MEET]);
        let nan = Case { reject: true, nan: Some((1, 0, 2222)), ..case.clone() };
        let outcome = run(&nan);
        let commits_late = matches!(how, How::Commit | How::Sequenced);
        let found = if commits_late { PA_AT_COMMIT } else { PA_AT_MEET };
        expect(&nan, &outcome, None, PA_NON_FINITE, 1, &[found]);
        let named = outcome.channels.iter().flatten().all(|c| c.status.detail == 1 + 2222);
        assert!(named, "every block knows the element, {nan:?}");
    }
    // A rank that leaves in the middle of the reduce, silently. One peer waits for its chunk, the
    // other for its vote; the first deadline that passes decides for both.
    let leaver = Case {
        world: 3,
        how: How::Commit,
        fault: Some((1, 3)),
        timeout_ms: SOON_MS,
        ..Case::default()
    };
    expect(&leaver, &run(&leaver), Some(1), PA_TIMEOUT, 1, &[PA_AT_REDUCE, PA_AT_COMMIT]);
}

fn no_device() {
    use cudarc::driver::{result, sys::CUresult};
    let error = result::init().expect_err("cuInit finds no device");
    assert_eq!(error.0, CUresult::CUDA_ERROR_NO_DEVICE);
}

fn no_driver() {
    // Anything else of cudarc panics now. SAFETY: the call opens a library, and nothing else.
    assert!(
        !unsafe { cudarc::driver::sys::is_culib_present() },
        "a libcuda is installed here, or LD_LIBRARY_PATH was not cleared"
    );
}
