// What crosses between Rust and the kernels, and between one rank's kernels and another's. bindgen reads this file
// and no other; the result is src/abi.rs. Plain C, no implicit padding (bytemuck's Pod refuses it). Addresses are
// u64 so that a struct has one layout for host and device. Counters are u32 and compared wrap-safe.
#pragma once
#include <stdint.h>

#define PA_MAX_WORLD 16
#define PA_LINE_WORDS 32 /* u32 words in a 128-byte line: the stride of mailbox counters */
#define PA_PACK_BYTES 16
#define PA_ALIGN_PACKS 8 /* shards and channels begin on a multiple of it: no two ranks write one 128-byte line */

enum PaDtype { PA_F32 = 0, PA_F64 = 1, PA_F16 = 2, PA_BF16 = 3 };

// What one launch does. Direct and the pipelined ring are one launch, after PA_SCAN where non-finite values are to be
// rejected; the ring with the all-or-nothing commit is two launches and scans in its first.
enum PaKernel { PA_DIRECT = 0, PA_RING = 1, PA_RING_REDUCE = 2, PA_RING_GATHER = 3, PA_SCAN = 4 };

// How an average ended. Up to PA_NO_WEIGHT nothing is broken and the next average may run; from PA_TIMEOUT on the
// world is poisoned.
enum PaKind {
  PA_OPEN = 0,       // not decided yet
  PA_COMMITTED = 1,  // every rank writes the mean
  PA_UNNEEDED = 2,   // no rank had anything to average
  PA_NON_FINITE = 3, // a rank holds NaN or infinity, and was asked to reject it
  PA_LAYOUT = 4,     // a rank's tensors are not the ones the averager was built for
  PA_SCHEDULE = 5,   // ranks average at different points of the schedule
  PA_WEIGHTING = 6,  // some ranks passed a weight and some did not
  PA_BAD_WEIGHT = 7, // a weight that is negative, infinite or NaN
  PA_NO_WEIGHT = 8,  // all weights are zero
  PA_TIMEOUT = 16,   // a rank was not there before the deadline
  PA_ABORTED = 17,   // somebody called abort
  PA_DEPARTED = 18,      // a rank dropped its averager
};

// Where in the protocol a block was when it ended.
enum PaPhase { PA_AT_MEET = 0, PA_AT_REDUCE = 1, PA_AT_COMMIT = 2, PA_AT_GATHER = 3, PA_AT_EXIT = 4 };

enum PaFlag {
  PA_FLAG_REJECT_NON_FINITE = 1, // scan what is read; a NaN or infinity anywhere means nobody writes
  PA_FLAG_WEIGHTED = 2,          // this call carries a weight
  PA_FLAG_UNNEEDED = 4,          // this rank has no steps to average; it takes part if another rank has
  PA_FLAG_LAYOUT = 8,            // this rank's tensors are not the ones the averager was built for; see PaRecord
  PA_FLAG_NON_FINITE = 16,       // in a record: the scan before the meeting found a NaN or infinity
  PA_FLAG_JOINER = 32,            // this rank knows of a process that waits to join the world
  PA_FLAG_COMPLETED = 64,          // hosts keep PaBoard.through: who is gone before it was through ends every wait, not only those for it
  PA_FLAG_KEEP = 128,            // by the ring only: this rank makes every step, but its own tensors are not written. Of no concern to the
                                 // others. Not with PA_DIRECT, where the owner of a part writes the tensors of all ranks
};

// One tensor's place in its bucket. `first_pack` ascends; a tensor of no elements has no segment.
struct PaSegment {
  uint64_t address;    // of the first element; aligned to the element at least, not necessarily to a pack
  uint64_t elements;   // > 0
  uint64_t first_pack; // each tensor starts a new pack; what its last pack lacks is zero on the wire
};

// The tensors of one dtype as one index space of 16-byte packs. src/bucket.rs divides it.
struct PaBucket {
  uint64_t segments;      // PaSegment[segment_count]
  uint64_t packs;
  uint64_t channel_packs; // channel c has the packs from c * channel_packs on, so many of them or what is left
  uint64_t shard;         // Pack[channels][shard_packs]: the own shard of the mean, waiting for the commit
                          // (PA_RING_REDUCE -> PA_RING_GATHER)
  uint64_t shard_packs;   // own packs of one channel at most
  uint32_t segment_count;
  uint32_t dtype;    // PaDtype
  uint32_t chunk;    // data packs that one slot carries at most; a multiple of PA_ALIGN_PACKS
  uint32_t wire_f32; // 1: partial sums of f16 or bf16, which more than two ranks send, travel as f32: two wire packs for one data pack
};

// What a rank says as it enters an average: everything that must agree, and its weight.
struct PaRecord {
  uint64_t schedule; // digest of why it averages now
  double weight;
  uint64_t buckets;  // PaBucket*, which PA_DIRECT lets every rank read
  uint64_t detail;   // PA_FLAG_LAYOUT: index of the tensor that differs. Non-finite: PaChannel.bad
  uint64_t found;    // PA_FLAG_LAYOUT: (dtype << 56) | elements found. Else: where in its schedule the rank is, for PA_SCHEDULE
  uint32_t flags;    // PaFlag
  uint32_t reserved;
};

