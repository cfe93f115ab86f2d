//! Averages on devices that behave as unkindly as `../shared/GPU.md` expects of real ones: each
//! scenario of its findings A1 to A5, and the other scenarios of this program, under the modes of
//! the simulator that take one kindness away each, alone and in pairs.
//!
//! A case is a process of its own under its mode. A case that hangs ends within seconds, by the
//! simulator's detection of wedges, with a line that says what waits for what. `matrix` writes the
//! outcome of every case to a file. One table of more than 400 lines, in the order of the findings.

mod case;
pub mod matrix;
mod modes;
mod outer;
mod ranks;
mod trainer;

use test_support::{Skip, Test};

use case::{cases, check, check_former, Case};
use modes::*;
pub use ranks::process;

/// Runs the scenario of a child process: words, the first of which says what kind it is.
pub fn run(scenario: &str) {
    let words: Vec<&str> = scenario.split(' ').collect();
    match words[..] {
        ["threads", ref plan @ ..] => ranks::threads(plan),
        ["processes", ref plan @ ..] => ranks::processes(plan),
        // A test of processes, under the settings of this one.
        ["test", name] => match name {
            "processes_share_a_device" => crate::cuda_processes::processes_share_a_device(),
            "an_abort_ends_the_kernels" => {
                crate::cuda_processes::an_abort_ends_the_kernels_of_all_processes();
            }
            "kill_at_a_step" => crate::cuda_processes::kill_at_a_step_leaves_survivors_running(),
            other => panic!("no test {other}"),
        },
        _ => panic!("no scenario {scenario}"),
    }
}

