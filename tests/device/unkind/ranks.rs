//! Ranks with trainers of their own, as threads and as processes: the bodies of the scenarios.

use std::time::Duration;

use param_averager::*;
use test_support::process::start_all;
use test_support::rank::join;
use test_support::ranks_of;

use super::outer::{self, expected, value};
use super::trainer::{Trainer, ELEMENTS};
use crate::cuda::{on_hosts, staged, with_stage};

/// Variable with the timeout of the averagers in seconds, for a slot on a GPU.
const TIMEOUT: &str = "PA_UNKIND_TIMEOUT_S";
/// Change that training makes to each element while a copy of it is averaged.
const TRAINED: f32 = 128.0;
/// More launches than a launch queue holds.
const AHEAD: usize = 1100;

/// Action of the last rank's trainer while its peers wait for it, and options of the averages.
#[derive(Clone, Debug)]
struct Plan {
    act: String,
    outers: Vec<Outer>,
    /// True with the stage of `cuda::with_stage`.
    stage: bool,
    /// True for averages of copies, while training goes on.
    copies: bool,
    telemetry: bool,
    /// True if each half of the devices is that of a host.
    hosts: bool,
    algorithm: Option<Algorithm>,
    devices: Vec<usize>,
    seed: u64,
}

impl Plan {
    /// Reads `ACT[+OPTION] ALGORITHM DEVICES [SEED]`, such as `alloc ring 0,1`. The option is an
    /// outer optimizer, `stage`, `copies`, `telemetry` or `hosts`.
    fn new(words: &[&str]) -> Plan {
        let [act, algorithm, devices, ..] = words else { panic!("no plan: {words:?}") };
        let algorithm = match *algorithm {
            "ring" => Some(Algorithm::Ring),
            "direct" => Some(Algorithm::Direct),
            "auto" => None,
            other => panic!("no algorithm {other}"),
        };
        let devices = devices.split(',').map(|ordinal| ordinal.parse().expect("an ordinal"));
        let seed = words.get(3).map_or(0, |seed| seed.parse().expect("a seed"));
        let (act, name) = act.split_once('+').unwrap_or((act, ""));
        let outers = match name {
            "" | "stage" | "copies" | "telemetry" | "hosts" => vec![Outer::mean()],
            name => outer::named(name),
        };
        let [stage, copies, telemetry, hosts] =
            ["stage", "copies", "telemetry", "hosts"].map(|of| name == of);
        let (act, devices) = (act.to_owned(), devices.collect());
        Plan { act, outers, stage, copies, telemetry, hosts, algorithm, devices, seed }
    }
}

/// Runs a world of threads.
pub fn threads(words: &[&str]) {
    let plan = Plan::new(words);
    let devices: Vec<Device> = plan.devices.iter().copied().map(Device::cuda).collect();
    if plan.hosts {
        let hosts: Vec<_> = devices.chunks(devices.len() / 2).map(<[Device]>::to_vec).collect();
        on_hosts(&hosts, |host, communicator, link| {
            averages(&plan, communicator, Some((host, link)));
        });
        return;
    }
    ranks_of(&devices, |communicator| averages(&plan, communicator, None));
}

/// Variable with the plan of a rank that is a process.
const PLAN: &str = "PA_UNKIND_PLAN";

/// Runs a world of processes, which inherit the simulator's settings.
pub fn processes(words: &[&str]) {
    let plan = Plan::new(words);
    let mut ranks = start_all("unkind", plan.devices.len(), |rank| {
        vec![("PA_TEST_DEVICE", plan.devices[rank].to_string()), (PLAN, words.join(" "))]
    });
    let ends: Vec<Option<i32>> = ranks.iter_mut().map(|rank| rank.end()).collect();
    let output: Vec<_> = ranks.iter().map(|rank| rank.output.join("\n")).collect();
    assert!(ends.iter().all(|end| *end == Some(0)), "{ends:?}\n{}", output.join("\n"));
}

/// Runs one rank of [`processes`], and returns its exit code.
pub fn process() -> i32 {
    let words = std::env::var(PLAN).expect("a plan");
    averages(&Plan::new(&words.split(' ').collect::<Vec<_>>()), join().unwrap(), None);
    0
}

