//! Averages of processes on CUDA devices: links, refusals, kills and joins.

pub mod coded;
pub mod outer;
mod ranks;
pub mod shared_state;

use std::time::Duration;

use rustix::process::Signal;

use ranks::bits_of_the_cpu;
pub use ranks::rank;
use test_support::process::{check_survivors, name, start, start_all, RankProcess};
use test_support::simulator::{environment, Setting};
use test_support::{seed, Random};

/// A world: a rank on each of these devices, or with each of these made visible to it alone.
#[derive(Clone, Copy)]
struct Case {
    devices: &'static [usize],
    hidden: bool,
    link: &'static str,
    settings: &'static [Setting<'static>],
}

impl Case {
    /// Starts the ranks. `more`: further variables, by rank.
    fn start(
        &self,
        role: &str,
        more: impl Fn(usize) -> Vec<(&'static str, String)>,
    ) -> Option<Vec<RankProcess>> {
        let environment = environment(self.settings)?;
        Some(start_all(role, self.devices.len(), |rank| {
            let device = self.devices[rank].to_string();
            let place = match self.hidden {
                true => vec![("PA_TEST_DEVICE", "0".into()), ("CUDA_VISIBLE_DEVICES", device)],
                false => vec![("PA_TEST_DEVICE", device)],
            };
            [environment.clone(), place, vec![("PA_TEST_LINK", self.link.to_owned())], more(rank)]
                .concat()
        }))
    }

    fn averages(&self, order: &str) {
        let Some(mut ranks) = self.start("devices", |_| vec![]) else { return };
        let expected = bits_of_the_cpu(ranks.len());
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
            assert_eq!(rank.said("order"), [order]);
            assert_eq!(rank.said("done").len(), 1);
        }
        let again = ranks[0].said("again");
        for rank in &ranks {
            assert_eq!(rank.said("again"), again);
            match order.chars().filter(char::is_ascii_digit).is_sorted() {
                true => assert_eq!(rank.said("bits"), expected, "not the bits of the CPU"),
                false => assert_eq!(rank.said("bits"), ranks[0].said("bits")),
            }
        }
    }
}

const ONE: Setting<'_> = ("CUDASIM_DEVICES", "1");
const TWO: Setting<'_> = ("CUDASIM_DEVICES", "2");
const NO_P2P: Setting<'_> = ("CUDASIM_P2P", "none");
const BROKEN: Setting<'_> = ("CUDASIM_P2P", "broken");
const OFF: Setting<'_> = ("PARAM_AVERAGER_P2P", "0");

pub fn processes_share_a_device() {
    for link in ["auto", "peer", "host"] {
        Case { devices: &[0, 0], hidden: false, link, settings: &[ONE] }.averages("[0, 1]");
    }
    for link in ["auto", "host"] {
        Case { devices: &[0; 4], hidden: false, link, settings: &[ONE, ("CUDASIM_DELAY", "30")] }
            .averages("[0, 1, 2, 3]");
    }
}

pub fn processes_on_two_devices_reach_each_other_or_go_through_the_host() {
    let two = Case { devices: &[0, 1], hidden: false, link: "auto", settings: &[TWO] };
    for link in ["auto", "peer", "pull", "host"] {
        Case { link, ..two }.averages("[0, 1]");
    }
    // Each process sees one device only, as its device 0.
    for link in ["auto", "peer", "pull", "host"] {
        Case { link, hidden: true, ..two }.averages("[0, 1]");
    }
    for settings in [&[TWO, NO_P2P][..], &[TWO, BROKEN], &[TWO, OFF]] {
        Case { settings, ..two }.averages("[0, 1]");
        Case { settings, hidden: true, ..two }.averages("[0, 1]");
        // Links of both kinds: each device's two ranks follow one another.
        Case { settings, devices: &[0, 1, 0, 1], ..two }.averages("[0, 2, 1, 3]");
    }
}

pub fn a_link_that_is_not_there_is_refused_by_all_processes() {
    for (settings, why) in [
        (&[TWO, NO_P2P][..], "CUDA IPC"),
        (&[TWO, BROKEN], "were lost"),
        (&[TWO, OFF], "PARAM_AVERAGER_P2P=0"),
    ] {
        let case = Case { devices: &[0, 1], hidden: false, link: "peer", settings };
        let Some(mut ranks) = case.start("devices", |_| vec![]) else { return };
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
            let error = &rank.said("error")[0];
            assert!(
                error.contains("the devices of ranks 0 and 1 don't reach each other's memory"),
                "{error}"
            );
            assert!(error.contains(why), "{error}");
        }
    }
}

