// Coded averages: of every kind, cut into launches, segment by segment on one thread, and with some
// in full between them.
#pragma once
#include "scenario_parts.h"

inline Setup coded_setup(uint32_t kernel, uint32_t world, uint32_t channels, uint64_t seed) {
  Setup s = setup_of(Mode::kCommit, world, channels, seed);
  s.kernel = kernel;
  s.chunk = seed % 4 == 1 ? 64 : seed % 4 == 2 ? 40 : 8; // blocks of a code: whole and short
  s.buckets = {{PA_F32, false, {530, 1, 2, 3, 5, 264, 1257}}};
  return roomy(s);
}

// Averages of every kind in turn, and every fifth in full. One that fails after the reduce has
// begun is followed by one that succeeds.
inline void coded() {
  uint64_t seed = 400;
  for (uint32_t kernel : {PA_RING_INT8, PA_RING_BF16})
    for (uint32_t world : {3u, 2u, 5u, 4u})
      for (uint32_t channels : {2u, 1u, 3u}) {
        if ((channels == 3 && world != 3) || (kLanes[0] > 1 && world > 3)) continue;
        World w(coded_setup(kernel, world, channels, seed));
        const uint32_t from = seed++ % 2 * 4; // a rank that does not count in the first average
        run_script(
            w, 12,
            [&](uint32_t k) {
              Script script = parts_script(w, from + k);
              for (uint32_t r = 0; r < world; ++r) {
                script.calls[r].cuts = some_cuts(world, mix(w.s.seed + 77 * k));
                // One of them holds a NaN, so that it fails after its reduce.
                script.calls[r].in_full = k % 5 == 3 || (from + k) % 12 == 5;
              }
              return script;
            },
            [&](uint32_t k, uint32_t r, const Outcome& o) {
              expect_end_of_part(w, from + k, r, o);
            });
      }
}
// Averages of copies, of one bucket or of both, whose results are added afterwards. What one of
// them leaves, or has left when it failed, is that of its buckets alone.
inline Script script_of_some(const World& w, uint32_t k) {
  Script script = parts_script(w, k);
  const uint64_t h = mix(w.s.seed * 3000 + k);
  script.plan.useless.clear(); // a NaN stays one, whatever is added
  for (Call& call : script.calls) call.cuts = some_cuts(w.s.world, mix(w.s.seed + 77 * k));
  if (h % 3 == 2) return script;
  script.plan.only = uint32_t(h % 3);
  for (Call& call : script.calls) call.first_bucket = script.plan.only, call.bucket_count = 1;
  Odd& odd = script.plan.odd;
  if (odd.rank == ~0u) return script;
  const auto& elements = w.s.buckets[script.plan.only].elements;
  odd.bucket = script.plan.only;
  odd.tensor = uint32_t((h >> 16) % elements.size());
  odd.element = (h >> 24) % elements[odd.tensor];
  return script;
}
inline void coded_copies() {
  uint64_t seed = 460;
  for (uint32_t kernel : {PA_RING_INT8, PA_RING_BF16})
    for (uint32_t world : {3u, 2u, 5u, 4u})
      for (uint32_t channels : {2u, 1u, 3u}) {
        if ((channels == 3 && world != 3) || (kLanes[0] > 1 && world > 3)) continue;
        Setup s = coded_setup(kernel, world, channels, seed++);
        s.buckets = {{PA_F32, false, {530, 1, 2, 3, 5}}, {PA_F32, false, {264, 757, 9}}};
        s.copies = true;
        World w(roomy(s));
        run_script(
            w, 24, [&](uint32_t k) { return script_of_some(w, k); },
            [&](uint32_t k, uint32_t r, const Outcome& o) { expect_end_of_part(w, k, r, o); });
        for (uint32_t r = 1; r < world; ++r)
          for (size_t b = 0; b < w.s.buckets.size(); ++b) {
            const Region &own = *w.ranks[r].references[b], &first = *w.ranks[0].references[b];
            if (std::memcmp(own.base, first.base, own.bytes) != 0)
              wrong("n=%u: ranks 0 and %u differ in the reference of bucket %zu", world, r, b);
          }
      }
}
inline void coded_in_sequence() {
  uint64_t seed = 430;
  for (uint32_t kernel : {PA_RING_INT8, PA_RING_BF16})
    for (uint32_t world : {2u, 3u, 5u}) {
      Setup s = coded_setup(kernel, world, 1 + world % 2, seed++);
      s.timeout_ns = 1'000'000; // a wait would not end before
      World w(s);
      for (uint32_t k = 0; k < 12; ++k) average_in_sequence(w, k);
    }
}
