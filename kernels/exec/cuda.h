// CUDA: a block is a thread block, a lane is a thread. Included by exec.h.
#pragma once
#define PA_FN __device__ __forceinline__
#define PA_NOINLINE __device__ __noinline__
#define PA_UNROLL _Pragma("unroll")
#define PA_MAX_TURN_NS ~uint64_t(0) // no bound of max_turn_ns() but the timeout

namespace PA_ISA {
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
PA_FN void store_release(uint64_t* p, uint64_t v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
PA_FN void fence_release() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
PA_FN void store_after_fence(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
PA_FN void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
PA_FN void store_relaxed(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
// The fence orders the store before every later load_flag of this thread.
PA_FN void raise_flag(uint32_t* p) {
  asm volatile("st.relaxed.sys.global.u32 [%0], 1;\n\tfence.sc.sys;" ::"l"(p) : "memory");
}
PA_FN uint32_t load_flag(const uint32_t* p) { return load_acquire(p); }
PA_FN uint32_t fetch_add(uint32_t* p, uint32_t v) {
  uint32_t seen;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(seen)
               : "l"(p), "r"(v)
               : "memory");
  return seen;
}
PA_FN bool try_lock(uint32_t* p) {
  uint32_t seen;
  asm volatile("atom.acq_rel.gpu.global.exch.b32 %0, [%1], 1;" : "=r"(seen) : "l"(p) : "memory");
  return seen == 0;
}
template <class T> PA_FN bool replace(T* p, T, T v) {
  store_release(p, v);
  return true;
}
PA_FN void wake(uint32_t*, uint32_t*) {} // no thread sleeps on a GPU

struct Exec {
  PA_FN uint32_t block() const { return blockIdx.x; }
  PA_FN uint32_t lane() const { return threadIdx.x; }
  PA_FN uint32_t lanes() const { return blockDim.x; } // a power of two
  PA_FN bool leader() const { return threadIdx.x == 0; }
  // Distance of this lane's first pack from `begin`.
  PA_FN uint32_t first(uint32_t begin) const { return (lane() - begin) & (lanes() - 1); }
  PA_FN void sync() const { __syncthreads(); }
  PA_FN bool any(bool p) const { return __syncthreads_or(p); }
  PA_FN uint64_t now_ns() const {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
  }
  // A hint, for any address.
  PA_FN void prefetch(const char* p) const {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
  }
  PA_FN void pause(uint32_t spins, uint32_t, const uint32_t*, uint32_t, uint32_t*) const {
    __nanosleep(spins < 64 ? 20 : 200);
  }
  PA_FN bool sleeps(uint32_t, uint32_t) const { return false; } // not for so long that it matters
};
// Memory that the lanes of a block share.
template <class X> struct Shared {
  PA_FN explicit Shared(const Exec&) {}
  PA_FN X& get() const {
    __shared__ X x;
    return x;
  }
};
PA_FN bool reader_is_remote(char*, uint64_t, uint32_t) { return false; } // stores do not wait
constexpr uint32_t kLookAround = 64; // see wait_slow()
constexpr int kInFlight = 4; // packs a lane loads before it stores any
constexpr int kGroup = 1;
constexpr uint32_t kMostLanes = 512; // of a block
} // namespace PA_ISA
