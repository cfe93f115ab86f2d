// The execution layer. exec/cuda.h and exec/cpu.h implement one contract for the algorithm above:
//
//   Exec            block(), lane(), lanes(), leader(), now_ns(); block barriers sync() and any()
//   CUDA            a block is a thread block, a lane is a thread, sync() is __syncthreads
//   CPU             a block is one OS thread with one lane: barriers vanish, lane loops are plain
//   CPU, tests      (PA_LANES) a block has many lanes, each an OS thread, with a real barrier, so
//                   that a missing block barrier can be seen
//
//   Shared          an object that the lanes of a block share
//   load_acquire, store_release   publish and poll words of other ranks, at system scope
//   fence_release, store_after_fence  one fence for several releases, on CUDA
//   raise_flag, load_flag         sequentially consistent with one another
//   fetch_add, try_lock           between blocks of one rank only: PCIe has no atomics between
//                                 devices
//   replace                       a store under the turn lock, see decision.h
//   wake                          wakes threads that sleep on a word after it was published
//   reader_is_remote              measures the reader's distance, see exec/cpu.h
//
// No fences on CPUs, since ThreadSanitizer does not model them. Whatever is weaker has `relaxed` in
// its name, and the call says why it may be.
#pragma once
#include "abi.h"
#include <stddef.h>
#include <string.h>
#include <type_traits>

#define PA_SAME(a, b) std::is_same_v<a, b>

// One namespace per instruction set: the linker must not replace one copy's functions by another's.
#ifndef PA_ISA
#define PA_ISA portable
#endif
#if defined(__CUDACC__)
#include "exec/cuda.h"
#else
#include "exec/cpu.h"
#endif

namespace PA_ISA {
template <class T> PA_FN T* at(uint64_t address) { return reinterpret_cast<T*>(address); }
PA_FN uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }

template <int K> struct Group {
  static constexpr int kPacks = K;
};

// Packs begin … end of a chunk, by load(group, i) and store(group, i, value) for packs i … i + K of
// a Group<K>. Pack i belongs to lane i mod lanes wherever the range begins, so that many small
// tensors in one chunk keep all lanes busy. Returns this lane's first pack that is left: behind the
// end on a CPU. A GPU's lane has kDeep packs in flight and leaves what does not fill them to a loop
// that costs less code. Groups begin `lead` packs after `begin`, where their stores are aligned.
template <int kDeep, class Load, class Store>
PA_FN uint32_t each_pack(const Exec& ex, uint32_t begin, uint32_t lead, uint32_t end, Load load,
                         Store store) {
  const uint32_t step = ex.lanes();
  uint32_t i = begin + ex.first(begin);
  constexpr Group<1> one;
  if constexpr (kGroup > 1) {
    constexpr Group<kGroup> group;
    for (; i < begin + lead && i < end; ++i) store(one, i, load(one, i));
    for (; i + kGroup <= end; i += kGroup) store(group, i, load(group, i));
  }
  for (; i + (kDeep - 1) * step < end; i += kDeep * step) {
    decltype(load(one, i)) v[kDeep];
    PA_UNROLL for (int u = 0; u < kDeep; ++u) v[u] = load(one, i + u * step);
    PA_UNROLL for (int u = 0; u < kDeep; ++u) store(one, i + u * step, v[u]);
  }
  return i;
}
} // namespace PA_ISA
