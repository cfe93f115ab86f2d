// The ring. A channel's packs are taken in rounds; a round is one chunk per rank, its shard. In
// n - 1 steps every shard travels once around the ring, from the rank after its owner to its owner,
// and each rank adds its own packs: reduce-scatter. The owner divides and rounds once, and the mean
// travels around again: all-gather.
//
//   step            rank r sends                     rank r receives
//   0               own packs of shard r-1           -
//   k = 1 … n-2     what came, plus own packs        shard r-1-k, partial
//   n-1             shard r, the mean                shard r, all but its own packs
//   k = 1 … n-2     what came                        shard r-k, the mean
//   n-1             -                                shard r+1, the mean
//
// Shard s is summed in the order of ranks s+1, s+2, …, s, in f32 (f64 for f64). Step 0 sends raw
// packs, which the receiver widens and multiplies by the sender's scale; the mean is raw, too.
// Partial sums, which exist from 3 ranks on, travel as f32 (f64), or in the tensors' 16 bits unless
// `wire_f32` is set: as partial means then, which lie within the range of their inputs. A rank that
// only receives adds nothing; the slot holds nothing where no rank before has added anything.
// Every rank makes every step, also for an empty shard.
#pragma once
#include "barriers.h"
#include "scan.h"
#include "stage.h"

