// CPU, tests: a block of many lanes, each an OS thread. Included by exec/cpu.h.
#pragma once
#include <pthread.h>

namespace PA_ISA {
struct Lanes { // shared by the lanes of one block
  pthread_barrier_t barrier;
  int flag[2];
  alignas(16) char memory[512];
};
struct Exec : CpuExec {
  uint32_t lane_, lanes_;
  Lanes* shared;
  mutable unsigned calls = 0;
  uint32_t lane() const { return lane_; }
  uint32_t lanes() const { return lanes_; }
  bool leader() const { return lane_ == 0; }
  uint32_t first(uint32_t begin) const { return (lane_ - begin) & (lanes_ - 1); }
  void sync() const { pthread_barrier_wait(&shared->barrier); }
  // Two flags in turn: the idle one is cleared between the barriers, when no lane reads it.
  bool any(bool p) const {
    const unsigned f = calls++ & 1;
    if (p) __atomic_store_n(&shared->flag[f], 1, __ATOMIC_RELAXED);
    sync();
    const bool result = __atomic_load_n(&shared->flag[f], __ATOMIC_RELAXED) != 0;
    if (leader()) __atomic_store_n(&shared->flag[f ^ 1], 0, __ATOMIC_RELAXED);
    sync();
    return result;
  }
};
template <class X> struct Shared {
  X& x;
  explicit Shared(const Exec& ex) : x(*reinterpret_cast<X*>(ex.shared->memory)) {
    static_assert(sizeof(X) <= sizeof ex.shared->memory, "Lanes::memory");
  }
  X& get() const { return x; }
};
} // namespace PA_ISA
