// Made by bindgen from kernels/abi.h: `WRITE_ABI=1 cargo test --test build abi`. Do not edit.

pub const PA_MAX_WORLD: u32 = 16;
pub const PA_LINE_WORDS: u32 = 32;
pub const PA_PACK_BYTES: u32 = 16;
pub const PA_ALIGN_PACKS: u32 = 8;
pub const PA_VETOED: u64 = 9151314442816847872;
pub const PA_LEFT: i64 = -9223372036854775808;
pub const PA_RUN_PACKS: u32 = 64;
pub const PA_BLOCK_PACKS: u32 = 32;
pub const PA_NO_SEGMENT: u32 = 4294967295;
pub const PA_F32: PaDtype = 0;
pub const PA_F64: PaDtype = 1;
pub const PA_F16: PaDtype = 2;
pub const PA_BF16: PaDtype = 3;
pub type PaDtype = ::std::os::raw::c_uint;
pub const PA_DIRECT: PaKernel = 0;
pub const PA_RING: PaKernel = 1;
pub const PA_RING_COMMIT: PaKernel = 2;
pub const PA_SCAN: PaKernel = 3;
pub const PA_DIRECT_STEP: PaKernel = 4;
pub const PA_RING_STEP: PaKernel = 5;
pub const PA_RING_MIX: PaKernel = 6;
pub const PA_ANCHOR: PaKernel = 7;
pub const PA_SAMPLE: PaKernel = 8;
pub const PA_COMPARE: PaKernel = 9;
pub const PA_SNAPSHOT: PaKernel = 10;
pub const PA_APPLY: PaKernel = 11;
pub const PA_DIRECT_DELTA: PaKernel = 12;
pub const PA_RING_INT8: PaKernel = 13;
pub const PA_RING_BF16: PaKernel = 14;
pub const PA_REFERENCE: PaKernel = 15;
pub const PA_RING_VOTE: PaKernel = 16;
pub type PaKernel = ::std::os::raw::c_uint;
pub const PA_OPEN: PaKind = 0;
pub const PA_COMMITTED: PaKind = 1;
pub const PA_UNNEEDED: PaKind = 2;
pub const PA_NON_FINITE: PaKind = 3;
pub const PA_LAYOUT: PaKind = 4;
pub const PA_SCHEDULE: PaKind = 5;
pub const PA_WEIGHTING: PaKind = 6;
pub const PA_BAD_WEIGHT: PaKind = 7;
pub const PA_NO_WEIGHT: PaKind = 8;
pub const PA_TIMEOUT: PaKind = 16;
pub const PA_ABORTED: PaKind = 17;
pub const PA_DEPARTED: PaKind = 18;
pub type PaKind = ::std::os::raw::c_uint;
pub const PA_AT_MEET: PaPhase = 0;
pub const PA_AT_REDUCE: PaPhase = 1;
pub const PA_AT_COMMIT: PaPhase = 2;
pub const PA_AT_GATHER: PaPhase = 3;
pub const PA_AT_EXIT: PaPhase = 4;
pub type PaPhase = ::std::os::raw::c_uint;
pub const PA_RESIDUALS_KEPT: PaResiduals = 0;
pub const PA_RESIDUALS_STALE: PaResiduals = 1;
pub const PA_RESIDUALS_ADDED: PaResiduals = 2;
pub const PA_RESIDUALS_BEGIN: PaResiduals = 3;
pub type PaResiduals = ::std::os::raw::c_uint;
pub const PA_FLAG_REJECT_NON_FINITE: PaFlag = 1;
pub const PA_FLAG_WEIGHTED: PaFlag = 2;
pub const PA_FLAG_UNNEEDED: PaFlag = 4;
pub const PA_FLAG_LAYOUT: PaFlag = 8;
pub const PA_FLAG_NON_FINITE: PaFlag = 16;
pub const PA_FLAG_JOINER: PaFlag = 32;
pub const PA_FLAG_KEEP: PaFlag = 128;
pub const PA_FLAG_DONE: PaFlag = 256;
pub const PA_FLAG_OF_SCHEDULE: PaFlag = 512;
pub const PA_FLAG_WHOLE: PaFlag = 1024;
pub const PA_FLAG_STEP: PaFlag = 2048;
pub const PA_FLAG_MEASURED: PaFlag = 4096;
pub const PA_FLAG_STAGE: PaFlag = 65536;
pub const PA_FLAG_VETO: PaFlag = 131072;
pub const PA_FLAG_CODED: PaFlag = 524288;
pub const PA_FLAG_DELTA: PaFlag = 262144;
pub const PA_FLAG_HOSTS: PaFlag = 1048576;
pub type PaFlag = ::std::os::raw::c_uint;
pub const PA_OUTER_MOMENTUM: PaOuterKind = 0;
pub const PA_OUTER_ADAM: PaOuterKind = 1;
pub type PaOuterKind = ::std::os::raw::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaOuter {
    pub lr: f64,
    pub a: f64,
    pub b: f64,
    pub mu: f64,
    pub beta2: f64,
    pub tau: f64,
    pub mix: f64,
    pub kind: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaOuter"][::std::mem::size_of::<PaOuter>() - 64usize];
    ["Alignment of PaOuter"][::std::mem::align_of::<PaOuter>() - 8usize];
    ["Offset of field: PaOuter::lr"][::std::mem::offset_of!(PaOuter, lr) - 0usize];
    ["Offset of field: PaOuter::a"][::std::mem::offset_of!(PaOuter, a) - 8usize];
    ["Offset of field: PaOuter::b"][::std::mem::offset_of!(PaOuter, b) - 16usize];
    ["Offset of field: PaOuter::mu"][::std::mem::offset_of!(PaOuter, mu) - 24usize];
    [
        "Offset of field: PaOuter::beta2",
    ][::std::mem::offset_of!(PaOuter, beta2) - 32usize];
    ["Offset of field: PaOuter::tau"][::std::mem::offset_of!(PaOuter, tau) - 40usize];
    ["Offset of field: PaOuter::mix"][::std::mem::offset_of!(PaOuter, mix) - 48usize];
    ["Offset of field: PaOuter::kind"][::std::mem::offset_of!(PaOuter, kind) - 56usize];
    [
        "Offset of field: PaOuter::reserved",
    ][::std::mem::offset_of!(PaOuter, reserved) - 60usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaSegment {
    pub address: u64,
    pub elements: u64,
    pub first_pack: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaSegment"][::std::mem::size_of::<PaSegment>() - 24usize];
    ["Alignment of PaSegment"][::std::mem::align_of::<PaSegment>() - 8usize];
    [
        "Offset of field: PaSegment::address",
    ][::std::mem::offset_of!(PaSegment, address) - 0usize];
    [
        "Offset of field: PaSegment::elements",
    ][::std::mem::offset_of!(PaSegment, elements) - 8usize];
    [
        "Offset of field: PaSegment::first_pack",
    ][::std::mem::offset_of!(PaSegment, first_pack) - 16usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaBucket {
    pub segments: u64,
    pub packs: u64,
    pub channel_packs: u64,
    pub shard: u64,
    pub shard_packs: u64,
    pub state: u64,
    pub mean: u64,
    pub outer: PaOuter,
    pub reference: u64,
    pub residual: u64,
    pub residual_state: u64,
    pub sample: u64,
    pub sample_packs: u64,
    pub sample_period: u64,
    pub snapshot: u64,
    pub source: u64,
    pub segment_count: u32,
    pub dtype: u32,
    pub chunk: u32,
    pub wire_f32: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaBucket"][::std::mem::size_of::<PaBucket>() - 200usize];
    ["Alignment of PaBucket"][::std::mem::align_of::<PaBucket>() - 8usize];
    [
        "Offset of field: PaBucket::segments",
    ][::std::mem::offset_of!(PaBucket, segments) - 0usize];
    [
        "Offset of field: PaBucket::packs",
    ][::std::mem::offset_of!(PaBucket, packs) - 8usize];
    [
        "Offset of field: PaBucket::channel_packs",
    ][::std::mem::offset_of!(PaBucket, channel_packs) - 16usize];
    [
        "Offset of field: PaBucket::shard",
    ][::std::mem::offset_of!(PaBucket, shard) - 24usize];
    [
        "Offset of field: PaBucket::shard_packs",
    ][::std::mem::offset_of!(PaBucket, shard_packs) - 32usize];
    [
        "Offset of field: PaBucket::state",
    ][::std::mem::offset_of!(PaBucket, state) - 40usize];
    [
        "Offset of field: PaBucket::mean",
    ][::std::mem::offset_of!(PaBucket, mean) - 48usize];
    [
        "Offset of field: PaBucket::outer",
    ][::std::mem::offset_of!(PaBucket, outer) - 56usize];
    [
        "Offset of field: PaBucket::reference",
    ][::std::mem::offset_of!(PaBucket, reference) - 120usize];
    [
        "Offset of field: PaBucket::residual",
    ][::std::mem::offset_of!(PaBucket, residual) - 128usize];
    [
        "Offset of field: PaBucket::residual_state",
    ][::std::mem::offset_of!(PaBucket, residual_state) - 136usize];
    [
        "Offset of field: PaBucket::sample",
    ][::std::mem::offset_of!(PaBucket, sample) - 144usize];
    [
        "Offset of field: PaBucket::sample_packs",
    ][::std::mem::offset_of!(PaBucket, sample_packs) - 152usize];
    [
        "Offset of field: PaBucket::sample_period",
    ][::std::mem::offset_of!(PaBucket, sample_period) - 160usize];
    [
        "Offset of field: PaBucket::snapshot",
    ][::std::mem::offset_of!(PaBucket, snapshot) - 168usize];
    [
        "Offset of field: PaBucket::source",
    ][::std::mem::offset_of!(PaBucket, source) - 176usize];
    [
        "Offset of field: PaBucket::segment_count",
    ][::std::mem::offset_of!(PaBucket, segment_count) - 184usize];
    [
        "Offset of field: PaBucket::dtype",
    ][::std::mem::offset_of!(PaBucket, dtype) - 188usize];
    [
        "Offset of field: PaBucket::chunk",
    ][::std::mem::offset_of!(PaBucket, chunk) - 192usize];
    [
        "Offset of field: PaBucket::wire_f32",
    ][::std::mem::offset_of!(PaBucket, wire_f32) - 196usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaRecord {
    pub schedule: u64,
    pub weight: f64,
    pub buckets: u64,
    pub detail: u64,
    pub found: u64,
    pub flags: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaRecord"][::std::mem::size_of::<PaRecord>() - 48usize];
    ["Alignment of PaRecord"][::std::mem::align_of::<PaRecord>() - 8usize];
    [
        "Offset of field: PaRecord::schedule",
    ][::std::mem::offset_of!(PaRecord, schedule) - 0usize];
    [
        "Offset of field: PaRecord::weight",
    ][::std::mem::offset_of!(PaRecord, weight) - 8usize];
    [
        "Offset of field: PaRecord::buckets",
    ][::std::mem::offset_of!(PaRecord, buckets) - 16usize];
    [
        "Offset of field: PaRecord::detail",
    ][::std::mem::offset_of!(PaRecord, detail) - 24usize];
    [
        "Offset of field: PaRecord::found",
    ][::std::mem::offset_of!(PaRecord, found) - 32usize];
    [
        "Offset of field: PaRecord::flags",
    ][::std::mem::offset_of!(PaRecord, flags) - 40usize];
    [
        "Offset of field: PaRecord::reserved",
    ][::std::mem::offset_of!(PaRecord, reserved) - 44usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaBoard {
    pub arrived: u32,
    pub vote: u32,
    pub exited: u32,
    pub waiting_on: u32,
    pub sleepers: u32,
    pub deciding: u32,
    pub reserved: [u32; 2usize],
    pub record: [PaRecord; 2usize],
    pub measured: [[f64; 2usize]; 2usize],
    pub waited_ns: [u64; 2usize],
    pub reserved1: [u64; 10usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaBoard"][::std::mem::size_of::<PaBoard>() - 256usize];
    ["Alignment of PaBoard"][::std::mem::align_of::<PaBoard>() - 8usize];
    [
        "Offset of field: PaBoard::arrived",
    ][::std::mem::offset_of!(PaBoard, arrived) - 0usize];
    ["Offset of field: PaBoard::vote"][::std::mem::offset_of!(PaBoard, vote) - 4usize];
    [
        "Offset of field: PaBoard::exited",
    ][::std::mem::offset_of!(PaBoard, exited) - 8usize];
    [
        "Offset of field: PaBoard::waiting_on",
    ][::std::mem::offset_of!(PaBoard, waiting_on) - 12usize];
    [
        "Offset of field: PaBoard::sleepers",
    ][::std::mem::offset_of!(PaBoard, sleepers) - 16usize];
    [
        "Offset of field: PaBoard::deciding",
    ][::std::mem::offset_of!(PaBoard, deciding) - 20usize];
    [
        "Offset of field: PaBoard::reserved",
    ][::std::mem::offset_of!(PaBoard, reserved) - 24usize];
    [
        "Offset of field: PaBoard::record",
    ][::std::mem::offset_of!(PaBoard, record) - 32usize];
    [
        "Offset of field: PaBoard::measured",
    ][::std::mem::offset_of!(PaBoard, measured) - 128usize];
    [
        "Offset of field: PaBoard::waited_ns",
    ][::std::mem::offset_of!(PaBoard, waited_ns) - 160usize];
    [
        "Offset of field: PaBoard::reserved1",
    ][::std::mem::offset_of!(PaBoard, reserved1) - 176usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaControl {
    pub decision: u64,
    pub reserved0: [u64; 15usize],
    pub failed: u32,
    pub reserved1: [u32; 31usize],
    pub board: [PaBoard; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaControl"][::std::mem::size_of::<PaControl>() - 4352usize];
    ["Alignment of PaControl"][::std::mem::align_of::<PaControl>() - 8usize];
    [
        "Offset of field: PaControl::decision",
    ][::std::mem::offset_of!(PaControl, decision) - 0usize];
    [
        "Offset of field: PaControl::reserved0",
    ][::std::mem::offset_of!(PaControl, reserved0) - 8usize];
    [
        "Offset of field: PaControl::failed",
    ][::std::mem::offset_of!(PaControl, failed) - 128usize];
    [
        "Offset of field: PaControl::reserved1",
    ][::std::mem::offset_of!(PaControl, reserved1) - 132usize];
    [
        "Offset of field: PaControl::board",
    ][::std::mem::offset_of!(PaControl, board) - 256usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaHost {
    pub abort: u32,
    pub departed: u32,
    pub reserved: [u32; 30usize],
    pub completed: [u32; 16usize],
    pub called: [u32; 16usize],
    pub arrived: [u32; 16usize],
    pub reserved1: [u32; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaHost"][::std::mem::size_of::<PaHost>() - 384usize];
    ["Alignment of PaHost"][::std::mem::align_of::<PaHost>() - 4usize];
    ["Offset of field: PaHost::abort"][::std::mem::offset_of!(PaHost, abort) - 0usize];
    [
        "Offset of field: PaHost::departed",
    ][::std::mem::offset_of!(PaHost, departed) - 4usize];
    [
        "Offset of field: PaHost::reserved",
    ][::std::mem::offset_of!(PaHost, reserved) - 8usize];
    [
        "Offset of field: PaHost::completed",
    ][::std::mem::offset_of!(PaHost, completed) - 128usize];
    [
        "Offset of field: PaHost::called",
    ][::std::mem::offset_of!(PaHost, called) - 192usize];
    [
        "Offset of field: PaHost::arrived",
    ][::std::mem::offset_of!(PaHost, arrived) - 256usize];
    [
        "Offset of field: PaHost::reserved1",
    ][::std::mem::offset_of!(PaHost, reserved1) - 320usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaStatus {
    pub epoch: u32,
    pub outcome: u32,
    pub peer: u32,
    pub phase: u32,
    pub step: u32,
    pub committed: u32,
    pub detail: u64,
    pub found: u64,
    pub waited_ns: u64,
    pub joiner: u32,
    pub reserved: u32,
    pub active_ns: u64,
    pub measured: [f64; 2usize],
    pub sampled: [f64; 4usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaStatus"][::std::mem::size_of::<PaStatus>() - 112usize];
    ["Alignment of PaStatus"][::std::mem::align_of::<PaStatus>() - 8usize];
    [
        "Offset of field: PaStatus::epoch",
    ][::std::mem::offset_of!(PaStatus, epoch) - 0usize];
    [
        "Offset of field: PaStatus::outcome",
    ][::std::mem::offset_of!(PaStatus, outcome) - 4usize];
    ["Offset of field: PaStatus::peer"][::std::mem::offset_of!(PaStatus, peer) - 8usize];
    [
        "Offset of field: PaStatus::phase",
    ][::std::mem::offset_of!(PaStatus, phase) - 12usize];
    [
        "Offset of field: PaStatus::step",
    ][::std::mem::offset_of!(PaStatus, step) - 16usize];
    [
        "Offset of field: PaStatus::committed",
    ][::std::mem::offset_of!(PaStatus, committed) - 20usize];
    [
        "Offset of field: PaStatus::detail",
    ][::std::mem::offset_of!(PaStatus, detail) - 24usize];
    [
        "Offset of field: PaStatus::found",
    ][::std::mem::offset_of!(PaStatus, found) - 32usize];
    [
        "Offset of field: PaStatus::waited_ns",
    ][::std::mem::offset_of!(PaStatus, waited_ns) - 40usize];
    [
        "Offset of field: PaStatus::joiner",
    ][::std::mem::offset_of!(PaStatus, joiner) - 48usize];
    [
        "Offset of field: PaStatus::reserved",
    ][::std::mem::offset_of!(PaStatus, reserved) - 52usize];
    [
        "Offset of field: PaStatus::active_ns",
    ][::std::mem::offset_of!(PaStatus, active_ns) - 56usize];
    [
        "Offset of field: PaStatus::measured",
    ][::std::mem::offset_of!(PaStatus, measured) - 64usize];
    [
        "Offset of field: PaStatus::sampled",
    ][::std::mem::offset_of!(PaStatus, sampled) - 80usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaChannel {
    pub status: PaStatus,
    pub recv_seq: u32,
    pub send_seq: u32,
    pub segment: u32,
    pub remote: u32,
    pub finished: u32,
    pub deciding: u32,
    pub bad: u64,
    pub divisor: f64,
    pub divisor_f32: f64,
    pub agreed_ns: u64,
    pub heartbeat: [u16; 16usize],
    pub segments: [u64; 16usize],
    pub scale: [f64; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaChannel"][::std::mem::size_of::<PaChannel>() - 456usize];
    ["Alignment of PaChannel"][::std::mem::align_of::<PaChannel>() - 8usize];
    [
        "Offset of field: PaChannel::status",
    ][::std::mem::offset_of!(PaChannel, status) - 0usize];
    [
        "Offset of field: PaChannel::recv_seq",
    ][::std::mem::offset_of!(PaChannel, recv_seq) - 112usize];
    [
        "Offset of field: PaChannel::send_seq",
    ][::std::mem::offset_of!(PaChannel, send_seq) - 116usize];
    [
        "Offset of field: PaChannel::segment",
    ][::std::mem::offset_of!(PaChannel, segment) - 120usize];
    [
        "Offset of field: PaChannel::remote",
    ][::std::mem::offset_of!(PaChannel, remote) - 124usize];
    [
        "Offset of field: PaChannel::finished",
    ][::std::mem::offset_of!(PaChannel, finished) - 128usize];
    [
        "Offset of field: PaChannel::deciding",
    ][::std::mem::offset_of!(PaChannel, deciding) - 132usize];
    [
        "Offset of field: PaChannel::bad",
    ][::std::mem::offset_of!(PaChannel, bad) - 136usize];
    [
        "Offset of field: PaChannel::divisor",
    ][::std::mem::offset_of!(PaChannel, divisor) - 144usize];
    [
        "Offset of field: PaChannel::divisor_f32",
    ][::std::mem::offset_of!(PaChannel, divisor_f32) - 152usize];
    [
        "Offset of field: PaChannel::agreed_ns",
    ][::std::mem::offset_of!(PaChannel, agreed_ns) - 160usize];
    [
        "Offset of field: PaChannel::heartbeat",
    ][::std::mem::offset_of!(PaChannel, heartbeat) - 168usize];
    [
        "Offset of field: PaChannel::segments",
    ][::std::mem::offset_of!(PaChannel, segments) - 200usize];
    [
        "Offset of field: PaChannel::scale",
    ][::std::mem::offset_of!(PaChannel, scale) - 328usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaLink {
    pub slots: u64,
    pub filled: u64,
    pub drained: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaLink"][::std::mem::size_of::<PaLink>() - 24usize];
    ["Alignment of PaLink"][::std::mem::align_of::<PaLink>() - 8usize];
    ["Offset of field: PaLink::slots"][::std::mem::offset_of!(PaLink, slots) - 0usize];
    ["Offset of field: PaLink::filled"][::std::mem::offset_of!(PaLink, filled) - 8usize];
    [
        "Offset of field: PaLink::drained",
    ][::std::mem::offset_of!(PaLink, drained) - 16usize];
};
pub const PA_IN: PaLinkEnd = 0;
pub const PA_OUT: PaLinkEnd = 1;
pub const PA_LINKS: PaLinkEnd = 2;
pub type PaLinkEnd = ::std::os::raw::c_uint;
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaArgs {
    pub control: u64,
    pub host: u64,
    pub status: u64,
    pub waits: u64,
    pub channel: u64,
    pub buckets: u64,
    pub links: [PaLink; 2usize],
    pub timeout_ns: u64,
    pub schedule: u64,
    pub weight: f64,
    pub detail: u64,
    pub found: u64,
    pub measured: [f64; 2usize],
    pub share: f64,
    pub rank: u32,
    pub world: u32,
    pub channels: u32,
    pub slots: u32,
    pub slot_packs: u32,
    pub bucket_count: u32,
    pub flags: u32,
    pub fault_step: u32,
    pub spins: u32,
    pub remote_ns: u32,
    pub delay_ns: u32,
    pub from_segment: u32,
    pub to_segment: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaArgs"][::std::mem::size_of::<PaArgs>() - 216usize];
    ["Alignment of PaArgs"][::std::mem::align_of::<PaArgs>() - 8usize];
    [
        "Offset of field: PaArgs::control",
    ][::std::mem::offset_of!(PaArgs, control) - 0usize];
    ["Offset of field: PaArgs::host"][::std::mem::offset_of!(PaArgs, host) - 8usize];
    [
        "Offset of field: PaArgs::status",
    ][::std::mem::offset_of!(PaArgs, status) - 16usize];
    ["Offset of field: PaArgs::waits"][::std::mem::offset_of!(PaArgs, waits) - 24usize];
    [
        "Offset of field: PaArgs::channel",
    ][::std::mem::offset_of!(PaArgs, channel) - 32usize];
    [
        "Offset of field: PaArgs::buckets",
    ][::std::mem::offset_of!(PaArgs, buckets) - 40usize];
    ["Offset of field: PaArgs::links"][::std::mem::offset_of!(PaArgs, links) - 48usize];
    [
        "Offset of field: PaArgs::timeout_ns",
    ][::std::mem::offset_of!(PaArgs, timeout_ns) - 96usize];
    [
        "Offset of field: PaArgs::schedule",
    ][::std::mem::offset_of!(PaArgs, schedule) - 104usize];
    [
        "Offset of field: PaArgs::weight",
    ][::std::mem::offset_of!(PaArgs, weight) - 112usize];
    [
        "Offset of field: PaArgs::detail",
    ][::std::mem::offset_of!(PaArgs, detail) - 120usize];
    ["Offset of field: PaArgs::found"][::std::mem::offset_of!(PaArgs, found) - 128usize];
    [
        "Offset of field: PaArgs::measured",
    ][::std::mem::offset_of!(PaArgs, measured) - 136usize];
    ["Offset of field: PaArgs::share"][::std::mem::offset_of!(PaArgs, share) - 152usize];
    ["Offset of field: PaArgs::rank"][::std::mem::offset_of!(PaArgs, rank) - 160usize];
    ["Offset of field: PaArgs::world"][::std::mem::offset_of!(PaArgs, world) - 164usize];
    [
        "Offset of field: PaArgs::channels",
    ][::std::mem::offset_of!(PaArgs, channels) - 168usize];
    ["Offset of field: PaArgs::slots"][::std::mem::offset_of!(PaArgs, slots) - 172usize];
    [
        "Offset of field: PaArgs::slot_packs",
    ][::std::mem::offset_of!(PaArgs, slot_packs) - 176usize];
    [
        "Offset of field: PaArgs::bucket_count",
    ][::std::mem::offset_of!(PaArgs, bucket_count) - 180usize];
    ["Offset of field: PaArgs::flags"][::std::mem::offset_of!(PaArgs, flags) - 184usize];
    [
        "Offset of field: PaArgs::fault_step",
    ][::std::mem::offset_of!(PaArgs, fault_step) - 188usize];
    ["Offset of field: PaArgs::spins"][::std::mem::offset_of!(PaArgs, spins) - 192usize];
    [
        "Offset of field: PaArgs::remote_ns",
    ][::std::mem::offset_of!(PaArgs, remote_ns) - 196usize];
    [
        "Offset of field: PaArgs::delay_ns",
    ][::std::mem::offset_of!(PaArgs, delay_ns) - 200usize];
    [
        "Offset of field: PaArgs::from_segment",
    ][::std::mem::offset_of!(PaArgs, from_segment) - 204usize];
    [
        "Offset of field: PaArgs::to_segment",
    ][::std::mem::offset_of!(PaArgs, to_segment) - 208usize];
    [
        "Offset of field: PaArgs::reserved",
    ][::std::mem::offset_of!(PaArgs, reserved) - 212usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaLaunch {
    pub args: [PaArgs; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaLaunch"][::std::mem::size_of::<PaLaunch>() - 3456usize];
    ["Alignment of PaLaunch"][::std::mem::align_of::<PaLaunch>() - 8usize];
    ["Offset of field: PaLaunch::args"][::std::mem::offset_of!(PaLaunch, args) - 0usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaProbeSide {
    pub links: [PaLink; 2usize],
    pub result: u64,
    pub limit_ns: u64,
    pub packs: u32,
    pub slots: u32,
    pub rounds: u32,
    pub seed_out: u32,
    pub seed_in: u32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaProbeSide"][::std::mem::size_of::<PaProbeSide>() - 88usize];
    ["Alignment of PaProbeSide"][::std::mem::align_of::<PaProbeSide>() - 8usize];
    [
        "Offset of field: PaProbeSide::links",
    ][::std::mem::offset_of!(PaProbeSide, links) - 0usize];
    [
        "Offset of field: PaProbeSide::result",
    ][::std::mem::offset_of!(PaProbeSide, result) - 48usize];
    [
        "Offset of field: PaProbeSide::limit_ns",
    ][::std::mem::offset_of!(PaProbeSide, limit_ns) - 56usize];
    [
        "Offset of field: PaProbeSide::packs",
    ][::std::mem::offset_of!(PaProbeSide, packs) - 64usize];
    [
        "Offset of field: PaProbeSide::slots",
    ][::std::mem::offset_of!(PaProbeSide, slots) - 68usize];
    [
        "Offset of field: PaProbeSide::rounds",
    ][::std::mem::offset_of!(PaProbeSide, rounds) - 72usize];
    [
        "Offset of field: PaProbeSide::seed_out",
    ][::std::mem::offset_of!(PaProbeSide, seed_out) - 76usize];
    [
        "Offset of field: PaProbeSide::seed_in",
    ][::std::mem::offset_of!(PaProbeSide, seed_in) - 80usize];
    [
        "Offset of field: PaProbeSide::reserved",
    ][::std::mem::offset_of!(PaProbeSide, reserved) - 84usize];
};
#[repr(C)]
#[derive(Debug, Copy, Clone, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PaProbeResult {
    pub wrong: u32,
    pub late: u32,
    pub ns: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PaProbeResult"][::std::mem::size_of::<PaProbeResult>() - 16usize];
    ["Alignment of PaProbeResult"][::std::mem::align_of::<PaProbeResult>() - 8usize];
    [
        "Offset of field: PaProbeResult::wrong",
    ][::std::mem::offset_of!(PaProbeResult, wrong) - 0usize];
    [
        "Offset of field: PaProbeResult::late",
    ][::std::mem::offset_of!(PaProbeResult, late) - 4usize];
    [
        "Offset of field: PaProbeResult::ns",
    ][::std::mem::offset_of!(PaProbeResult, ns) - 8usize];
};
