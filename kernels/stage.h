// The stage: an outer optimizer, on the own shard of the mean. Its state is the shard of the outer
// parameters, the anchor θ, and one or two slots; in the type of sums. With Δ = θ - mean:
//
//   momentum  v ← μ v + Δ                                    θ ← θ - lr (a Δ + b v)
//   Adam      m ← β₁ m + (1 - β₁) Δ, s ← β₂ s + (1 - β₂) Δ²  θ ← θ - lr m / (√s + τ)
//
// Each rank makes the step for its shard after the commit was decided and before it waits for
// anything further, so no peer can keep it from that: every rank that survives has made the step,
// or none has. So one copy of the state is enough. State lies in the order of elements, pack by
// pack, whatever the layout of a Wide is.
#pragma once
#include "segments.h"

namespace PA_ISA {

template <class T> constexpr uint64_t kStatePackBytes = sizeof(SumOf<T>) * Element<T>::kPerPack;

// Share of the result in each rank's new values.
template <class T> PA_FN SumOf<T> mix_of(const PaBucket& bucket, const PaArgs& a) {
  const SumOf<T> mix = SumOf<T>(load_in_place(&bucket.outer.mix));
  return a.flags & PA_FLAG_WHOLE ? SumOf<T>(1) : mix;
}
// Share of its own value that a rank keeps; -1 where it writes the difference.
template <class T> PA_FN SumOf<T> keep_of(SumOf<T> mix, const PaArgs& a) {
  return a.flags & PA_FLAG_DELTA ? SumOf<T>(-1) : SumOf<T>(1) - mix;
}
// Value of a rank after partial mixing: a part of its own, and `mix` of the new one.
template <class T, int K>
PA_FN Raw<T, K> mixed(const Raw<T, K>& own, const Raw<T, K>& outer, SumOf<T> keep, SumOf<T> mix) {
  return narrow<T, K>(widen<T, K>(own) * keep + widen<T, K>(outer) * mix);
}

// The state of one block's shard, and what is done with it.
template <class T, bool kAdam> struct Stage {
  using S = SumOf<T>;
  char* state;     // the anchor
  uint64_t stride; // bytes from the anchor to the first slot, and from there to the second
  S lr, a, b, mu, beta2, tau, mix, keep;

  PA_FN Stage(const PaBucket& bucket, const PaArgs& args, uint32_t block)
      : state(at<char>(bucket.state) + kStatePackBytes<T> * block * bucket.shard_packs),
        stride(kStatePackBytes<T> * args.channels * bucket.shard_packs),
        lr(S(load_in_place(&bucket.outer.lr))), a(S(load_in_place(&bucket.outer.a))),
        b(S(load_in_place(&bucket.outer.b))), mu(S(load_in_place(&bucket.outer.mu))),
        beta2(S(load_in_place(&bucket.outer.beta2))), tau(S(load_in_place(&bucket.outer.tau))),
        mix(mix_of<T>(bucket, args)), keep(keep_of<T>(mix, args)) {}

  PA_FN char* slot(int number, uint64_t i) const {
    return state + stride * number + kStatePackBytes<T> * i;
  }
  // State of a pack, loaded before it is used.
  template <int K> struct Loaded { Wide<T, K> anchor, first, second; };
  template <int K> PA_FN Loaded<K> load(uint64_t i) const {
    Loaded<K> s;
    s.anchor = load_in_order<T, K>(slot(0, i));
    s.first = load_in_order<T, K>(slot(1, i));
    if constexpr (kAdam) s.second = load_in_order<T, K>(slot(2, i));
    return s;
  }
  // The step of pack i. Returns the new anchor in the tensors' type.
  template <int K>
  PA_FN Raw<T, K> step(uint64_t i, const Wide<T, K>& mean, const Loaded<K>& s) const {
    const Wide<T, K> delta = s.anchor - mean;
    Wide<T, K> way;
    if constexpr (kAdam) {
      const Wide<T, K> first = s.first * mu + delta * (S(1) - mu);
      const Wide<T, K> second = s.second * beta2 + delta * delta * (S(1) - beta2);
      store_in_order<T, K>(slot(1, i), first);
      store_in_order<T, K>(slot(2, i), second);
      way = ratio_to_root<T, K>(first, second, tau);
    } else {
      const Wide<T, K> velocity = s.first * mu + delta;
      store_in_order<T, K>(slot(1, i), velocity);
      way = delta * a + velocity * b;
    }
    const Wide<T, K> anchor = s.anchor - way * lr;
    store_in_order<T, K>(slot(0, i), anchor);
    return narrow<T, K>(anchor);
  }
};

template <class T, bool kAdam, int K> struct StepInput {
  Wide<T, K> mean;
  typename Stage<T, kAdam>::template Loaded<K> state;
};

// Makes the step for packs 0 … count of a block's shard, whose mean lies at `mean`, and stores the
// result in the tensors' type at `out`, which may be the same memory if both have one size.
template <class T, bool kAdam>
PA_FN void make_step(const Exec& ex, const Stage<T, kAdam>& stage, const char* mean, char* out,
                     uint64_t count) {
  in_pieces(0, count, kMaxPiecePacks, [&](uint64_t begin, uint64_t end) {
    const auto load = [&](auto g, uint32_t i) {
      constexpr int K = g.kPacks;
      StepInput<T, kAdam, K> input;
      input.mean = load_in_order<T, K>(mean + kStatePackBytes<T> * (begin + i));
      input.state = stage.template load<K>(begin + i);
      return input;
    };
    const auto store = [&](auto g, uint32_t i, const auto& input) {
      constexpr int K = g.kPacks;
      store_raw<T, K>(out + 16 * (begin + i),
                      stage.template step<K>(begin + i, input.mean, input.state));
    };
    // Three loads of 16 bytes for a pack at least, six where elements are widened.
    constexpr int kDeep = sizeof(T) == 2 ? 1 : (kInFlight + 1) / 2;
    const uint32_t packs = uint32_t(end - begin);
    constexpr Group<1> one;
    for (uint32_t i = each_pack<kDeep>(ex, 0, 0, packs, load, store); i < packs;
         i += ex.lanes())
      store(one, i, load(one, i));
  });
}

// Packs of a block's shard of one bucket of the ring.
PA_FN uint64_t ring_shard_packs(const PaBucket& bucket, const PaArgs& a, uint32_t block) {
  const Range all = channel_range(bucket, block);
  const uint64_t round = uint64_t(bucket.chunk) * a.world, full = all.packs() / round;
  const Range rest = part_of({all.begin + full * round, all.end}, a.rank, a.world);
  return full * bucket.chunk + rest.packs();
}
// Calls f(element, mean, shard, packs) for a block's shard of one bucket of the ring: where it lies
// in `mean`, in the type of sums, and in `shard`, in the tensors' type.
template <class F>
PA_FN void with_shard(const Exec& ex, const PaBucket& bucket, const PaArgs& a, F f) {
  const uint64_t packs = ring_shard_packs(bucket, a, ex.block());
  with_dtype(bucket.dtype, [&](auto element) {
    const uint64_t first = ex.block() * bucket.shard_packs;
    f(element, at<const char>(bucket.mean) + kStatePackBytes<decltype(element)> * first,
      at<char>(bucket.shard) + 16 * first, packs);
  });
}
// The step for a block's shard of one bucket of the ring: `mean` → `shard`.
PA_FN void step_shard(const Exec& ex, const PaBucket& bucket, const PaArgs& a) {
  with_shard(ex, bucket, a, [&](auto element, const char* mean, char* out, uint64_t packs) {
    using T = decltype(element);
    if (bucket.outer.kind == PA_OUTER_ADAM)
      make_step(ex, Stage<T, true>(bucket, a, ex.block()), mean, out, packs);
    else make_step(ex, Stage<T, false>(bucket, a, ex.block()), mean, out, packs);
  });
}

// The own tensors' values become the anchor, `done` packs into the block's shard.
template <class T>
PA_FN void anchor_range(const Exec& ex, const PaBucket& bucket, Range range, uint64_t done) {
  char* anchor = at<char>(bucket.state) +
                 kStatePackBytes<T> * (ex.block() * bucket.shard_packs + done);
  in_pieces(range.begin, range.end, kMaxPiecePacks, [&](uint64_t begin, uint64_t end) {
    char* out = anchor + kStatePackBytes<T> * (begin - range.begin);
    each_own<T>(
        ex, bucket, begin, end,
        [&](const auto& own, auto g, uint32_t i) { return own.template load<g.kPacks>(i); },
        [&](const auto&, auto g, uint32_t i, const auto& raw) {
          store_in_order<T, g.kPacks>(out + kStatePackBytes<T> * i, widen<T, g.kPacks>(raw));
        });
  });
}
// The same for all of the block's shard. After an average that has given all ranks the same values,
// and has committed.
PA_FN void run_anchor(const Exec& ex, const PaArgs& a) {
  if (at<PaChannel>(a.channel)[ex.block()].status.outcome != PA_COMMITTED) return;
  for (uint32_t i = 0; i < a.bucket_count; ++i) {
    const PaBucket& bucket = at<const PaBucket>(a.buckets)[i];
    const Range all = channel_range(bucket, ex.block());
    const bool is_ring = bucket.mean != 0;
    const uint64_t round = is_ring ? uint64_t(bucket.chunk) * a.world : all.packs();
    uint64_t done = 0;
    for (uint64_t begin = all.begin; begin < all.end; begin += round) {
      const Range own = part_of({begin, min(begin + round, all.end)}, a.rank, a.world);
      with_dtype(bucket.dtype,
                 [&](auto element) { anchor_range<decltype(element)>(ex, bucket, own, done); });
      done += own.packs();
    }
  }
}
} // namespace PA_ISA
