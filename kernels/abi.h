// Structures shared between Rust and the kernels, and between the kernels of different ranks.
// bindgen reads this file and no other; the result is src/abi.rs. Plain C without implicit padding
// (bytemuck's Pod refuses it). Addresses are u64, so that a struct has one layout on host and
// device. Counters are u32 and compared wrap-safe.
#pragma once
#include <stdint.h>

#define PA_MAX_WORLD 16
#define PA_LINE_WORDS 32 /* u32 words in a 128-byte line: the stride of mailbox counters */
#define PA_PACK_BYTES 16
/* Alignment of shards and channels: no two ranks write one 128-byte line. */
#define PA_ALIGN_PACKS 8
/* PaRecord.detail with PA_NON_FINITE: a user's stage has refused. No PaChannel.bad is it. */
#define PA_VETOED 0x7f00000000000000
/* A bit of PaChannel.bad: the value is not one of a tensor, but what a user's stage has left for
   one. Larger than PA_VETOED, and than any other `bad`. */
#define PA_LEFT 0x8000000000000000

enum PaDtype { PA_F32 = 0, PA_F64 = 1, PA_F16 = 2, PA_BF16 = 3 };

// Kernel of one launch. PA_DIRECT and PA_RING follow PA_SCAN where non-finite values are rejected.
// PA_RING_COMMIT is all or nothing; it also scans, and can be launched in several parts, see
// PaArgs.from_segment.
// With an outer optimizer: PA_DIRECT_STEP in the place of PA_DIRECT, or PA_RING_STEP between the
// segments of PA_RING_COMMIT up to n and those from n + 1 on, which PA_RING_MIX runs if mix != 1.
// With a user's stage: PA_RING_VOTE behind the segments up to n, and before PA_RING_STEP.
// With PA_FLAG_DELTA, on the copy that PA_SNAPSHOT has made: PA_DIRECT_DELTA in the place of
// PA_DIRECT, or the segments of PA_RING_COMMIT up to n, and PA_RING_MIX. PA_APPLY comes later.
// PA_RING_INT8 and PA_RING_BF16 take the place of PA_RING_COMMIT in coded averages, and of
// PA_RING_MIX in those of copies, see coded.h.
enum PaKernel {
  PA_DIRECT = 0,
  PA_RING = 1,
  PA_RING_COMMIT = 2,
  PA_SCAN = 3,
  PA_DIRECT_STEP = 4,
  PA_RING_STEP = 5,
  PA_RING_MIX = 6,
  PA_ANCHOR = 7,  // after an average without a step: its result becomes the anchor
  PA_SAMPLE = 8,  // before everything else: keeps a sample of the own values, see sample.h
  PA_COMPARE = 9, // after everything else: compares the sample with the new values
  PA_SNAPSHOT = 10,  // copies the own tensors, see overlap.h
  PA_APPLY = 11,     // adds the differences that an average has left there to the own tensors
  PA_DIRECT_DELTA = 12,
  PA_RING_INT8 = 13,
  PA_RING_BF16 = 14,
  PA_REFERENCE = 15, // after an average that is not coded: its result becomes the reference
  PA_RING_VOTE = 16, // casts the vote after a user's stage has had the shard, see host_stage.h
};

// Outcome of an average. Up to PA_NO_WEIGHT nothing is broken and the next average may run; from
// PA_TIMEOUT on the world is poisoned.
enum PaKind {
  PA_OPEN = 0,       // not decided yet
  PA_COMMITTED = 1,  // every rank writes the mean
  PA_UNNEEDED = 2,   // no rank had anything to average
  PA_NON_FINITE = 3, // a rank that rejects NaN and infinity holds one; or PA_VETOED; or PA_LEFT
  PA_LAYOUT = 4,     // a rank's tensors differ from those the averager was built for
  PA_SCHEDULE = 5,   // ranks average at different points of the schedule
  PA_WEIGHTING = 6,  // some ranks passed a weight and some did not
  PA_BAD_WEIGHT = 7, // a weight is negative, infinite or NaN
  PA_NO_WEIGHT = 8,  // all weights are zero
  PA_TIMEOUT = 16,   // a rank did not arrive before the deadline
  PA_ABORTED = 17,   // abort was called
  PA_DEPARTED = 18,  // a rank dropped its averager
};

