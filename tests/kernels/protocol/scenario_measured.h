// Measurements that ranks agree on.
#pragma once
#include "scenarios_good.h"

// Measurements: after the average every rank that has measured knows the largest value of all ranks
// that have measured in this average. NaN counts as nothing. The time of the average
// is no longer than that of all.
inline void measured() {
  uint64_t seed = 57;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect}) {
    World w(setup_of(mode, 3, 2, seed++));
    // In average k rank k % 4 measures nothing, though it passes large numbers, and another one
    // has a NaN.
    const auto value = [](uint32_t k, uint32_t r, uint32_t i) {
      return 1.0 + (mix(k * 64 + r * 2 + i) >> 40);
    };
    const auto counts = [](uint32_t k, uint32_t r) { return r != k % 4 && r != (k + 1) % 3; };
    const uint64_t start = PA_ISA::cpu_now_ns();
    run_script(
        w, 24,
        [&](uint32_t k) {
          Script script = script_of(w, k);
          for (uint32_t r = 0; r < 3 && k % 5 != 4; ++r) {
            Call& call = script.calls[r];
            if (r != k % 4) call.flags |= PA_FLAG_MEASURED;
            for (uint32_t i = 0; i < 2; ++i)
              call.measured[i] = r == k % 4   ? 1e300
                                 : r == (k + 1) % 3 ? NAN
                                                    : value(k, r, i);
          }
          return script;
        },
        [&](uint32_t k, uint32_t r, const Outcome& o) {
          expect_outcome(w, r, k, o, PA_COMMITTED, 0);
          if (r == k % 4 || k % 5 == 4) return;
          for (uint32_t i = 0; i < 2; ++i) {
            double most = 0;
            for (uint32_t other = 0; other < 3; ++other)
              if (counts(k, other)) most = std::max(most, value(k, other, i));
            if (o.measured[i] != most)
              wrong("%s, average %u: rank %u says %g was measured, not %g", name_of(mode), k, r,
                    o.measured[i], most);
          }
          if (o.active_ns == 0 || o.active_ns > PA_ISA::cpu_now_ns() - start)
            wrong("%s, average %u: rank %u has averaged for %llu ns", name_of(mode), k, r,
                  static_cast<unsigned long long>(o.active_ns));
        });
  }
}
