// Codes of f32 in fewer bits, for the wire. A code's block is PA_BLOCK_PACKS neighbouring packs,
// counted from the begin of a chunk; the last one may be shorter. A slot holds the codes of all
// packs, in their order, and behind them a scale in f32 for each block, if the code has scales.
//
//   Int8   scale = max |v| / 127, code = v / scale, to nearest even: off by max |v| / 254 at most,
//          of the block, and by what f32 rounds. A block below 2^-100 becomes zeros
//   Bf16   the upper half of the f32, to nearest even: off by 2^-8 of the element at most
//
// codec/cuda.h and codec/cpu.h implement it for both machines, which give the same bits:
//
//   Codes<C, K>            codes of K packs
//   load_codes, store_codes_to_peer
//   decoded                their values
//   load_scale, store_scale
//   Largest                largest magnitude among values, as bits: NaN and infinity are above all
//   each_block             codes all blocks of a chunk
#pragma once
#include "segments.h"

namespace PA_ISA {
// kBytes: of a pack's code.
struct Int8 {
  static constexpr uint32_t kBytes = 4;
  static constexpr bool kScales = true;
};
struct Bf16 {
  static constexpr uint32_t kBytes = 8;
  static constexpr bool kScales = false;
};

// Magnitudes as bits. From kTop on a value may be coded as infinity.
constexpr uint32_t kTop = 0x7f7f8000, kInfinity = 0x7f800000;
// Added to a number of less than 2^22, it leaves the nearest integer in the lower bits.
constexpr float kToInteger = 12582912;

// Scale of an Int8 block, and the factor of its values.
struct Scale { float scale, factor; };
PA_FN Scale scale_of(uint32_t largest) {
  constexpr uint32_t kLeast = 27u << 23; // 2^-100: 127 divided by a subnormal may be infinity
  if (largest < kLeast) return {0, 0};
  float most;
  memcpy(&most, &largest, 4);
  return {most / 127, 127 / most};
}
// A block that holds what can't be coded becomes zeros, or, if it spoils, NaN.
PA_FN Scale unusable(bool spoils) {
  const uint32_t nan = spoils ? 0x7fffffffu : 0;
  Scale s = {0, 0};
  memcpy(&s.scale, &nan, 4);
  return s;
}
PA_FN uint32_t blocks_of(uint64_t packs) {
  return uint32_t((packs + PA_BLOCK_PACKS - 1) / PA_BLOCK_PACKS);
}
} // namespace PA_ISA

#if defined(__CUDACC__)
#include "codec/cuda.h"
#else
#include "codec/cpu.h"
#endif
