// CUDA: a Wide is an array of scalars. Included by pack.h.
#pragma once

namespace PA_ISA {
// 16 bytes are loaded from and stored to multiples of 16 only.
constexpr bool kAnyAlignment = false;

template <class T, int K> struct alignas(16) Raw {
  uint32_t w[4];
};
template <class T, int K> struct Wide {
  static constexpr int kParts = Element<T>::kPerPack;
  SumOf<T> part[kParts];
};
// A Wide's values in f64, one by one.
template <class T, int K> using Doubles = double;
template <class T, int K> constexpr int kDoublesPieces = Wide<T, K>::kParts;
template <class T, int K> PA_FN double doubles_of(const Wide<T, K>& x, int piece) {
  return double(x.part[piece]);
}
template <class T, int K, class F> PA_FN void each_double(double x, F f) { f(x); }
// In PTX: the compiler cannot tell that an address from the segment table is one of global memory
// and would use generic accesses. (A cast in at(), to tell it, makes nvcc 13.0 run for ever.)
PA_FN uint4 load_16(const char* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
PA_FN void store_16(char* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

template <class T, int K> PA_FN Raw<T, K> load_raw(const char* p) {
  const uint4 v = load_16(p);
  return {{v.x, v.y, v.z, v.w}};
}
template <class T, int K> PA_FN void store_raw(char* p, const Raw<T, K>& r) {
  store_16(p, make_uint4(r.w[0], r.w[1], r.w[2], r.w[3]));
}
template <class T, int K> PA_FN void store_raw_nt(char* p, const Raw<T, K>& r) {
  store_raw<T, K>(p, r);
}
template <class T, int K> PA_FN void store_to_peer(char* p, const Raw<T, K>& r, bool) {
  store_raw<T, K>(p, r);
}
PA_FN void fence_nt() {}

template <class T, int K> PA_FN Wide<T, K> widen(const Raw<T, K>& r) {
  Wide<T, K> x;
  PA_UNROLL for (int i = 0; i < Wide<T, K>::kParts; ++i) {
    if constexpr (sizeof(T) == 4) x.part[i] = __uint_as_float(r.w[i]);
    if constexpr (sizeof(T) == 8)
      x.part[i] = __hiloint2double(int(r.w[2 * i + 1]), int(r.w[2 * i]));
    if constexpr (PA_SAME(T, BF16))
      x.part[i] = __uint_as_float(i & 1 ? r.w[i / 2] & 0xffff0000u : r.w[i / 2] << 16);
    if constexpr (PA_SAME(T, F16)) {
      const uint16_t half = uint16_t(i & 1 ? r.w[i / 2] >> 16 : r.w[i / 2]);
      asm("cvt.f32.f16 %0, %1;" : "=f"(x.part[i]) : "h"(half));
    }
  }
  return x;
}
template <class T, int K> PA_FN Raw<T, K> narrow(const Wide<T, K>& x) {
  Raw<T, K> r;
  PA_UNROLL for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) r.w[i] = __float_as_uint(x.part[i]);
    if constexpr (sizeof(T) == 8)
      r.w[i] = uint32_t(i & 1 ? __double2hiint(x.part[i / 2]) : __double2loint(x.part[i / 2]));
    if constexpr (sizeof(T) == 2) {
      const float low = x.part[2 * i], high = x.part[2 * i + 1];
      if constexpr (PA_SAME(T, BF16))
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r.w[i]) : "f"(high), "f"(low));
      else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r.w[i]) : "f"(high), "f"(low));
    }
  }
  return r;
}
template <class T, int K> PA_FN bool any_nonzero(const Wide<T, K>& a) {
  bool any = false;
  PA_UNROLL for (int i = 0; i < Wide<T, K>::kParts; ++i) any |= a.part[i] != SumOf<T>(0);
  return any;
}
// Search for NaN in values that are each 0 or NaN. One bit, not a register per element.
template <class T, int K> struct Nonzero {
  bool any = false;
  PA_FN void look(const Wide<T, K>& x) { any |= any_nonzero<T, K>(x); }
  PA_FN bool found() const { return any; }
};
template <class T, int K> PA_FN Wide<T, K> load_wide(const char* p) {
  Wide<T, K> x;
  PA_UNROLL for (int q = 0; q < int(sizeof x / 16); ++q) {
    const uint4 v = load_16(p + 16 * q);
    memcpy(reinterpret_cast<char*>(&x) + 16 * q, &v, 16);
  }
  return x;
}
template <class T, int K> PA_FN void store_wide(char* p, const Wide<T, K>& x) {
  PA_UNROLL for (int q = 0; q < int(sizeof x / 16); ++q) {
    uint4 v;
    memcpy(&v, reinterpret_cast<const char*>(&x) + 16 * q, 16);
    store_16(p + 16 * q, v);
  }
}
template <class T, int K> PA_FN void store_wide_to_peer(char* p, const Wide<T, K>& x, bool) {
  store_wide<T, K>(p, x);
}
template <class T, int K> PA_FN Wide<T, K> load_in_order(const char* p) {
  return load_wide<T, K>(p);
}
template <class T, int K> PA_FN void store_in_order(char* p, const Wide<T, K>& x) {
  store_wide<T, K>(p, x);
}
// Not moved by the compiler: loads of all four dtypes' constants, ahead of the choice, would spill.
PA_FN double load_in_place(const double* p) {
  double v;
  asm volatile("ld.global.f64 %0, [%1];" : "=d"(v) : "l"(p) : "memory");
  return v;
}
// first / (√second + tau). A call for each element: eight at once would spill.
PA_NOINLINE float ratio_to_root(float first, float second, float tau) {
  return first / (sqrtf(second) + tau);
}
PA_NOINLINE double ratio_to_root(double first, double second, double tau) {
  return first / (sqrt(second) + tau);
}
template <class T, int K>
PA_FN Wide<T, K> ratio_to_root(Wide<T, K> first, const Wide<T, K>& second, SumOf<T> tau) {
  PA_UNROLL for (int i = 0; i < Wide<T, K>::kParts; ++i)
    first.part[i] = ratio_to_root(first.part[i], second.part[i], tau);
  return first;
}

