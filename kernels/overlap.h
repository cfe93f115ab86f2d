// An average that is made while the tensors change: of a copy of them, the snapshot, in which it
// leaves the result less the snapshot; a coded one leaves the result in the reference instead.
// Adding the difference to the tensors later keeps all that they have been changed by meanwhile. No
// peer takes part in the kernels of this file.
//
// The snapshot of a bucket is flat, pack by pack, in the tensors' dtype.
#pragma once
#include "segments.h"

namespace PA_ISA {

// Calls f(bucket, range) for this block's packs of each bucket, in pieces. `bucket` has the tensors
// for its segments.
template <class F> PA_FN void each_source(const Exec& ex, const PaArgs& a, F f) {
  for (uint32_t i = 0; i < a.bucket_count; ++i) {
    PaBucket bucket = at<const PaBucket>(a.buckets)[i];
    bucket.segments = bucket.source;
    const Range all = channel_range(bucket, ex.block());
    in_pieces(all.begin, all.end, kMaxPiecePacks,
              [&](uint64_t begin, uint64_t end) { f(bucket, Range{begin, end}); });
  }
}

PA_FN void run_snapshot(const Exec& ex, const PaArgs& a) {
  each_source(ex, a, [&](const PaBucket& bucket, Range range) {
    char* copy = at<char>(bucket.snapshot) + 16 * range.begin;
    with_dtype(bucket.dtype, [&](auto element) {
      using T = decltype(element);
      each_own<T>(
          ex, bucket, range.begin, range.end,
          [&](const auto& own, auto g, uint32_t i) { return own.template load<g.kPacks>(i); },
          [&](const auto&, auto g, uint32_t i, const auto& raw) {
            store_raw_nt<T, g.kPacks>(copy + 16 * uint64_t(i), raw);
          });
    });
  });
}

template <class T, int K> struct OwnAndDelta { Raw<T, K> own, delta; };
template <int K> struct OwnAndBoth { Raw<float, K> own, copy, result; };

template <class T>
PA_FN void apply_range(const Exec& ex, const PaBucket& bucket, Range range, SumOf<T> share) {
  const char* deltas = at<const char>(bucket.snapshot) + 16 * range.begin;
  each_own<T>(
      ex, bucket, range.begin, range.end,
      [&](const auto& own, auto g, uint32_t i) {
        constexpr int K = g.kPacks;
        return OwnAndDelta<T, K>{own.template load<K>(i),
                                 load_raw<T, K>(deltas + 16 * uint64_t(i))};
      },
      [&](const auto& own, auto g, uint32_t i, const auto& packs) {
        constexpr int K = g.kPacks;
        own.template store<K>(
            i, narrow<T, K>(widen<T, K>(packs.own) + widen<T, K>(packs.delta) * share));
      });
}
// The same after a coded average: the difference is that of the reference from the copy.
PA_FN void apply_coded(const Exec& ex, const PaBucket& bucket, Range range, float share) {
  const char* copies = at<const char>(bucket.snapshot) + 16 * range.begin;
  const char* results = at<const char>(bucket.reference) + 16 * range.begin;
  each_own<float>(
      ex, bucket, range.begin, range.end,
      [&](const auto& own, auto g, uint32_t i) {
        constexpr int K = g.kPacks;
        return OwnAndBoth<K>{own.template load<K>(i),
                             load_raw<float, K>(copies + 16 * uint64_t(i)),
                             load_raw<float, K>(results + 16 * uint64_t(i))};
      },
      [&](const auto& own, auto g, uint32_t i, const auto& packs) {
        constexpr int K = g.kPacks;
        const auto delta = widen<float, K>(packs.result) - widen<float, K>(packs.copy);
        own.template store<K>(i, narrow<float, K>(widen<float, K>(packs.own) + delta * share));
      });
}
// After an average that has committed.
PA_FN void run_apply(const Exec& ex, const PaArgs& a) {
  if (at<PaChannel>(a.channel)[ex.block()].status.outcome != PA_COMMITTED) return;
  each_source(ex, a, [&](const PaBucket& bucket, Range range) {
    if (a.flags & PA_FLAG_CODED) return apply_coded(ex, bucket, range, float(a.share));
    with_dtype(bucket.dtype, [&](auto element) {
      using T = decltype(element);
      apply_range<T>(ex, bucket, range, SumOf<T>(a.share));
    });
  });
}
} // namespace PA_ISA
