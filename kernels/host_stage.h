// The vote after a user's stage. The reduce leaves this rank's shard in `mean`, in the type of
// sums, and casts no vote (PA_FLAG_STAGE); the stage, a function of the host, changes what lies
// there, by itself or by work that it puts before this launch on the device, or refuses it
// (PA_FLAG_VETO). Then this launch narrows it to `shard`, which is the same memory where nothing is
// narrowed, looks for values that the tensors can't hold, and votes. A stage is done before its
// rank votes, so no tensor changes before every rank's stage has agreed.
#pragma once
#include "ring_launches.h"

namespace PA_ISA {

// `mean` → `shard` for a block's shard of one bucket. Returns true if this lane has found a value
// that is not finite, or becomes so, where such values are rejected.
PA_FN bool narrow_shard(const Exec& ex, const PaBucket& bucket, const PaArgs& a) {
  const bool narrows = bucket.mean != bucket.shard;
  const bool rejects = a.flags & PA_FLAG_REJECT_NON_FINITE;
  bool found = false;
  if (!narrows && !rejects) return found;
  with_shard(ex, bucket, a, [&](auto element, const char* mean, char* shard, uint64_t packs) {
    using T = decltype(element);
    NonFiniteCheck<T> check;
    in_pieces(0, packs, kMaxPiecePacks, [&](uint64_t begin, uint64_t end) {
      const auto load = [&](auto g, uint32_t i) {
        return load_in_order<T, g.kPacks>(mean + kStatePackBytes<T> * (begin + i));
      };
      const auto store = [&](auto g, uint32_t i, const auto& x) {
        const auto raw = narrow<T, g.kPacks>(x);
        if (rejects) check.template look<g.kPacks>(widen<T, g.kPacks>(raw));
        if (narrows) store_raw<T, g.kPacks>(shard + 16 * (begin + i), raw);
      };
      const uint32_t count = uint32_t(end - begin);
      constexpr Group<1> one;
      for (uint32_t i = each_pack<kInFlight>(ex, 0, 0, count, load, store); i < count;
           i += ex.lanes())
        store(one, i, load(one, i));
    });
    found = check.found();
  });
  return found;
}

// Pack of the bucket that lies at `pack` of a block's shard of it.
PA_FN uint64_t bucket_pack(const PaBucket& bucket, const PaArgs& a, uint32_t block, uint64_t pack) {
  const Range all = channel_range(bucket, block);
  const uint64_t round = uint64_t(bucket.chunk) * a.world, number = pack / bucket.chunk;
  const uint64_t begin = all.begin + number * round;
  return part_of({begin, min(begin + round, all.end)}, a.rank, a.world).begin + pack % bucket.chunk;
}
// Stores in me->bad where a value lies that narrow_shard() has found, behind a block barrier.
PA_NOINLINE void locate_left(Exec ex, const PaBucket* bucket, uint32_t index, const PaArgs* a,
                             PaChannel* me) {
  with_shard(ex, *bucket, *a, [&](auto element, const char*, char* shard, uint64_t packs) {
    using T = decltype(element);
    constexpr uint32_t N = Element<T>::kPerPack;
    for (uint64_t i = ex.lane(); i < packs; i += ex.lanes())
      for (uint32_t e = 0; e < N; ++e) {
        const auto x = widen<T, 1>(load_ragged<T>(shard + 16 * i + sizeof(T) * e, 1));
        if (!any_nonzero<T, 1>(x - x)) continue;
        const uint64_t at = bucket_pack(*bucket, *a, ex.block(), i) * N + e;
        // Relaxed: lanes that find one each may overwrite one another; all are true.
        return store_relaxed(&me->bad, PA_LEFT | (1 + (uint64_t(index) << 56 | at)));
      }
  });
}

// The vote. Comes behind segment n, and before PA_RING_STEP or segment n + 1.
PA_FN void run_ring_vote(const Exec& ex, const PaArgs& a) {
  if (!is_next(ex, a, a.world + 1)) return;
  Block b(ex, a, false);
  for (uint32_t i = 0; i < a.bucket_count; ++i) {
    const PaBucket* bucket = at<const PaBucket>(a.buckets) + i;
    // The values of a stage that vetoes are not checked. The barrier is also the one before the
    // block's part of the vote: the shard is whole.
    const bool vetoes = a.flags & PA_FLAG_VETO;
    // A value of the own tensors, which may be the cause, comes before one that the stage has left.
    const bool had_one = b.me->bad != 0;
    if (ex.any(!vetoes && narrow_shard(ex, *bucket, a)) && !had_one) {
      locate_left(ex, bucket, i, &a, b.me);
      ex.sync(); // before the vote: one lane reads `bad`
    }
  }
  end_launch(b, cast_vote(b), a.world + 1);
}
} // namespace PA_ISA
