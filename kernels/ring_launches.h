// One block's share of the launches of the ring: without a commit, in segments with one, and what
// comes between the segments.
#pragma once
#include "ring.h"

namespace PA_ISA {
// Calls f(ring) for each bucket, until it returns false.
template <class F> PA_FN bool each_bucket(Block& b, F f) {
  bool good = true;
  for (uint32_t i = 0; good && i < b.a.bucket_count; ++i) {
    const PaBucket& bucket = at<const PaBucket>(b.a.buckets)[i];
    // Forced inline: an argument passed by address, as `b` would be, lies in memory on a GPU.
    with_dtype(bucket.dtype, [&](auto element) __attribute__((always_inline)) {
      using T = decltype(element);
      if constexpr (sizeof(T) == 2) {
        if (bucket.wire_f32 && b.a.world > 2)
          return void(good = f(Ring<T, true>(b, bucket, i)));
      }
      good = f(Ring<T, false>(b, bucket, i));
    });
  }
  return good;
}

// One block's share of the ring without a commit.
PA_FN void run_ring(const Exec& ex, const PaArgs& a) {
  if (has_failed(ex, a)) return;
  Block b(ex, a, true);
  const bool good = publish_record(b, true) && entry_barrier(b, true) &&
                    each_bucket(b, [](auto ring) { return ring.run_both(); });
  if (good && ex.leader()) b.me->status.outcome = PA_COMMITTED;
  b.save();
}

// PaResiduals of a block's part of a bucket.
PA_FN uint32_t& residual_state(const Block& b, const PaBucket& bucket) {
  return at<uint32_t>(bucket.residual_state)[b.ex.block()];
}
// Calls f(state), by one lane, for each bucket that coded averages have.
template <class F> PA_FN void each_residual_state(Block& b, F f) {
  if (!b.ex.leader()) return;
  for (uint32_t i = 0; i < b.a.bucket_count; ++i) {
    const PaBucket& bucket = at<const PaBucket>(b.a.buckets)[i];
    if (bucket.residual_state) f(residual_state(b, bucket));
  }
}

// Ends a launch of PA_RING_COMMIT and its kin, whose next segment is `to`.
PA_FN void end_launch(Block& b, bool good, uint32_t to) {
  if (b.ex.leader()) {
    const bool ends = to == PA_SEGMENTS(b.a.world);
    if (good && ends) b.me->status.outcome = PA_COMMITTED;
    b.me->segment = good && !ends ? to : PA_NO_SEGMENT;
  }
  b.save();
}
PA_FN bool is_next(const Exec& ex, const PaArgs& a, uint32_t segment) {
  return at<PaChannel>(a.channel)[ex.block()].segment == segment;
}

// One block's share of one launch of a ring with a commit, whose segments of the reduce and of the
// gather run in reduce(block) and gather(block).
template <class Reduce, class Gather>
PA_FN void run_segments(const Exec& ex, const PaArgs& a, Reduce reduce, Gather gather) {
  const uint32_t n = a.world, from = a.from_segment, to = a.to_segment;
  if (from == 0 ? has_failed(ex, a) : !is_next(ex, a, from)) return;
  Block b(ex, a, from == 0);
  if (from == 0 && ex.leader()) b.me->bad = 0;
  const auto runs = [&](uint32_t segment) { return from <= segment && segment < to; };
  const bool good = (!runs(0) || publish_record(b, false)) &&
                    (!runs(1) || entry_barrier(b, false)) && (from > n || reduce(b)) &&
                    (!runs(n) || (a.flags & PA_FLAG_STAGE) || cast_vote(b)) &&
                    (!runs(n + 1) || b.committed || commit_vote(b)) &&
                    (to <= n + 1 || gather(b));
  end_launch(b, good, to);
}
PA_FN void run_ring_commit(const Exec& ex, const PaArgs& a) {
  // Forced inline: see each_bucket().
  run_segments(
      ex, a,
      [](Block& b) __attribute__((always_inline)) {
        // The shard, which is written before the commit, is the target of coded averages, too.
        each_residual_state(b, [](uint32_t& state) { state = PA_RESIDUALS_STALE; });
        return each_bucket(b, [](auto ring) { return ring.run_reduce(); });
      },
      [](Block& b) __attribute__((always_inline)) {
        return each_bucket(b, [](auto ring) { return ring.template run_gather<false>(); });
      });
}

// The commit, and the outer optimizer's step. Comes before segment n + 1.
PA_FN void run_ring_step(const Exec& ex, const PaArgs& a) {
  if (!is_next(ex, a, a.world + 1)) return;
  Block b(ex, a, false);
  const bool good = commit_vote(b);
  for (uint32_t i = 0; good && i < a.bucket_count; ++i)
    step_shard(ex, at<const PaBucket>(a.buckets)[i], a);
  end_launch(b, good, a.world + 1);
}
// PA_RING_COMMIT from segment n + 1 on, where own tensors keep a part of what they were, or the
// difference is written. Commits if no step has.
PA_FN void run_ring_mix(const Exec& ex, const PaArgs& a) {
  if (!is_next(ex, a, a.from_segment)) return;
  Block b(ex, a, false);
  const bool good = (b.committed || commit_vote(b)) && each_bucket(b, [](auto ring) {
                      return ring.template run_gather<true>();
                    });
  end_launch(b, good, a.to_segment);
}
} // namespace PA_ISA
