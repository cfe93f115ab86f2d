// Fills a rank's tensors before an average and checks every element and guard byte after it.
#pragma once
#include "world.h"

// Position of the one value that is not finite, if any.
struct Odd {
  uint32_t rank = ~0u, bucket = 0, tensor = 0;
  uint64_t element = 0;
  bool infinite = false;
};
// Inputs of average `number`, known to all ranks.
struct Plan {
  uint32_t number = 0;
  std::vector<double> weights;  // empty: not weighted
  std::vector<uint32_t> useless; // ranks of weight 0, whose tensors are all NaN
  Odd odd;
  std::vector<uint32_t> keepers; // ranks with PA_FLAG_KEEP
  uint32_t only = ~0u;           // the bucket that is averaged; else all are
  bool keeps(uint32_t r) const {
    for (uint32_t keeper : keepers)
      if (keeper == r) return true;
    return false;
  }
  double weight(uint32_t r) const { return weights.empty() ? 1 : weights[r]; }
};
enum class Expect { kMean, kLocal, kEither };

inline uint64_t local_bits(const World& w, const Plan& plan, uint32_t r, uint32_t b, uint32_t t,
                           uint64_t i) {
  const uint32_t dtype = w.s.buckets[b].dtype;
  if (plan.odd.rank == r && plan.odd.bucket == b && plan.odd.tensor == t && plan.odd.element == i)
    return plan.odd.infinite ? infinity_bits(dtype) : nan_bits(dtype);
  for (uint32_t useless : plan.useless)
    if (useless == r) return nan_bits(dtype);
  return make_bits(dtype, mix(w.s.seed) ^ mix(uint64_t(plan.number) << 40 | uint64_t(r) << 32 |
                                              b << 24 | t << 16 | i));
}

inline void fill(const World& w, const Plan& plan, uint32_t r) {
  for (uint32_t b = 0; b < w.s.buckets.size(); ++b) {
    const unsigned bytes = kFormat[w.s.buckets[b].dtype].bytes;
    for (uint32_t t = 0; t < w.ranks[r].tensors[b].size(); ++t) {
      const Tensor& tensor = w.ranks[r].tensors[b][t];
      for (uint64_t i = 0; i < tensor.elements; ++i) {
        const uint64_t bits = local_bits(w, plan, r, b, t, i);
        std::memcpy(tensor.data + i * bytes, &bits, bytes);
      }
    }
  }
}

inline void check_guards(const World& w, uint32_t r) {
  if (kOffLimits) return;
  for (uint32_t b = 0; b < w.s.buckets.size(); ++b)
    for (const Tensor& tensor : w.ranks[r].tensors[b]) {
      const char *end = tensor.data + tensor.elements * kFormat[w.s.buckets[b].dtype].bytes,
                 *base = tensor.memory->base;
      for (const char* p = base; p < base + tensor.memory->bytes;
           p = p + 1 == tensor.data ? end : p + 1)
        if (*p != char(kGuardByte))
          wrong("rank %u wrote %td bytes beside a tensor of %llu elements", r, p - tensor.data,
                (unsigned long long)tensor.elements);
    }
}

// Checks that every element is the mean, or unchanged, or either. Returns a digest of all bytes, to
// compare ranks.
inline uint64_t check(const World& w, const Plan& plan, uint32_t r, Expect expect) {
  uint64_t digest = 0;
  const uint32_t n = w.s.world;
  std::vector<double> values(n), weights(n);
  for (uint32_t q = 0; q < n; ++q) weights[q] = plan.weight(q);
  for (uint32_t b = 0; b < w.s.buckets.size(); ++b) {
    const Shape& shape = w.s.buckets[b];
    const unsigned bytes = kFormat[shape.dtype].bytes;
    const bool narrow_wire = w.s.mode != Mode::kDirect && !shape.wire_f32;
    const Expect here = plan.only == ~0u || plan.only == b ? expect : Expect::kLocal;
    for (uint32_t t = 0; t < w.ranks[r].tensors[b].size(); ++t) {
      const Tensor& tensor = w.ranks[r].tensors[b][t];
      for (uint64_t i = 0; i < tensor.elements; ++i) {
        const uint64_t bits = load_bits(tensor.data + i * bytes, bytes),
                       local = local_bits(w, plan, r, b, t, i);
        digest = mix(digest ^ bits);
        if (bits == local && here != Expect::kMean) continue;
        for (uint32_t q = 0; q < n; ++q)
          values[q] = decode(shape.dtype, local_bits(w, plan, q, b, t, i));
        Mean mean = mean_of(shape.dtype, values.data(), weights.data(), n, narrow_wire);
        // n codes: of differences from the last mean, and of what the averages before have left.
        if (w.s.is_coded()) mean.tolerance += 2 * n * 8.5 / 250;
        const double got = decode(shape.dtype, bits);
        // The difference and its sum with the value are rounded, too; neither exceeds 8.
        if (w.s.copies) mean.tolerance += std::ldexp(16, -int(kFormat[shape.dtype].mantissa) - 1);
        // Infinity times a scale may be NaN, and infinity minus infinity is: both are "not finite".
        const bool is_mean = std::isfinite(mean.value)
                                 ? std::fabs(got - mean.value) <= mean.tolerance
                                 : !std::isfinite(got);
        if (is_mean && here != Expect::kLocal) continue;
        wrong(
            "%s, n=%u, C=%u, average %u: rank %u, bucket %u (dtype %u, wire_f32 %d), tensor "
            "%u[%llu] is %.9g; it was %.9g, the mean is %.9g ± %.2g; expected %s",
            name_of(w.s.mode), n, w.s.channels, plan.number, r, b, shape.dtype, shape.wire_f32, t,
            (unsigned long long)i, got, decode(shape.dtype, local), mean.value, mean.tolerance,
            here == Expect::kMean    ? "the mean"
            : here == Expect::kLocal ? "no change"
                                     : "one of them");
      }
    }
  }
  check_guards(w, r);
  return w.s.copies ? 0 : digest; // differences are added with one more rounding
}

