// The direct average, where every rank can address every tensor of every other: the owner of a part
// reads its n values, adds them in rank order, divides, rounds once, and writes n results. Values
// that are equal on all ranks that count stay as they are, bit for bit. No mailboxes; 2·S of memory
// traffic per rank. The entry barrier is the commit. An exit barrier keeps every rank until no peer
// accesses its tensors any more.
#pragma once
#include "barriers.h"
#include "stage.h"

namespace PA_ISA {

// Table that a block's lanes share where the world is too large for registers. It has addresses of
// two parts, in turn: no lane overwrites those that another lane still uses for the part before.
template <class S> struct DirectTable {
  S scale[PA_MAX_WORLD];
  char* base[2][PA_MAX_WORLD];
};

// kWorld 2 to 4: a world of that size. Loops over ranks unroll, so that a GPU keeps the state of
// each rank in registers. kWorld 0: any world, by a DirectTable.
template <class T, int kWorld> struct Direct {
  using S = SumOf<T>;
  // Ranks whose packs are loaded before one is used, and packs of each of them.
  static constexpr uint32_t kRanks = kWorld > 0 ? kWorld : kInFlight;
  static constexpr int kDeep = (kInFlight + kRanks - 1) / kRanks;
  Block& b;
  const PaBucket& bucket;
  Shared<DirectTable<S>> shared;
  S scale_of[kWorld + 1];
  S divisor;
  uint32_t first; // rank that counts

  PA_FN Direct(Block& b_, const PaBucket& bucket_) : b(b_), bucket(bucket_), shared(b_.ex) {
    if constexpr (kWorld > 0) {
      PA_UNROLL for (uint32_t r = 0; r < kWorld; ++r) scale_of[r] = S(b.me->scale[r]);
    } else {
      each_entry([&](uint32_t r, uint32_t) {
        shared.get().scale[r] = r < b.a.world ? S(b.me->scale[r]) : S(-1);
      });
    }
    divisor = S(PA_SAME(S, float) ? b.me->divisor_f32 : b.me->divisor);
    first = 0;
    while (first + 1 < b.a.world && b.me->scale[first] < 0) ++first;
  }

  // This lane's entries of the table, and the rank whose tensors each stands for. The last group of
  // ranks is filled up with entries that do not count.
  template <class F> PA_FN void each_entry(F f) const {
    const uint32_t entries = (b.a.world + kRanks - 1) / kRanks * kRanks;
    for (uint32_t r = b.ex.lane(); r < entries; r += b.ex.lanes()) f(r, r < b.a.world ? r : 0);
  }
  template <class F> PA_FN void each_rank(F f) const {
    if constexpr (kWorld > 0) {
      PA_UNROLL for (uint32_t r = 0; r < kWorld; ++r) f(r);
    } else {
      for (uint32_t r = 0; r < b.a.world; ++r) f(r);
    }
  }
  PA_FN uint64_t address(uint32_t r, const Part& part) const {
    return at<const PaSegment>(b.me->segments[r])[part.segment].address;
  }
  // Negative: r only receives.
  PA_FN S scale(uint32_t r) const {
    if constexpr (kWorld > 0) return scale_of[r];
    else return shared.get().scale[r];
  }

  // Values of one place, added up in rank order.
  template <int K> struct Sum {
    Wide<T, K> sum = zero<T, K>();
    Raw<T, K> value{}, differs{};
    PA_FN void add(const Raw<T, K>& raw, S scale, bool is_first) {
      if (!(scale >= 0)) return;
      if (is_first) value = raw;
      differs = differing_bits<T, K>(value, raw, differs);
      sum = sum + widen<T, K>(raw) * scale;
    }
  };
  // Pack i of ranks r and following.
  template <int K> struct Packs { Raw<T, K> raw[kRanks]; };
  template <class G, class Access>
  PA_FN Packs<G::kPacks> load(const Access& access, G, uint32_t i, uint32_t r) const {
    Packs<G::kPacks> packs;
    PA_UNROLL for (uint32_t j = 0; j < kRanks; ++j)
      packs.raw[j] = access(r + j).template load<G::kPacks>(i);
    return packs;
  }
  template <int K> PA_FN void add(Sum<K>& sum, const Packs<K>& packs, uint32_t r) const {
    PA_UNROLL for (uint32_t j = 0; j < kRanks; ++j)
      sum.add(packs.raw[j], scale(r + j), r + j == first);
  }
  template <int K> PA_FN Wide<T, K> wide_mean_of(const Sum<K>& s) const {
    // By 1 after equal weights in a world of 2, 4, 8 or 16.
    return divisor == S(1) ? s.sum : s.sum / divisor;
  }
  template <int K> PA_FN Raw<T, K> mean_of(const Sum<K>& s) const {
    return where_equal<T, K>(s.differs, s.value, narrow<T, K>(wide_mean_of(s)));
  }

  // `end` says what becomes of a sum: EndsInMean, EndsInStep.
  template <class End> PA_FN void run(const End& end) const {
    const Range own = part_of(channel_range(bucket, b.ex.block()), b.a.rank, b.a.world);
    uint32_t turn = 0;
    each_part_of_any<T>(bucket, own.begin, own.end, [&](const Part& part, uint64_t from) {
      run_part(end, part, from - own.begin, turn ^= 1);
    });
  }
  // `ahead`: packs of the own part before pack 0 of `part`.
  template <class End>
  PA_FN void run_part(const End& end, const Part& part, uint64_t ahead, uint32_t turn) const {
    char* base_of[kWorld + 1] = {};
    bool odd = false; // not at a multiple of 16
    const auto look_up = [&](char*& base, uint32_t r) {
      const uint64_t tensor = address(r, part);
      base = at<char>(tensor + part.offset) - 16 * uint64_t(part.first);
      odd |= tensor % 16 != 0;
    };
    if constexpr (kWorld > 0) {
      each_rank([&](uint32_t r) { look_up(base_of[r], r); });
    } else {
      each_entry([&](uint32_t r, uint32_t of) { look_up(shared.get().base[turn][r], of); });
      odd = b.ex.any(odd); // also the barrier before the table is read
    }
    const auto base = [&](uint32_t r) {
      if constexpr (kWorld > 0) return base_of[r];
      else return shared.get().base[turn][r];
    };
    const auto whole = [&](uint32_t r) { return Whole<T>{base(r)}; };
    const auto ragged = [&](bool aligned) {
      return [&base, &part, aligned](uint32_t r) {
        return Ragged<T>{base(r), part.whole, part.tail, aligned && kDeep > 1};
      };
    };
    each_pack_of<kDeep>(
        b.ex, part, 0, !odd, [&] { return whole; }, ragged,
        [&](const auto& access, auto g, uint32_t i) {
          constexpr int K = g.kPacks;
          if constexpr (kWorld > 0) {
            return load(access, g, i, 0);
          } else {
            Sum<K> sum;
            for (uint32_t r = 0; r < b.a.world; r += kRanks) add(sum, load(access, g, i, r), r);
            return end.template mean_of<K>(*this, sum);
          }
        },
        [&](const auto& access, auto g, uint32_t i, const auto& loaded) {
          constexpr int K = g.kPacks;
          Raw<T, K> result;
          if constexpr (kWorld > 0) {
            Sum<K> sum;
            add(sum, loaded, 0);
            result = end.template result_of<K>(ahead + i, end.template mean_of<K>(*this, sum));
          } else {
            result = end.template result_of<K>(ahead + i, loaded);
          }
          each_rank([&](uint32_t r) { end.template write<K>(access(r), i, result); });
        });
  }
};

// The mean is the result.
template <class T> struct EndsInMean {
  template <int K, class D, class Sum> PA_FN Raw<T, K> mean_of(const D& d, const Sum& sum) const {
    return d.mean_of(sum);
  }
  template <int K> PA_FN Raw<T, K> result_of(uint64_t, const Raw<T, K>& mean) const {
    return mean;
  }
  template <int K, class Access>
  PA_FN void write(const Access& access, uint32_t i, const Raw<T, K>& result) const {
    access.template store<K>(i, result);
  }
};
// The mean less the former value is the result.
template <class T> struct EndsInDelta : EndsInMean<T> {
  template <int K, class Access>
  PA_FN void write(const Access& access, uint32_t i, const Raw<T, K>& mean) const {
    const Raw<T, K> own = access.template load<K>(i);
    access.template store<K>(i, mixed<T, K>(own, mean, SumOf<T>(-1), SumOf<T>(1)));
  }
};
// A step of the outer optimizer follows.
template <class T, bool kAdam> struct EndsInStep {
  Stage<T, kAdam> stage;
  template <int K, class D, class Sum> PA_FN Wide<T, K> mean_of(const D& d, const Sum& sum) const {
    return d.wide_mean_of(sum);
  }
  template <int K> PA_FN Raw<T, K> result_of(uint64_t i, const Wide<T, K>& mean) const {
    return stage.template step<K>(i, mean, stage.template load<K>(i));
  }
  template <int K, class Access>
  PA_FN void write(const Access& access, uint32_t i, const Raw<T, K>& result) const {
    if (stage.keep == SumOf<T>(0)) return access.template store<K>(i, result);
    const Raw<T, K> own = access.template load<K>(i);
    access.template store<K>(i, mixed<T, K>(own, result, stage.keep, stage.mix));
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

// Exits, and waits until all ranks have. False: a rank left its part undone, or its device failed.
PA_NOINLINE bool exit_barrier_as_leader(Exec ex, WaitCtx ctx) {
  PaControl* control = ctx.control();
  publish_exit(ctx, true);
  uint32_t undone = 0;
  bool lost = false;
  for (uint32_t r = 0; r < ctx.a->world; ++r) {
    uint32_t* exited = &control->board[r].exited;
    lost |= !wait_for_board(ex, ctx, r, exited, 2 * ctx.epoch, PA_AT_EXIT);
    if (load_acquire(exited) == 2 * ctx.epoch + 1) undone = code_of(uint32_t(PA_DEPARTED), r);
  }
  return !lost && (undone == 0 || !resolve_failure(ex, ctx, undone, PA_AT_EXIT));
}

// All sums of this block's share of one bucket. With an outer optimizer not unrolled by ranks on a
// GPU: the kernel's code would double.
template <class T, class End> PA_FN void run_direct_to(Block& b, const PaBucket& bucket, End end) {
  if constexpr (kInFlight == 1 || PA_SAME(End, EndsInMean<T>)) {
    switch (b.a.world) {
      case 2: return Direct<T, 2>(b, bucket).run(end);
      case 3: return Direct<T, 3>(b, bucket).run(end);
      case 4: return Direct<T, 4>(b, bucket).run(end);
    }
  }
  Direct<T, 0>(b, bucket).run(end);
}
// End of an average: of PA_DIRECT, PA_DIRECT_STEP, PA_DIRECT_DELTA.
enum class DirectEnd { kMean, kStep, kDelta };
// This block's share of one bucket.
template <class T, DirectEnd kEnd>
PA_FN void run_direct_bucket(Block& b, const PaBucket& bucket, uint32_t index) {
  if (b.ex.leader())
    for (uint32_t r = 0; r < b.a.world; ++r) {
      const PaRecord& record = b.wait_ctx().control()->board[r].record[b.epoch & 1];
      b.me->segments[r] = at<const PaBucket>(record.buckets)[index].segments;
    }
  b.ex.sync();
  if constexpr (kEnd == DirectEnd::kMean) run_direct_to<T>(b, bucket, EndsInMean<T>{});
  else if constexpr (kEnd == DirectEnd::kDelta) run_direct_to<T>(b, bucket, EndsInDelta<T>{});
  else if (bucket.outer.kind == PA_OUTER_ADAM)
    run_direct_to<T>(b, bucket, EndsInStep<T, true>{{bucket, b.a, b.ex.block()}});
  else run_direct_to<T>(b, bucket, EndsInStep<T, false>{{bucket, b.a, b.ex.block()}});
  b.ex.sync(); // all lanes have written, and have read me->segments
}

template <DirectEnd kEnd> PA_FN void run_direct(const Exec& ex, const PaArgs& a) {
  if (has_failed(ex, a)) return;
  Block b(ex, a, true);
  if (publish_record(b, true) && entry_barrier(b, true)) {
    bool good = b.begin_step();
    for (uint32_t i = 0; good && i < a.bucket_count; ++i) {
      const PaBucket& bucket = at<const PaBucket>(a.buckets)[i];
      with_dtype(bucket.dtype, [&](auto element) {
        run_direct_bucket<decltype(element), kEnd>(b, bucket, i);
      });
    }
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
