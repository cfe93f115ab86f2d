// The execution layer: what a block, a lane, a barrier, a flag and a clock are. The algorithm above it is written once.
//   CUDA         a block is a thread block, a lane is a thread, sync() is __syncthreads
//   CPU          a block is one OS thread with one lane: barriers vanish, lane loops become plain loops
//   CPU, tests   (PA_LANES) a block has many lanes, each an OS thread, with a real barrier: so that a missing block
//                barrier can be seen
// Flags are published with st.release and polled with ld.acquire at system scope; no fences on CPUs, since ThreadSanitizer
// does not model them. Only blocks of one rank share words that are read and modified in one go: between devices PCIe can't.
// Whatever is weaker has `relaxed` in its name and says at the call why it may be.
#pragma once
#include "abi.h"
#include <stddef.h>
#include <string.h>
#include <type_traits>
#if !defined(__CUDACC__)
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <sched.h>
#include <time.h>
#if defined(PA_LANES)
#include <pthread.h>
#endif
#endif

// The longest wait for a rank in its turn, whatever the timeout: see longest_turn_ns(). A variable in tests.
#ifndef PA_MOST_TURN_NS
#if defined(__CUDACC__)
#define PA_MOST_TURN_NS ~uint64_t(0)
#else
#define PA_MOST_TURN_NS uint64_t(250'000'000)
#endif
#endif

#define PA_SAME(a, b) std::is_same_v<a, b>
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define PA_SANITIZE
#endif

#if defined(__CUDACC__)
#define PA_FN __device__ __forceinline__
#define PA_SLOW __device__ __noinline__
#define PA_UNROLL _Pragma("unroll")
#else
#define PA_FN inline __attribute__((always_inline))
#define PA_SLOW inline __attribute__((noinline, unused))
#define PA_UNROLL
#endif