/// Processes that share a device by one ordinal, and processes that each see it as device 0.
pub fn blocks_of_processes_that_share_a_device_must_fit_on_it_together() {
    for (devices, hidden, ranks) in
        [(&[0, 0, 1][..], false, 2), (&[0, 1, 1], true, 2), (&[0, 1], true, 1)]
    {
        let case = Case { devices, hidden, link: "auto", settings: &[TWO] };
        let Some(mut all) = case.start("devices", |_| vec![("PA_TEST_CHANNELS", "1000".into())])
        else {
            return;
        };
        for process in &mut all {
            assert_eq!(process.end(), Some(3), "{:#?}", process.output);
            let error = &process.said("error")[0];
            assert!(error.contains(&format!("1000, on each of {ranks} ranks of cuda:")), "{error}");
        }
    }
}

pub fn cpus_and_devices_are_not_in_one_world() {
    let Some(environment) = environment(&[ONE]) else { return };
    let mut ranks = start_all("meet", 3, |rank| {
        let device = if rank == 2 { vec![] } else { vec![("PA_TEST_DEVICE", "0".to_owned())] };
        [environment.clone(), device].concat()
    });
    for rank in &mut ranks {
        assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
        let error = &rank.said("error")[0];
        assert!(error.contains("rank 2 is on cpu and rank 0 on cuda:0"), "{error}");
    }
}

pub fn missing_device_is_reported_to_all_processes() {
    for (devices, rank) in [(&[7, 0, 0][..], 0), (&[0, 0, 7], 2)] {
        let case = Case { devices, hidden: false, link: "auto", settings: &[ONE] };
        let Some(mut ranks) = case.start("devices", |_| vec![]) else { return };
        for process in &mut ranks {
            assert_eq!(process.end(), Some(3), "{:#?}", process.output);
            let error = &process.said("error")[0];
            assert!(error.contains(&format!("rank {rank} asks for cuda:7")), "{error}");
            assert!(error.contains("CUDA devices, numbered from 0"), "{error}");
        }
    }
}

pub fn two_ranks_of_one_process_go_through_the_host() {
    let case = Case { devices: &[0], hidden: false, link: "auto", settings: &[ONE] };
    let Some(mut ranks) = case.start("threads", |_| vec![]) else { return };
    assert_eq!(ranks[0].end(), Some(0), "{:#?}", ranks[0].output);
}

pub fn an_abort_ends_the_kernels_of_all_processes() {
    for case in DOOMED {
        let Some(mut ranks) = case.start("abort", |_| vec![]) else { return };
        for rank in &mut ranks {
            assert_eq!(rank.end(), Some(3), "{:#?}", rank.output);
            let error = &rank.said("error")[0];
            assert!(error.contains("rank 1") && error.contains("abort"), "{error}");
        }
    }
}

/// Worlds in which ranks are killed, with links of each kind.
const DOOMED: [Case; 3] = [
    Case { devices: &[0; 3], hidden: false, link: "auto", settings: &[ONE] },
    Case { devices: &[0, 1, 0], hidden: false, link: "host", settings: &[TWO] },
    Case { devices: &[0, 1, 0], hidden: true, link: "auto", settings: &[TWO] },
];

/// Variables by which two survivors average until they are done.
fn survivors() -> Vec<(&'static str, String)> {
    vec![("PA_TEST_FINAL", "2".to_owned())]
}

pub fn kill_at_a_step_leaves_survivors_running() {
    for (index, case) in DOOMED.into_iter().enumerate() {
        // In the first launch, in the second, and without the commit in the only one.
        for (dead, step, all_or_nothing) in [(0, 1, "1"), (1, 3 + index, "0"), (2, 6 + index, "1")]
        {
            let variables = |rank| {
                let step = ("PA_TEST_DIE_AT", step.to_string());
                let last = if rank == dead { vec![step] } else { vec![] };
                let all = ("PA_TEST_ALL_OR_NOTHING", all_or_nothing.to_owned());
                [survivors(), vec![all], last].concat()
            };
            let Some(mut ranks) = case.start("survive", variables) else {
                return;
            };
            assert_eq!(ranks[dead].end(), None, "{:#?}", ranks[dead].output);
            check_survivors(&mut ranks, dead);
        }
    }
}

pub fn kill_at_any_time_leaves_survivors_running() {
    let mut chance = Random(seed());
    for case in DOOMED {
        for dead in 0..3 {
            let Some(mut ranks) = case.start("survive", |_| survivors()) else {
                return;
            };
            ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
            std::thread::sleep(Duration::from_micros(chance.below(200_000)));
            ranks[dead].signal(Signal::KILL);
            assert_eq!(ranks[dead].end(), None, "{:#?}", ranks[dead].output);
            check_survivors(&mut ranks, dead);
        }
    }
}

