// The mean of a range of n buffers → the same range of others: all that the limits of limit.rs do,
// with the vectors of the library's own kernels. Compiled once for each instruction set, PA_ISA.
#include "pack.h"

// As limit.rs has it.
struct Mean {
  char* const* from;
  size_t reads;
  char* const* to;
  size_t writes, begin, end; // in bytes
  uint32_t dtype;
  bool stream;
};

namespace PA_ISA {
// Vectors of one replica that are moved together: fewer turns between replicas, and no more than
// the registers hold.
constexpr int kTogether = 4;

// kVectors of K packs, `at` bytes from the start. kReads: mean.reads where it is known, which
// unrolls the loop over replicas, or 0.
template <class T, int K, int kVectors, int kReads>
PA_FN void average_at(const Mean& mean, size_t at, SumOf<T> inverse) {
  const size_t reads = kReads > 0 ? kReads : mean.reads;
  Wide<T, K> sum[kVectors] = {};
  for (size_t r = 0; r < reads; ++r)
    for (int v = 0; v < kVectors; ++v)
      sum[v] = sum[v] + widen<T, K>(load_raw<T, K>(mean.from[r] + at + 16 * K * v));
  Raw<T, K> result[kVectors];
  for (int v = 0; v < kVectors; ++v) result[v] = narrow<T, K>(sum[v] * inverse);
  for (size_t r = 0; r < mean.writes; ++r)
    for (int v = 0; v < kVectors; ++v)
      store_to_peer<T, K>(mean.to[r] + at + 16 * K * v, result[v], mean.stream);
}

template <class T, int kReads> PA_NOINLINE void average_of(const Mean& mean) {
  const SumOf<T> inverse = SumOf<T>(1) / SumOf<T>(mean.reads);
  constexpr size_t kStep = 16 * kGroup * kTogether;
  size_t at = mean.begin;
  for (; at + kStep <= mean.end; at += kStep)
    average_at<T, kGroup, kTogether, kReads>(mean, at, inverse);
  for (; at + 16 <= mean.end; at += 16) average_at<T, 1, 1, 0>(mean, at, inverse);
  if (const uint32_t left = uint32_t((mean.end - at) / sizeof(T))) {
    Wide<T, 1> sum{};
    for (size_t r = 0; r < mean.reads; ++r)
      sum = sum + widen<T, 1>(load_ragged<T>(mean.from[r] + at, left));
    for (size_t r = 0; r < mean.writes; ++r)
      store_ragged<T>(mean.to[r] + at, left, narrow<T, 1>(sum * inverse));
  }
  fence_nt();
}

template <class T> PA_FN void average(const Mean& mean) {
  switch (mean.reads) {
    case 1: return average_of<T, 1>(mean);
    case 2: return average_of<T, 2>(mean);
    case 3: return average_of<T, 3>(mean);
    case 4: return average_of<T, 4>(mean);
    case 8: return average_of<T, 8>(mean);
    default: return average_of<T, 0>(mean);
  }
}
} // namespace PA_ISA

#define JOIN(a, b) a##b
#define NAME(prefix, isa) JOIN(prefix, isa)
extern "C" void NAME(allreduce_bench_mean_, PA_ISA)(const Mean* mean) {
  PA_ISA::with_dtype(mean->dtype, [&](auto element) {
    PA_ISA::average<decltype(element)>(*mean);
  });
}
