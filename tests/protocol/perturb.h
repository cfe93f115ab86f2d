// Delays at random places, from a seed: the windows of a race last nanoseconds, and these make them last long enough to
// be met. The kernels' clock and yield are replaced by ones that dawdle. To be included before the kernels.
#pragma once
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "data.h"

inline thread_local uint64_t dawdle_state = 1;
inline int dawdle_us = 40; // the longest delay

inline uint64_t random_bits() { return mix(dawdle_state++); }
inline uint64_t random_below(uint64_t n) { return n == 0 ? 0 : random_bits() % n; }
// One call in `chance` dawdles.
inline void perturb(unsigned chance) {
  const uint64_t h = random_bits();
  if (h % chance != 0) return;
  if (h >> 32 & 1) sched_yield();
  else usleep(unsigned(h >> 40) % unsigned(dawdle_us + 1));
}
// Looked at between a poll of the awaited word and a look at what else may have happened.
inline int perturbed_clock(clockid_t clock, timespec* t) {
  perturb(8);
  return clock_gettime(clock, t);
}
inline int perturbed_yield() {
  perturb(16);
  return sched_yield();
}
#define clock_gettime perturbed_clock
#define sched_yield perturbed_yield
