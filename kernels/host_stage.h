// The vote after a stage on the host. The reduce leaves this rank's shard in `mean`, in the type of
// sums, and casts no vote (PA_FLAG_STAGE); the host's stage changes what lies there, or refuses it
// (PA_FLAG_VETO); then this launch narrows it to `shard`, which is the same memory where nothing is
// narrowed, and votes. A stage is done before its rank votes, so no tensor changes before every
// rank's stage has agreed.
#pragma once
#include "ring_launches.h"

namespace PA_ISA {

// `mean` → `shard` for a block's shard of one bucket.
PA_FN void narrow_shard(const Exec& ex, const PaBucket& bucket, const PaArgs& a) {
  if (bucket.mean == bucket.shard) return;
  with_shard(ex, bucket, a, [&](auto element, const char* mean, char* shard, uint64_t packs) {
    using T = decltype(element);
    in_pieces(0, packs, kMaxPiecePacks, [&](uint64_t begin, uint64_t end) {
      const auto load = [&](auto g, uint32_t i) {
        return load_in_order<T, g.kPacks>(mean + kStatePackBytes<T> * (begin + i));
      };
      const auto store = [&](auto g, uint32_t i, const auto& x) {
        store_raw<T, g.kPacks>(shard + 16 * (begin + i), narrow<T, g.kPacks>(x));
      };
      const uint32_t count = uint32_t(end - begin);
      constexpr Group<1> one;
      for (uint32_t i = each_pack<kInFlight>(ex, 0, 0, count, load, store); i < count;
           i += ex.lanes())
        store(one, i, load(one, i));
    });
  });
}

// The vote. Comes behind segment n, and before PA_RING_STEP or segment n + 1.
PA_FN void run_ring_vote(const Exec& ex, const PaArgs& a) {
  if (!is_next(ex, a, a.world + 1)) return;
  Block b(ex, a, false);
  for (uint32_t i = 0; i < a.bucket_count; ++i)
    narrow_shard(ex, at<const PaBucket>(a.buckets)[i], a);
  ex.sync(); // before the block's part of the vote: the shard is whole
  end_launch(b, cast_vote(b), a.world + 1);
}
} // namespace PA_ISA