// See pack/cpu.h.
template <class T, int K>
PA_FN Raw<T, K> differing_bits(const Raw<T, K>& a, const Raw<T, K>& b, Raw<T, K> before) {
  PA_UNROLL for (int i = 0; i < 4; ++i) before.w[i] |= a.w[i] ^ b.w[i];
  return before;
}
template <class T, int K>
PA_FN Raw<T, K> where_equal(const Raw<T, K>& differs, Raw<T, K> equal, const Raw<T, K>& other) {
  PA_UNROLL for (int i = 0; i < 4; ++i) {
    uint32_t mask = differs.w[i] != 0 ? ~0u : 0u;
    if constexpr (sizeof(T) == 2)
      mask = (differs.w[i] & 0xffffu ? 0xffffu : 0u) | (differs.w[i] >> 16 ? 0xffff0000u : 0u);
    if constexpr (sizeof(T) == 8) mask = differs.w[i] | differs.w[i ^ 1] ? ~0u : 0u;
    equal.w[i] = (equal.w[i] & ~mask) | (other.w[i] & mask);
  }
  return equal;
}

// A pack of `count` elements at any address, element by element; the rest of the Raw is zero.
template <class T> PA_FN Raw<T, 1> load_ragged(const char* p, uint32_t count) {
  using Bits = BitsOf<T>;
  constexpr int N = Element<T>::kPerPack;
  // Shifts into registers, not an array in memory.
  Raw<T, 1> r = {{0, 0, 0, 0}};
  PA_UNROLL for (int i = 0; i < N; ++i) {
    if (uint32_t(i) < count) {
      const Bits bits = reinterpret_cast<const Bits*>(p)[i];
      if constexpr (sizeof(T) == 2) r.w[i / 2] |= uint32_t(bits) << (16 * (i & 1));
      if constexpr (sizeof(T) == 4) r.w[i] = bits;
      if constexpr (sizeof(T) == 8)
        r.w[2 * i] = uint32_t(bits), r.w[2 * i + 1] = uint32_t(bits >> 32);
    }
  }
  return r;
}
template <class T> PA_FN void store_ragged(char* p, uint32_t count, const Raw<T, 1>& r) {
  using Bits = BitsOf<T>;
  PA_UNROLL for (int i = 0; i < Element<T>::kPerPack; ++i) {
    if (uint32_t(i) < count) {
      Bits bits;
      if constexpr (sizeof(T) == 2) bits = Bits(r.w[i / 2] >> (16 * (i & 1)));
      if constexpr (sizeof(T) == 4) bits = r.w[i];
      if constexpr (sizeof(T) == 8) bits = Bits(r.w[2 * i + 1]) << 32 | r.w[2 * i];
      reinterpret_cast<Bits*>(p)[i] = bits;
    }
  }
}
} // namespace PA_ISA
