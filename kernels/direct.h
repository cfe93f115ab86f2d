// The direct average, where every rank can address every tensor of every other: the owner of a part
// reads its n values, adds them in rank order, divides, rounds once, and writes n results. Values
// that are equal on all ranks that count stay as they are, bit for bit. No mailboxes; 2·S of memory
// traffic per rank. The entry barrier is the commit. An exit barrier keeps every rank until no peer
// accesses its tensors any more.
#pragma once
#include "barriers.h"
#include "segments.h"

namespace PA_ISA {

// kMost 2 and 4: worlds up to that size. Loops over ranks unroll, so that a GPU keeps the state of
// each rank in registers. kMost 0: any world; the state is read from the block's PaChannel.
template <class T, int kMost> struct Direct {
  using S = SumOf<T>;
  // Packs of each rank in flight.
  static constexpr int kDeep = kMost > 0 && kInFlight > kMost ? kInFlight / kMost : 1;
  Block& b;
  const PaBucket& bucket;
  S scale_of[kMost + 1];
  S divisor;
  uint32_t first; // rank that counts

  PA_FN Direct(Block& b_, const PaBucket& bucket_) : b(b_), bucket(bucket_) {
    if constexpr (kMost > 0) {
      each_rank([&](uint32_t r) { scale_of[r] = S(b.me->scale[r]); });
    }
    divisor = S(PA_SAME(S, float) ? b.me->divisor_f32 : b.me->divisor);
    first = 0;
    while (first + 1 < b.a.world && b.me->scale[first] < 0) ++first;
  }

  template <class F> PA_FN void each_rank(F f) const {
    if constexpr (kMost > 0) {
      PA_UNROLL for (uint32_t r = 0; r < kMost; ++r)
        if (r < b.a.world) f(r);
    } else {
      for (uint32_t r = 0; r < b.a.world; ++r) f(r);
    }
  }
  PA_FN const PaSegment* segments(uint32_t r) const {
    return at<const PaSegment>(b.me->segments[r]);
  }
  // Negative: r only receives.
  PA_FN S scale(uint32_t r) const { return kMost > 0 ? scale_of[r] : S(b.me->scale[r]); }

  // Pack i of every rank → the mean.
  template <class G, class Access> PA_FN auto mean(const Access& access, G, uint32_t i) const {
    constexpr int K = G::kPacks;
    Wide<T, K> sum = zero<T, K>();
    Raw<T, K> value{}, differs{};
    each_rank([&](uint32_t r) {
      if (scale(r) < 0) return;
      const Raw<T, K> raw = access(r).template load<K>(i);
      if (r == first) value = raw;
      else differs = differing_bits<T, K>(value, raw, differs);
      sum = sum + widen<T, K>(raw) * scale(r);
    });
    // By 1 after equal weights in a world of 2, 4, 8 or 16.
    const Raw<T, K> mean = narrow<T, K>(divisor == S(1) ? sum : sum / divisor);
    return where_equal<T, K>(differs, value, mean);
  }

  PA_FN void run() const {
    const Range own = part_of(channel_range(bucket, b.ex.block()), b.a.rank, b.a.world);
    if (own.begin == own.end) return;
    each_part_of_any<T>(bucket, own.begin, own.end, [&](const Part& part) {
      char* base_of[kMost + 1] = {}; // else those beyond the world live in memory, across parts
      uint64_t addresses = 0;
      each_rank([&](uint32_t r) {
        const uint64_t address = segments(r)[part.segment].address;
        if constexpr (kMost > 0)
          base_of[r] = at<char>(address + part.offset) - 16 * uint64_t(part.first);
        addresses |= address;
      });
      const auto base = [&](uint32_t r) {
        if constexpr (kMost > 0) return base_of[r];
        else
          return at<char>(segments(r)[part.segment].address + part.offset) -
                 16 * uint64_t(part.first);
      };
      const auto whole = [&](uint32_t r) { return Whole<T>{base(r)}; };
      const auto ragged = [&](bool aligned) {
        return [&base, &part, aligned](uint32_t r) {
          return Ragged<T>{base(r), part.whole, part.tail, aligned && kDeep > 1};
        };
      };
      each_pack_of<kDeep>(
          b.ex, part, 0, addresses % 16 == 0, [&] { return whole; }, ragged,
          [&](const auto& access, auto g, uint32_t i) { return mean(access, g, i); },
          [&](const auto& access, auto g, uint32_t i, const auto& raw) {
            each_rank([&](uint32_t r) { access(r).template store<g.kPacks>(i, raw); });
          });
    });
  }
};

// Publishes that this rank has exited, when its last block does, and whether its part is done.
PA_FN void publish_exit(WaitCtx ctx, bool whole) {
  uint32_t* finished = &at<PaChannel>(ctx.a->channel)->finished;
  const uint32_t all = ctx.a->channels;
  if (fetch_add(finished, 1) + 1 == all) {
    store_relaxed(finished, 0); // read next by the next launch
    publish_board(ctx, &ctx.control()->board[ctx.a->rank].exited, 2 * ctx.epoch + (whole ? 0 : 1));
  }
}

// Exits, and waits until all ranks have. False: a rank left its part undone.
PA_NOINLINE bool exit_barrier_as_leader(Exec ex, WaitCtx ctx) {
  PaControl* control = ctx.control();
  publish_exit(ctx, true);
  uint32_t undone = 0;
  for (uint32_t r = 0; r < ctx.a->world; ++r) {
    uint32_t* exited = &control->board[r].exited;
    wait_for_board(ex, ctx, r, exited, 2 * ctx.epoch, PA_AT_EXIT);
    if (load_acquire(exited) == 2 * ctx.epoch + 1) undone = code_of(uint32_t(PA_DEPARTED), r);
  }
  return undone == 0 || !resolve_failure(ex, ctx, undone, PA_AT_EXIT);
}

// Averages this block's share of one bucket.
template <class T> PA_FN void run_direct_bucket(Block& b, const PaBucket& bucket, uint32_t index) {
  if (b.ex.leader())
    for (uint32_t r = 0; r < b.a.world; ++r) {
      const PaRecord& record = b.wait_ctx().control()->board[r].record[b.epoch & 1];
      b.me->segments[r] = at<const PaBucket>(record.buckets)[index].segments;
    }
  b.ex.sync();
  if (b.a.world <= 2) Direct<T, 2>(b, bucket).run();
  else if (b.a.world <= 4) Direct<T, 4>(b, bucket).run();
  else Direct<T, 0>(b, bucket).run();
  b.ex.sync(); // all lanes have written, and have read me->segments
}

PA_FN void run_direct(const Exec& ex, const PaArgs& a) {
  if (has_failed(ex, a)) return;
  Block b(ex, a, true);
  if (publish_record(b, true) && entry_barrier(b, true)) {
    const PaBucket* buckets = at<const PaBucket>(a.buckets);
    bool good = b.begin_step();
    for (uint32_t i = 0; good && i < a.bucket_count; ++i)
      with_dtype(buckets[i].dtype, [&](auto element) {
        run_direct_bucket<decltype(element)>(b, buckets[i], i);
      });
    good = good && b.begin_step();
    if (ex.leader()) {
      // A block that fault_step ends still publishes its exit: peers wait for that without limit.
      if (!good) publish_exit(b.wait_ctx(), false);
      else if (exit_barrier_as_leader(ex, b.wait_ctx())) b.me->status.outcome = PA_COMMITTED;
    }
  }
  b.save();
}
} // namespace PA_ISA
