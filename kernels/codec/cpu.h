// CPU: a lane codes a block. Included by codec.h.
#pragma once

namespace PA_ISA {
template <class C, int K> struct Codes {
  using E = std::conditional_t<PA_SAME(C, Int8), uint8_t, uint16_t>;
  static constexpr int kCount = 4 * K;
  V<E, int(C::kBytes) * K> part;
};
template <class C, int K> PA_FN Codes<C, K> load_codes(const char* p) {
  return {load_vector<typename Codes<C, K>::E, int(C::kBytes) * K>(p)};
}
template <class C, int K>
PA_FN void store_codes_to_peer(char* p, const Codes<C, K>& codes, bool remote) {
  constexpr int B = int(C::kBytes) * K;
#if defined(__x86_64__) && !defined(PA_SANITIZE) // which do not see intrinsics
  if (remote && B < 16) {
    for (int i = 0; i < B / 4; ++i) {
      int word;
      memcpy(&word, reinterpret_cast<const char*>(&codes.part) + 4 * i, 4);
      _mm_stream_si32(reinterpret_cast<int*>(p) + i, word);
    }
    return;
  }
#endif
  if constexpr (B >= 16) {
    if (remote) return store_vector_nt<typename Codes<C, K>::E, B>(p, codes.part);
  }
  store_vector<typename Codes<C, K>::E, B>(p, codes.part);
}
PA_FN float load_scale(const char* p) {
  float scale;
  memcpy(&scale, p, 4);
  return scale;
}
PA_FN void store_scale(char* p, float scale) { memcpy(p, &scale, 4); }

template <class C, int K>
PA_FN Wide<float, K> decoded(const Codes<C, K>& codes, float scale) {
  constexpr int B = 16 * K;
  if constexpr (PA_SAME(C, Int8)) {
    const auto bytes = (V<int8_t, 4 * K>)codes.part;
    const auto numbers = __builtin_convertvector(bytes, V<int32_t, B>);
    return {{__builtin_convertvector(numbers, V<float, B>) * scale}};
  } else {
    (void)scale;
    return {{(V<float, B>)(__builtin_convertvector(codes.part, V<uint32_t, B>) << 16)}};
  }
}
template <class C, int K>
PA_FN Codes<C, K> coded(const Wide<float, K>& x, float factor, bool spoils) {
  constexpr int B = 16 * K;
  using E = typename Codes<C, K>::E;
  if constexpr (PA_SAME(C, Int8)) {
    const auto bits = (V<uint32_t, B>)(x.part[0] * factor + kToInteger);
    return {__builtin_convertvector(bits, V<E, 4 * K>)};
  } else {
    const auto bits = rounded_to_bf16<B>(x.part[0]) >> 16;
    return {__builtin_convertvector(spoils ? V<uint32_t, B>{} + 0x7fffu : bits, V<E, 8 * K>)};
  }
}

struct Largest {
  V<int32_t, 16 * kGroup> group{};
  V<int32_t, 16> one{};
  template <int K> PA_FN void look(const Wide<float, K>& x) {
    const auto bits = (V<int32_t, 16 * K>)x.part[0] & 0x7fffffff;
    if constexpr (K == 1) one = bits > one ? bits : one;
    else group = bits > group ? bits : group;
  }
  PA_FN uint32_t bits() const {
    int32_t most = 0;
    for (int i = 0; i < 4 * kGroup; ++i) most = group[i] > most ? group[i] : most;
    for (int i = 0; i < 4; ++i) most = one[i] > most ? one[i] : most;
    return uint32_t(most);
  }
};

// Packs 0 … count, by f(group, i).
template <class F> PA_FN void each_group(uint32_t count, F f) {
  uint32_t i = 0;
  if constexpr (kGroup > 1) {
    for (; i + kGroup <= count; i += kGroup) f(Group<kGroup>{}, i);
  }
  for (; i < count; ++i) f(Group<1>{}, i);
}

// Codes packs 0 … packs, whose values are value(group, load(group, i)), to `out`;
// keep(group, i, loaded, value, decoded) gets what each has become. bad(element) is told of a value
// that can't be coded.
template <class C, class Load, class Value, class Keep, class Bad>
PA_FN void each_block(const Exec& ex, uint32_t packs, char* out, bool remote, bool spoils,
                      Load load, Value value, Keep keep, Bad bad) {
  alignas(64) char values[16 * PA_BLOCK_PACKS];
  for (uint32_t block = ex.lane(); block * PA_BLOCK_PACKS < packs; block += ex.lanes()) {
    const uint32_t first = block * PA_BLOCK_PACKS;
    const uint32_t count = uint32_t(min(packs - first, PA_BLOCK_PACKS));
    Largest largest;
    each_group(count, [&](auto g, uint32_t i) {
      const Wide<float, g.kPacks> x = value(g, load(g, first + i));
      largest.template look<g.kPacks>(x);
      store_wide<float, g.kPacks>(values + 16 * i, x);
    });
    const uint32_t most = largest.bits();
    const bool fits = most < kTop;
    const Scale s = fits ? scale_of(most) : unusable(spoils);
    if (!fits) {
      for (uint32_t e = 0; e < 4 * count; ++e) {
        uint32_t bits;
        memcpy(&bits, values + 4 * e, 4);
        if ((bits & 0x7fffffffu) >= kTop) {
          bad(4 * first + e);
          break;
        }
      }
    }
    each_group(count, [&](auto g, uint32_t i) {
      constexpr int K = g.kPacks;
      const Wide<float, K> x = load_wide<float, K>(values + 16 * i);
      const auto codes = coded<C, K>(fits ? x : zero<float, K>(), s.factor, !fits && spoils);
      store_codes_to_peer<C, K>(out + C::kBytes * (first + i), codes, remote);
      keep(g, first + i, load(g, first + i), x, decoded<C, K>(codes, s.scale));
    });
    if (C::kScales) store_scale(out + C::kBytes * packs + 4 * block, s.scale);
  }
}
} // namespace PA_ISA
