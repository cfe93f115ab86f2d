// Telemetry: own values in a sample of the packs, before an average and after it. Kernels of their
// own, before and after all others, so that the average itself costs no register more. None waits
// for a peer.
//
// With its sample a rank puts on its board how long it has waited in the average before, which is
// known by then. Its record is published later, so after the average every rank has these of all.
//
// A block's packs of a bucket are divided into periods of one length. One run of PA_RUN_PACKS
// neighbouring packs of each, at a place that varies from period to period, is in the sample; where
// a period is not longer, all of it. The same packs in every average, and on every rank.
#pragma once
#include "segments.h"

namespace PA_ISA {

struct Sample {
  uint64_t begin, packs;
  uint32_t runs;
  char* memory;

  PA_FN Sample(const PaBucket& bucket, uint32_t block) {
    const Range all = channel_range(bucket, block);
    begin = all.begin, packs = all.packs();
    runs = uint32_t((packs + bucket.sample_period - 1) / bucket.sample_period);
    memory = at<char>(bucket.sample + 16 * bucket.sample_packs * block);
  }
  PA_FN Range run(uint32_t number) const {
    const uint64_t from = packs * number / runs, period = packs * (number + 1) / runs - from;
    const uint64_t length = min(PA_RUN_PACKS, period);
    const uint64_t mixed = (number + 1) * 0x9e3779b97f4a7c15u >> 32; // Fibonacci hashing
    const uint64_t first = begin + from + mixed % (period - length + 1);
    return {first, first + length};
  }
  PA_FN char* kept(uint32_t number) const { return memory + 16 * uint64_t(PA_RUN_PACKS) * number; }
};

// Squares of values and of differences, largest difference, and values that are not finite.
template <class T, int K> struct Tally {
  using D = Doubles<T, K>;
  D norm{}, change{}, largest{}, bad{};
  PA_FN void add(const Wide<T, K>& now, const Wide<T, K>& before) {
    PA_UNROLL for (int piece = 0; piece < kDoublesPieces<T, K>; ++piece) {
      const D x = doubles_of<T, K>(now, piece), d = x - doubles_of<T, K>(before, piece);
      const auto finite = d - d == 0; // NaN where one of the two is NaN or infinity
      const D none{}, size = d < 0 ? -d : d;
      norm += finite ? x * x : none;
      change += finite ? d * d : none;
      largest = size > largest ? (finite ? size : largest) : largest;
      bad += finite ? none : none + 1.0;
    }
  }
  PA_FN void add_to(double* sums, double scale) const {
    each_double<T, K>(norm, [&](double x) { sums[0] += scale * x; });
    each_double<T, K>(change, [&](double x) { sums[1] += scale * x; });
    each_double<T, K>(largest, [&](double x) { sums[2] = x > sums[2] ? x : sums[2]; });
    each_double<T, K>(bad, [&](double x) { sums[3] += scale * x; });
  }
};

template <class T> PA_FN void keep_sample(const Exec& ex, const PaBucket& bucket) {
  const Sample sample(bucket, ex.block());
  for (uint32_t number = 0; number < sample.runs; ++number) {
    const Range run = sample.run(number);
    char* out = sample.kept(number);
    each_own<T>(
        ex, bucket, run.begin, run.end,
        [&](const auto& own, auto g, uint32_t i) { return own.template load<g.kPacks>(i); },
        [&](const auto&, auto g, uint32_t i, const auto& raw) {
          store_raw<T, g.kPacks>(out + 16 * uint64_t(i), raw);
        });
  }
}

template <class T, int K> struct NowAndBefore { Raw<T, K> now, before; };

template <class T>
PA_FN void compare_sample(const Exec& ex, const PaBucket& bucket, double* sums) {
  const Sample sample(bucket, ex.block());
  Tally<T, kGroup> groups;
  Tally<T, 1> ones;
  uint64_t packs = 0;
  for (uint32_t number = 0; number < sample.runs; ++number) {
    const Range run = sample.run(number);
    packs += run.packs();
    const char* kept = sample.kept(number);
    each_own<T>(
        ex, bucket, run.begin, run.end,
        [&](const auto& own, auto g, uint32_t i) {
          constexpr int K = g.kPacks;
          return NowAndBefore<T, K>{own.template load<K>(i),
                                    load_raw<T, K>(kept + 16 * uint64_t(i))};
        },
        [&](const auto&, auto g, uint32_t, const auto& pack) {
          constexpr int K = g.kPacks;
          const Wide<T, K> now = widen<T, K>(pack.now), before = widen<T, K>(pack.before);
          if constexpr (K == 1) ones.add(now, before);
          else groups.add(now, before);
        });
  }
  if (packs == 0) return;
  const double scale = double(sample.packs) / double(packs);
  groups.add_to(sums, scale);
  ones.add_to(sums, scale);
}

struct SampleTable { double of[4][kMostLanes]; };
// Sums over the lanes of a block, in one order; the third is a maximum. The result is the leader's.
PA_FN void sum_over_lanes(const Exec& ex, double* sums) {
  const Shared<SampleTable> shared(ex);
  auto& of = shared.get().of;
  const uint32_t lane = ex.lane();
  for (int i = 0; i < 4; ++i) of[i][lane] = sums[i];
  for (uint32_t half = ex.lanes() / 2; half > 0; half /= 2) {
    ex.sync();
    if (lane >= half) continue;
    for (int i = 0; i < 4; ++i) {
      const double own = of[i][lane], other = of[i][lane + half];
      of[i][lane] = i == 2 ? (other > own ? other : own) : own + other;
    }
  }
  for (int i = 0; i < 4; ++i) sums[i] = of[i][lane]; // of the leader: its own last store
}

// The own wait in the last average, for the record of the next one.
PA_FN void publish_waited(const PaArgs& a) {
  const PaChannel* own = at<const PaChannel>(a.channel);
  uint64_t most = 0;
  for (uint32_t c = 0; c < a.channels; ++c) {
    const uint64_t waited_ns = own[c].status.waited_ns;
    most = waited_ns > most ? waited_ns : most;
  }
  const uint32_t epoch = own[0].status.epoch + 1;
  store_relaxed(&at<PaControl>(a.control)->board[a.rank].waited_ns[epoch & 1], most);
}
// The waits of all ranks, which belong to the records of the last average.
PA_FN void gather_waited(const PaArgs& a) {
  const uint32_t epoch = at<const PaChannel>(a.channel)->status.epoch;
  for (uint32_t r = 0; r < a.world; ++r)
    at<uint64_t>(a.waits)[r] =
        load_acquire(&at<PaControl>(a.control)->board[r].waited_ns[epoch & 1]);
}

PA_FN void run_sample(const Exec& ex, const PaArgs& a) {
  if (ex.block() == 0 && ex.leader()) publish_waited(a);
  for (uint32_t i = 0; i < a.bucket_count; ++i) {
    const PaBucket& bucket = at<const PaBucket>(a.buckets)[i];
    with_dtype(bucket.dtype, [&](auto element) { keep_sample<decltype(element)>(ex, bucket); });
  }
}
// After an average that has committed.
PA_FN void run_compare(const Exec& ex, const PaArgs& a) {
  PaChannel* me = at<PaChannel>(a.channel) + ex.block();
  if (me->status.outcome != PA_COMMITTED) return;
  double sums[4] = {0, 0, 0, 0};
  for (uint32_t i = 0; i < a.bucket_count; ++i) {
    const PaBucket& bucket = at<const PaBucket>(a.buckets)[i];
    with_dtype(bucket.dtype,
               [&](auto element) { compare_sample<decltype(element)>(ex, bucket, sums); });
  }
  sum_over_lanes(ex, sums);
  if (!ex.leader()) return;
  if (ex.block() == 0) gather_waited(a);
  for (int i = 0; i < 4; ++i) me->status.sampled[i] = sums[i];
  at<PaStatus>(a.status)[ex.block()] = me->status;
}
} // namespace PA_ISA