// Phase of the protocol in which a block ended.
enum PaPhase {
  PA_AT_MEET = 0, // entry barrier
  PA_AT_REDUCE = 1,
  PA_AT_COMMIT = 2,
  PA_AT_GATHER = 3,
  PA_AT_EXIT = 4, // exit barrier of the direct average
};

// Neighbouring packs of one run of a sample.
#define PA_RUN_PACKS 64

// Packs of a block of a code: neighbours that share a scale. The lanes of a warp on CUDA.
#define PA_BLOCK_PACKS 32

// PaBucket.residual_state.
enum PaResiduals {
  PA_RESIDUALS_KEPT = 0,   // they are what the last coded average has left
  PA_RESIDUALS_STALE = 1,  // the next coded average begins without any
  PA_RESIDUALS_ADDED = 2,  // a coded average is under way, or has failed, that adds to them
  PA_RESIDUALS_BEGIN = 3,  // the same, and it has begun without any
};

enum PaFlag {
  PA_FLAG_REJECT_NON_FINITE = 1, // scan the own tensors; a NaN or infinity vetoes the commit
  PA_FLAG_WEIGHTED = 2,          // this call carries a weight
  PA_FLAG_UNNEEDED = 4,    // nothing to average here; this rank takes part if another one needs it
  PA_FLAG_LAYOUT = 8,      // this rank's tensors differ from those of the build; see PaRecord
  PA_FLAG_NON_FINITE = 16, // in a record: the scan before the entry barrier found NaN or infinity
  PA_FLAG_JOINER = 32,     // this rank knows of a process that waits to join the world
  // Ring only: this rank makes every step, but its own tensors are not written. Not with PA_DIRECT,
  // where the owner of a part writes the tensors of all ranks.
  PA_FLAG_KEEP = 128,
  // This rank has ended its steps: it takes part in whatever call of their schedules the others
  // make, with its own `weight`, and no joiner is admitted meanwhile.
  PA_FLAG_DONE = 256,
  PA_FLAG_OF_SCHEDULE = 512, // the call is one that a rank with PA_FLAG_DONE takes part in
  PA_FLAG_WHOLE = 1024,      // PaOuter.mix counts as 1
  PA_FLAG_STEP = 2048,       // the outer optimizer's step follows the commit, or PA_FLAG_STAGE
  PA_FLAG_MEASURED = 4096,   // PaBoard.measured belongs to this record
  PA_FLAG_STAGE = 65536,     // PA_RING_COMMIT casts no vote: PA_RING_VOTE does, after the stage
  PA_FLAG_VETO = 131072,     // PA_RING_VOTE: the stage has refused the average
  PA_FLAG_CODED = 524288, // PA_RING_INT8 or PA_RING_BF16 makes the average, on all ranks or on none
  // The result less the former value is written in the place of the result. With PA_FLAG_WHOLE. In
  // a coded average nothing is written there: the reference has the result, and PA_APPLY, which has
  // PA_FLAG_CODED then, makes the difference.
  PA_FLAG_DELTA = 262144,
  // The average is of several hosts: the sum is made although no rank here has news or weight.
  // Where none has weight, all count alike in it. The hosts decide whether it counts.
  PA_FLAG_HOSTS = 1048576,
};

// Outer optimizer, see stage.h.
enum PaOuterKind {
  PA_OUTER_MOMENTUM = 0, // one slot: velocity
  PA_OUTER_ADAM = 1,     // two slots: both moments
};
struct PaOuter {
  double lr;
  double a, b;  // PA_OUTER_MOMENTUM: factors of the difference and of the velocity
  double mu;    // decay of the first slot
  double beta2; // PA_OUTER_ADAM: decay of the second slot
  double tau;   // PA_OUTER_ADAM: added to the root
  double mix;   // share of the result in each rank's new values; the rest is its own
  uint32_t kind;
  uint32_t reserved;
};

