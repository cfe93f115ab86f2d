//! Modes of the simulator: what `../shared/cudasim/README.md` calls a harsher device.

use test_support::simulator::Setting;

/// Settings of a case.
pub type Mode = &'static [Setting<'static>];

/// Ends a case that hangs. A wedge is reported when nothing but polling has happened for so long,
/// which is longer than any rank of a case is late where something may be held back meanwhile.
pub const ENDS: [Setting<'static>; 3] =
    [("CUDASIM_WEDGE", "abort"), ("CUDASIM_WEDGE_MS", "3000"), ("CUDASIM_KILL_S", "20")];

const COOP_SERIAL: Setting<'static> = ("CUDASIM_COOP", "serial");
const REAL: Setting<'static> = ("CUDASIM_OCCUPANCY", "real");
const FINITE: Setting<'static> = ("CUDASIM_ROOM", "finite");
const EIGHT_QUEUES: Setting<'static> = ("CUDASIM_QUEUES", "8");
const IMPLICIT_WAITS: Setting<'static> = ("CUDASIM_IMPLICIT_WAITS", "1");
const LAZY_LAUNCH: Setting<'static> = ("CUDASIM_LAZY", "launch");
const WATCHDOG: Setting<'static> = ("CUDASIM_WATCHDOG_S", "2");
/// Placeholder for a file of the case's own, which its processes share.
pub const OWN_NODE: Setting<'static> = ("CUDASIM_NODE", "own");

/// No mode.
pub const PLAIN: Mode = &[];
pub const COOP: Mode = &[COOP_SERIAL];
pub const OCCUPANCY: Mode = &[REAL];
pub const ROOM: Mode = &[REAL, FINITE];
/// With multiprocessors for 8 ranks, of which half are left for others.
pub const WIDE_ROOM: Mode = &[REAL, FINITE, ("CUDASIM_SMS", "32")];
pub const QUEUES: Mode = &[EIGHT_QUEUES];
pub const THREE_QUEUES: Mode = &[("CUDASIM_QUEUES", "3")];
pub const ONE_QUEUE: Mode = &[EIGHT_QUEUES, ("CUDA_DEVICE_MAX_CONNECTIONS", "1")];
pub const WAITS: Mode = &[IMPLICIT_WAITS];
pub const LAZY: Mode = &[IMPLICIT_WAITS, LAZY_LAUNCH];
pub const QUEUES_AND_WAITS: Mode = &[EIGHT_QUEUES, IMPLICIT_WAITS, LAZY_LAUNCH];
pub const DISPLAY: Mode = &[WATCHDOG];
pub const DISPLAY_AND_WAITS: Mode = &[WATCHDOG, IMPLICIT_WAITS, LAZY_LAUNCH];
pub const DEPTH: Mode = &[("CUDASIM_LAUNCH_DEPTH", "1024")];
pub const SHORT: Mode = &[("CUDASIM_LAUNCH_DEPTH", "64")];
pub const BLOCKING: Mode = &[("CUDA_LAUNCH_BLOCKING", "1")];
pub const NODE: Mode = &[COOP_SERIAL, OWN_NODE, ("CUDASIM_DEVICES", "1")];
pub const NODE_OF_TWO: Mode = &[COOP_SERIAL, OWN_NODE];
pub const SLICES: Mode = &[("CUDASIM_TIMESLICE_MS", "2"), OWN_NODE, ("CUDASIM_DEVICES", "1")];