/// The same with a stage, beside which ranks meet twice: a rank dies before its call and after it.
pub fn kill_beside_a_stage_leaves_survivors_running() {
    let mut chance = Random(seed());
    const THREE: &[Setting<'_>] = &[("CUDASIM_DEVICES", "3")];
    // Ranks that meet in their streams.
    let alone = Case { devices: &[0, 1, 2], hidden: false, link: "auto", settings: THREE };
    for (index, case) in DOOMED.into_iter().chain([alone]).enumerate() {
        for (dead, step) in [(index % 3, Some(2 + index)), ((index + 1) % 3, None)] {
            let variables = |rank| {
                let step = step.filter(|_| rank == dead).map(|step| step.to_string());
                let last = step.map(|step| ("PA_TEST_DIE_AT", step));
                let stage = ("PA_TEST_SHARD_STAGE", "1".to_owned());
                [survivors(), vec![stage], last.into_iter().collect()].concat()
            };
            let Some(mut ranks) = case.start("survive", variables) else {
                return;
            };
            if step.is_none() {
                ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
                std::thread::sleep(Duration::from_micros(chance.below(200_000)));
                ranks[dead].signal(Signal::KILL);
            }
            assert_eq!(ranks[dead].end(), None, "{:#?}", ranks[dead].output);
            check_survivors(&mut ranks, dead);
        }
    }
}

/// Starts a rank on a device: one of `begin` first ranks, or a joiner.
fn one(
    role: &str,
    environment: &[(&'static str, String)],
    name: &str,
    origin: usize,
    device: usize,
    begin: Option<usize>,
) -> RankProcess {
    let mut variables = environment.to_vec();
    variables.push(("PA_TEST_NAME", name.to_owned()));
    variables.push(("PA_TEST_ORIGIN", origin.to_string()));
    variables.push(("PA_TEST_DEVICE", device.to_string()));
    match begin {
        Some(world) => variables
            .extend([("PA_TEST_RANK", origin.to_string()), ("PA_TEST_WORLD", world.to_string())]),
        None => variables.push(("PA_TEST_JOIN", "1".to_owned())),
    }
    start(role, &variables)
}

/// The joiner is killed at any time, such as during the probe of peer access.
pub fn kill_of_a_joiner_leaves_members_running() {
    let Some(environment) = environment(&[TWO]) else { return };
    let (name, mut chance) = (name(), Random(seed()));
    let mut ranks = [0, 1].map(|origin| one("survive", &environment, &name, origin, 0, Some(2)));
    ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
    for _ in 0..8 {
        let mut joiner = one("survive", &environment, &name, 2, 1, None);
        std::thread::sleep(Duration::from_micros(chance.below(1_500_000)));
        joiner.signal(Signal::KILL);
        assert_eq!(joiner.end(), None, "{:#?}", joiner.output);
    }
    let mut last = one("survive", &environment, &name, 2, 1, None);
    last.wait_for("ready");
    for rank in ranks.iter_mut().chain([&mut last]) {
        rank.ask_to_end();
        assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
    }
}

/// The joiner is on another device than the members, or on the same; then a member is killed.
pub fn a_process_joins_processes_on_devices() {
    for (settings, device) in [(&[TWO][..], 1), (&[TWO], 0), (&[TWO, NO_P2P], 1)] {
        let Some(environment) = environment(settings) else { return };
        let name = name();
        let mut ranks =
            Vec::from([0, 1].map(|origin| one("survive", &environment, &name, origin, 0, Some(2))));
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        ranks.push(one("survive", &environment, &name, 2, device, None));
        assert_eq!(ranks[2].wait_for("joined"), "[0, 1]");
        assert_eq!(ranks[0].wait_for("admitted"), ranks[1].wait_for("admitted"));
        ranks[2].wait_for("ready");
        std::thread::sleep(Duration::from_millis(100));
        ranks[0].signal(Signal::KILL);
        assert_eq!(ranks[0].end(), None);
        let agreed = [ranks[1].wait_for("agreed"), ranks[2].wait_for("agreed")];
        assert_eq!(agreed[0], agreed[1]);
        for rank in &mut ranks[1..] {
            rank.ask_to_end();
            assert_eq!(rank.end(), Some(0), "{:#?}", rank.output);
        }
    }
}

/// The process may stop in the middle of an average, and go on to write where its neighbour's
/// mailbox was.
pub fn stopped_process_disturbs_no_peer_when_it_resumes() {
    let mut chance = Random(seed());
    for case in DOOMED {
        // Longer than a busy machine delays a rank.
        let soon = |_| vec![("PA_TEST_TIMEOUT_MS", "6000".to_owned())];
        let Some(mut ranks) = case.start("survive", soon) else { return };
        ranks.iter_mut().for_each(|rank| drop(rank.wait_for("ready")));
        std::thread::sleep(Duration::from_micros(chance.below(200_000)));
        ranks[1].signal(Signal::STOP);
        ranks[0].wait_for("agreed");
        ranks[2].wait_for("agreed");
        ranks[1].signal(Signal::CONT);
        assert_eq!(ranks[1].end(), Some(5), "{:#?}", ranks[1].output);
        std::thread::sleep(Duration::from_millis(100));
        for rank in [0, 2] {
            ranks[rank].ask_to_end();
            assert_eq!(ranks[rank].end(), Some(0), "{:#?}", ranks[rank].output);
            assert_eq!(ranks[rank].said("ended").len(), 1);
        }
    }
}