// Placement of one tensor in its bucket. `first_pack` ascends; an empty tensor has no segment.
struct PaSegment {
  uint64_t address;    // of the first element; aligned to the element, not necessarily to a pack
  uint64_t elements;   // > 0
  uint64_t first_pack; // each tensor starts a new pack; its last pack is padded with zeros
};

// Tensors of one dtype as one index space of 16-byte packs, divided by src/bucket.rs.
struct PaBucket {
  uint64_t segments; // PaSegment[segment_count]
  uint64_t packs;
  uint64_t channel_packs; // channel c begins at pack c * channel_packs; the last may be shorter
  uint64_t shard;         // Pack[channels][shard_packs]: own shard of the mean, until the commit of
                          // PA_RING_COMMIT
  uint64_t shard_packs;   // capacity of one channel's shard
  // State of the outer optimizer, or 0: SumOf<T>[slots + 1][channels][shard_packs of elements]. The
  // anchor comes first.
  uint64_t state;
  uint64_t mean; // ring with `state` or PA_FLAG_STAGE: SumOf<T>[channels][shard_packs of elements];
                 // `shard` itself where that has the size
  struct PaOuter outer;
  // Coded averages: Pack[packs] each, or 0. The values that all ranks have had after the last
  // average, and this rank's part of what the mean still lacks.
  uint64_t reference;
  uint64_t residual;
  uint64_t residual_state; // u32[channels]: PaResiduals of each block's part of it
  uint64_t sample;        // Pack[channels][sample_packs]: own values before the average, or 0
  uint64_t sample_packs;  // capacity of one channel's sample
  uint64_t sample_period; // packs from the place of one run to that of the next; at least a run
  uint64_t snapshot;      // Pack[packs]: copy of the tensors, which `segments` describe then, or 0
  uint64_t source;        // PaSegment[segment_count]: the tensors that it is a copy of, or 0
  uint32_t segment_count;
  uint32_t dtype;    // PaDtype
  uint32_t chunk;    // data packs per slot at most; a multiple of PA_ALIGN_PACKS
  uint32_t wire_f32; // 1: partial sums of f16 or bf16, which exist from 3 ranks on, travel as f32:
                     // two wire packs per data pack
};

// Entry record of a rank: everything that must agree, and its weight.
struct PaRecord {
  uint64_t schedule; // digest of the reason to average now
  double weight;
  uint64_t buckets;  // PaBucket*; PA_DIRECT lets every rank read it
  uint64_t detail;   // PA_FLAG_LAYOUT: index of the differing tensor. Non-finite: PaChannel.bad
  uint64_t found;    // PA_FLAG_LAYOUT: (dtype << 56) | elements found. Else: position in the
                     // schedule, for PA_SCHEDULE
  uint32_t flags;    // PaFlag
  uint32_t reserved;
};

// Notice board of a rank, on lines of its own: written by that rank, read by all. The record of
// epoch e is record[e & 1]: a rank that is already in e + 1 must not overwrite what a slow rank
// still reads, and no rank reaches e + 2 before all have arrived at e + 1. The words that
// every average reads are on the first line.
struct PaBoard {
  uint32_t arrived;    // latest epoch entered; published after its record
  uint32_t vote;       // 2·e: finite and reduced; 2·e + 1: reduced, but holds a non-finite value
  uint32_t exited;     // direct only. 2·e: accesses no peer's tensors any more; 2·e + 1: gave up
  uint32_t waiting_on; // (heartbeat << 8) | awaited rank + 1; 0: none. See find_straggler()
  uint32_t sleepers;   // CPU: threads that may sleep on a word of this board
  uint32_t deciding;   // 1: holds the turn lock or waits for it, see take_turn()
  uint32_t reserved[2];
  struct PaRecord record[2];
  double measured[2][2]; // of each record, with PA_FLAG_MEASURED: what this rank alone knows
  uint64_t waited_ns[2]; // of each record, by PA_SAMPLE: its wait in the average before
  uint64_t reserved1[10];
};

