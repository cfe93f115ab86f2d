// CPU, tests: a block has many lanes, each an OS thread. Included by exec/cpu.h.
#pragma once
#include <pthread.h>

namespace PA_ISA {
struct Lanes { // what the lanes of one block share
  pthread_barrier_t barrier;
  int flag[2];
};
struct Exec {
  uint32_t channel, lane_, lanes_;
  Lanes* shared;
  mutable unsigned calls = 0;
  uint32_t block() const { return channel; }
  uint32_t lane() const { return lane_; }
  uint32_t lanes() const { return lanes_; }
  bool leader() const { return lane_ == 0; }
  uint32_t first(uint32_t begin) const { return (lane_ - begin) & (lanes_ - 1); }
  void sync() const { pthread_barrier_wait(&shared->barrier); }
  // Two flags in turn: the one not in use is cleared between the barriers, when nobody looks at it.
  bool any(bool p) const {
    const unsigned f = calls++ & 1;
    if (p) __atomic_store_n(&shared->flag[f], 1, __ATOMIC_RELAXED);
    sync();
    const bool result = __atomic_load_n(&shared->flag[f], __ATOMIC_RELAXED) != 0;
    if (leader()) __atomic_store_n(&shared->flag[f ^ 1], 0, __ATOMIC_RELAXED);
    sync();
    return result;
  }
  uint64_t now_ns() const { return cpu_now_ns(); }
  void pause(uint32_t spins, uint32_t most, const uint32_t* w, uint32_t seen, uint32_t* s) const { cpu_pause(spins, most, w, seen, s); }
  bool sleeps(uint32_t spins, uint32_t most) const { return cpu_sleeps(spins, most); }
};
} // namespace PA_ISA