// A rank's notice board: written by that rank alone, read by all, one 128-byte line. The record of average e is
// record[e & 1]: a rank that is already in e + 1 does not overwrite what a slow one still reads, and nobody gets to
// e + 2 before all have arrived at e + 1.
struct PaBoard {
  uint32_t arrived;    // the last average this rank entered; published after its record
  uint32_t vote;       // 2·e: its tensors are finite and its reduce is done; 2·e + 1: done, but it holds a non-finite value
  uint32_t exited;       // 2·e: direct only, it touches nobody's tensors any more; 2·e + 1: it gave up half way
  uint32_t departed;       // 1: this rank dropped its averager and never comes again
  uint32_t waiting_on; // (beat << 8) | rank + 1 it is stuck behind, 0 if none: lets a timeout name the culprit, not the neighbour
  uint32_t sleepers;   // CPU: nonzero when someone may sleep on a word of this board
  uint32_t deciding;   // 1: this rank has its turn to write the decision or `failed`, or waits for it, see take_turn()
  uint32_t completed;    // PA_FLAG_THROUGH: the last average this rank is through with, said by its host, before `gone`
  struct PaRecord record[2];
};

// One per world, in memory that every rank can address.
struct PaControl {
  // (epoch << 32) | (where << 16) | (kind << 8) | rank: what was decided about the latest decided average. Only moves forward,
  // and is written in turn, so ranks that time out and ranks that commit can't disagree.
  uint64_t decision;
  uint64_t reserved0[15];
  uint32_t abort;  // (kind << 8) | rank: the host poisoned the world; 0: it did not. Besides `gone` and `through`, all that a host writes
  uint32_t failed; // the same of the first failure that a kernel met. Set once, in turn
  uint32_t reserved1[30];
  struct PaBoard board[PA_MAX_WORLD];
};

// One block's own state and status record: private to its rank, on lines of its own.
struct PaChannel {
  uint32_t recv_seq;    // chunks taken from the inbox so far
  uint32_t send_seq;    // chunks put into the outbox so far
  uint32_t epoch;       // averages entered so far
  uint32_t outcome;     // PaKind of the last launch; PA_OPEN: it left without a word (fault_step). After PA_RING_REDUCE, PA_COMMITTED means
                        // that this block is ready to vote
  uint32_t peer;        // the rank it names
  uint32_t phase;       // PaWhere it ended at
  uint32_t step;        // protocol steps it had made by then
  uint32_t committed;   // 1: tensors may have been written
  uint64_t bad;         // 0, or 1 + (bucket << 56 | element of the bucket): a NaN or an infinity in the own tensors
  uint64_t detail;      // of the record of rank `peer`, where the outcome is about one. PA_SCHEDULE: `found` of rank 0's record
  uint64_t found;       // of the record of rank `peer`. PA_BAD_WEIGHT: its weight
  uint64_t waited_ns;   // time spent waiting for peers, over all launches of this average
  double divisor;       // what sums in f64 are divided by, agreed at the meeting
  double divisor_f32;   // what sums in f32 are divided by: the scales were rounded to f32
  uint32_t finished;    // channel 0: blocks that are done with everybody's tensors (PA_DIRECT)
  uint32_t remote;         // CPU: 1: the next rank's core is far away, see is_far()
  uint32_t deciding;    // channel 0: 1: one of this rank's blocks takes a turn, see take_turn()
  uint32_t joiner;       // 1: the record of some rank has PA_FLAG_GUEST
  uint16_t heartbeat[PA_MAX_WORLD];    // what every rank's beat was when a wait had almost lasted too long, see culprit()
  uint64_t segments[PA_MAX_WORLD]; // PA_DIRECT: every rank's segment table of the bucket at hand
  double scale[PA_MAX_WORLD];      // what each rank's values are multiplied by; negative: it only receives
};

// The arguments of one launch, the same for all its blocks.
struct PaArgs {
  uint64_t control;     // PaControl*
  uint64_t channel;     // PaChannel[channels], own
  uint64_t buckets;     // PaBucket[bucket_count], own
  uint64_t inbox;       // Pack[channels][slots][slot_packs]: own mailbox slots, the previous rank writes them
  uint64_t outbox;      // the next rank's inbox
  uint64_t filled_in;   // u32 line[channels]: chunks the previous rank has put into the inbox
  uint64_t filled_out;  // the next rank's filled_in
  uint64_t drained_in;  // u32 line[channels]: chunks the next rank has taken out of the outbox
  uint64_t drained_out; // the previous rank's drained_in
  uint64_t timeout_ns;  // how long one wait may last without the awaited rank moving
  uint64_t schedule;    // schedule, weight, detail, found: for the record
  double weight;
  uint64_t detail;
  uint64_t found;
  uint32_t rank;
  uint32_t world;       // 2 … PA_MAX_WORLD
  uint32_t channels;
  uint32_t slots;       // a power of two, at least 2
  uint32_t slot_packs;
  uint32_t bucket_count;
  uint32_t flags;       // PaFlag
  uint32_t fault_step;  // tests: leave without a word before this protocol step; 0: never
  uint32_t spins;       // CPU: how often a wait looks before it gives its core to another thread
  uint32_t remote_ns;      // CPU: past the caches into slots whose lines take longer to get hold of, each
  uint32_t delay_ns;    // tests: every block dawdles at each of its protocol steps, for up to so long; 0: no
  uint32_t reserved;
};
