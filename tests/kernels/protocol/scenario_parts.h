// PA_RING_COMMIT in several launches: segment by segment on one thread, where no wait can end; cut
// on threads; and given up between two of them.
#pragma once
#include "scenarios_bad.h"

// Rounds of all buckets in the largest channel: the chunks that a rank sends in one segment.
inline uint32_t all_rounds(const World& w) {
  uint64_t rounds = 0;
  for (size_t b = 0; b < w.s.buckets.size(); ++b) {
    const PaBucket& bucket = w.ranks[0].buckets->as<PaBucket>()[b];
    const uint64_t round = uint64_t(w.s.chunk) * w.s.world;
    rounds += (bucket.channel_packs + round - 1) / round;
  }
  return uint32_t(rounds);
}
// A setup with room for the chunks of two segments: then no segment waits for what peers do in the
// same one, and all of a bucket's rounds are one batch.
inline Setup roomy(Setup s) {
  const uint32_t least = 2 * all_rounds(World(s));
  while (s.slots < least) s.slots *= 2;
  return s;
}

// Every kind of average that a scan, a weight or a layout can bring about, in turn.
enum class Part { kGood, kNaN, kWeighted, kLayout, kChecked, kUnneeded, kKinds };
inline Part part_at(uint32_t k) { return Part((k * 5) % uint32_t(Part::kKinds)); }
inline Script parts_script(const World& w, uint32_t k) {
  Script script = script_of(w, k);
  const uint64_t h = mix(w.s.seed * 1000 + k);
  const uint32_t n = w.s.world, odd = uint32_t(h % n);
  const Part part = part_at(k);
  if (part == Part::kNaN) {
    const uint32_t bucket = uint32_t((h >> 8) % w.s.buckets.size());
    const auto& elements = w.s.buckets[bucket].elements;
    const uint32_t tensor = uint32_t((h >> 16) % elements.size());
    script.plan.odd = {odd, bucket, tensor, (h >> 24) % elements[tensor], (h >> 60 & 1) != 0};
  }
  for (uint32_t r = 0; r < n; ++r) {
    Call& call = script.calls[r];
    if (part != Part::kGood) call.flags |= PA_FLAG_REJECT_NON_FINITE;
    if (part == Part::kUnneeded) call.flags |= PA_FLAG_UNNEEDED;
    if (part == Part::kLayout && r == odd)
      call.flags |= PA_FLAG_LAYOUT, call.detail = k, call.found = 1000 + k;
    if (part != Part::kWeighted) continue;
    const double weight = r == odd ? 0 : 0.25 + r;
    script.plan.weights.push_back(weight);
    if (weight == 0) script.plan.useless.push_back(r);
    call.flags |= PA_FLAG_WEIGHTED, call.weight = weight;
  }
  return script;
}
inline void expect_end_of_part(const World& w, uint32_t k, uint32_t r, const Outcome& o) {
  const uint32_t odd = uint32_t(mix(w.s.seed * 1000 + k) % w.s.world);
  const Part part = part_at(k);
  const uint32_t kind = part == Part::kNaN        ? PA_NON_FINITE
                        : part == Part::kLayout   ? PA_LAYOUT
                        : part == Part::kUnneeded ? PA_UNNEEDED
                                                  : PA_COMMITTED;
  expect_outcome(w, r, k, o, kind, odd);
  if (o.committed != (kind == PA_COMMITTED))
    wrong("n=%u, average %u: rank %u says committed = %d", w.s.world, k, r, o.committed);
  if (kind == PA_LAYOUT && (o.detail != k || o.found != 1000 + k))
    wrong("n=%u, average %u: rank %u was told the wrong tensor of the layout", w.s.world, k, r);
}