/// Three averages by each averager, of other values each time. The peers of the last rank wait for
/// it twice, while its trainer acts.
fn averages(plan: &Plan, communicator: Communicator, mut link: Option<(usize, ThreadHosts)>) {
    let before = link.as_ref().map_or(0, |(host, _)| host * communicator.world_size());
    let rank = before + communicator.rank();
    let mut trainer = Trainer::new(&plan.act, plan.seed, communicator.device(), rank);
    for &outer in &plan.outers {
        let link = link.take().map(|(_, link)| link);
        let averager = averages_with(plan, outer, (rank, communicator.clone(), link), &mut trainer);
        std::mem::forget(averager); // freed with the process
    }
    trainer.release();
    std::mem::forget(trainer);
}

fn averages_with(
    plan: &Plan,
    outer: Outer,
    (rank, communicator, link): (usize, Communicator, Option<ThreadHosts>),
    trainer: &mut Trainer,
) -> ParamAverager {
    const ROUNDS: usize = 3;
    let (world, on) = (plan.devices.len(), communicator.device());
    // Longer than a wedge takes to be found, so that the simulator says what hangs.
    let timeout = std::env::var(TIMEOUT).map_or(25, |seconds| seconds.parse().expect("seconds"));
    let timeout = Duration::from_secs(timeout);
    let mut builder = test_support::options(communicator).timeout(timeout);
    if let Some(algorithm) = plan.algorithm {
        builder = builder.algorithm(algorithm);
    }
    if plan.act == "peer" {
        builder = builder.link(Link::Peer); // refused if the probe of peer access fails
    }
    // Where room on the device is what a scenario is about, as many channels as by default.
    if !matches!(plan.act.as_str(), "averages" | "resident") {
        builder = builder.channels(2);
    }
    if outer != Outer::mean() {
        builder = builder.start_from(Start::Rank(0)).outer(outer);
        trainer.fill(outer::BEGIN);
        trainer.synchronize();
    }
    if let Some(link) = link {
        builder = builder.start_from(Start::Rank(0)).hosts(link, Hierarchy::Every);
    }
    if plan.stage {
        builder = with_stage(builder, on);
    }
    if plan.copies {
        builder = builder.overlap(Overlap::default().delay(1));
    }
    let builder = builder.telemetry(plan.telemetry);
    let mut averager = builder.build(&mut trainer.model).unwrap();
    trainer.more_streams();
    if plan.act == "resident" && rank == 0 {
        trainer.hold();
    }
    for (round, expected) in expected(outer, rank, world, ROUNDS).into_iter().enumerate() {
        let expected = match plan {
            Plan { stage: true, .. } => staged(expected),
            Plan { copies: true, .. } => expected + TRAINED,
            _ => expected,
        };
        trainer.fill(value(rank, round));
        // Threads meet in the call that starts an average of a copy: then the trainer acts while
        // its peers train on.
        let acts = rank + 1 == world && round > 0;
        let acts_beside = plan.copies && round > 1;
        if acts && !acts_beside {
            trainer.act(&plan.act);
        }
        if plan.act == "trainers" {
            trainer.steps(rank);
        }
        let is_started = matches!(plan.act.as_str(), "ahead" | "started");
        let stream = trainer.stream.cast();
        // SAFETY: own stream and memory, which live until the process ends.
        let mut params = unsafe { RawCudaParams::new(stream, &mut trainer.model) };
        let report = if plan.copies {
            let average = averager.start_overlapped(0, &mut params).unwrap();
            if acts && acts_beside {
                trainer.act(&plan.act);
            }
            trainer.fill(value(rank, round) + TRAINED);
            if plan.act == "ahead" {
                (0..AHEAD).for_each(|_| trainer.launch(trainer.step));
            }
            // SAFETY: as above.
            let mut params = unsafe { RawCudaParams::new(stream, &mut trainer.model) };
            averager.finish_overlapped(average, &mut params).unwrap()
        } else if is_started {
            let pending = averager.start(&mut params).unwrap();
            if plan.act == "ahead" {
                (0..AHEAD).for_each(|_| trainer.launch(trainer.step));
            }
            pending.wait().unwrap()
        } else {
            averager.average(&mut params).unwrap()
        };
        let ranks = report.world_size * report.hosts;
        assert_eq!((ranks, report.bytes), (world, 4 * ELEMENTS as u64));
        let change = report.telemetry.map(|telemetry| telemetry.largest_change);
        let changed = f64::from((expected - value(rank, round)).abs());
        assert_eq!(change, plan.telemetry.then_some(changed), "rank {rank}, {round}");
        let found = trainer.values();
        assert!(
            found.iter().all(|x| *x == expected),
            "{outer}, rank {rank}, {round}: {} instead of {expected}",
            found[0]
        );
    }
    averager
}
