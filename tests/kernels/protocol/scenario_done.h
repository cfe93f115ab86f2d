// Ranks that have ended their steps, beside others that go on.
#pragma once
#include "scenarios_good.h"

// A rank that is done takes part in whatever call of their schedules the others make, and counts
// with its own weight; the others' calls are compared with one another. A joiner is not admitted
// meanwhile. A rank without news need not know whether the others pass weights.
inline void done() {
  uint64_t seed = 90;
  enum Case { kPlain, kWeighted, kAllDone, kAllOver, kUnneeded, kDiffer, kByHand, kCases };
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect}) {
    World w(setup_of(mode, 4, 2, seed++));
    const auto case_at = [](uint32_t k) { return Case((k * 3) % kCases); };
    const auto is_done = [&](uint32_t k, uint32_t r) {
      return r == k % 4 || case_at(k) == kAllDone || case_at(k) == kAllOver;
    };
    const auto odd_at = [](uint32_t k) { return k % 4 == 3 ? 2u : 3u; }; // last that is not done
    const auto kind_at = [&](uint32_t k) {
      const Case which = case_at(k);
      return which == kDiffer || which == kByHand      ? PA_SCHEDULE
             : which == kUnneeded || which == kAllOver ? PA_UNNEEDED
                                                       : PA_COMMITTED;
    };
    run_script(
        w, 56,
        [&](uint32_t k) {
          Script script = script_of(w, k);
          const Case which = case_at(k);
          for (uint32_t r = 0; r < 4; ++r) {
            Call& call = script.calls[r];
            call.flags |= PA_FLAG_JOINER | (which == kByHand ? 0 : PA_FLAG_OF_SCHEDULE);
            call.found = 3000 + r;
            double weight = which == kWeighted ? 1.5 + r : 1;
            if (which == kWeighted) call.flags |= PA_FLAG_WEIGHTED;
            if (is_done(k, r)) {
              // With steps that no average has had, in every second average.
              const bool rest = (k / 4 % 2 == 0 || which == kAllDone) &&
                                which != kUnneeded && which != kAllOver;
              weight = rest ? 1 : 0;
              call.flags |= PA_FLAG_DONE | PA_FLAG_WEIGHTED | (rest ? 0 : PA_FLAG_UNNEEDED);
              call.schedule = 99;
            } else if (which == kDiffer && r == odd_at(k)) {
              ++call.schedule;
            } else if (which == kUnneeded) {
              call.flags |= PA_FLAG_UNNEEDED;
            } else if (r == odd_at(k) && which == kWeighted) {
              // It has made no step, and so has not learnt of weights.
              call.flags = PA_FLAG_JOINER | PA_FLAG_OF_SCHEDULE | PA_FLAG_UNNEEDED;
              weight = 0;
            } else if (r == odd_at(k) && which == kPlain) {
              // It has made weighted steps before, and none since.
              call.flags |= PA_FLAG_WEIGHTED | PA_FLAG_UNNEEDED;
              weight = 0;
            }
            call.weight = weight;
            script.plan.weights.push_back(weight);
            if (weight == 0) script.plan.useless.push_back(r);
          }
          return script;
        },
        [&](uint32_t k, uint32_t r, const Outcome& o) {
          const Case which = case_at(k);
          const uint32_t reference = k % 4 == 0 ? 1 : 0;
          const uint32_t odd = which == kByHand ? k % 4 : odd_at(k);
          expect_outcome(w, r, k, o, kind_at(k), kind_at(k) == PA_SCHEDULE ? odd : 0);
          if (o.kind == PA_SCHEDULE && (o.detail != 3000 + reference || o.found != 3000 + odd))
            wrong("%s, average %u: rank %u was told of the wrong calls", name_of(mode), k, r);
          if (o.kind == PA_UNNEEDED && o.detail != (which == kAllOver ? 4u : 1u))
            wrong("%s, average %u: rank %u says %u ranks are done", name_of(mode), k, r,
                  unsigned(o.detail));
          if (o.kind == PA_COMMITTED && o.joiner)
            wrong("%s, average %u: rank %u admits a joiner", name_of(mode), k, r);
        });
  }
}
