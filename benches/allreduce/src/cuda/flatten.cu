// Moves pieces of memory from one place to another, 16 bytes a load, and scales their elements on
// the way if asked: in f32 (f64 in f64), rounded once. For the bench's baselines: copy engines are
// many times slower at many small tensors, and a baseline that is slow for no reason proves
// nothing.
#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int kThreads = 512, kPacks = 4; // of a block; that each thread has in flight

// At most kThreads * kPacks packs, at a multiple of 16 bytes.
struct Piece {
    uint64_t place[2]; // in the tensors, in the flat buffer
    uint64_t bytes;
};

__device__ char scaled(char x, double) { return x; }
__device__ float scaled(float x, double s) { return x * float(s); }
__device__ double scaled(double x, double s) { return x * s; }
__device__ __half scaled(__half x, double s) {
    return __float2half_rn(__half2float(x) * float(s));
}
__device__ __nv_bfloat16 scaled(__nv_bfloat16 x, double s) {
    return __float2bfloat16_rn(__bfloat162float(x) * float(s));
}

// Every pack is loaded before the first is stored. A tail of less than a pack: an element a thread.
template <class T>
__device__ void move(const Piece *pieces, uint32_t count, uint32_t from, uint32_t to, double s) {
    for (uint32_t row = blockIdx.x; row < count; row += gridDim.x) {
        const char *source = reinterpret_cast<const char *>(pieces[row].place[from]);
        char *target = reinterpret_cast<char *>(pieces[row].place[to]);
        const uint32_t bytes = pieces[row].bytes, packs = bytes / 16;
        uint4 pack[kPacks];
#pragma unroll
        for (uint32_t k = 0, n = threadIdx.x; k < kPacks; ++k, n += kThreads)
            if (n < packs) pack[k] = reinterpret_cast<const uint4 *>(source)[n];
#pragma unroll
        for (uint32_t k = 0, n = threadIdx.x; k < kPacks; ++k, n += kThreads) {
            T element[16 / sizeof(T)];
            memcpy(element, &pack[k], 16);
            for (T &x : element) x = scaled(x, s);
            memcpy(&pack[k], element, 16);
            if (n < packs) reinterpret_cast<uint4 *>(target)[n] = pack[k];
        }
        const uint32_t n = packs * (16 / sizeof(T)) + threadIdx.x;
        if (n < bytes / sizeof(T))
            reinterpret_cast<T *>(target)[n] = scaled(reinterpret_cast<const T *>(source)[n], s);
    }
}

#define KERNEL(name, T)                                                                       \
    extern "C" __global__ void __launch_bounds__(kThreads)                                    \
        name(const Piece *pieces, uint32_t count, uint32_t from, uint32_t to, double scale) { \
        move<T>(pieces, count, from, to, scale);                                              \
    }
KERNEL(move_bytes, char)
KERNEL(scale_f32, float)
KERNEL(scale_f64, double)
KERNEL(scale_f16, __half)
KERNEL(scale_bf16, __nv_bfloat16)
