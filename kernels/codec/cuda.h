// CUDA: a warp codes a block, a lane a pack. Included by codec.h.
#pragma once

namespace PA_ISA {
template <class C, int K> struct Codes {
  uint32_t part[C::kBytes / 4];
};
// In PTX, as load_16() is.
template <class C, int K> PA_FN Codes<C, K> load_codes(const char* p) {
  Codes<C, K> codes;
  if constexpr (PA_SAME(C, Int8))
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(codes.part[0]) : "l"(p) : "memory");
  else
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(codes.part[0]), "=r"(codes.part[1])
                 : "l"(p)
                 : "memory");
  return codes;
}
template <class C, int K>
PA_FN void store_codes_to_peer(char* p, const Codes<C, K>& codes, bool) {
  if constexpr (PA_SAME(C, Int8))
    asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(codes.part[0]) : "memory");
  else
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(codes.part[0]),
                 "r"(codes.part[1])
                 : "memory");
}
PA_FN float load_scale(const char* p) {
  float scale;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(scale) : "l"(p) : "memory");
  return scale;
}
PA_FN void store_scale(char* p, float scale) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(p), "f"(scale) : "memory");
}

template <class C, int K>
PA_FN Wide<float, K> decoded(const Codes<C, K>& codes, float scale) {
  Wide<float, K> x;
  PA_UNROLL for (int i = 0; i < 4; ++i) {
    if constexpr (PA_SAME(C, Int8))
      x.part[i] = float(int8_t(codes.part[0] >> (8 * i))) * scale;
    else
      x.part[i] = __uint_as_float(i & 1 ? codes.part[i / 2] & 0xffff0000u
                                        : codes.part[i / 2] << 16);
  }
  return x;
}
template <class C, int K>
PA_FN Codes<C, K> coded(const Wide<float, K>& x, float factor, bool spoils) {
  Codes<C, K> codes;
  if constexpr (PA_SAME(C, Int8)) {
    codes.part[0] = 0;
    PA_UNROLL for (int i = 0; i < 4; ++i)
      codes.part[0] |= (__float_as_uint(x.part[i] * factor + kToInteger) & 0xffu) << (8 * i);
  } else {
    PA_UNROLL for (int i = 0; i < 2; ++i) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
          : "=r"(codes.part[i])
          : "f"(x.part[2 * i + 1]), "f"(x.part[2 * i]));
      if (spoils) codes.part[i] = 0x7fff7fffu;
    }
  }
  return codes;
}

struct Largest {
  uint32_t most = 0;
  template <int K> PA_FN void look(const Wide<float, K>& x) {
    PA_UNROLL for (int i = 0; i < 4; ++i) {
      const uint32_t bits = __float_as_uint(x.part[i]) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
  }
  PA_FN uint32_t bits() const { return most; }
};

// See codec/cpu.h. The lanes of a warp, all of them, go through the blocks together, since each
// block's maximum is theirs; a thread block has whole warps. A lane has kInFlight packs in flight,
// and leaves what does not fill them to a loop that costs less code.
template <class C, class Load, class Value, class Keep, class Bad>
PA_FN void each_block(const Exec& ex, uint32_t packs, char* out, bool, bool spoils, Load load,
                      Value value, Keep keep, Bad bad) {
  static_assert(PA_BLOCK_PACKS == 32, "lanes of a warp");
  constexpr uint32_t kNone = ~0u;
  constexpr Group<1> one;
  const uint32_t step = ex.lanes(), in_warp = ex.lane() % PA_BLOCK_PACKS;
  uint32_t wrong = kNone; // told behind the loops, which store nothing but packs
  const auto code = [&](uint32_t i, const auto& loaded, bool is_mine) {
    const Wide<float, 1> x = is_mine ? value(one, loaded) : zero<float, 1>();
    Largest largest;
    largest.template look<1>(x);
    const uint32_t most = __reduce_max_sync(~0u, largest.bits());
    const bool fits = most < kTop;
    const Scale s = fits ? scale_of(most) : unusable(spoils);
    PA_UNROLL for (int e = 0; e < 4; ++e)
      wrong = (__float_as_uint(x.part[e]) & 0x7fffffffu) >= kTop ? 4 * i + e : wrong;
    if (!is_mine) return;
    const auto codes = coded<C, 1>(fits ? x : zero<float, 1>(), s.factor, !fits && spoils);
    store_codes_to_peer<C, 1>(out + C::kBytes * i, codes, false);
    keep(one, i, loaded, x, decoded<C, 1>(codes, s.scale));
    if (C::kScales && in_warp == 0)
      store_scale(out + C::kBytes * packs + 4 * (i / PA_BLOCK_PACKS), s.scale);
  };
  uint32_t at = ex.lane();
  for (; at - in_warp + (kInFlight - 1) * step + PA_BLOCK_PACKS <= packs; at += kInFlight * step) {
    decltype(load(one, at)) loaded[kInFlight];
    PA_UNROLL for (int u = 0; u < kInFlight; ++u) loaded[u] = load(one, at + u * step);
    PA_UNROLL for (int u = 0; u < kInFlight; ++u) code(at + u * step, loaded[u], true);
  }
  for (; at - in_warp < packs; at += step) {
    const bool is_mine = at < packs;
    decltype(load(one, at)) loaded{};
    if (is_mine) loaded = load(one, at);
    code(at, loaded, is_mine);
  }
  if (wrong != kNone) bad(wrong);
}
} // namespace PA_ISA
