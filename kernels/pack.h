// Packs: 16 bytes, the unit of load and store. A Raw holds K packs as they lie in memory, a Wide
// their elements in the type of sums: f32 for f32, f16 and bf16, f64 for f64. K is 1, or kGroup on
// a CPU: as many packs as one vector register holds. Narrowing rounds once, to nearest even, and
// makes every NaN 0x7fff, as a GPU does. Host and device do the same operations in the same order:
// the same bits.
#pragma once
#include "exec.h"

namespace PA_ISA {

struct F16 { uint16_t bits; };
struct BF16 { uint16_t bits; };

// Sum: type of sums. kPerPack: elements in a pack.
template <class T> struct Element;
template <> struct Element<float> { using Sum = float; static constexpr int kPerPack = 4; };
template <> struct Element<double> { using Sum = double; static constexpr int kPerPack = 2; };
template <> struct Element<F16> { using Sum = float; static constexpr int kPerPack = 8; };
template <> struct Element<BF16> { using Sum = float; static constexpr int kPerPack = 8; };
template <class T> using SumOf = typename Element<T>::Sum;
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 2, uint16_t,
                                  std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// Calls f with a value of the element type of a PaDtype.
template <class F> PA_FN void with_dtype(uint32_t dtype, F f) {
  switch (dtype) {
    case PA_F32: return f(float{});
    case PA_F64: return f(double{});
    case PA_F16: return f(F16{});
    default: return f(BF16{});
  }
}

} // namespace PA_ISA

#if defined(__CUDACC__)
#include "pack/cuda.h"
#else
#include "pack/cpu.h"
#endif

namespace PA_ISA {

// Arithmetic by parts: a part of a Wide is a scalar on CUDA, a vector on a CPU.
template <class T, int K> PA_FN Wide<T, K> zero() { return Wide<T, K>{}; }
template <class T, int K> PA_FN Wide<T, K> operator+(Wide<T, K> a, const Wide<T, K>& b) {
  PA_UNROLL for (int i = 0; i < Wide<T, K>::kParts; ++i) a.part[i] = a.part[i] + b.part[i];
  return a;
}
template <class T, int K> PA_FN Wide<T, K> operator-(Wide<T, K> a, const Wide<T, K>& b) {
  PA_UNROLL for (int i = 0; i < Wide<T, K>::kParts; ++i) a.part[i] = a.part[i] - b.part[i];
  return a;
}
template <class T, int K> PA_FN Wide<T, K> operator*(Wide<T, K> a, SumOf<T> s) {
  PA_UNROLL for (int i = 0; i < Wide<T, K>::kParts; ++i) a.part[i] = a.part[i] * s;
  return a;
}
template <class T, int K> PA_FN Wide<T, K> operator/(Wide<T, K> a, SumOf<T> s) {
  PA_UNROLL for (int i = 0; i < Wide<T, K>::kParts; ++i) a.part[i] = a.part[i] / s;
  return a;
}
template <class T, int K> PA_FN Wide<T, K> operator*(Wide<T, K> a, const Wide<T, K>& b) {
  PA_UNROLL for (int i = 0; i < Wide<T, K>::kParts; ++i) a.part[i] = a.part[i] * b.part[i];
  return a;
}

// Finds NaN and infinity among all values that were looked at: x - x is NaN then, and 0 otherwise.
template <class T> struct NonFiniteCheck {
  Nonzero<T, kGroup> group;
  Nonzero<T, 1> one;
  template <int K> PA_FN void look(const Wide<T, K>& x) {
    if constexpr (K == 1) one.look(x - x);
    else group.look(x - x);
  }
  PA_FN bool found() const { return one.found() || group.found(); }
};
} // namespace PA_ISA