/// Declares tests, each with the finding that it is about and its cases.
macro_rules! tests {
    ($($(#[doc = $doc:literal])* $name:ident: $finding:literal, $cases:expr;)*) => {
        $($(#[doc = $doc])* fn $name() { check(&$cases); })*

        /// The tests of this module.
        pub fn tests(skip: &Skip) -> Vec<Test> {
            let test = |name: &str, run: fn()| {
                Test::new(&format!("unkind::{name}"), run).unless(skip)
            };
            vec![
                test("the_former_way_fails", || check_former(&former())),
                $(test(stringify!($name), $name)),*
            ]
        }

        /// Cases of all tests, each with the test's name and its finding.
        fn all() -> Vec<(&'static str, &'static str, Vec<Case>)> {
            vec![$((stringify!($name), $finding, $cases)),*]
        }
    };
}

/// Worlds of threads on one device, by both algorithms.
fn one_device(act: &str, ranks: usize) -> Vec<String> {
    let devices = vec!["0"; ranks].join(",");
    ["ring", "direct"].map(|algorithm| format!("threads {act} {algorithm} {devices}")).to_vec()
}

/// [`one_device`], and a world of threads on two devices.
fn one_and_two_devices(act: &str, ranks: usize) -> Vec<String> {
    let devices = ["0", "1"].repeat(ranks / 2).join(",");
    [one_device(act, ranks), vec![format!("threads {act} ring {devices}")]].concat()
}

/// Worlds of 2 and of 4 ranks with these outer optimizers.
fn with_outer(act: &str) -> Vec<String> {
    [one_and_two_devices(act, 2), one_and_two_devices(act, 4)].concat()
}

/// Some of [`with_outer`]: both algorithms, both sizes, one device and two.
fn some_with_outer(act: &str) -> Vec<String> {
    ["ring 0,0", "direct 0,0,0,0", "ring 0,1,0,1"].map(|of| format!("threads {act} {of}")).to_vec()
}

/// Worlds of threads with a stage, on one device, on two, and on two that ranks share.
fn with_stage(act: &str) -> Vec<String> {
    ["0,0", "0,1", "0,1,0,1"].map(|of| format!("threads {act}+stage ring {of}")).to_vec()
}

/// Worlds of threads with an option, by both algorithms, on one device and on two.
fn threads_with(option: &str, act: &str) -> Vec<String> {
    let worlds = ["ring 0,0", "direct 0,0,0,0", "ring 0,1"];
    worlds.map(|of| format!("threads {act}+{option} {of}")).into()
}

/// Worlds of processes with a device each, and links of their own choice.
fn processes(act: &str) -> Vec<String> {
    vec![format!("processes {act} auto 0,1"), format!("processes {act} auto 0,1,2")]
}

tests! {
    /// Cooperative grids of one device run one after the other.
    cooperative_grids_that_take_turns: "A1", [
        cases(&[one_device("averages", 2), one_device("averages", 4)].concat(), COOP),
    ].concat();

    /// Blocks that fit by their registers, and grids that start as a whole or not at all.
    ranks_that_share_a_device_by_its_registers: "A1", [
        cases(&one_device("averages", 2), ROOM),
        cases(&one_device("averages", 4), ROOM),
        cases(&one_device("averages", 8), WIDE_ROOM),
    ].concat();

    /// A block of another kernel stays on the device during the averages.
    another_kernel_that_stays: "A1", [
        cases(&one_device("resident", 2), OCCUPANCY),
        cases(&one_device("resident", 2), ROOM),
        cases(&one_and_two_devices("resident", 4), ROOM),
    ].concat();

    /// The trainer of a late rank allocates.
    a_late_trainer_allocates: "A2", cases(&one_and_two_devices("alloc", 2), WAITS);
    /// The trainer of a late rank frees.
    a_late_trainer_frees: "A2", cases(&one_and_two_devices("free", 2), WAITS);
    /// The trainer of a late rank allocates, frees or registers page-locked memory.
    a_late_trainer_pins_memory: "A2", [
        cases(&one_and_two_devices("pinned", 2), WAITS),
        cases(&one_and_two_devices("unpinned", 2), WAITS),
        cases(&one_and_two_devices("registered", 2), WAITS),
    ].concat();
    /// The trainer of a late rank loads a module, or takes a function out of one.
    a_late_trainer_loads_a_module: "A2", [
        cases(&one_and_two_devices("module", 2), WAITS),
        cases(&one_and_two_devices("fetch", 2), WAITS),
    ].concat();
    /// The trainer of a late rank launches a kernel for the first time, which loads its code.
    a_late_trainer_launches_for_the_first_time: "A2",
        cases(&one_and_two_devices("launch", 2), LAZY);
    /// The trainer of a late rank waits for the device.
    a_late_trainer_synchronizes: "A2", cases(&one_device("synchronize", 2), PLAIN);
    /// Launches return when their work is done.
    launches_that_block: "A2", [
        cases(&one_and_two_devices("waited", 2), BLOCKING),
        cases(&one_and_two_devices("started", 2), BLOCKING),
        cases(&one_and_two_devices("alloc", 2), BLOCKING),
    ].concat();
    /// A trainer that is far ahead of a late peer fills its launch queue.
    a_trainer_runs_ahead: "A2", cases(&one_and_two_devices("ahead", 2), DEPTH);

    /// Streams share hardware queues, in whatever order they were created.
    streams_that_share_queues: "A3", [QUEUES, THREE_QUEUES, ONE_QUEUE].map(|mode| {
        let seeds = 0..if mode == QUEUES { 4 } else { 2 };
        let with_seed = |seed| one_and_two_devices("trainers", 4).into_iter()
            .map(move |scenario| format!("{scenario} {seed}"));
        cases(&seeds.flat_map(with_seed).collect::<Vec<_>>(), mode)
    }).concat();

    /// A device with a display ends kernels that run long.
    a_device_with_a_display: "A4", [
        cases(&one_and_two_devices("late", 2), DISPLAY),
        cases(&one_and_two_devices("late", 2), DISPLAY_AND_WAITS),
    ].concat();

    /// Processes share a device without MPS: their grids take turns, or slices of time.
    processes_that_share_a_device: "A5", [
        cases(&["processes waited auto 0,0", "processes waited auto 0,0,0,0"], NODE),
        cases(&["processes waited auto 0,0", "processes late auto 0,0"], SLICES),
        cases(&["processes waited auto 0,1,0,1"], NODE_OF_TWO),
        cases(&["test processes_share_a_device"], NODE),
        cases(&["test an_abort_ends_the_kernels", "test kill_at_a_step"], NODE_OF_TWO),
    ].concat();

    /// Processes with a device each.
    processes_with_a_device_each: "A2-A4", [
        cases(&processes("trainers"), QUEUES),
        cases(&processes("later"), ONE_QUEUE),
        cases(&processes("alloc"), WAITS),
        cases(&processes("launch"), LAZY),
        cases(&processes("late"), DISPLAY),
        cases(&processes("later"), QUEUES_AND_WAITS),
    ].concat();

    /// The probe of peer access itself waits for nothing that a device may hold back: peer access
    /// is found wherever there is any.
    the_probe_of_peer_access: "A6", [
        COOP, ROOM, QUEUES, ONE_QUEUE, WAITS, LAZY, DISPLAY, SHORT, BLOCKING, QUEUES_AND_WAITS,
    ].map(|mode| {
        cases(&["threads peer ring 0,1", "processes peer ring 0,1"], mode)
    }).concat();

    /// The direct average between devices, which access one another's tensors.
    direct_averages_between_devices: "A1-A4", [
        [COOP, OCCUPANCY, ROOM, WAITS, LAZY, SHORT, BLOCKING, QUEUES_AND_WAITS, DISPLAY_AND_WAITS]
            .map(|mode| cases(&["threads waited direct 0,1,0,1"], mode)).concat(),
        [QUEUES, THREE_QUEUES, ONE_QUEUE]
            .map(|mode| cases(&["threads trainers direct 0,1,0,1"], mode)).concat(),
        ["alloc", "free", "pinned", "module"]
            .map(|act| cases(&[format!("threads {act} direct 0,1")], WAITS)).concat(),
        cases(&["threads resident direct 0,1"], ROOM),
        cases(&["threads launch direct 0,1"], LAZY),
        cases(&["threads ahead direct 0,1"], DEPTH),
        cases(&["threads started direct 0,1"], BLOCKING),
        cases(&["threads late direct 0,1"], DISPLAY),
        ["all", "copies", "telemetry"].map(|option| {
            cases(&[format!("threads waited+{option} direct 0,1")], QUEUES_AND_WAITS)
        }).concat(),
    ].concat();

    /// Steps of outer optimizers, which have kernels of their own, in all worlds.
    outer_steps_of_ranks_that_are_threads: "A1-A3",
        [COOP, ROOM, QUEUES_AND_WAITS].map(|mode| cases(&with_outer("waited+all"), mode)).concat();
    /// The same in the other modes, in some worlds.
    outer_steps_in_further_modes: "A1-A4", [
        [OCCUPANCY, WAITS, LAZY, BLOCKING, SHORT, DISPLAY, DISPLAY_AND_WAITS]
            .map(|mode| cases(&some_with_outer("waited+all"), mode)).concat(),
        [QUEUES, THREE_QUEUES, ONE_QUEUE]
            .map(|mode| cases(&some_with_outer("trainers+all"), mode)).concat(),
    ].concat();
    /// The trainer of a late rank acts while its peers wait in an average with an outer step.
    outer_steps_beside_a_late_trainer: "A1, A2, A4", [
        cases(&one_device("resident+all", 2), ROOM),
        cases(&one_and_two_devices("alloc+nesterov", 2), WAITS),
        cases(&one_and_two_devices("launch+keeping", 2), LAZY),
        cases(&one_and_two_devices("ahead+adam", 2), DEPTH),
        cases(&one_and_two_devices("started+all", 2), BLOCKING),
        cases(&["threads late+keeping ring 0,1"], DISPLAY),
    ].concat();
    /// Steps of ranks that are processes.
    outer_steps_of_processes: "A1-A5", [
        cases(&["processes waited+all auto 0,0", "processes waited+all auto 0,0,0,0"], NODE),
        cases(&["processes waited+all auto 0,0"], SLICES),
        cases(&["processes waited+all auto 0,1,0,1"], NODE_OF_TWO),
        [COOP, ROOM, QUEUES, LAZY, DISPLAY, SHORT, BLOCKING, QUEUES_AND_WAITS].map(|mode| {
            cases(&["processes waited+all auto 0,1"], mode)
        }).concat(),
    ].concat();
    /// Steps of all dtypes, states that are saved and loaded, and calls that differ.
    scenarios_of_outer_optimizers: "A1-A4", [
        [COOP, ROOM, QUEUES_AND_WAITS].map(|mode| cases(&["outer-devices"], mode)).concat(),
        [COOP, ROOM, SHORT, BLOCKING, QUEUES_AND_WAITS, DISPLAY_AND_WAITS]
            .map(|mode| cases(&["outer-saved", "outer-calls"], mode)).concat(),
    ].concat();

    /// Stages of ranks that are threads, whose averages meet twice.
    stages_of_ranks_that_are_threads: "A1-A4", [
        [COOP, ROOM, QUEUES_AND_WAITS, SHORT, DISPLAY_AND_WAITS]
            .map(|mode| cases(&with_stage("waited"), mode)).concat(),
        [QUEUES, ONE_QUEUE].map(|mode| cases(&with_stage("trainers"), mode)).concat(),
    ].concat();
    /// The trainer of a late rank acts while its peers wait in an average with a stage.
    stages_beside_a_late_trainer: "A1, A2, A4", [
        cases(&["threads resident+stage ring 0,0"], ROOM),
        cases(&with_stage("alloc"), WAITS),
        cases(&with_stage("launch"), LAZY),
        cases(&["threads ahead+stage ring 0,1"], DEPTH),
        cases(&["threads started+stage ring 0,1"], BLOCKING),
        cases(&["threads late+stage ring 0,1"], DISPLAY),
    ].concat();
    /// Stages of ranks that are processes.
    stages_of_processes: "A1-A5", [
        cases(&["processes waited+stage auto 0,0", "processes waited+stage auto 0,0,0,0"], NODE),
        cases(&["processes waited+stage auto 0,0"], SLICES),
        cases(&["processes waited+stage auto 0,1,0,1"], NODE_OF_TWO),
        [ROOM, ONE_QUEUE, DISPLAY, BLOCKING, QUEUES_AND_WAITS].map(|mode| {
            cases(&["processes waited+stage auto 0,1"], mode)
        }).concat(),
        cases(&["processes later+stage auto 0,1", "processes alloc+stage auto 0,1"], WAITS),
        cases(&["stage-vetoes", "stage-streams"], QUEUES_AND_WAITS),
    ].concat();

    /// Ranks of two hosts, which exchange their shards between the two halves of an average.
    averages_of_several_hosts: "A1-A4", [
        [COOP, ROOM, WAITS, LAZY, SHORT, QUEUES_AND_WAITS, DISPLAY_AND_WAITS]
            .map(|mode| cases(&["threads waited+hosts ring 0,0,1,1"], mode)).concat(),
        [ROOM, QUEUES_AND_WAITS]
            .map(|mode| cases(&["threads waited+hosts ring 0,1,2,3"], mode)).concat(),
        [QUEUES, ONE_QUEUE]
            .map(|mode| cases(&["threads trainers+hosts ring 0,0,1,1"], mode)).concat(),
        cases(&["threads resident+hosts ring 0,0,1,1"], ROOM),
        ["alloc", "free", "pinned", "module"]
            .map(|act| cases(&[format!("threads {act}+hosts ring 0,1,2,3")], WAITS)).concat(),
        cases(&["threads launch+hosts ring 0,0,1,1"], LAZY),
        cases(&["threads ahead+hosts ring 0,0,1,1"], DEPTH),
        cases(&["threads started+hosts ring 0,0,1,1"], BLOCKING),
        cases(&["threads late+hosts ring 0,0,1,1"], DISPLAY),
    ].concat();

    /// Averages of copies, beside a trainer on a stream and between devices.
    averages_of_copies: "A1-A4", [
        COOP, ROOM, SHORT, BLOCKING, QUEUES_AND_WAITS, DISPLAY_AND_WAITS,
    ].map(|mode| cases(&["overlap-streams", "overlap-devices"], mode)).concat();
    /// Averages of copies of ranks that are threads, in every mode.
    averages_of_copies_of_threads: "A1-A4", [
        [COOP, OCCUPANCY, ROOM, WAITS, LAZY, SHORT, BLOCKING, QUEUES_AND_WAITS, DISPLAY_AND_WAITS]
            .map(|mode| cases(&threads_with("copies", "waited"), mode)).concat(),
        [QUEUES, THREE_QUEUES, ONE_QUEUE]
            .map(|mode| cases(&threads_with("copies", "trainers"), mode)).concat(),
    ].concat();
    /// The trainer of a rank acts before an average of a copy, so that its peers wait, and beside
    /// the next one.
    averages_of_copies_beside_a_late_trainer: "A1, A2, A4", [
        cases(&["threads resident+copies ring 0,0"], ROOM),
        ["alloc", "free", "pinned", "module"]
            .map(|act| cases(&threads_with("copies", act), WAITS)).concat(),
        cases(&threads_with("copies", "launch"), LAZY),
        cases(&threads_with("copies", "ahead"), DEPTH),
        cases(&threads_with("copies", "alloc"), BLOCKING),
        cases(&["threads late+copies ring 0,1"], DISPLAY),
    ].concat();
    /// Averages of copies of ranks that are processes.
    averages_of_copies_of_processes: "A1-A5", [
        cases(&["processes waited+copies auto 0,0", "processes waited+copies auto 0,0,0,0"], NODE),
        cases(&["processes waited+copies auto 0,0"], SLICES),
        cases(&["processes waited+copies auto 0,1,0,1"], NODE_OF_TWO),
        [COOP, ROOM, QUEUES, ONE_QUEUE, LAZY, DISPLAY, SHORT, BLOCKING, QUEUES_AND_WAITS]
            .map(|mode| cases(&["processes waited+copies auto 0,1"], mode)).concat(),
        cases(&["processes later+copies auto 0,1", "processes alloc+copies auto 0,1"], WAITS),
    ].concat();

    /// Averages with telemetry, which has launches of its own around them.
    averages_with_telemetry: "A1-A5", [
        [COOP, ROOM, WAITS, LAZY, SHORT, BLOCKING, QUEUES_AND_WAITS, DISPLAY_AND_WAITS]
            .map(|mode| cases(&threads_with("telemetry", "waited"), mode)).concat(),
        cases(&threads_with("telemetry", "trainers"), ONE_QUEUE),
        cases(&threads_with("telemetry", "alloc"), WAITS),
        cases(&["threads ahead+telemetry ring 0,1"], DEPTH),
        cases(&["threads started+telemetry ring 0,1"], BLOCKING),
        cases(&["processes waited+telemetry auto 0,0"], NODE),
        cases(&["processes waited+telemetry auto 0,1"], QUEUES_AND_WAITS),
    ].concat();

    /// Coded averages: on one device and between two, after failures, of copies and in graphs.
    coded_averages: "A1-A4", [
        [COOP, QUEUES_AND_WAITS].map(|mode| cases(&["coded", "coded-devices"], mode)).concat(),
        cases(&["coded-devices"], ROOM),
        [SHORT, BLOCKING, DISPLAY_AND_WAITS]
            .map(|mode| cases(&["coded-devices", "coded-failures"], mode)).concat(),
        [COOP, ROOM, SHORT, BLOCKING, QUEUES_AND_WAITS, DISPLAY_AND_WAITS]
            .map(|mode| cases(&["coded-copies-devices", "coded-graphs-devices"], mode)).concat(),
    ].concat();

    /// The other scenarios of this program, where grids take turns.
    scenarios_with_cooperative_grids_that_take_turns: "A1",
        [cases(&FEW, COOP), cases(&["averages", "links", "link-failures"], COOP)].concat();
    /// The same, on a device whose registers count.
    scenarios_on_a_device_with_its_registers: "A1",
        [cases(&FEW, ROOM), cases(&["averages"], WIDE_ROOM)].concat();
    /// The same, with shared queues and calls that wait for kernels.
    scenarios_with_queues_and_waits: "A2, A3", cases(&MORE, QUEUES_AND_WAITS);
    /// The same, on a device with a display whose calls wait for kernels.
    scenarios_with_a_display_and_waits: "A2, A4", cases(&FEW, DISPLAY_AND_WAITS);
    /// The same, where a launch queue is short.
    scenarios_with_a_short_launch_queue: "A2", cases(&["streams", "steps", "beside"], SHORT);
    /// The same, where launches block. (`streams` and `steps` are about averages that go on by
    /// themselves.)
    scenarios_with_launches_that_block: "A2", cases(&["trainers", "links"], BLOCKING);
}

/// Cases of each finding that the former way does not pass.
fn former() -> Vec<Case> {
    let on_waits = ["alloc", "free", "pinned", "module", "fetch"];
    let on_waits = on_waits.map(|act| format!("threads {act} ring 0,0"));
    [
        cases(&one_device("averages", 2), COOP),
        cases(&["threads averages+nesterov ring 0,0"], COOP),
        cases(&one_device("resident", 2), ROOM),
        cases(&["beside"], COOP),
        cases(&on_waits, WAITS),
        cases(&["threads alloc direct 0,0", "threads alloc ring 0,1"], WAITS),
        cases(&["threads launch ring 0,1"], LAZY),
        cases(&["threads ahead ring 0,0"], DEPTH),
        cases(&["threads trainers ring 0,0,0,0 0", "threads trainers direct 0,0,0,0 0"], ONE_QUEUE),
        cases(&["threads late ring 0,1", "processes late auto 0,1"], DISPLAY),
        cases(&["processes waited auto 0,0"], NODE),
    ]
    .concat()
}

/// Scenarios of `cuda` that end soon.
const FEW: [&str; 9] = [
    "trainers",
    "streams",
    "any-stream",
    "any-stream-devices",
    "steps",
    "beside",
    "interop",
    "interop-devices",
    "graphs-devices",
];

/// [`FEW`], and failures.
const MORE: [&str; 11] = [
    "trainers",
    "streams",
    "any-stream",
    "any-stream-devices",
    "steps",
    "beside",
    "interop",
    "interop-devices",
    "graphs-devices",
    "failures",
    "link-failures",
];