// ---- several averages of one world --------------------------------------------------------------
struct Script {
  Plan plan;
  std::vector<Call> calls; // by rank
};
inline Script script_of(const World& w, uint32_t number) {
  Script script;
  script.plan.number = number;
  script.calls.resize(w.s.world);
  return script;
}
struct Ended { // end of one average on one rank
  Outcome outcome;
  uint64_t digest = 0;
};
inline void expect_outcome(const World& w, uint32_t r, uint32_t number, const Outcome& o,
                           uint32_t kind, uint32_t peer) {
  if (o.kind != kind ||
      (kind != PA_COMMITTED && kind != PA_UNNEEDED && kind != PA_NO_WEIGHT && o.peer != peer))
    wrong("%s, n=%u, C=%u, average %u: rank %u ended with %u of rank %u at %u, not %u of rank %u",
          name_of(w.s.mode), w.s.world, w.s.channels, number, r, o.kind, o.peer, o.phase, kind,
          peer);
  if (kind == PA_COMMITTED && !o.committed)
    wrong("%s, average %u: rank %u does not know that it has committed", name_of(w.s.mode), number,
          r);
}

// Digest that check() returns where all tensors are as rank r had them.
inline uint64_t local_digest(const World& w, const Plan& plan, uint32_t r) {
  uint64_t digest = 0;
  for (uint32_t b = 0; b < w.s.buckets.size(); ++b)
    for (uint32_t t = 0; t < w.s.buckets[b].elements.size(); ++t)
      for (uint64_t i = 0; i < w.s.buckets[b].elements[t]; ++i)
        digest = mix(digest ^ local_bits(w, plan, r, b, t, i));
  return digest;
}

// Runs averages back to back on all ranks, which wait for one another in the kernels only.
// script(k) gives the inputs of average k, ending(k) checks its outcome. All ranks that end with
// the mean must end with the same bits.
inline void run_script(World& w, uint32_t averages, const std::function<Script(uint32_t)>& script,
                       const std::function<void(uint32_t, uint32_t, const Outcome&)>& ending) {
  std::vector<std::vector<Ended>> ended(w.s.world, std::vector<Ended>(averages));
  each_rank(w, [&](uint32_t r) {
    for (uint32_t k = 0; k < averages; ++k) {
      const Script now = script(k);
      fill(w, now.plan, r);
      w.clear_state(r);
      Ended& e = ended[r][k];
      e.outcome = w.average(r, now.calls[r]);
      w.check_state(r, now.calls[r], e.outcome);
      ending(k, r, e.outcome);
      e.digest = check(
          w, now.plan, r,
          e.outcome.kind == PA_COMMITTED && !now.plan.keeps(r) ? Expect::kMean : Expect::kLocal);
    }
  });
  for (uint32_t k = 0; k < averages; ++k) {
    const Plan plan = script(k).plan;
    uint32_t first = 0; // first rank whose tensors were written
    while (first < w.s.world && plan.keeps(first)) ++first;
    for (uint32_t r = first; r < w.s.world; ++r)
      if (!plan.keeps(r) && ended[r][k].outcome.kind == PA_COMMITTED &&
          ended[r][k].digest != ended[first][k].digest)
        wrong("%s, n=%u, average %u: ranks %u and %u differ in bits", name_of(w.s.mode), w.s.world,
              k, first, r);
  }
}
// Runs averages that must all succeed.
inline void run_good(World& w, uint32_t averages, const std::function<Script(uint32_t)>& script) {
  run_script(w, averages, script, [&](uint32_t k, uint32_t r, const Outcome& o) {
    expect_outcome(w, r, k, o, PA_COMMITTED, 0);
  });
}