namespace PA_ISA {

// State that the lanes of a block share: in registers of a GPU it would displace others.
struct RingTable {
  uint32_t reached[2 * PA_MAX_WORLD]; // segment by shard, of the reduce and the gather; only grows
  Range range;     // of the step's chunk, looked up before the wait
  uint32_t cursor; // index of `reached`
  uint32_t index;  // of the segment in which the chunk begins
  PaSegment segment;
};

// kF32: partial sums of f16 or bf16 travel as f32.
template <class T, bool kF32> struct Ring {
  using S = SumOf<T>;
  static constexpr bool kPartialMeans = sizeof(T) == 2 && !kF32;
  Block& b;
  const PaBucket& bucket;
  uint32_t index; // of the bucket
  S scale, divisor;
  bool contributes, rejects;
  Shared<RingTable> table;

  PA_FN Ring(Block& b_, const PaBucket& bucket_, uint32_t index_)
      : b(b_), bucket(bucket_), index(index_), table(b_.ex) {
    const double own = b.me->scale[b.a.rank];
    contributes = own >= 0;
    scale = contributes ? S(own) : S(0);
    divisor = S(PA_SAME(S, float) ? b.me->divisor_f32 : b.me->divisor);
    rejects = (b.a.flags & PA_FLAG_REJECT_NON_FINITE) && contributes;
    for (uint32_t i = b.ex.lane(); i < 2 * PA_MAX_WORLD; i += b.ex.lanes())
      table.get().reached[i] = 0;
    b.ex.sync();
  }

  // True if the own tensors are not written.
  PA_FN bool keeps() const { return b.a.flags & PA_FLAG_KEEP; }

  // State of a shard after k steps.
  struct Incoming {
    bool any;  // at least one of the k ranks on its way counts
    S in, out; // factors of values in the inbox, and of values that go into the outbox
  };
  PA_FN Incoming incoming(uint32_t k) const {
    double sum = 0;
    bool any = false;
    for (uint32_t j = k; j > 0; --j) {
      const double other = b.me->scale[(b.a.rank + b.a.world - j) % b.a.world];
      if (other >= 0) any = true, sum += other;
    }
    const double with_own = contributes ? sum + double(scale) : sum;
    return {any, k == 1 || kPartialMeans ? S(sum) : S(1),
            kPartialMeans && with_own > 0 ? S(1 / with_own) : S(1)};
  }

  // Unchanged, also a NaN, where one rank counts.
  template <int K> PA_FN static Wide<T, K> times(const Wide<T, K>& x, S factor) {
    return factor == S(1) ? x : x * factor;
  }
  template <int K>
  PA_FN Wide<T, K> own_share(const Raw<T, K>& raw, NonFiniteCheck<T>& check) const {
    const Wide<T, K> x = widen<T, K>(raw);
    if (rejects) check.template look<K>(x);
    return times<K>(x, scale);
  }
  // Skips the division, which is slow, by 1: after equal weights in a world of 2, 4, 8 or 16.
  template <int K> PA_FN Wide<T, K> mean_of(const Wide<T, K>& sum) const {
    return divisor == S(1) ? sum : sum / divisor;
  }
  PA_FN void after(NonFiniteCheck<T>& check) {
    const Range& r = table.get().range;
    if (rejects && check.found()) locate_non_finite<T>(&bucket, index, r.begin, r.end, b.me);
  }

  // A chunk of a shard.
  struct Chunk {
    Range range;
    uint32_t shard;
  };
  PA_FN Chunk chunk_of(uint32_t round_number, uint32_t shard) const {
    return {part_of(round(round_number), shard, b.a.world), shard};
  }
  // Enters a step. What depends on no peer comes before the wait: where the chunk lies, and on a
  // GPU its way from memory to the cache.
  template <bool kReceive, bool kSend>
  PA_FN bool enter(const Chunk& c, uint32_t phase, bool reads_own) {
    RingTable& t = table.get();
    const uint32_t cursor = c.shard + (phase == PA_AT_GATHER ? PA_MAX_WORLD : 0);
    const uint32_t s = last_at_from(bucket, t.reached[cursor], c.range.begin);
    const PaSegment segment = at<const PaSegment>(bucket.segments)[s];
    if (reads_own) prefetch_own(b.ex, segment, c.range);
    if (b.ex.leader()) t.range = c.range, t.cursor = cursor, t.index = s, t.segment = segment;
    return b.template enter<kReceive, kSend>(phase, bucket.chunk);
  }
  template <int kDeep = kInFlight, class Load, class Store>
  PA_FN void each_own(Load load, Store store) {
    RingTable& t = table.get();
    const uint32_t last =
        each_part_from<T>(bucket, t.index, t.segment, t.range, [&](const Part& part) {
          each_own_pack<T, kDeep>(b.ex, part, load, store);
        });
    // Read before this step began, and after it. A world of one comes to its shard twice.
    if (b.ex.leader() && b.a.world > 1) t.reached[t.cursor] = last;
  }

  // Steps load a lane's packs first and use them afterwards, in `store`: what is branched over or
  // computed between two loads makes a GPU wait for the first one.

  // Own packs of a shard → outbox.
  PA_FN bool send_own(const Chunk& c) {
    if (!enter<false, true>(c, PA_AT_REDUCE, contributes)) return false;
    char* out = b.outbox();
    const bool remote = b.remote;
    NonFiniteCheck<T> check;
    if (contributes)
      each_own(
          [&](const auto& own, auto g, uint32_t i) { return own.template load<g.kPacks>(i); },
          [&](const auto&, auto g, uint32_t i, const auto& raw) {
            if (rejects) check.template look<g.kPacks>(widen<T, g.kPacks>(raw));
            store_to_peer<T, g.kPacks>(out + 16 * uint64_t(i), raw, remote);
          });
    after(check);
    b.leave<false, true>();
    return true;
  }

  // Pack i of a shard: what came, and the own one.
  template <bool kRaw, int K> struct Packs {
    std::conditional_t<kRaw, Raw<T, K>, Wide<T, K>> came;
    Raw<T, K> own;
  };
  template <bool kRaw, int K>
  PA_FN Wide<T, K> sum_of(const Packs<kRaw, K>& packs, const Incoming& incoming,
                          NonFiniteCheck<T>& check) const {
    auto sum = zero<T, K>();
    if (incoming.any) {
      if constexpr (kRaw) sum = times<K>(widen<T, K>(packs.came), incoming.in);
      else sum = packs.came;
    }
    if (!contributes) return sum;
    const auto share = own_share<K>(packs.own, check);
    return incoming.any ? sum + share : share;
  }

  // Inbox + own packs → sink(own, group, i, sum); make_sink() runs after the step has begun.
  // kSend: the sink fills the outbox. kRaw: the inbox holds raw packs, not partial sums as f32.
  template <bool kRaw, bool kSend, class MakeSink>
  PA_FN bool receive_and_add(const Chunk& c, const Incoming& incoming, MakeSink make_sink) {
    if (!enter<true, kSend>(c, PA_AT_REDUCE, contributes)) return false;
    const char* in = b.inbox();
    NonFiniteCheck<T> check;
    const auto sink = make_sink();
    if (incoming.any || contributes)
      each_own(
          [&](const auto& own, auto g, uint32_t i) {
            constexpr int K = g.kPacks;
            Packs<kRaw, K> packs;
            // Also where one of them is not used: memory that may be read.
            if constexpr (kRaw) packs.came = load_raw<T, K>(in + 16 * uint64_t(i));
            else packs.came = load_wide<T, K>(in + sizeof(Wide<T, 1>) * uint64_t(i));
            packs.own = own.template load<K>(i);
            return packs;
          },
          [&](const auto& own, auto g, uint32_t i, const auto& packs) {
            sink(own, g, i, sum_of<kRaw, g.kPacks>(packs, incoming, check));
          });
    after(check);
    b.leave<true, kSend>();
    return true;
  }
  template <bool kRaw> PA_FN bool add_and_send(const Chunk& c, const Incoming& incoming) {
    return receive_and_add<kRaw, true>(c, incoming, [&] {
      return [out = b.outbox(), remote = b.remote, factor = incoming.out](
                 const auto&, auto g, uint32_t i, const auto& x) {
        constexpr int K = g.kPacks;
        if constexpr (kF32)
          store_wide_to_peer<T, K>(out + sizeof(Wide<T, 1>) * uint64_t(i), x, remote);
        else
          store_to_peer<T, K>(out + 16 * uint64_t(i),
                              narrow<T, K>(kPartialMeans ? times<K>(x, factor) : x), remote);
      };
    });
  }
  // The last step of the reduce: the mean → `shard`, until the commit …
  PA_FN bool finish_into(const Chunk& c, const Incoming& incoming, char* shard) {
    return receive_and_add<!kF32, false>(c, incoming, [&] {
      return [this, shard](const auto&, auto g, uint32_t i, const auto& x) {
        store_raw_nt<T, g.kPacks>(shard + 16 * uint64_t(i),
                                  narrow<T, g.kPacks>(mean_of<g.kPacks>(x)));
      };
    });
  }
  // … or, for an outer optimizer, → `mean`, not narrowed; the same memory where nothing is …
  PA_FN bool finish_into_mean(const Chunk& c, const Incoming& incoming, char* mean) {
    return receive_and_add<!kF32, false>(c, incoming, [&] {
      return [this, mean](const auto&, auto g, uint32_t i, const auto& x) {
        store_in_order<T, g.kPacks>(mean + kStatePackBytes<T> * i, mean_of<g.kPacks>(x));
      };
    });
  }
  // … or → own tensors, unless they are kept, and outbox.
  PA_FN bool finish_and_send(const Chunk& c, const Incoming& incoming) {
    return receive_and_add<!kF32, true>(c, incoming, [&] {
      return [this, out = b.outbox(), remote = b.remote, writes = !keeps()](
                 const auto& own, auto g, uint32_t i, const auto& x) {
        const auto raw = narrow<T, g.kPacks>(mean_of<g.kPacks>(x));
        if (writes) own.template store<g.kPacks>(i, raw);
        store_to_peer<T, g.kPacks>(out + 16 * uint64_t(i), raw, remote);
      };
    });
  }

  // Inbox, or `shard` → own tensors, unless they are kept, and → outbox. kNonTemporal: the tensors
  // were not read a moment ago. kMixes: own tensors keep a part of what they were.
  template <bool kReceive, bool kSend, bool kNonTemporal, bool kMixes = false>
  PA_FN bool forward(const Chunk& c, const char* shard) {
    const S mix = kMixes ? mix_of<T>(bucket, b.a) : S(1); // before the wait
    const S keep = kMixes ? keep_of<T>(mix, b.a) : S(0);
    if (!enter<kReceive, kSend>(c, PA_AT_GATHER, false)) return false;
    const char* in = kReceive ? b.inbox() : shard;
    char* out = kSend ? b.outbox() : nullptr;
    const bool remote = b.remote;
    // Alone, a rank comes to its shard twice: as the owner, and as the last one that it goes to.
    const bool writes = !keeps() && (kReceive || b.a.world > 1);
    each_own(
        [&](const auto& own, auto g, uint32_t i) {
          constexpr int K = g.kPacks;
          const Raw<T, K> came = load_raw<T, K>(in + 16 * uint64_t(i));
          if constexpr (kMixes) return Packs<true, K>{came, own.template load<K>(i)};
          else return came;
        },
        [&](const auto& own, auto g, uint32_t i, const auto& loaded) {
          constexpr int K = g.kPacks;
          const auto send = [&](const Raw<T, K>& raw) {
            if (kSend) store_to_peer<T, K>(out + 16 * uint64_t(i), raw, remote);
          };
          if constexpr (kMixes) {
            if (writes) own.template store<K>(i, mixed<T, K>(loaded.own, loaded.came, keep, mix));
            send(loaded.came);
          } else {
            if (writes) {
              if (kNonTemporal) own.template store_nt<K>(i, loaded);
              else own.template store<K>(i, loaded);
            }
            send(loaded);
          }
        });
    b.leave<kReceive, kSend>();
    return true;
  }

  // ---- rounds, and the batches in which they go around -----------------------------------------
  PA_FN Range round(uint64_t number) const {
    const Range all = channel_range(bucket, b.ex.block());
    const uint64_t packs = uint64_t(bucket.chunk) * b.a.world, begin = all.begin + number * packs;
    return {begin, min(begin + packs, all.end)};
  }
  PA_FN uint64_t own_pack(uint64_t number) const { // first pack of a round, in the shards
    return b.ex.block() * bucket.shard_packs + number * bucket.chunk;
  }
  PA_FN char* own_shard(uint64_t number) const {
    return at<char>(bucket.shard) + 16 * own_pack(number);
  }
  PA_FN char* own_mean(uint64_t number) const {
    return at<char>(bucket.mean) + kStatePackBytes<T> * own_pack(number);
  }
  // Rounds that make each step together, so that one chunk travels while another is worked on.
  // More rounds than half the slots would fill a mailbox with no rank left to empty it.
  struct Batch {
    uint32_t first, end;
  };
  template <class Step> PA_FN bool each(Batch batch, uint32_t shard, Step step) {
    for (uint32_t number = batch.first; number < batch.end; ++number)
      if (!step(chunk_of(number, shard % b.a.world), number)) return false;
    return true;
  }
  // Segments of PA_RING_COMMIT that this launch runs: step k of the reduce is segment k + 1, of the
  // gather segment n + 1 + k.
  PA_FN bool runs(uint32_t segment) const {
    return b.a.from_segment <= segment && segment < b.a.to_segment;
  }
  // Steps 0 … n - 2 of the reduce.
  template <bool kAll> PA_FN bool reduce(Batch batch) {
    const uint32_t n = b.a.world;
    if ((kAll || runs(1)) &&
        !each(batch, b.a.rank + n - 1, [&](const Chunk& c, uint32_t) { return send_own(c); }))
      return false;
    uint32_t k = 1;
    if constexpr (kF32) { // more than two ranks; what comes first is raw
      const Incoming in = incoming(k);
      if ((kAll || runs(k + 1)) &&
          !each(batch, b.a.rank + n - 1 - k,
                [&](const Chunk& c, uint32_t) { return add_and_send<true>(c, in); }))
        return false;
      ++k;
    }
    for (; k + 1 < n; ++k) {
      const Incoming in = incoming(k);
      if ((kAll || runs(k + 1)) &&
          !each(batch, b.a.rank + n - 1 - k,
                [&](const Chunk& c, uint32_t) { return add_and_send<!kF32>(c, in); }))
        return false;
    }
    return true;
  }
  // Steps 1 … n - 1 of the gather.
  template <bool kAll, bool kNonTemporal, bool kMixes = false> PA_FN bool gather(Batch batch) {
    const uint32_t n = b.a.world;
    for (uint32_t k = 1; k + 1 < n; ++k)
      if ((kAll || runs(n + 1 + k)) &&
          !each(batch, b.a.rank + n - k, [&](const Chunk& c, uint32_t) {
            return forward<true, true, kNonTemporal, kMixes>(c, nullptr);
          }))
        return false;
    return !(kAll || runs(2 * n)) || each(batch, b.a.rank + 1, [&](const Chunk& c, uint32_t) {
      return forward<true, false, kNonTemporal, kMixes>(c, nullptr);
    });
  }

  // Calls f for each batch, until it returns false.
  template <class F> PA_FN bool each_batch(F f) const {
    const uint64_t packs = channel_range(bucket, b.ex.block()).packs();
    const uint64_t round_packs = uint64_t(bucket.chunk) * b.a.world;
    const uint32_t rounds = uint32_t((packs + round_packs - 1) / round_packs); // 256 bytes each
    bool good = true;
    for (uint32_t first = 0, end; good && first < rounds; first = end) {
      end = uint32_t(min(first + uint64_t(b.a.slots / 2), rounds));
      good = f(Batch{first, end});
    }
    return good;
  }
  PA_FN bool run_reduce() {
    const uint32_t n = b.a.world;
    const Incoming last = incoming(n - 1);
    return each_batch([&](Batch batch) {
      return reduce<false>(batch) &&
             (!runs(n) || each(batch, b.a.rank, [&](const Chunk& c, uint32_t at) {
               if constexpr (sizeof(T) == 2) {
                 if (b.a.flags & PA_FLAG_STEP) return finish_into_mean(c, last, own_mean(at));
               }
               return finish_into(c, last, own_shard(at));
             }));
    });
  }
  template <bool kMixes> PA_FN bool run_gather() {
    const uint32_t n = b.a.world;
    return each_batch([&](Batch batch) {
      return (!runs(n + 1) || each(batch, b.a.rank,
                                   [&](const Chunk& c, uint32_t at) {
                                     return forward<false, true, true, kMixes>(c, own_shard(at));
                                   })) &&
             gather<false, true, kMixes>(batch);
    });
  }
  PA_FN bool run_both() {
    return each_batch([&](Batch batch) {
      if (!reduce<true>(batch)) return false;
      const Incoming last = incoming(b.a.world - 1); // here, or it holds registers throughout
      return each(batch, b.a.rank,
                  [&](const Chunk& c, uint32_t) { return finish_and_send(c, last); }) &&
             gather<true, false>(batch);
    });
  }
};
} // namespace PA_ISA
