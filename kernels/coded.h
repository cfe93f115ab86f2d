// The ring with codes on the wire, for tensors of f32 whose ranks have had the same values, the
// reference A, after the last average. What travels are differences from it, in the steps of
// ring.h. Each rank has A, and D: before an average the residual, which is this rank's part of what
// the mean still lacks, and in it that and this rank's share w of the difference.
//
//   reduce   D ← D + w (x - A), then each rank sends code(what came + D) and keeps what the code
//            lacks: D ← what came + D - decoded. The owner adds the exact sum to its shard,
//            T ← T + (what came + D), and D ← 0. T is what the mean would be without codes
//   commit   and, with an outer optimizer, its step, T ← its result
//   gather   the owner sends code(T - A), and all ranks, the owner too, set A ← A + decoded, x ← A
//
// So all ranks have the same bits, and each error is in the next average: that of a hop by the D
// of the rank that made it, that of the gather by T, which is more than A by it. D is in the units
// of the mean, so weights may change from one average to the next.
//
// D and T change before the commit. If the average fails after that, which x and A do not notice,
// the next one begins without residuals: D ← w (x - A), and T from A, or from the outer optimizer's
// parameters, which are exact. PaBucket.residual_state says so, in the kernels' own memory, since a
// graph replays the same arguments; for each bucket, since an average of a fragment has some of
// them only, and changes nothing of the others.
//
// In an average of a copy, x is the copy, which stays as it is: A has the result, and PA_APPLY adds
// A - x to the tensors. The ranks' tensors may differ after it; A, which is all that the next
// average counts from, does not.
#pragma once
#include "codec.h"
#include "ring_launches.h"

