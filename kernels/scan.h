// The scan for NaN and infinity: its own kernel before the entry barrier, where nothing else reads
// all own tensors before the commit.
#pragma once
#include "segments.h"

namespace PA_ISA {

// Locates the non-finite element of a range that NonFiniteCheck has found and stores it in me->bad.
template <class T>
PA_NOINLINE void locate_non_finite(const PaBucket* bucket, uint32_t index, uint64_t begin,
                                   uint64_t end, PaChannel* me) {
  constexpr uint32_t N = Element<T>::kPerPack;
  each_part<T>(*bucket, begin, end, [&](const Part& part) {
    const char* tensor = at<const char>(
        at<const PaSegment>(bucket->segments)[part.segment].address + part.offset);
    const uint64_t elements =
        uint64_t(part.whole - part.first) * N + (part.end > part.whole ? part.tail : 0);
    for (uint64_t i = 0; i < elements; ++i) {
      const Wide<T, 1> x = widen<T, 1>(load_ragged<T>(tensor + i * sizeof(T), 1));
      if (any_nonzero<T, 1>(x - x)) {
        // Relaxed: lanes that find one each may overwrite one another; all are true.
        return store_relaxed(&me->bad,
                             1 + (uint64_t(index) << 56 | ((begin + part.first) * N + i)));
      }
    }
  });
}

// Scans a range of the own tensors.
template <class T>
PA_FN void scan_range(const Exec& ex, const PaBucket& bucket, uint32_t index, Range range,
                      PaChannel* me) {
  constexpr uint64_t kStep = 1u << 14; // packs between two looks at the result
  in_pieces(range.begin, range.end, kStep, [&](uint64_t begin, uint64_t end) {
    NonFiniteCheck<T> check;
    each_own<T>(
        ex, bucket, begin, end,
        [&](const auto& own, auto g, uint32_t i) { return own.template load<g.kPacks>(i); },
        [&](const auto&, auto g, uint32_t, const auto& raw) {
          check.template look<g.kPacks>(widen<T, g.kPacks>(raw));
        });
    if (check.found()) locate_non_finite<T>(&bucket, index, begin, end, me);
  });
}

PA_FN void run_scan(const Exec& ex, const PaArgs& a) {
  PaChannel* me = at<PaChannel>(a.channel) + ex.block();
  if (ex.leader()) me->bad = 0;
  ex.sync();
  if ((a.flags & PA_FLAG_WEIGHTED) && a.weight == 0) return; // this rank only receives
  const PaBucket* buckets = at<const PaBucket>(a.buckets);
  for (uint32_t i = 0; i < a.bucket_count; ++i)
    with_dtype(buckets[i].dtype, [&](auto element) {
      scan_range<decltype(element)>(ex, buckets[i], i, channel_range(buckets[i], ex.block()), me);
    });
}
} // namespace PA_ISA