// Control block, one per world, addressable by every rank.
struct PaControl {
  // (epoch << 32) | (phase << 16) | (kind << 8) | rank: outcome of the latest decided epoch. Moves
  // forward only. Written under the turn lock, so a rank that times out and a rank that commits
  // cannot disagree.
  uint64_t decision;
  uint64_t reserved0[15];
  // (kind << 8) | rank: first failure found by a kernel; written once, under the lock. 0: none
  uint32_t failed;
  uint32_t reserved1[31];
  struct PaBoard board[PA_MAX_WORLD];
};

// Words that hosts write and kernels read, one per world, in memory of the host: a host ends the
// waits of kernels by a store, whatever the device is doing. Hosts also find a rank here that
// another host has lost.
struct PaHost {
  uint32_t abort;    // (kind << 8) | rank: a host poisoned the world; 0: none did
  uint32_t departed; // bit r: rank r has dropped its averager, for good
  uint32_t reserved[30];
  uint32_t completed[PA_MAX_WORLD]; // latest epoch that the rank completed; before `departed`
  // The words below are none of the kernels' business. They count averages on devices, replays of
  // graphs aside: those that the rank's host has called, and those that its stream has come to.
  uint32_t called[PA_MAX_WORLD];
  uint32_t arrived[PA_MAX_WORLD];
  uint32_t reserved1[PA_MAX_WORLD];
};

// Status record of one block: how its last average ended. Written in memory of the host.
struct PaStatus {
  uint32_t epoch;     // averages entered
  uint32_t outcome;   // PaKind of the average. PA_OPEN: not ended, or ended by fault_step
  uint32_t peer;      // the rank that the outcome names
  uint32_t phase;     // PaPhase in which the block ended
  uint32_t step;      // protocol steps made by then
  uint32_t committed; // 1: tensors may have been written
  uint64_t detail;    // from the record of `peer`. PA_SCHEDULE: `found` of the call compared with.
                      // PA_UNNEEDED: number of ranks with PA_FLAG_DONE
  uint64_t found;     // from the record of `peer`. PA_BAD_WEIGHT: its weight
  uint64_t waited_ns; // time spent waiting for peers, over all launches of this average
  uint32_t joiner;    // 1: a rank's record has PA_FLAG_JOINER
  uint32_t reserved;
  // Set on a rank with PA_FLAG_MEASURED, after PA_COMMITTED:
  uint64_t active_ns; // time since the end of the entry barrier
  double measured[2]; // largest of all records, the same on every rank; 0: none
  // Written by PA_COMPARE, from the sample of this block's packs, scaled up to all of them:
  // squares of the new values and of their differences from the old ones; the largest difference,
  // not scaled; values that are not finite, or were not.
  double sampled[4];
};

// State of one block, private to its rank, on lines of its own.
struct PaChannel {
  struct PaStatus status; // the original of the record
  uint32_t recv_seq;      // chunks taken out of links[PA_IN]
  uint32_t send_seq;      // chunks put into links[PA_OUT]
  uint32_t segment;       // PA_RING_COMMIT: segment that comes next; PA_NO_SEGMENT: none
  uint32_t remote;        // CPU: 1: the next rank's core is remote, see reader_is_remote()
  uint32_t finished;      // channel 0: blocks that have reached the vote, or the exit (PA_DIRECT)
  uint32_t deciding;      // channel 0: lock among the blocks of this rank, see take_turn()
  uint64_t bad;       // 1 + (bucket << 56 | element) of a NaN or infinity in the own tensors, or 0;
                      // or with PA_LEFT
  double divisor;     // divisor of sums in f64, agreed at the entry barrier
  double divisor_f32; // divisor of sums in f32, whose scales were rounded to f32
  uint64_t agreed_ns; // clock at the end of the entry barrier
  uint16_t heartbeat[PA_MAX_WORLD]; // heartbeats at the start of the watch, see begin_watch()
  uint64_t segments[PA_MAX_WORLD];  // PA_DIRECT: every rank's segment table of the current bucket
  double scale[PA_MAX_WORLD];       // factor of each rank's values; negative: it only receives
};