namespace PA_ISA {

template <class C> struct Coded : Ring<float, false> {
  using Base = Ring<float, false>;
  using typename Base::Batch;
  using typename Base::Chunk;
  static constexpr int kThreeLoads = (kInFlight + 1) / 2; // packs in flight, of three loads each
  float share;   // of this rank's values in the mean
  bool begins;   // without residuals

  PA_FN Coded(Block& b_, const PaBucket& bucket_, uint32_t index_)
      : Base(b_, bucket_, index_), share(scale / divisor),
        begins(residual_state(b_, bucket_) == PA_RESIDUALS_BEGIN) {}

  // True if the own tensors are not written.
  PA_FN bool keeps() const { return b.a.flags & PA_FLAG_DELTA; }

  // Memory of a chunk's packs.
  PA_FN char* reference(const Chunk& c) const {
    return at<char>(bucket.reference) + 16 * c.range.begin;
  }
  PA_FN char* residual(const Chunk& c) const {
    return at<char>(bucket.residual) + 16 * c.range.begin;
  }
  PA_FN static uint32_t packs(const Chunk& c) { return uint32_t(c.range.packs()); }
  template <int K> PA_FN static Wide<float, K> load(const char* base, uint32_t i) {
    return load_wide<float, K>(base + 16 * uint64_t(i));
  }
  template <int K> PA_FN static void store(char* base, uint32_t i, const Wide<float, K>& x) {
    store_wide<float, K>(base + 16 * uint64_t(i), x);
  }
  // Values that came, of pack i of a chunk, and their scale.
  template <int K> struct Came {
    Codes<C, K> codes;
    float scale;
    PA_FN Wide<float, K> values() const { return decoded<C, K>(codes, scale); }
  };
  template <int K> PA_FN static Came<K> load_came(const char* in, uint32_t count, uint32_t i) {
    Came<K> came;
    came.codes = load_codes<C, K>(in + C::kBytes * uint64_t(i));
    came.scale = 1;
    if constexpr (C::kScales)
      came.scale = load_scale(in + C::kBytes * uint64_t(count) + 4 * (i / PA_BLOCK_PACKS));
    return came;
  }
  // All packs of a chunk, by load(group, i) and store(group, i, value), each by its lane. Of up to
  // three loads each.
  template <class Load, class Store>
  PA_FN void each_flat(const Chunk& c, Load load, Store store) const {
    constexpr Group<1> one;
    for (uint32_t i = each_pack<kThreeLoads>(b.ex, 0, 0, packs(c), load, store); i < packs(c);
         i += b.ex.lanes())
      store(one, i, load(one, i));
  }
  PA_FN void is_bad(const Chunk& c, uint32_t element) const {
    // Relaxed: lanes that find one each may overwrite one another; all are true.
    store_relaxed(&b.me->bad, 1 + (uint64_t(index) << 56 | (4 * c.range.begin + element)));
  }

  template <int K> struct Delta { Raw<float, K> own; Wide<float, K> reference, residual; };
  // D ← D + w (x - A). Behind enter(), which looks up where the chunk lies.
  PA_FN void add_delta(const Chunk& c) {
    char* d = residual(c);
    const char* from = reference(c);
    if (contributes)
      each_own<kThreeLoads>(
          [&](const auto& own, auto g, uint32_t i) {
            constexpr int K = g.kPacks;
            Delta<K> delta;
            delta.own = own.template load<K>(i);
            delta.reference = load<K>(from, i);
            delta.residual = load<K>(d, i);
            return delta;
          },
          [&](const auto&, auto g, uint32_t i, const auto& delta) {
            constexpr int K = g.kPacks;
            const auto before = begins ? zero<float, K>() : delta.residual;
            const auto change = widen<float, K>(delta.own) - delta.reference;
            store<K>(d, i, before + change * share);
          });
    else if (begins)
      each_flat(
          c, [&](auto, uint32_t) { return 0; },
          [&](auto g, uint32_t i, int) { store<g.kPacks>(d, i, zero<float, g.kPacks>()); });
    b.ex.sync(); // other lanes code these packs
  }

  template <int K> struct Sum { Came<K> came; Wide<float, K> own; };
  // Steps 0 … n - 2 of the reduce: what came, and D → outbox.
  template <bool kReceive> PA_FN bool add_and_send(const Chunk& c) {
    if (!enter<kReceive, true>(c, PA_AT_REDUCE, contributes)) return false;
    add_delta(c);
    const char* in = kReceive ? b.inbox() : nullptr;
    char* d = residual(c);
    const uint32_t count = packs(c);
    each_block<C>(
        b.ex, count, b.outbox(), b.remote, false,
        [&](auto g, uint32_t i) {
          constexpr int K = g.kPacks;
          Sum<K> sum;
          if constexpr (kReceive) sum.came = load_came<K>(in, count, i);
          sum.own = load<K>(d, i);
          return sum;
        },
        [](auto, const auto& sum) {
          if constexpr (kReceive) return sum.came.values() + sum.own;
          else return sum.own;
        },
        [&](auto g, uint32_t i, const auto&, const auto& sum, const auto& sent) {
          store<g.kPacks>(d, i, sum - sent);
        },
        [&](uint32_t element) { is_bad(c, element); });
    b.leave<kReceive, true>();
    return true;
  }
  template <int K> struct Last { Came<K> came; Wide<float, K> own, target; };
  // The last step of the reduce: the sum is added to T, which lies in `shard`.
  PA_FN bool finish(const Chunk& c, char* shard, const char* exact) {
    if (!enter<true, false>(c, PA_AT_REDUCE, contributes)) return false;
    add_delta(c);
    const char* in = b.inbox();
    const char* from = !begins ? shard : exact ? exact : reference(c);
    char* d = residual(c);
    const uint32_t count = packs(c);
    Largest largest;
    each_flat(
        c,
        [&](auto g, uint32_t i) {
          constexpr int K = g.kPacks;
          Last<K> last;
          last.came = load_came<K>(in, count, i);
          last.own = load<K>(d, i);
          last.target = load<K>(from, i);
          return last;
        },
        [&](auto g, uint32_t i, const auto& last) {
          constexpr int K = g.kPacks;
          const auto target = last.target + (last.came.values() + last.own);
          largest.template look<K>(target);
          store<K>(shard, i, target);
          store<K>(d, i, zero<float, K>());
        });
    if (largest.bits() >= kInfinity) locate(c, shard);
    b.leave<true, false>();
    return true;
  }
  // Finds what is not finite among this lane's packs of a chunk.
  PA_FN void locate(const Chunk& c, const char* values) const {
    for (uint32_t i = b.ex.first(0); i < packs(c); i += b.ex.lanes()) {
      Largest largest;
      largest.template look<1>(load<1>(values, i));
      if (largest.bits() >= kInfinity) return is_bad(c, 4 * i);
    }
  }

  template <int K> struct Missing { Wide<float, K> target, reference; };
  // Step 0 of the gather: T - A → outbox, and what all ranks read there is added to A.
  PA_FN bool send_target(const Chunk& c, const char* shard) {
    if (!enter<false, true>(c, PA_AT_GATHER, false)) return false;
    char* from = reference(c);
    each_block<C>(
        b.ex, packs(c), b.outbox(), b.remote, true,
        [&](auto g, uint32_t i) {
          constexpr int K = g.kPacks;
          return Missing<K>{load<K>(shard, i), load<K>(from, i)};
        },
        [](auto, const auto& missing) { return missing.target - missing.reference; },
        [&](auto g, uint32_t i, const auto& missing, const auto&, const auto& sent) {
          store<g.kPacks>(from, i, missing.reference + sent);
        },
        [](uint32_t) {}); // an outer step has made it: then it is in the tensors, too
    b.ex.sync(); // other lanes write these packs to the tensors
    if (!keeps())
      each_own([&](const auto&, auto g, uint32_t i) { return load<g.kPacks>(from, i); },
               [&](const auto& own, auto g, uint32_t i, const auto& x) {
                 own.template store<g.kPacks>(i, narrow<float, g.kPacks>(x));
               });
    b.leave<false, true>();
    return true;
  }
  template <int K> struct Next { Came<K> came; Wide<float, K> reference; };
  // Steps 1 … n - 1 of the gather: what came → A, own tensors, and outbox.
  template <bool kSend> PA_FN bool forward(const Chunk& c) {
    if (!enter<true, kSend>(c, PA_AT_GATHER, false)) return false;
    const char* in = b.inbox();
    char* out = kSend ? b.outbox() : nullptr;
    char* from = reference(c);
    const bool remote = b.remote, writes = !keeps();
    const uint32_t count = packs(c);
    if (kSend && C::kScales) {
      const uint64_t scales = C::kBytes * uint64_t(count);
      for (uint32_t i = b.ex.lane(); i < blocks_of(count); i += b.ex.lanes())
        store_scale(out + scales + 4 * i, load_scale(in + scales + 4 * i));
    }
    each_own(
        [&](const auto&, auto g, uint32_t i) {
          constexpr int K = g.kPacks;
          Next<K> next;
          next.came = load_came<K>(in, count, i);
          next.reference = load<K>(from, i);
          return next;
        },
        [&](const auto& own, auto g, uint32_t i, const auto& next) {
          constexpr int K = g.kPacks;
          if (kSend)
            store_codes_to_peer<C, K>(out + C::kBytes * uint64_t(i), next.came.codes, remote);
          const auto x = next.reference + next.came.values();
          store<K>(from, i, x);
          if (writes) own.template store_nt<K>(i, narrow<float, K>(x));
        });
    b.leave<true, kSend>();
    return true;
  }

  PA_FN bool run_reduce() {
    const uint32_t n = b.a.world;
    return each_batch([&](Batch batch) {
      const uint32_t from = b.a.rank + n - 1;
      if (runs(1) && !each(batch, from, [&](const Chunk& c, uint32_t) {
            return add_and_send<false>(c);
          }))
        return false;
      for (uint32_t k = 1; k + 1 < n; ++k)
        if (runs(k + 1) && !each(batch, from - k, [&](const Chunk& c, uint32_t) {
              return add_and_send<true>(c);
            }))
          return false;
      return !runs(n) || each(batch, b.a.rank, [&](const Chunk& c, uint32_t number) {
        const char* exact = bucket.state ? at<char>(bucket.state) + 16 * own_pack(number) : nullptr;
        return finish(c, own_shard(number), exact);
      });
    });
  }
  PA_FN bool run_gather() {
    const uint32_t n = b.a.world;
    return each_batch([&](Batch batch) {
      if (runs(n + 1) && !each(batch, b.a.rank, [&](const Chunk& c, uint32_t number) {
            return send_target(c, own_shard(number));
          }))
        return false;
      for (uint32_t k = 1; k + 1 < n; ++k)
        if (runs(n + 1 + k) && !each(batch, b.a.rank + n - k, [&](const Chunk& c, uint32_t) {
              return forward<true>(c);
            }))
          return false;
      return !runs(2 * n) || each(batch, b.a.rank + 1, [&](const Chunk& c, uint32_t) {
        return forward<false>(c);
      });
    });
  }
};

// Calls f(ring) for each bucket, all of which are of f32, until it returns false.
template <class C, class F> PA_FN bool each_coded(Block& b, F f) {
  bool good = true;
  for (uint32_t i = 0; good && i < b.a.bucket_count; ++i)
    good = f(Coded<C>(b, at<const PaBucket>(b.a.buckets)[i], i));
  return good;
}
// The begin of the reduce: notes that D changes from here on. The lanes read it behind the barrier
// of Ring's constructor.
PA_FN void begin_residuals(Block& b) {
  each_residual_state(b, [](uint32_t& state) {
    state = state == PA_RESIDUALS_KEPT ? PA_RESIDUALS_ADDED : PA_RESIDUALS_BEGIN;
  });
}

// One block's share of one launch of a coded average.
template <class C> PA_FN void run_ring_coded(const Exec& ex, const PaArgs& a) {
  run_segments(
      ex, a,
      [&](Block& b) __attribute__((always_inline)) {
        if (a.from_segment <= 1 && a.to_segment > 1) begin_residuals(b);
        return each_coded<C>(b, [](auto ring) { return ring.run_reduce(); });
      },
      [&](Block& b) __attribute__((always_inline)) {
        const bool good = each_coded<C>(b, [](auto ring) { return ring.run_gather(); });
        if (good && a.to_segment == PA_SEGMENTS(a.world))
          each_residual_state(b, [](uint32_t& state) { state = PA_RESIDUALS_KEPT; });
        return good;
      });
}

// One block's share of the reference: its packs of the own tensors, after an average that has given
// all ranks the same values, and has committed.
PA_FN void run_reference(const Exec& ex, const PaArgs& a) {
  if (at<PaChannel>(a.channel)[ex.block()].status.outcome != PA_COMMITTED) return;
  for (uint32_t i = 0; i < a.bucket_count; ++i) {
    const PaBucket& bucket = at<const PaBucket>(a.buckets)[i];
    const Range all = channel_range(bucket, ex.block());
    in_pieces(all.begin, all.end, kMaxPiecePacks, [&](uint64_t begin, uint64_t end) {
      char* out = at<char>(bucket.reference) + 16 * begin;
      each_own<float>(
          ex, bucket, begin, end,
          [&](const auto& own, auto g, uint32_t i) { return own.template load<g.kPacks>(i); },
          [&](const auto&, auto g, uint32_t i, const auto& raw) {
            store_raw<float, g.kPacks>(out + 16 * uint64_t(i), raw);
          });
    });
  }
}
} // namespace PA_ISA
