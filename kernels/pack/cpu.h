// CPU: a Wide is one vector, or two where a half is widened to f32. Included by pack.h.
#pragma once
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
// Shuffles, which clang has, and g++ from 12 on.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define PA_HAS_SHUFFLEVECTOR 1
#endif
#endif

namespace PA_ISA {
// Vectors are loaded from and stored to any address.
constexpr bool kAnyAlignment = true;

// A vector of B bytes of E, and its memory at any address, in an object of any type.
template <class E, int B> struct Vector {
  typedef E type __attribute__((vector_size(B)));
  typedef E memory __attribute__((vector_size(B), aligned(1), may_alias));
};
template <class E, int B> using V = typename Vector<E, B>::type;
template <class E, int B> PA_FN V<E, B> load_vector(const char* p) {
  return *reinterpret_cast<const typename Vector<E, B>::memory*>(p);
}
template <class E, int B> PA_FN void store_vector(char* p, V<E, B> v) {
  *reinterpret_cast<typename Vector<E, B>::memory*>(p) = v;
}
// Non-temporal store, past the caches: memory that was not just read is not read to be overwritten.
template <class E, int B> PA_FN void store_vector_nt(char* p, V<E, B> v) {
#if defined(__SSE2__) && !defined(PA_SANITIZE) // which do not see intrinsics
  if ((uintptr_t(p) & (B - 1)) == 0) {
    if constexpr (B == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#if defined(__AVX2__)
    if constexpr (B == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__AVX512F__)
    if constexpr (B == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
  }
#endif
  store_vector<E, B>(p, v);
}
PA_FN void fence_nt() {
#if defined(__SSE2__)
  _mm_sfence(); // the release that publishes them does not order non-temporal stores
#endif
}

// A bf16 is the upper half of a float, so that a vector of floats with every second element is one
// operation away from their packs, with no move between elements. A Wide of bf16 holds the even
// elements and then the odd ones, also on the wire: the ranks of a world run on one machine, with
// one kGroup. Packs of f16 are two vectors of half the width, which widen to a whole one each.
template <class T, int K> struct Raw {
  using E = std::conditional_t<sizeof(T) == 2, uint16_t, SumOf<T>>;
  static constexpr int kParts = PA_SAME(T, F16) ? 2 : 1, kBytes = 16 * K / kParts;
  V<E, kBytes> part[kParts];
};
template <class T, int K> struct Wide {
  static constexpr int kParts = sizeof(T) == 2 ? 2 : 1, kBytes = 16 * K;
  V<SumOf<T>, kBytes> part[kParts];
};
// A Wide's values in f64, in vectors of its size: one piece for f64, two for each part of f32.
// (Vectors that are wider than a register are slow.)
template <class T, int K> using Doubles = V<double, Wide<T, K>::kBytes>;
template <class T, int K>
constexpr int kDoublesPieces = Wide<T, K>::kParts * (sizeof(double) / sizeof(SumOf<T>));
template <class T, int K> PA_FN Doubles<T, K> doubles_of(const Wide<T, K>& x, int piece) {
  constexpr int kBytes = Wide<T, K>::kBytes * sizeof(SumOf<T>) / sizeof(double);
  const char* values = reinterpret_cast<const char*>(x.part) + kBytes * piece;
  return __builtin_convertvector((load_vector<SumOf<T>, kBytes>(values)), Doubles<T, K>);
}
template <class T, int K, class F> PA_FN void each_double(const Doubles<T, K>& x, F f) {
  for (int i = 0; i < int(sizeof x / sizeof(double)); ++i) f(x[i]);
}
template <class T, int K> PA_FN Raw<T, K> load_raw(const char* p) {
  using R = Raw<T, K>;
  R r;
  for (int h = 0; h < R::kParts; ++h)
    r.part[h] = load_vector<typename R::E, R::kBytes>(p + h * R::kBytes);
  return r;
}
template <class T, int K> PA_FN void store_raw(char* p, const Raw<T, K>& r) {
  using R = Raw<T, K>;
  for (int h = 0; h < R::kParts; ++h)
    store_vector<typename R::E, R::kBytes>(p + h * R::kBytes, r.part[h]);
}
template <class T, int K> PA_FN void store_raw_nt(char* p, const Raw<T, K>& r) {
  using R = Raw<T, K>;
  if constexpr (R::kBytes >= 16) {
    for (int h = 0; h < R::kParts; ++h)
      store_vector_nt<typename R::E, R::kBytes>(p + h * R::kBytes, r.part[h]);
  } else {
    store_raw<T, K>(p, r);
  }
}
// A store for another core to read: non-temporal if it is remote, see reader_is_remote().
template <class T, int K> PA_FN void store_to_peer(char* p, const Raw<T, K>& r, bool remote) {
  if (remote) store_raw_nt<T, K>(p, r);
  else store_raw<T, K>(p, r);
}

// Rounded to bf16, in the upper halves; the lower ones are not cleared.
template <int B> PA_FN V<uint32_t, B> rounded_to_bf16(V<float, B> f) {
  const auto u = (V<uint32_t, B>)f;
  const auto rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return f != f ? V<uint32_t, B>{} + 0x7fff0000u : rounded;
}
template <int B> PA_FN V<float, B> f16_to_float(V<uint16_t, B / 2> h) {
#if defined(__F16C__)
  if constexpr (B == 16) {
    const V<uint16_t, 16> both = {h[0], h[1], h[2], h[3]};
    return (V<float, B>)_mm_cvtph_ps((__m128i)both);
  }
  if constexpr (B == 32) return (V<float, B>)_mm256_cvtph_ps((__m128i)h);
#if defined(__AVX512F__)
  if constexpr (B == 64) return (V<float, B>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#endif
#endif
  // The exponent is rebased by a multiplication, which also normalises subnormals.
  const auto wide = __builtin_convertvector(h, V<uint32_t, B>);
  const auto rebased = (V<uint32_t, B>)((V<float, B>)((wide & 0x7fffu) << 13) * 0x1p112f);
  const auto special = rebased >= 0x47800000u; // was an infinity or a NaN
  return (V<float, B>)((special ? rebased | 0x7f800000u : rebased) | (wide & 0x8000u) << 16);
}
template <int B> PA_FN V<uint16_t, B / 2> float_to_f16(V<float, B> f) {
  using U = V<uint32_t, B>;
#if defined(__F16C__)
  // The conversion keeps the upper bits of a NaN: of this one it makes 0x7fff.
  const auto g = (V<float, B>)(f != f ? U{} + 0x7fffe000u : (U)f);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  if constexpr (B == 16) {
    const auto both = (V<uint16_t, 16>)_mm_cvtps_ph((__m128)g, kNearest);
    return V<uint16_t, B / 2>{both[0], both[1], both[2], both[3]};
  }
  if constexpr (B == 32) return (V<uint16_t, B / 2>)_mm256_cvtps_ph((__m256)g, kNearest);
#if defined(__AVX512F__)
  if constexpr (B == 64)
    return (V<uint16_t, B / 2>)_mm512_maskz_cvtps_ph(0xffff, (__m512)g, kNearest);
#endif
#else
  const U magnitude = (U)f & 0x7fffffffu;
  const auto is_nan = magnitude > 0x7f800000u;
  // Below 2^-14, adding 0.5 leaves the rounded subnormal in the low bits. Above, the carry of the
  // rounding goes into the exponent, and at the top to infinity.
  const U tiny = (U)((V<float, B>)magnitude + 0.5f) - 0x3f000000u;
  const U usual = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U finite = magnitude < 0x38800000u ? tiny : usual;
  const U number = magnitude >= 0x47800000u ? U{} + 0x7c00u : finite;
  const U signed_number = number | ((U)f >> 16 & 0x8000u);
  return __builtin_convertvector(is_nan ? U{} + 0x7fffu : signed_number, V<uint16_t, B / 2>);
#endif
}

template <class T, int K> PA_FN Wide<T, K> widen(const Raw<T, K>& r) {
  constexpr int B = Wide<T, K>::kBytes;
  if constexpr (PA_SAME(T, F16)) {
    return {{f16_to_float<B>(r.part[0]), f16_to_float<B>(r.part[1])}};
  } else if constexpr (PA_SAME(T, BF16)) {
    const auto both = (V<uint32_t, B>)r.part[0];
    return {{(V<float, B>)(both << 16), (V<float, B>)(both & 0xffff0000u)}};
  } else {
    return {{r.part[0]}};
  }
}
template <class T, int K> PA_FN Raw<T, K> narrow(const Wide<T, K>& x) {
  constexpr int B = Wide<T, K>::kBytes;
  if constexpr (PA_SAME(T, F16)) {
    return {{float_to_f16<B>(x.part[0]), float_to_f16<B>(x.part[1])}};
  } else if constexpr (PA_SAME(T, BF16)) {
    const auto even = rounded_to_bf16<B>(x.part[0]), odd = rounded_to_bf16<B>(x.part[1]);
    return {{(V<uint16_t, B>)(even >> 16 | (odd & 0xffff0000u))}};
  } else {
    return {{x.part[0]}};
  }
}
template <class T, int K> PA_FN bool any_nonzero(const Wide<T, K>& a) {
  bool any = false;
  for (int h = 0; h < Wide<T, K>::kParts; ++h)
    for (unsigned i = 0; i < sizeof a.part[h] / sizeof(SumOf<T>); ++i) any |= a.part[h][i] != 0;
  return any;
}
// Search for NaN in values that are each 0 or NaN.
template <class T, int K> struct Nonzero {
  Wide<T, K> sum{};
  PA_FN void look(const Wide<T, K>& x) {
    for (int h = 0; h < Wide<T, K>::kParts; ++h) sum.part[h] = sum.part[h] + x.part[h];
  }
  PA_FN bool found() const { return any_nonzero<T, K>(sum); }
};
template <class T, int K> PA_FN Wide<T, K> load_wide(const char* p) {
  using W = Wide<T, K>;
  W x;
  for (int h = 0; h < W::kParts; ++h)
    x.part[h] = load_vector<SumOf<T>, W::kBytes>(p + h * W::kBytes);
  return x;
}
template <class T, int K> PA_FN void store_wide(char* p, const Wide<T, K>& x) {
  using W = Wide<T, K>;
  for (int h = 0; h < W::kParts; ++h)
    store_vector<SumOf<T>, W::kBytes>(p + h * W::kBytes, x.part[h]);
}
template <class T, int K> PA_FN void store_wide_to_peer(char* p, const Wide<T, K>& x, bool remote) {
  using W = Wide<T, K>;
  if (!remote) return store_wide<T, K>(p, x);
  for (int h = 0; h < W::kParts; ++h)
    store_vector_nt<SumOf<T>, W::kBytes>(p + h * W::kBytes, x.part[h]);
}
// Elements of a and then b: number of(i) at i, for each i of the sequence.
template <class Vec, class Of, int... I>
PA_FN Vec picked(const Vec& a, const Vec& b, Of of, std::integer_sequence<int, I...>) {
#if PA_HAS_SHUFFLEVECTOR
  return __builtin_shufflevector(a, b, of(I)...);
#else // slower: through memory
  constexpr int N = sizeof...(I);
  Vec all;
  ((all[I] = of(I) < N ? a[of(I)] : b[of(I) - N]), ...);
  return all;
#endif
}
// Memory in the order of elements. A Wide of bf16 has another one.
template <class T, int K> PA_FN Wide<T, K> load_in_order(const char* p) {
  const Wide<T, K> x = load_wide<T, K>(p);
  if constexpr (!PA_SAME(T, BF16)) {
    return x;
  } else {
    constexpr std::make_integer_sequence<int, Wide<T, K>::kBytes / sizeof(float)> all;
    return {{picked(x.part[0], x.part[1], [](int i) { return 2 * i; }, all),
             picked(x.part[0], x.part[1], [](int i) { return 2 * i + 1; }, all)}};
  }
}
template <class T, int K> PA_FN void store_in_order(char* p, const Wide<T, K>& x) {
  if constexpr (!PA_SAME(T, BF16)) {
    store_wide<T, K>(p, x);
  } else {
    constexpr int N = Wide<T, K>::kBytes / sizeof(float);
    constexpr std::make_integer_sequence<int, N> all;
    const auto low = [](int i) { return i / 2 + i % 2 * N; };
    const auto high = [](int i) { return (N + i) / 2 + i % 2 * N; };
    store_wide<T, K>(p, {{picked(x.part[0], x.part[1], low, all),
                          picked(x.part[0], x.part[1], high, all)}});
  }
}
PA_FN double load_in_place(const double* p) { return *p; }
template <class E, int B> PA_FN V<E, B> root_of(V<E, B> x) {
#if defined(__SSE2__)
  constexpr bool kFloat = sizeof(E) == 4;
  if constexpr (B == 16 && kFloat) return (V<E, B>)_mm_sqrt_ps((__m128)x);
  if constexpr (B == 16 && !kFloat) return (V<E, B>)_mm_sqrt_pd((__m128d)x);
#if defined(__AVX2__)
  if constexpr (B == 32 && kFloat) return (V<E, B>)_mm256_sqrt_ps((__m256)x);
  if constexpr (B == 32 && !kFloat) return (V<E, B>)_mm256_sqrt_pd((__m256d)x);
#endif
#if defined(__AVX512F__)
  if constexpr (B == 64 && kFloat) return (V<E, B>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
  if constexpr (B == 64 && !kFloat) return (V<E, B>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#endif
#endif
  for (unsigned i = 0; i < B / sizeof(E); ++i)
    x[i] = sizeof(E) == 4 ? E(__builtin_sqrtf(float(x[i]))) : E(__builtin_sqrt(double(x[i])));
  return x;
}
// first / (√second + tau).
template <class T, int K>
PA_FN Wide<T, K> ratio_to_root(Wide<T, K> first, const Wide<T, K>& second, SumOf<T> tau) {
  for (int h = 0; h < Wide<T, K>::kParts; ++h)
    first.part[h] =
        first.part[h] / (root_of<SumOf<T>, Wide<T, K>::kBytes>(second.part[h]) + tau);
  return first;
}

// Bits in which a and b differ, and those of `before`.
template <class T, int K>
PA_FN Raw<T, K> differing_bits(const Raw<T, K>& a, const Raw<T, K>& b, Raw<T, K> before) {
  using R = Raw<T, K>;
  using B = V<BitsOf<T>, R::kBytes>;
  for (int h = 0; h < R::kParts; ++h) {
    const B differs = (B)before.part[h] | ((B)a.part[h] ^ (B)b.part[h]);
    before.part[h] = (V<typename R::E, R::kBytes>)differs;
  }
  return before;
}
// Element by element: `equal` where `differs` has no bit, else `other`. NaN included.
template <class T, int K>
PA_FN Raw<T, K> where_equal(const Raw<T, K>& differs, Raw<T, K> equal, const Raw<T, K>& other) {
  using R = Raw<T, K>;
  using B = V<BitsOf<T>, R::kBytes>;
  for (int h = 0; h < R::kParts; ++h)
    equal.part[h] = (B)differs.part[h] == B{} ? equal.part[h] : other.part[h];
  return equal;
}

// A pack of `count` elements; the rest of the Raw is zero.
template <class T> PA_FN Raw<T, 1> load_ragged(const char* p, uint32_t count) {
  using Bits = BitsOf<T>;
  constexpr int N = Element<T>::kPerPack;
  Bits bits[N] = {};
  memcpy(bits, p, count * sizeof(T));
  return load_raw<T, 1>(reinterpret_cast<const char*>(bits));
}
template <class T> PA_FN void store_ragged(char* p, uint32_t count, const Raw<T, 1>& r) {
  using Bits = BitsOf<T>;
  Bits bits[Element<T>::kPerPack];
  store_raw<T, 1>(reinterpret_cast<char*>(bits), r);
  memcpy(p, bits, count * sizeof(T));
}
} // namespace PA_ISA
