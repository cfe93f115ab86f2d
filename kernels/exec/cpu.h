// CPU: a block is one OS thread with one lane. Included by exec.h.
#pragma once
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <sched.h>
#include <time.h>

#define PA_FN inline __attribute__((always_inline))
#define PA_NOINLINE inline __attribute__((noinline, unused))
#define PA_UNROLL
// Bound of max_turn_ns(), whatever the timeout. A variable in tests.
#ifndef PA_MAX_TURN_NS
#define PA_MAX_TURN_NS uint64_t(250'000'000)
#endif
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define PA_SANITIZE
#endif

namespace PA_ISA {
PA_FN uint32_t load_acquire(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
PA_FN uint64_t load_acquire(const uint64_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
PA_FN uint32_t load_relaxed(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
// Stronger than release: it must not pass the load of `sleepers` in wake(), or a wake-up is lost.
PA_FN void store_release(uint32_t* p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
PA_FN void store_release(uint64_t* p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
PA_FN void fence_release() {} // the stores that follow are releases each
PA_FN void store_after_fence(uint32_t* p, uint32_t v) { store_release(p, v); }
PA_FN void store_relaxed(uint32_t* p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
PA_FN void store_relaxed(uint64_t* p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
PA_FN void raise_flag(uint32_t* p) { __atomic_store_n(p, 1u, __ATOMIC_SEQ_CST); }
PA_FN uint32_t load_flag(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
PA_FN bool try_lock(uint32_t* p) { return __atomic_exchange_n(p, 1u, __ATOMIC_ACQ_REL) == 0; }
PA_FN uint32_t fetch_add(uint32_t* p, uint32_t v) {
  return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
// A compare-and-swap even under the turn lock: a process that was stopped while it held the lock,
// until others took it over, must not overwrite their decision.
template <class T> PA_FN bool replace(T* p, T seen, T v) {
  return __atomic_compare_exchange_n(p, &seen, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
// One load where no thread sleeps. The word may lie in memory that other processes map, hence no
// FUTEX_PRIVATE.
PA_FN void wake(uint32_t* word, uint32_t* sleepers) {
  if (__atomic_load_n(sleepers, __ATOMIC_SEQ_CST) == 0) return;
#if defined(__linux__)
  syscall(SYS_futex, word, FUTEX_WAKE, 0x7fffffff, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}
inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}
// A wait spins while the peer is about to publish, then yields its core, then sleeps. A sleep is
// sliced, so that an abort or a deadline is noticed although it wakes no thread.
inline bool cpu_sleeps(uint32_t spins, uint32_t max_spins) {
  constexpr uint32_t kYields = 200;
  return spins >= max_spins + kYields;
}
inline void cpu_pause(uint32_t spins, uint32_t max_spins, const uint32_t* word, uint32_t seen,
                      uint32_t* sleepers) {
  constexpr long kSliceNs = 1000000;
  if (spins < max_spins) return cpu_relax();
  if (!cpu_sleeps(spins, max_spins)) {
    sched_yield();
    return;
  }
  const timespec slice = {0, kSliceNs};
#if defined(__linux__)
  __atomic_fetch_add(sleepers, 1u, __ATOMIC_SEQ_CST);
  // Returns at once if the word differs from `seen` by now.
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &slice, nullptr, 0);
  __atomic_fetch_sub(sleepers, 1u, __ATOMIC_SEQ_CST);
#else
  (void)word, (void)seen, (void)sleepers;
  nanosleep(&slice, nullptr);
#endif
}
inline uint64_t cpu_now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1000000000u + uint64_t(t.tv_nsec);
}

// True if stores to a slot take longer than `max_ns` per line while the core that read it last
// still holds it. Not so where the two cores share a cache. Where they do not (other sockets, other
// clusters of cores), such stores make the ring six times slower; non-temporal stores, which need
// no ownership, take as long as ever.
inline bool reader_is_remote(char* slot, uint64_t bytes, uint32_t max_ns) {
#if defined(__x86_64__) && !defined(PA_LANES) // one lane measures
  // Fewer lines than kLeast take no longer than reading the clock.
  constexpr uint64_t kLine = 64, kMost = 64, kLeast = 16;
  const uint64_t lines = bytes / kLine < kMost ? bytes / kLine : kMost;
  if (lines < kLeast && max_ns != 0) return false;
  const uint64_t start = cpu_now_ns();
  for (uint64_t i = 0; i < lines; ++i)
    store_relaxed(reinterpret_cast<uint32_t*>(slot + i * kLine), 0u); // not published yet
  __builtin_ia32_mfence(); // until all of them are in this core's cache
  return cpu_now_ns() - start > lines * max_ns;
#else
  (void)slot, (void)bytes, (void)max_ns;
  return false;
#endif
}

constexpr uint32_t kLookAround = 16; // see wait_slow()
constexpr int kInFlight = 1; // the compiler and the core overlap loads themselves
#if defined(__AVX512BW__) && !defined(PA_LANES)
constexpr int kGroup = 4; // packs per vector register
#elif defined(__AVX2__) && !defined(PA_LANES)
constexpr int kGroup = 2;
#else
constexpr int kGroup = 1;
#endif

#if defined(PA_LANES)
constexpr uint32_t kMostLanes = 16; // of a block
#else
constexpr uint32_t kMostLanes = 1;
#endif

struct CpuExec {
  uint32_t channel;
  uint32_t block() const { return channel; }
  uint64_t now_ns() const { return cpu_now_ns(); }
  void prefetch(const char*) const {}
  bool sleeps(uint32_t spins, uint32_t max_spins) const { return cpu_sleeps(spins, max_spins); }
  void pause(uint32_t spins, uint32_t max_spins, const uint32_t* word, uint32_t seen,
             uint32_t* sleepers) const {
    cpu_pause(spins, max_spins, word, seen, sleepers);
  }
};
} // namespace PA_ISA

#if defined(PA_LANES)
#include "lanes.h"
#else
namespace PA_ISA {
struct Exec : CpuExec {
  constexpr uint32_t lane() const { return 0; }
  constexpr uint32_t lanes() const { return 1; }
  constexpr bool leader() const { return true; }
  constexpr uint32_t first(uint32_t) const { return 0; }
  void sync() const {}
  bool any(bool p) const { return p; }
};
template <class X> struct Shared {
  mutable X x;
  explicit Shared(const Exec&) {}
  X& get() const { return x; }
};
} // namespace PA_ISA
#endif
