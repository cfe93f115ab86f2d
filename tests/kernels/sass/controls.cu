// Negative controls for the static checks: each kernel but the first has one flaw, which its name
// says.
#include <stdint.h>

__device__ __forceinline__ uint4 load(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store(uint4* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Waits for a flag, moves packs with four in flight, publishes a flag.
template <bool kAcquire, bool kRelease, bool kNarrow>
__device__ __forceinline__ void move_packs(const uint4* from, uint4* to, int n,
                                      uint32_t* flags, uint16_t* half) {
  uint32_t seen = 0;
  if (kAcquire) asm volatile("ld.acquire.sys.global.u32 %0, [%1];"
                             : "=r"(seen) : "l"(flags) : "memory");
  else asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags) : "memory");
#pragma unroll 1
  for (int i = threadIdx.x + int(seen); i < n; i += 4 * 512) {
    uint4 v[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) v[u] = load(from + i + 512 * u);
    if (kNarrow) v[0].x += half[i];
#pragma unroll
    for (int u = 0; u < 4; ++u) store(to + i + 512 * u, v[u]);
  }
  __syncthreads();
  if (kRelease) asm volatile("st.release.sys.global.u32 [%0], %1;"
                             ::"l"(flags + 32), "r"(seen + 1) : "memory");
  else asm volatile("st.relaxed.sys.global.u32 [%0], %1;"
                    ::"l"(flags + 32), "r"(seen + 1) : "memory");
}

#define CONTROL(name) extern "C" __global__ void __launch_bounds__(512, 1) name
CONTROL(flawless)(const uint4* from, uint4* to, int n, uint32_t* flags, uint16_t* half) {
  move_packs<true, true, false>(from, to, n, flags, half);
}
CONTROL(relaxed_load)(const uint4* from, uint4* to, int n, uint32_t* flags, uint16_t* half) {
  move_packs<false, true, false>(from, to, n, flags, half);
}
CONTROL(relaxed_store)(const uint4* from, uint4* to, int n, uint32_t* flags, uint16_t* half) {
  move_packs<true, false, false>(from, to, n, flags, half);
}
CONTROL(narrow_in_the_loop)(const uint4* from, uint4* to, int n, uint32_t* flags, uint16_t* half) {
  move_packs<true, true, true>(from, to, n, flags, half);
}
// Two steps of a ring: wait, move packs, one fence, two flags.
template <bool kLate, int kFences>
__device__ __forceinline__ void make_steps(const uint4* from, uint4* to, int n, uint32_t* flags,
                                           const volatile int* table) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    int begin = table[step];
    uint32_t seen;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flags) : "memory");
    if (__syncthreads_or(seen == 0)) return;
    if (kLate) begin = table[step + 2];
#pragma unroll 1
    for (int i = threadIdx.x + begin; i < n; i += 4 * 512) {
      uint4 v[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) v[u] = load(from + i + 512 * u);
#pragma unroll
      for (int u = 0; u < 4; ++u) store(to + i + 512 * u, v[u]);
    }
    __syncthreads();
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if (f < kFences) asm volatile("fence.acq_rel.sys;" ::: "memory");
      asm volatile("st.relaxed.sys.global.u32 [%0], %1;"
                   ::"l"(flags + 32 * (f + 1)), "r"(seen + 1) : "memory");
    }
  }
}
CONTROL(two_steps)(const uint4* from, uint4* to, int n, uint32_t* flags, const int* table) {
  make_steps<false, 1>(from, to, n, flags, table);
}
CONTROL(look_up_after_the_wait)(const uint4* from, uint4* to, int n, uint32_t* flags,
                                const int* table) {
  make_steps<true, 1>(from, to, n, flags, table);
}
CONTROL(two_fences)(const uint4* from, uint4* to, int n, uint32_t* flags, const int* table) {
  make_steps<false, 2>(from, to, n, flags, table);
}
// Four loads, each of which is used before the next one.
CONTROL(one_load_in_flight)(const uint4* from, uint4* to, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 4 * 512) {
#pragma unroll
    for (int u = 0; u < 4; ++u) store(to + i + 512 * u, load(from + i + 512 * u));
  }
}
CONTROL(scalar_loop)(const volatile float* from, volatile float* to, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) to[i] = from[i];
}
CONTROL(byte_loop)(const volatile uint8_t* from, volatile uint8_t* to, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 512) to[i] = from[i];
}
CONTROL(stack_array)(const volatile int* from, volatile int* to, int n) {
  int v[64];
#pragma unroll 1
  for (int i = 0; i < 64; ++i) v[i] = from[i];
#pragma unroll 1
  for (int i = 0; i < n; ++i) to[i] = v[from[i] & 63];
}
CONTROL(generic_pointer)(const uint64_t* table, int n) {
  __shared__ uint4 other[4];
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    volatile uint4* p = table[i] & 1 ? other : reinterpret_cast<uint4*>(table[i]);
    uint4 v;
    asm volatile("ld.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};"
                 ::"l"(p + 1), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  }
}
// Launched with 128 threads, it may have 255 registers.
extern "C" __global__ void __launch_bounds__(128, 1)
many_registers(const volatile float* from, volatile float* to) {
  float v[180];
#pragma unroll
  for (int i = 0; i < 180; ++i) v[i] = from[i * 128 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 180; ++i) to[i * 128 + threadIdx.x] = v[i] * v[179 - i];
}
CONTROL(read_only_cache)(const float* __restrict__ from, float* __restrict__ to, int n) {
  for (int i = threadIdx.x; i < n; i += 512) to[i] = __ldg(from + i);
}
