// A world of ranks in this process, laid out as abi.h says: control block, and for each rank its
// tensors, segment tables, mailboxes and channels. Ranks run on threads of their own and share
// nothing else, so that one may be an average ahead of another. One file of more than 400 lines,
// since each part of a world has the addresses of the others.
#pragma once
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "perturb.h"
#include "setup.h"
// The kernels use the clock and the yield of perturb.h.
#include "average_cpu.cpp"
#undef clock_gettime
#undef sched_yield

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
inline void off_limits(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
constexpr bool kOffLimits = true; // guards cannot be accessed, and need no check
#else
inline void off_limits(const void*, size_t) {}
constexpr bool kOffLimits = false;
#endif

inline std::atomic<const char*> scenario_name{"?"};
[[noreturn]] inline void wrong(const char* format, ...) {
  va_list list;
  va_start(list, format);
  flockfile(stdout);
  std::printf("WRONG %s: ", scenario_name.load());
  std::vprintf(format, list);
  std::printf("\n");
  std::fflush(stdout);
  va_end(list);
  _exit(1);
}

// Memory on lines of its own, freed with the world.
struct Region {
  char* base;
  size_t bytes;
  explicit Region(size_t size, int fill) : bytes((size + 127) / 128 * 128) {
    base = static_cast<char*>(std::aligned_alloc(128, bytes == 0 ? 128 : bytes));
    std::memset(base, fill, bytes);
  }
  Region(const Region&) = delete;
  ~Region() { std::free(base); }
  template <class T> T* as() const { return reinterpret_cast<T*>(base); }
  uint64_t address() const { return reinterpret_cast<uint64_t>(base); }
};

constexpr size_t kGuard = 64;
constexpr int kGuardByte = 0xa5;
struct Tensor {
  std::unique_ptr<Region> memory;
  char* data;
  uint64_t elements, first_pack;
};

struct Rank {
  std::vector<std::vector<Tensor>> tensors;             // by bucket
  std::vector<std::unique_ptr<Region>> segments, shards, states, means, copies; // by bucket
  std::vector<std::unique_ptr<Region>> references, residuals; // of coded setups
  std::unique_ptr<Region> buckets, channels, statuses, inbox, filled_in, drained_in;
  uint32_t averages = 0;
};

inline uint64_t round_up(uint64_t x, uint64_t to) { return (x + to - 1) / to * to; }

struct World {
  Setup s;
  Region control_memory, host_memory;
  std::vector<Rank> ranks;
  mutable Stop stop[PA_MAX_WORLD];
  uint32_t slot_packs = 0;

  PaControl* control() const { return control_memory.as<PaControl>(); }
  PaHost* host() const { return host_memory.as<PaHost>(); }
  PaChannel* channel(uint32_t rank, uint32_t c) const {
    return ranks[rank].channels->as<PaChannel>() + c;
  }
  PaStatus* status(uint32_t rank, uint32_t c) const {
    return ranks[rank].statuses->as<PaStatus>() + c;
  }

  explicit World(const Setup& setup)
      : s(setup), control_memory(sizeof(PaControl), 0), host_memory(sizeof(PaHost), 0),
        ranks(setup.world) {
    for (const Shape& shape : s.buckets) {
      const uint32_t wide = shape.wire_f32 && kFormat[shape.dtype].bytes == 2 ? 2 : 1;
      slot_packs = std::max(slot_packs, s.chunk * wide);
    }
    slot_packs += PA_ALIGN_PACKS; // a gap that no slot uses
    control()->decision = uint64_t(s.epoch) << 32 | PA_COMMITTED << 8;
    for (uint32_t r = 0; r < s.world; ++r) build(r);
  }
  World(const World&) = delete;

  void build(uint32_t r) {
    Rank& rank = ranks[r];
    PaBoard& board = control()->board[r];
    board.arrived = s.epoch;
    board.vote = board.exited = 2 * s.epoch;
    host()->completed[r] = s.epoch;
    stop[r].deciding = &board.deciding;
    rank.buckets = std::make_unique<Region>(s.buckets.size() * sizeof(PaBucket), 0);
    for (size_t b = 0; b < s.buckets.size(); ++b)
      rank.buckets->as<PaBucket>()[b] = build_bucket(rank, r, s.buckets[b]);
    rank.channels = std::make_unique<Region>(s.channels * sizeof(PaChannel), 0);
    rank.statuses = std::make_unique<Region>(s.channels * sizeof(PaStatus), 0);
    rank.filled_in = std::make_unique<Region>(s.channels * PA_LINE_WORDS * 4, 0);
    rank.drained_in = std::make_unique<Region>(s.channels * PA_LINE_WORDS * 4, 0);
    // NaN
    rank.inbox =
        std::make_unique<Region>(size_t(s.channels) * s.slots * slot_packs * PA_PACK_BYTES, 0xff);
    for (uint32_t i = 0; i < s.channels * s.slots; ++i)
      off_limits(rank.inbox->base + ((i + 1) * slot_packs - PA_ALIGN_PACKS) * PA_PACK_BYTES,
                 PA_ALIGN_PACKS * PA_PACK_BYTES);
    for (uint32_t c = 0; c < s.channels; ++c) {
      const uint32_t out = sequence_of(r, c), in = sequence_of((r + s.world - 1) % s.world, c);
      PaChannel& own = rank.channels->as<PaChannel>()[c];
      own.status.epoch = s.epoch, own.send_seq = out, own.recv_seq = in;
      own.segment = PA_NO_SEGMENT;
      *status(r, c) = own.status;
      rank.filled_in->as<uint32_t>()[c * PA_LINE_WORDS] = in;
      rank.drained_in->as<uint32_t>()[c * PA_LINE_WORDS] = out;
    }
  }
  uint32_t sequence_of(uint32_t r, uint32_t c) const { return s.sequence + 3 * r + 5 * c; }

  PaBucket build_bucket(Rank& rank, uint32_t r, const Shape& shape) {
    const unsigned bytes = kFormat[shape.dtype].bytes;
    std::vector<Tensor> tensors;
    std::vector<PaSegment> segments;
    uint64_t packs = 0;
    for (size_t t = 0; t < shape.elements.size(); ++t) {
      const uint64_t elements = shape.elements[t];
      // Two tensors in three lie across packs, on every rank differently.
      const uint64_t shift = (t + r) % 3 == 0 ? 0 : (1 + t + r) % per_pack(shape.dtype) * bytes;
      Tensor tensor{std::make_unique<Region>(2 * kGuard + shift + elements * bytes, kGuardByte),
                    nullptr, elements, packs};
      const Region& memory = *tensor.memory;
      tensor.data = memory.base + kGuard + shift;
      const char* end = tensor.data + elements * bytes;
      // one shadow byte per 8 bytes
      off_limits(memory.base, size_t(tensor.data - memory.base) / 8 * 8);
      off_limits(end, size_t(memory.base + memory.bytes - end));
      segments.push_back({reinterpret_cast<uint64_t>(tensor.data), elements, packs});
      packs += (elements + per_pack(shape.dtype) - 1) / per_pack(shape.dtype);
      tensors.push_back(std::move(tensor));
    }
    PaBucket bucket = {};
    bucket.packs = packs;
    bucket.channel_packs = round_up((packs + s.channels - 1) / s.channels, PA_ALIGN_PACKS);
    bucket.shard_packs =
        round_up((bucket.channel_packs + s.world - 1) / s.world, PA_ALIGN_PACKS) + PA_ALIGN_PACKS;
    bucket.segment_count = uint32_t(segments.size());
    bucket.dtype = shape.dtype;
    bucket.chunk = s.chunk;
    bucket.wire_f32 = shape.wire_f32;
    rank.segments.push_back(std::make_unique<Region>(segments.size() * sizeof(PaSegment), 0));
    std::memcpy(rank.segments.back()->base, segments.data(), segments.size() * sizeof(PaSegment));
    rank.shards.push_back(
        std::make_unique<Region>(bucket.shard_packs * s.channels * PA_PACK_BYTES, 0xff));
    bucket.segments = rank.segments.back()->address();
    bucket.shard = rank.shards.back()->address();
    if (s.steps) add_state(rank, bucket, bytes == 2 ? 2 : 1);
    if (s.stages) add_mean(rank, bucket, bytes == 2 ? 2 : 1);
    if (s.copies) add_copy(rank, bucket, segments);
    if (s.is_coded()) add_reference(rank, bucket);
    rank.tensors.push_back(std::move(tensors));
    return bucket;
  }

  // Momentum with rate 1 and without a past: from an anchor of 0 it gives the mean.
  void add_state(Rank& rank, PaBucket& bucket, uint64_t wide) const {
    const uint64_t array = bucket.shard_packs * s.channels * PA_PACK_BYTES * wide;
    rank.states.push_back(std::make_unique<Region>(2 * array, 0));
    bucket.state = rank.states.back()->address();
    if (s.mode == Mode::kCommit) add_mean(rank, bucket, wide);
    bucket.outer = {1, 0, 1, 0, 0, 0, 1, PA_OUTER_MOMENTUM, 0};
  }
  void add_mean(Rank& rank, PaBucket& bucket, uint64_t wide) const {
    const uint64_t array = bucket.shard_packs * s.channels * PA_PACK_BYTES * wide;
    rank.means.push_back(std::make_unique<Region>(wide == 2 ? array : 0, 0xff));
    bucket.mean = wide == 2 ? rank.means.back()->address() : bucket.shard;
  }
  void add_copy(Rank& rank, PaBucket& bucket, std::vector<PaSegment> segments) const {
    rank.copies.push_back(std::make_unique<Region>(bucket.packs * PA_PACK_BYTES, 0xff));
    bucket.snapshot = rank.copies.back()->address();
    for (PaSegment& segment : segments)
      segment.address = bucket.snapshot + segment.first_pack * PA_PACK_BYTES;
    rank.copies.push_back(std::make_unique<Region>(segments.size() * sizeof(PaSegment), 0));
    std::memcpy(rank.copies.back()->base, segments.data(), segments.size() * sizeof(PaSegment));
    bucket.source = bucket.segments;
    bucket.segments = rank.copies.back()->address();
  }
  // All ranks have had zeros; residuals are NaN, which the first average must not read.
  void add_reference(Rank& rank, PaBucket& bucket) const {
    const uint64_t bytes = bucket.packs * PA_PACK_BYTES;
    rank.references.push_back(std::make_unique<Region>(bytes, 0));
    rank.residuals.push_back(std::make_unique<Region>(bytes + s.channels * 4, 0xff));
    bucket.reference = rank.references.back()->address();
    bucket.residual = rank.residuals.back()->address();
    bucket.residual_state = bucket.residual + bytes;
    for (uint32_t c = 0; c < s.channels; ++c)
      PA_ISA::at<uint32_t>(bucket.residual_state)[c] = PA_RESIDUALS_STALE;
  }
  void clear_state(uint32_t r) const {
    for (const auto& state : ranks[r].states) std::memset(state->base, 0, state->bytes);
  }
  // A step changes the state of each block with data, as does an anchor; a failure changes none.
  void check_state(uint32_t r, const Call& call, const Outcome& o) const {
    for (size_t b = 0; b < ranks[r].states.size(); ++b) {
      const PaBucket& bucket = ranks[r].buckets->as<PaBucket>()[b];
      const Region& state = *ranks[r].states[b];
      const size_t half = 2 * bucket.shard_packs * s.channels * PA_PACK_BYTES *
                          (kFormat[bucket.dtype].bytes == 2 ? 2 : 1) / 2;
      const auto any = [&](size_t from, size_t to) {
        for (size_t i = from; i < to; ++i)
          if (state.base[i] != 0) return true;
        return false;
      };
      const bool anchor = any(0, half), velocity = any(half, 2 * half);
      const bool ends = o.kind == PA_COMMITTED, steps = ends && !call.anchors;
      // Small buckets leave some ranks without a shard.
      if ((anchor && !ends) || (velocity && !steps) ||
          (bucket.packs >= 8 * PA_ALIGN_PACKS * s.channels * s.world &&
           (anchor != ends || velocity != steps)))
        wrong("rank %u, bucket %zu: outcome %u, the anchor %s and the velocity %s", r, b, o.kind,
              anchor ? "changed" : "stayed", velocity ? "changed" : "stayed");
    }
  }

  PaArgs args(uint32_t r, const Call& call) const {
    const Rank &own = ranks[r], &next = ranks[(r + 1) % s.world],
               &previous = ranks[(r + s.world - 1) % s.world];
    PaArgs a = {};
    a.control = control_memory.address();
    a.host = host_memory.address();
    a.status = own.statuses->address();
    a.channel = own.channels->address();
    a.buckets = own.buckets->address();
    a.links[PA_IN] = {own.inbox->address(), own.filled_in->address(),
                      previous.drained_in->address()};
    a.links[PA_OUT] = {next.inbox->address(), next.filled_in->address(),
                       own.drained_in->address()};
    a.timeout_ns = s.timeout_ns;
    a.schedule = call.schedule, a.weight = call.weight, a.detail = call.detail,
    a.found = call.found;
    a.measured[0] = call.measured[0], a.measured[1] = call.measured[1];
    a.rank = r, a.world = s.world, a.channels = s.channels, a.slots = s.slots,
    a.slot_packs = slot_packs;
    a.spins = s.seed % 2 == 0 ? 200 : 0; // with a core per thread, and without
    // Non-temporal stores always, never, as measured.
    a.remote_ns = s.seed % 3 == 0 ? 0 : s.seed % 3 == 1 ? ~0u : 8;
    a.bucket_count = call.bucket_count ? call.bucket_count : uint32_t(s.buckets.size());
    a.buckets += call.first_bucket * sizeof(PaBucket);
    if (s.steps && !call.anchors) a.flags |= PA_FLAG_STEP | PA_FLAG_WHOLE;
    if (s.stages) a.flags |= PA_FLAG_STAGE | PA_FLAG_STEP;
    if (s.copies) a.flags |= PA_FLAG_DELTA | PA_FLAG_WHOLE, a.share = 1;
    if (s.copies && s.is_coded()) a.flags |= PA_FLAG_CODED;
    a.flags |= call.flags, a.fault_step = call.fault_step, a.delay_ns = call.delay_ns;
    a.from_segment = 0, a.to_segment = PA_SEGMENTS(s.world);
    return a;
  }

  // One launch: a thread for every lane of every block, joined.
  void launch(uint32_t r, const PaArgs& a, uint32_t kernel, uint32_t last_channel_us) const {
    const uint64_t seed = random_bits();
    std::vector<std::thread> threads;
#if defined(PA_LANES)
    std::vector<PA_ISA::Lanes> shared(s.channels);
    for (auto& block : shared)
      pthread_barrier_init(&block.barrier, nullptr, s.lanes), block.flag[0] = block.flag[1] = 0;
#endif
    const uint32_t blocks = last_channel_us == kNever ? s.channels - 1 : s.channels;
    for (uint32_t c = 0; c < blocks; ++c)
      for (uint32_t lane = 0; lane < s.lanes; ++lane)
        threads.emplace_back([&, c, lane] {
          delay_state = mix(seed ^ (r << 20 | c << 10 | lane));
          own_stop = &stop[r];
          perturb(3);
          if (c + 1 == s.channels && last_channel_us != 0) usleep(last_channel_us);
#if defined(PA_LANES)
          PA_ISA::run_kernel(PA_ISA::Exec{{c}, lane, s.lanes, &shared[c]}, a, kernel);
#else
          PA_ISA::run_kernel(PA_ISA::Exec{{c}}, a, kernel);
#endif
        });
    for (auto& thread : threads) thread.join();
#if defined(PA_LANES)
    for (auto& block : shared) pthread_barrier_destroy(&block.barrier);
#endif
  }

  // One average of one rank, with the launches that Rust makes.
  Outcome average(uint32_t r, const Call& call) {
    const PaArgs a = args(r, call);
    if (call.before_us != 0) usleep(call.before_us);
    // tensors of a wrong layout are not read
    const bool reads = !(call.flags & PA_FLAG_LAYOUT);
    const bool scans = (call.flags & PA_FLAG_REJECT_NON_FINITE) && reads;
    if (s.copies && reads) launch(r, a, PA_SNAPSHOT, 0);
    if (s.mode != Mode::kCommit && scans) launch(r, a, PA_SCAN, 0);
    const bool steps = s.steps && !call.anchors;
    if (s.mode == Mode::kDirect)
      launch(r, a, steps ? PA_DIRECT_STEP : s.copies ? PA_DIRECT_DELTA : PA_DIRECT,
             call.last_channel_us);
    if (s.mode == Mode::kRing) launch(r, a, PA_RING, call.last_channel_us);
    if (s.mode == Mode::kCommit) launch_parts(r, a, call);
    if (s.steps && call.anchors) launch(r, a, PA_ANCHOR, 0);
    if (call.in_full) launch(r, a, PA_REFERENCE, 0);
    const Outcome o = complete(r);
    if (s.copies) launch(r, a, PA_APPLY, 0); // which changes nothing after a failure
    return o;
  }

  bool mixes() const { return s.copies && !s.is_coded(); }
  // Segments of PA_RING_COMMIT that begin a launch, as a bit mask. With few slots a launch can end
  // behind the record and before the commit only: a segment's chunks must fit the mailbox.
  uint32_t cuts(uint32_t r, const Call& call) const {
    const uint32_t commit = 1u << (s.world + 1);
    uint32_t cuts = call.cuts;
    if ((s.steps && !call.anchors) || s.stages || mixes()) cuts |= commit;
    if (s.seed / 2 % 2 != 0 || call.between_us != 0 || stop[r].later_looks != 0) cuts |= commit;
    if ((s.seed + r) % 3 == 0) cuts |= 1u << 1;
    return cuts;
  }
  // The launches of PA_RING_COMMIT.
  void launch_parts(uint32_t r, PaArgs a, const Call& call) const {
    const uint32_t begins = cuts(r, call), end = PA_SEGMENTS(s.world);
    for (a.from_segment = 0; a.from_segment < end; a.from_segment = a.to_segment) {
      a.to_segment = a.from_segment + 1;
      while (a.to_segment < end && !(begins >> a.to_segment & 1)) ++a.to_segment;
      if (a.from_segment == s.world + 1) {
        if (call.between_us != 0) usleep(call.between_us);
        if (stop[r].later_looks != 0) stop[r].looks = stop[r].later_looks;
        if (s.stages) vote(r, a, call);
        if (s.steps && !call.anchors) launch(r, a, PA_RING_STEP, 0);
      }
      const bool reduces = a.from_segment <= s.world;
      const uint32_t kernel = mixes() && !reduces ? uint32_t(PA_RING_MIX)
                              : call.in_full      ? uint32_t(PA_RING_COMMIT)
                                                  : s.kernel;
      launch(r, a, kernel, reduces ? call.last_channel_us : 0);
    }
  }

  // The end of a stage on the host. One that refuses takes longer than its peers need to commit
  // without it.
  void vote(uint32_t r, PaArgs a, const Call& call) const {
    if (call.vetoes) usleep(2000), a.flags |= PA_FLAG_VETO;
    if (call.leaves) std::memset(first_mean(r, a), 0xff, 8); // NaN in f32 and in f64
    launch(r, a, PA_RING_VOTE, 0);
  }
  // Where the mean of the first pack of a rank's shard in channel 0 lies.
  char* first_mean(uint32_t r, const PaArgs& a) const {
    const PaBucket& bucket = ranks[r].buckets->as<PaBucket>()[0];
    if (PA_ISA::ring_shard_packs(bucket, a, 0) == 0) wrong("rank %u has no shard", r);
    return PA_ISA::at<char>(bucket.mean);
  }

  // What a host does when an average has ended on its rank.
  Outcome complete(uint32_t r) {
    ++ranks[r].averages;
    const Outcome o = outcome(r);
    if (o.kind != PA_OPEN && o.kind < PA_TIMEOUT)
      PA_ISA::store_release(&host()->completed[r], status(r, 0)->epoch);
    return o;
  }
  void depart(uint32_t r) const {
    __atomic_fetch_or(&host()->departed, 1u << r, __ATOMIC_ACQ_REL);
  }

  // Outcome of all channels of a rank. They must agree, except about a failure after the commit,
  // which may strike some of them.
  Outcome outcome(uint32_t r) const {
    for (uint32_t c = 0; c < s.channels; ++c)
      if (std::memcmp(status(r, c), &channel(r, c)->status, sizeof(PaStatus)) != 0)
        wrong("rank %u: the host sees another status of channel %u", r, c);
    const PaStatus& first = *status(r, 0);
    Outcome o{first.outcome, first.peer,  first.phase,      first.committed != 0,
              first.detail,  first.found, first.joiner != 0,
              {first.measured[0], first.measured[1]}, first.active_ns};
    for (uint32_t c = 1; c < s.channels; ++c) {
      const PaStatus& other = *status(r, c);
      if ((other.committed != 0) != o.committed && other.outcome != PA_OPEN && o.kind != PA_OPEN)
        wrong("rank %u: channel %u committed=%u, channel 0 %u (outcomes %u and %u)", r, c,
              other.committed, o.committed, other.outcome, o.kind);
      if (!o.committed && o.kind != PA_OPEN && other.outcome != PA_OPEN &&
          (other.outcome != o.kind || (o.kind >= PA_NON_FINITE && other.peer != o.peer)))
        wrong("rank %u: channel %u ended with %u of rank %u, channel 0 with %u of rank %u", r, c,
              other.outcome, other.peer, o.kind, o.peer);
      if (other.outcome != PA_COMMITTED && o.kind == PA_COMMITTED)
        o.kind = other.outcome, o.peer = other.peer, o.phase = other.phase;
    }
    return o;
  }
};

// Runs f(rank) on a thread for each rank.
inline void each_rank(const World& world, const std::function<void(uint32_t)>& f) {
  std::vector<std::thread> threads;
  for (uint32_t r = 0; r < world.s.world; ++r)
    threads.emplace_back([&, r] {
      delay_state = mix(world.s.seed * 1000003 + r);
      f(r);
    });
  for (auto& thread : threads) thread.join();
}
