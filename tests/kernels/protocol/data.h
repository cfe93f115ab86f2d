// Values that ranks hold, and their expected mean: computed in f64 from (seed, rank, average,
// element) alone, without code of the kernels, so that every rank can check itself.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "abi.h"

struct Format {
  unsigned bytes, mantissa, exponent;
  int bias;
};
// indexed by PaDtype
constexpr Format kFormat[] = {{4, 23, 8, 127}, {8, 52, 11, 1023}, {2, 10, 5, 15}, {2, 7, 8, 127}};
inline uint64_t per_pack(uint32_t dtype) { return PA_PACK_BYTES / kFormat[dtype].bytes; }

inline uint64_t mix(uint64_t x) { // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A finite number of the dtype, of magnitude 1/8 … 4. Two different ones are far apart, so that a
// missing, doubled, stale or misplaced element shows.
inline uint64_t make_bits(uint32_t dtype, uint64_t key) {
  const Format& f = kFormat[dtype];
  const uint64_t h = mix(key);
  const uint64_t exponent = uint64_t(f.bias - 3) + (h & 0xffff) % 5;
  const uint64_t mantissa = (h >> 12) & ((uint64_t(1) << f.mantissa) - 1);
  return (h >> 11 & 1) << (f.bytes * 8 - 1) | exponent << f.mantissa | mantissa;
}
inline uint64_t nan_bits(uint32_t dtype) {
  const Format& f = kFormat[dtype];
  return ((uint64_t(1) << f.exponent) - 1) << f.mantissa | uint64_t(1) << (f.mantissa - 1);
}
inline uint64_t infinity_bits(uint32_t dtype) {
  const Format& f = kFormat[dtype];
  return ((uint64_t(1) << f.exponent) - 1) << f.mantissa;
}

inline double decode(uint32_t dtype, uint64_t bits) {
  const Format& f = kFormat[dtype];
  const uint64_t mantissa = bits & ((uint64_t(1) << f.mantissa) - 1);
  const uint64_t top = (uint64_t(1) << f.exponent) - 1, exponent = bits >> f.mantissa & top;
  double x = exponent == 0 ? std::ldexp(double(mantissa), 1 - f.bias - int(f.mantissa))
                           : std::ldexp(double(mantissa | uint64_t(1) << f.mantissa),
                                        int(exponent) - f.bias - int(f.mantissa));
  if (exponent == top) x = mantissa == 0 ? HUGE_VAL : std::nan("");
  return bits >> (f.bytes * 8 - 1) & 1 ? -x : x;
}

inline uint64_t load_bits(const char* p, unsigned bytes) {
  uint64_t bits = 0; // little-endian, as every target of the CPU kernels is
  std::memcpy(&bits, p, bytes);
  return bits;
}

struct Mean {
  double value, tolerance;
};
// Weighted mean of one element, and the error allowed: one rounding to the dtype, the rounding of
// sums in f32 (f64), and where partial sums travel in 16 bits, one more rounding per hop.
inline Mean mean_of(uint32_t dtype, const double* values, const double* weights, uint32_t world,
                    bool narrow_wire) {
  const Format& f = kFormat[dtype];
  const bool half = f.bytes == 2;
  double sum = 0, total = 0, most = 0;
  for (uint32_t r = 0; r < world; ++r) {
    if (weights[r] == 0) continue;
    sum += weights[r] * values[r], total += weights[r];
    most = std::fmax(most, std::fabs(values[r]));
  }
  const double unit = std::ldexp(1, -int(f.mantissa) - 1),
               sum_unit = half ? std::ldexp(1, -24) : unit;
  double tolerance = most * (2 * world + 4) * sum_unit;
  const double mean = sum / total;
  if (half) tolerance += std::fmax(std::fabs(mean) * unit * 1.001, std::ldexp(1, -24));
  if (half && narrow_wire) tolerance += world * (most * unit * 1.05 + std::ldexp(1, -20));
  return {mean, tolerance};
}