// Segments of PA_RING_COMMIT, PA_RING_INT8 and PA_RING_BF16 in a world of n ranks: 0 publishes the
// record, 1 validates all records and makes step 0 of the reduce, s = 2 … n step s - 1. At the end
// of n the vote is cast, at the begin of n + 1 the votes are counted, and n + 1 … 2 n are the n
// steps of the gather. No segment waits for what its peers do in the same one.
// A launch runs all segments of the reduce (1 … n) or one of them at most, and the same of the
// gather (n + 1 … 2 n): it takes each bucket through its segments, and chunks are in a mailbox in
// the order of launches, buckets, segments. So all ranks cut the reduce and the gather alike.
#define PA_SEGMENTS(world) (2 * (world) + 1)
#define PA_NO_SEGMENT 0xffffffffu

// A link of the ring: the mailbox between a rank that writes and one that reads. The slots lie in
// the reader's memory (push), in the writer's (pull) or in memory of the host; each counter lies
// beside the rank that polls it.
struct PaLink {
  uint64_t slots;   // Pack[channels][slots][slot_packs]
  uint64_t filled;  // u32 line[channels]: chunks put in, polled by the reader
  uint64_t drained; // u32 line[channels]: chunks taken out, polled by the writer
};
// PaArgs.links and PaProbeSide.links: where this rank reads, from the previous one; and where it
// writes, to the next one.
enum PaLinkEnd { PA_IN, PA_OUT, PA_LINKS };

// Arguments of one rank's part of a launch, the same for all its blocks.
struct PaArgs {
  uint64_t control;     // PaControl*
  uint64_t host;        // PaHost*
  uint64_t status;      // PaStatus[channels], own, in memory of the host
  uint64_t waits;       // PA_COMPARE: u64[world], own, in memory of the host; see PaBoard.waited_ns
  uint64_t channel;     // PaChannel[channels], own
  uint64_t buckets;     // PaBucket[bucket_count], own
  struct PaLink links[PA_LINKS];
  uint64_t timeout_ns;  // longest wait for a rank that does not move
  uint64_t schedule;    // schedule, weight, detail, found: see PaRecord
  double weight;
  uint64_t detail;
  uint64_t found;
  double measured[2]; // PA_FLAG_MEASURED: see PaBoard
  double share;       // PA_APPLY: share of the differences that is added
  uint32_t rank;
  uint32_t world; // 1 … PA_MAX_WORLD; 1 with an outer optimizer or a stage only
  uint32_t channels;
  uint32_t slots; // a power of two, at least 2
  uint32_t slot_packs;
  uint32_t bucket_count;
  uint32_t flags;      // PaFlag
  uint32_t fault_step; // tests: end before this protocol step; 0: never
  uint32_t spins;      // CPU: polls of a wait before it yields its core
  uint32_t remote_ns;  // CPU: time per line from which on slots are written by non-temporal stores
  uint32_t delay_ns;   // tests: longest delay before each protocol step; 0: none
  // Segments of PA_RING_COMMIT that this launch runs, to_segment excluded. A launch that does not
  // begin with segment 0 goes on where the one before it ended, unless that ended the average.
  uint32_t from_segment;
  uint32_t to_segment;
  uint32_t reserved;
};

// A launch on a device: the parts of all its ranks that are threads of one process. Block (c, i) is
// channel c of args[i].
struct PaLaunch {
  struct PaArgs args[PA_MAX_WORLD];
};

// One side of a probe, which writes and reads: `slots` chunks of `packs` for each block, and rounds
// in the place of chunks in the counters.
struct PaProbeSide {
  struct PaLink links[PA_LINKS];
  uint64_t result;   // PaProbeResult, in own memory, zeroed
  uint64_t limit_ns; // time from the kernel's start to its last wait
  uint32_t packs, slots, rounds;
  uint32_t seed_out, seed_in; // of the data
  uint32_t reserved;
};

struct PaProbeResult {
  uint32_t wrong; // packs that differ from what was written
  uint32_t late;  // blocks that have waited until the limit
  uint64_t ns;    // block 0: time from the end of its first round to the end of its last
};