// One block of one rank, on this thread, with one lane.
inline void run_here(const World& w, uint32_t r, uint32_t c, const PaArgs& a) {
  own_stop = &w.stop[r];
#if defined(PA_LANES)
  PA_ISA::Lanes shared{};
  pthread_barrier_init(&shared.barrier, nullptr, 1);
  PA_ISA::run_kernel(PA_ISA::Exec{{c}, 0, 1, &shared}, a, w.s.kernel);
  pthread_barrier_destroy(&shared.barrier);
#else
  PA_ISA::run_kernel(PA_ISA::Exec{{c}}, a, w.s.kernel);
#endif
  own_stop = nullptr;
}

// An average of all ranks on this thread. In each segment the ranks, and the blocks of each, come
// in another order.
inline void average_in_sequence(World& w, uint32_t k) {
  const uint32_t n = w.s.world, end = PA_SEGMENTS(n);
  const Script script = parts_script(w, k);
  for (uint32_t r = 0; r < n; ++r) fill(w, script.plan, r);
  const auto run = [&](uint32_t r, uint32_t from, uint32_t to) {
    PaArgs a = w.args(r, script.calls[r]);
    a.from_segment = from, a.to_segment = to;
    const uint32_t first = uint32_t(random_below(w.s.channels));
    for (uint32_t i = 0; i < w.s.channels; ++i) run_here(w, r, (first + i) % w.s.channels, a);
  };
  for (uint32_t segment = 0; segment < end; ++segment) {
    const uint32_t first = uint32_t(random_below(n)), step = random_below(2) ? 1 : n - 1;
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t r = (first + i * step) % n;
      // A launch that is not the next one, or that was made before, does nothing.
      if (segment + 1 < end) run(r, segment + 1, segment + 2);
      run(r, segment, segment + 1);
      if (segment != 0) run(r, segment, segment + 1);
    }
    if (segment <= n)
      for (uint32_t r = 0; r < n; ++r) check(w, script.plan, r, Expect::kLocal);
  }
  uint64_t digest = 0;
  for (uint32_t r = 0; r < n; ++r) {
    const Outcome o = w.complete(r);
    expect_end_of_part(w, k, r, o);
    for (uint32_t c = 0; c < w.s.channels; ++c)
      if (w.status(r, c)->waited_ns != 0) wrong("n=%u, average %u: rank %u has waited", n, k, r);
    const bool good = o.kind == PA_COMMITTED;
    const uint64_t own = check(w, script.plan, r, good ? Expect::kMean : Expect::kLocal);
    if (good && r != 0 && own != digest)
      wrong("n=%u, average %u: ranks 0 and %u differ in bits", n, k, r);
    digest = own;
  }
}
inline void sequenced() {
  uint64_t seed = 200;
  for (uint32_t world : {2u, 3u, 4u, 5u})
    for (uint32_t channels : {1u, 2u, 3u}) {
      Setup s = roomy(setup_of(Mode::kCommit, world, channels, seed++));
      s.timeout_ns = 1'000'000; // a wait would not end before
      if (channels == 2) s.epoch = 0xfffffffau, s.sequence = 0xffffffe0u;
      World w(s);
      for (uint32_t k = 0; k < 12; ++k) average_in_sequence(w, k);
    }
}

// The same averages on threads, cut at random. A launch has all segments of the reduce or one at
// most, and likewise of the gather: it takes each bucket through its segments, and the chunks of a
// mailbox are in the order of launches, buckets, segments. All ranks cut within them alike.
inline uint32_t some_cuts(uint32_t world, uint64_t chance) {
  const uint32_t reduce = (((1u << world) - 1) << 1) & ~2u, gather = reduce << world;
  const uint32_t between = 1u << 1 | 1u << (world + 1);
  return (chance & 1 ? reduce : 0) | (chance & 2 ? gather : 0) | (uint32_t(chance >> 8) & between);
}
inline void parts() {
  uint64_t seed = 230;
  for (uint32_t world : {3u, 2u, 5u, 4u})
    for (uint32_t channels : {2u, 1u, 3u}) {
      World w(roomy(setup_of(Mode::kCommit, world, channels, seed++)));
      run_script(
          w, 12,
          [&](uint32_t k) {
            Script script = parts_script(w, k);
            for (uint32_t r = 0; r < world; ++r)
              script.calls[r].cuts = some_cuts(world, mix(w.s.seed + 77 * k));
            return script;
          },
          [&](uint32_t k, uint32_t r, const Outcome& o) { expect_end_of_part(w, k, r, o); });
    }
}

