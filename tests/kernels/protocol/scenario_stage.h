// A stage on the host, which refuses some averages: no rank writes then, and the next one works.
#pragma once
#include "scenario_parts.h"

// Averages in turn that are good, and in which the stage of rank 0 leaves a NaN where its shard
// begins. The stage of the last rank refuses one of these, of which the lowest rank is told.
inline void leaving(Setup s, uint64_t seed) {
  s.seed = seed;
  World w(s);
  run_script(
      w, 6,
      [&](uint32_t k) {
        Script script = script_of(w, k);
        for (Call& call : script.calls) call.flags |= PA_FLAG_REJECT_NON_FINITE;
        script.calls[0].leaves = k % 2 == 1;
        script.calls.back().vetoes = k == 3 && s.world > 1;
        return script;
      },
      [&](uint32_t k, uint32_t r, const Outcome& o) {
        expect_outcome(w, r, k, o, k % 2 == 0 ? PA_COMMITTED : PA_NON_FINITE, 0);
        if (k % 2 == 1 && o.detail != (PA_LEFT | 1))
          wrong("n=%u, average %u: rank %u was told of %llx", s.world, k, r,
                static_cast<unsigned long long>(o.detail));
      });
}

// Averages of four kinds in turn: a good one; a veto; a veto of one rank beside a value of another
// that is not finite, which is told; and a value that is not finite alone.
inline void staged() {
  uint64_t seed = 330;
  for (uint32_t world : {1u, 3u, 2u, 5u})
    for (uint32_t channels : {2u, 1u, 3u}) {
      Setup s = roomy(setup_of(Mode::kCommit, world, channels, seed++));
      s.stages = true;
      World w(s);
      const auto vetoes = [&](uint32_t k) { return k % 4 == 1 || k % 4 == 2; };
      const auto refuser = [&](uint32_t k) { return uint32_t(mix(w.s.seed * 1000 + k) % world); };
      const auto odd = [&](uint32_t k) { return (refuser(k) + k / 4) % world; };
      run_script(
          w, 16,
          [&](uint32_t k) {
            Script script = script_of(w, k);
            for (Call& call : script.calls) call.flags |= PA_FLAG_REJECT_NON_FINITE;
            // The lowest rank of several that refuse is told.
            const uint32_t end = k % 8 == 1 ? world : refuser(k) + 1;
            for (uint32_t r = refuser(k); vetoes(k) && r < end; ++r) script.calls[r].vetoes = true;
            if (k % 4 >= 2) script.plan.odd = {odd(k), 0, 0, 0, k % 8 == 2};
            return script;
          },
          [&](uint32_t k, uint32_t r, const Outcome& o) {
            const bool is_odd = k % 4 >= 2;
            const uint32_t kind = k % 4 == 0 ? PA_COMMITTED : PA_NON_FINITE;
            expect_outcome(w, r, k, o, kind, is_odd ? odd(k) : refuser(k));
            if (kind == PA_NON_FINITE && (o.detail == PA_VETOED) == is_odd)
              wrong("n=%u, average %u: rank %u was told the wrong reason", world, k, r);
          });
      leaving(s, seed++);
    }
}