// One namespace an instruction set: the linker must not let one copy's functions stand in for another's.
#ifndef PA_ISA
#define PA_ISA portable
#endif
namespace PA_ISA {

template <class T> PA_FN T* at(uint64_t address) { return reinterpret_cast<T*>(address); }

#if defined(__CUDACC__)
// ---- CUDA ------------------------------------------------------------------------------------------------------
PA_FN uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
PA_FN uint64_t load_acquire(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
PA_FN uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
PA_FN void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
PA_FN void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
PA_FN void store_relaxed(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
PA_FN void store_release(uint64_t* p, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
// Raises a flag, and no load_flag of this thread that follows looks before it is up.
PA_FN void raise_flag(uint32_t* p) {
  asm volatile("st.relaxed.sys.global.u32 [%0], 1;\n\tfence.sc.sys;" ::"l"(p) : "memory");
}
PA_FN uint32_t load_flag(const uint32_t* p) { return load_acquire(p); }
// Between the blocks of one rank only.
PA_FN uint32_t fetch_add(uint32_t* p, uint32_t v) {
  uint32_t seen;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(seen) : "l"(p), "r"(v) : "memory");
  return seen;
}
PA_FN bool try_lock(uint32_t* p) {
  uint32_t seen;
  asm volatile("atom.acq_rel.gpu.global.exch.b32 %0, [%1], 1;" : "=r"(seen) : "l"(p) : "memory");
  return seen == 0;
}
// In turn, so that nobody else writes.
template <class T> PA_FN bool replace(T* p, T, T v) {
  store_release(p, v);
  return true;
}
PA_FN void wake(uint32_t*, uint32_t*) {} // nobody sleeps on a GPU

struct Exec {
  PA_FN uint32_t block() const { return blockIdx.x; }
  PA_FN uint32_t lane() const { return threadIdx.x; }
  PA_FN uint32_t lanes() const { return blockDim.x; } // a power of two
  PA_FN bool leader() const { return threadIdx.x == 0; }
  PA_FN uint32_t first(uint32_t begin) const { return (lane() - begin) & (lanes() - 1); } // this lane's, after begin
  PA_FN void sync() const { __syncthreads(); }
  PA_FN bool any(bool p) const { return __syncthreads_or(p); }
  PA_FN uint64_t now_ns() const {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
  }
  PA_FN void pause(uint32_t spins, uint32_t, const uint32_t*, uint32_t, uint32_t*) const { __nanosleep(spins < 64 ? 20 : 200); }
  PA_FN bool sleeps(uint32_t, uint32_t) const { return false; } // not for so long that it matters
};
PA_FN bool is_far(char*, uint64_t, uint32_t) { return false; } // a GPU's stores wait for nobody's cache
constexpr int kInFlight = 4; // packs a lane loads before it stores any
constexpr int kGroup = 1;
#else
// ---- CPU -------------------------------------------------------------------------------------------------------
PA_FN uint32_t load_acquire(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
PA_FN uint64_t load_acquire(const uint64_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
PA_FN uint32_t load_relaxed(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
// Stronger than release: it must not pass the load of the sleepers word in wake(), or a wake-up is lost.
PA_FN void store_release(uint32_t* p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
PA_FN void store_relaxed(uint32_t* p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
PA_FN void store_relaxed(uint64_t* p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
PA_FN void store_release(uint64_t* p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
PA_FN void raise_flag(uint32_t* p) { __atomic_store_n(p, 1u, __ATOMIC_SEQ_CST); }
PA_FN uint32_t load_flag(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
PA_FN bool try_lock(uint32_t* p) { return __atomic_exchange_n(p, 1u, __ATOMIC_ACQ_REL) == 0; }
PA_FN uint32_t fetch_add(uint32_t* p, uint32_t v) {
  return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL);
}
// In turn, and yet by compare-and-swap: a process that is stopped in its turn until others have taken it for gone does not
// overwrite what they wrote.
template <class T> PA_FN bool replace(T* p, T seen, T v) {
  return __atomic_compare_exchange_n(p, &seen, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}
// After a word was published: wakes who sleeps on it. One load when nobody does. The word may be in memory that other
// processes map, hence no FUTEX_PRIVATE.
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
// Spin while the peer is about to publish, then give the core to whoever can use it, then sleep. A sleep is sliced, so
// that an abort or a deadline is noticed although it wakes nobody.
inline bool cpu_sleeps(uint32_t spins, uint32_t most_spins) {
  constexpr uint32_t kYields = 200;
  return spins >= most_spins + kYields;
}
inline void cpu_pause(uint32_t spins, uint32_t most_spins, const uint32_t* word, uint32_t seen, uint32_t* sleepers) {
  constexpr long kSliceNs = 1000000;
  if (spins < most_spins) return cpu_relax();
  if (!cpu_sleeps(spins, most_spins)) {
    sched_yield();
    return;
  }
  const timespec slice = {0, kSliceNs};
#if defined(__linux__)
  __atomic_fetch_add(sleepers, 1u, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, word, FUTEX_WAIT, seen, &slice, nullptr, 0); // returns at once if the word is not `seen` any more
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

// Whether a line of a slot takes longer than `most_ns` to get hold of while the core that read it last still holds it.
// Where the two share a cache it does not. Where they do not (other sockets, other clusters of cores) such stores make the
// ring six times slower, while stores past the caches, which ask nobody, take as long as ever.
inline bool is_far(char* slot, uint64_t bytes, uint32_t most_ns) {
#if defined(__x86_64__) && !defined(PA_LANES) // one lane finds out
  constexpr uint64_t kLine = 64, kMost = 64, kLeast = 16; // fewer take no longer than to look at the clock
  const uint64_t lines = bytes / kLine < kMost ? bytes / kLine : kMost;
  if (lines < kLeast && most_ns != 0) return false;
  const uint64_t start = cpu_now_ns();
  for (uint64_t i = 0; i < lines; ++i) __atomic_store_n(reinterpret_cast<uint32_t*>(slot + i * kLine), 0u, __ATOMIC_RELAXED);
  __builtin_ia32_mfence(); // until all of them are in this core's cache
  return cpu_now_ns() - start > lines * most_ns;
#else
  (void)slot, (void)bytes, (void)most_ns;
  return false;
#endif
}

#if !defined(PA_LANES)
struct Exec {
  uint32_t channel;
  uint32_t block() const { return channel; }
  constexpr uint32_t lane() const { return 0; }
  constexpr uint32_t lanes() const { return 1; }
  constexpr bool leader() const { return true; }
  constexpr uint32_t first(uint32_t) const { return 0; }
  void sync() const {}
  bool any(bool p) const { return p; }
  uint64_t now_ns() const { return cpu_now_ns(); }
  void pause(uint32_t spins, uint32_t most, const uint32_t* w, uint32_t seen, uint32_t* s) const { cpu_pause(spins, most, w, seen, s); }
  bool sleeps(uint32_t spins, uint32_t most) const { return cpu_sleeps(spins, most); }
};
#else
struct Lanes { // what the lanes of one block share
  pthread_barrier_t barrier;
  int flag[2];
};
struct Exec {
  uint32_t channel, lane_, lanes_;
  Lanes* shared;
  mutable unsigned phase = 0;
  uint32_t block() const { return channel; }
  uint32_t lane() const { return lane_; }
  uint32_t lanes() const { return lanes_; }
  bool leader() const { return lane_ == 0; }
  uint32_t first(uint32_t begin) const { return (lane_ - begin) & (lanes_ - 1); }
  void sync() const { pthread_barrier_wait(&shared->barrier); }
  // Two flags in turn: the one not in use is cleared between the barriers, when nobody looks at it.
  bool any(bool p) const {
    const unsigned f = phase++ & 1;
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
#endif
constexpr int kInFlight = 1; // the compiler and the core overlap loads themselves
#if defined(PA_LANES)
constexpr int kGroup = 1;
#elif defined(__AVX512BW__)
constexpr int kGroup = 4; // packs in one vector register
#elif defined(__AVX2__)
constexpr int kGroup = 2;
#else
constexpr int kGroup = 1;
#endif
#endif

template <int K> struct Group {
  static constexpr int kPacks = K;
};

// Packs begin … end of a chunk, by load(group, i) and store(group, i, value) for packs i … i + K of a Group<K>. Shared
// out so that pack i belongs to lane i mod lanes wherever the range begins: many small tensors in one chunk then keep
// all lanes busy. Returns the first pack of this lane that is left: on a CPU that lies behind the end. A GPU's lane has
// kDeep packs in flight, and leaves what does not fill them to a loop that costs less code. Groups begin `lead` packs
// after `begin`, where what they are stored to is aligned.
template <int kDeep, class Load, class Store>
PA_FN uint32_t each_pack(const Exec& ex, uint32_t begin, uint32_t lead, uint32_t end, Load load, Store store) {
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