// The same with an outer optimizer: its state changes with the tensors, or not at all. The second
// half of the averages become the anchor.
inline void steps() {
  uint64_t seed = 300;
  for (Mode mode : {Mode::kCommit, Mode::kDirect})
    for (uint32_t world : {3u, 2u, 5u})
      for (uint32_t channels : {2u, 1u, 3u}) {
        Setup s = roomy(setup_of(mode, world, channels, seed++));
        s.steps = true;
        World w(s);
        run_script(
            w, 12,
            [&](uint32_t k) {
              Script script = parts_script(w, k);
              for (uint32_t r = 0; r < world; ++r) script.calls[r].anchors = k / 6 % 2 == 1;
              return script;
            },
            [&](uint32_t k, uint32_t r, const Outcome& o) { expect_end_of_part(w, k, r, o); });
      }
}

// The same of a copy, whose change is added to the tensors afterwards, or nothing is.
inline void copies() {
  uint64_t seed = 400;
  for (Mode mode : {Mode::kCommit, Mode::kDirect})
    for (uint32_t world : {3u, 2u, 5u})
      for (uint32_t channels : {2u, 1u, 3u}) {
        Setup s = roomy(setup_of(mode, world, channels, seed++));
        s.copies = true;
        World w(s);
        run_script(
            w, 12,
            [&](uint32_t k) {
              Script script = parts_script(w, k);
              script.plan.useless.clear(); // a NaN stays one, whatever is added
              return script;
            },
            [&](uint32_t k, uint32_t r, const Outcome& o) { expect_end_of_part(w, k, r, o); });
      }
}

// A host gives up between two launches while others go on. All ranks end with one outcome if each
// runs the rest, segment by segment, without any more meetings: a rank that only stopped would not
// know that others commit.
inline void given_up_before(Setup s, uint32_t at, uint32_t in_time) {
  World w(s);
  const uint32_t n = s.world, end = PA_SEGMENTS(n), first = uint32_t(random_below(n));
  for (uint32_t r = 0; r < n; ++r) fill(w, Plan{}, r);
  const auto run = [&](uint32_t r, uint32_t from, uint32_t to) {
    PaArgs a = w.args(r, Call{});
    a.from_segment = from, a.to_segment = to;
    for (uint32_t c = 0; c < s.channels; ++c) run_here(w, r, c, a);
  };
  for (uint32_t segment = 0; segment < at; ++segment)
    for (uint32_t r = 0; r < n; ++r) run(r, segment, segment + 1);
  abort_world(w, first);
  std::vector<Outcome> o(n);
  for (uint32_t i = 1; i <= in_time; ++i) run((first + i) % n, at, at + 1);
  bool others_committed = false; // before the rank that gave up first looks
  for (uint32_t i = 1; i <= n; ++i) {
    const uint32_t r = (first + i) % n;
    if (i == n) others_committed = w.status((r + 1) % n, 0)->committed != 0;
    for (uint32_t next = i <= in_time ? at + 1 : at; next < end; ++next) run(r, next, next + 1);
  }
  for (uint32_t r = 0; r < n; ++r) o[r] = w.complete(r);
  const bool committed = check_agreement(w, Plan{}, o, ~0u);
  if (committed != others_committed || (committed && at <= n))
    wrong("n=%u: given up before segment %u, and committed = %d", n, at, committed);
}
inline void given_up() {
  uint64_t seed = 260;
  for (uint32_t world : {2u, 3u, 4u})
    for (uint32_t at = 1; at < PA_SEGMENTS(world); ++at)
      for (uint32_t in_time = 0; in_time < world; ++in_time, ++seed)
        given_up_before(roomy(setup_of(Mode::kCommit, world, 1 + at % 2, seed)), at, in_time);
}
