// Random delays, from a seed, that widen the windows of races from nanoseconds. The kernels' clock
// and yield are replaced by versions with delays. To be included before the kernels.
#pragma once
#include <atomic>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "data.h"

inline thread_local uint64_t delay_state = 1;
inline int max_delay_us = 40; // the longest delay
inline uint64_t test_max_turn_ns = 250'000'000;
#define PA_MAX_TURN_NS test_max_turn_ns

inline uint64_t random_bits() { return mix(delay_state++); }
inline uint64_t random_below(uint64_t n) { return n == 0 ? 0 : random_bits() % n; }
// Delays one call in `chance`.
inline void perturb(unsigned chance) {
  const uint64_t h = random_bits();
  if (h % chance != 0) return;
  if (h >> 32 & 1) sched_yield();
  else usleep(unsigned(h >> 40) % unsigned(max_delay_us + 1));
}
// Stops a rank as a signal stops a process: all its threads, each at its next look at the clock,
// which a waiting thread takes again and again. Relaxed: it must not order what the kernels do not.
struct Stop {
  std::atomic<uint32_t> looks{0}; // look at which the rank is stopped; 0: none
  uint32_t later_looks = 0;       // the same, from the second launch of an average on
  std::atomic<bool> stopped{false}, goes_on{false};
  bool in_its_turn = false;           // stops the rank at its first look while its flag is up
  const uint32_t* deciding = nullptr; // that flag, on its board
  void look() {
    const auto relaxed = std::memory_order_relaxed;
    if (in_its_turn && __atomic_load_n(deciding, __ATOMIC_RELAXED) != 0)
      stopped.store(true, relaxed);
    if (looks.load(relaxed) != 0 && looks.fetch_sub(1, relaxed) == 1) stopped.store(true, relaxed);
    while (stopped.load(relaxed) && !goes_on.load(relaxed)) usleep(100);
  }
};
inline thread_local Stop* own_stop = nullptr; // the rank that this thread runs
// Look before which this thread was stopped, for stop_ns, as its clock shows.
inline thread_local uint32_t look_after_stop = 0;
inline thread_local uint64_t stop_ns = 0, clock_ahead_ns = 0;

// Called between a poll of the awaited word and a look at anything else that ends a wait.
inline int perturbed_clock(clockid_t clock, timespec* t) {
  perturb(8);
  if (own_stop != nullptr) own_stop->look();
  if (look_after_stop != 0 && --look_after_stop == 0) clock_ahead_ns += stop_ns;
  const int result = clock_gettime(clock, t);
  t->tv_sec += time_t(clock_ahead_ns / 1'000'000'000);
  // may exceed a second; the kernels only add it up
  t->tv_nsec += long(clock_ahead_ns % 1'000'000'000);
  return result;
}
inline int perturbed_yield() {
  perturb(16);
  return sched_yield();
}
#define clock_gettime perturbed_clock
#define sched_yield perturbed_yield
