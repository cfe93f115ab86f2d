// Averages that succeed, and averages that end with a verdict, after which the next one works.
#pragma once
#include "check.h"

#if defined(PA_LANES)
constexpr uint32_t kLanes[] = {4, 2};
#else
constexpr uint32_t kLanes[] = {1, 1};
#endif

inline std::vector<Shape> all_dtypes() {
  return {{PA_F32, false, {130, 1, 2, 3, 5, 64, 257}},
          {PA_BF16, false, {300, 7, 1, 9, 16}},
          {PA_F16, true, {1, 215, 8, 33}},
          {PA_F64, false, {61, 1, 2, 3}},
          {PA_BF16, true, {129, 5, 64}},
          {PA_F16, false, {77, 1}}};
}
inline std::vector<Shape> two_dtypes() {
  return {{PA_F32, false, {333, 1, 2, 3, 70, 5}}, {PA_BF16, true, {301, 3, 1, 90}}};
}

inline Setup setup_of(Mode mode, uint32_t world, uint32_t channels, uint64_t seed) {
  Setup s;
  s.mode = mode, s.world = world, s.channels = channels, s.seed = seed;
  s.slots = seed % 3 == 0 ? 4 : 2;
  s.chunk = seed % 4 == 1 ? 16 : 8;
  s.lanes = kLanes[seed % 2];
  s.buckets = seed % 2 ? all_dtypes() : two_dtypes();
  return s;
}

// Worlds of 2 … 5 ranks, 1 … 3 channels.
inline void many_worlds(Mode mode, uint32_t averages) {
  uint64_t seed = 1;
  for (uint32_t world : {3u, 4u, 2u, 5u, 3u})
    for (uint32_t channels : {2u, 1u, 3u}) {
      if (channels == 3 && world != 3) continue;
      World w(setup_of(mode, world, channels, seed++));
      run_good(w, averages, [&](uint32_t k) { return script_of(w, k); });
    }
}
inline void ring() { many_worlds(Mode::kRing, 5); }
inline void commit() { many_worlds(Mode::kCommit, 4); }
inline void direct() { many_worlds(Mode::kDirect, 8); }
inline void largest() { // the largest world
  for (Mode mode : {Mode::kRing, Mode::kDirect}) {
    World w(setup_of(mode, PA_MAX_WORLD, 1, 6));
    run_good(w, 1, [&](uint32_t k) { return script_of(w, k); });
  }
}

// Every counter passes its wrap and the middle of its range.
inline void wrap() {
  uint64_t seed = 30;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect})
    for (uint32_t epoch : {0xfffffffdu, 0x7ffffffdu})
      for (uint32_t sequence : {0xffffffe0u, 0x7fffffe0u}) {
        Setup s = setup_of(mode, 3, 2, seed++);
        s.epoch = epoch, s.sequence = sequence;
        World w(s);
        run_good(w, 5, [&](uint32_t k) { return script_of(w, k); });
      }
}

inline void weights() {
  uint64_t seed = 50;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect})
    for (uint32_t world : {3u, 5u}) {
      World w(setup_of(mode, world, 2, seed++));
      run_good(w, 4, [&](uint32_t k) {
        Script script = script_of(w, k);
        for (uint32_t r = 0; r < world; ++r) {
          const double weight = k == 0   ? 1.0 + r
                                : k == 1 ? (r == 1 ? 0.0 : 1.0)
                                : k == 2 ? (r == 2 ? 3.0 : 0.0)
                                         : 1e-3 * (1 + (r + k) % 3);
          script.plan.weights.push_back(weight);
          if (weight == 0) script.plan.useless.push_back(r);
          // A rank of weight 0 only receives: its NaNs neither count nor are found.
          script.calls[r].flags = PA_FLAG_WEIGHTED | (k % 2 ? PA_FLAG_REJECT_NON_FINITE : 0);
          script.calls[r].weight = weight;
        }
        return script;
      });
    }
}

// Ranks that keep their tensors: the others still get the mean. As where a process joins: one rank
// counts, its bits arrive at the ranks that keep nothing, whose own values count for nothing.
inline void keep() {
  uint64_t seed = 57;
  for (Mode mode : {Mode::kRing, Mode::kCommit})
    for (uint32_t world : {2u, 3u, 5u}) {
      World w(setup_of(mode, world, 2, seed++));
      const auto script_at = [&](uint32_t k) {
        Script script = script_of(w, k);
        const uint32_t giver = k % world;
        for (uint32_t r = 0; r < world; ++r) {
          const bool keeps = k % 3 == 2 ? r == giver : r != (giver + 1) % world;
          if (keeps) script.plan.keepers.push_back(r), script.calls[r].flags |= PA_FLAG_KEEP;
          if (k % 3 == 2) continue; // all count
          script.plan.weights.push_back(r == giver ? 0.3 : 0);
          if (r != giver) script.plan.useless.push_back(r);
          script.calls[r].flags |= PA_FLAG_WEIGHTED,
              script.calls[r].weight = script.plan.weights[r];
        }
        return script;
      };
      const auto good = [&](uint32_t k, uint32_t r, const Outcome& o) {
        expect_outcome(w, r, k, o, PA_COMMITTED, 0);
        const Plan plan = script_at(k).plan;
        if (k % 3 == 2 || plan.keeps(r)) return;
        if (check(w, plan, r, Expect::kMean) != local_digest(w, plan, k % world))
          wrong("%s, average %u: rank %u has other bits than the only rank that counts",
                name_of(mode), k, r);
      };
      run_script(w, 7, script_at, good);
    }
}

// A rank that knows of a joiner: after that average every rank does, and after the next none.
inline void joiners() {
  uint64_t seed = 55;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect}) {
    World w(setup_of(mode, 3, 2, seed++));
    run_script(
        w, 12,
        [&](uint32_t k) {
          Script script = script_of(w, k);
          if (k % 3 == 1) script.calls[k / 3 % 3].flags |= PA_FLAG_JOINER;
          return script;
        },
        [&](uint32_t k, uint32_t r, const Outcome& o) {
          expect_outcome(w, r, k, o, PA_COMMITTED, 0);
          if (o.joiner != (k % 3 == 1))
            wrong("%s, average %u: rank %u says joiner = %d", name_of(mode), k, r, o.joiner);
        });
  }
}

// Each verdict of the entry barrier in turn, with good averages between. Some follow one another at
// once: a rank may write its next record while another still reads this one.
inline void layout() {
  uint64_t seed = 60;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect}) {
    World w(setup_of(mode, 3, 2, seed++));
    const double bad[] = {-1, HUGE_VAL, std::nan("")};
    const uint32_t kinds[] = {PA_COMMITTED,  PA_LAYOUT,    PA_SCHEDULE, PA_WEIGHTING,
                              PA_BAD_WEIGHT, PA_NO_WEIGHT, PA_UNNEEDED};
    const auto kind_at = [&](uint32_t k) { return kinds[(k * 5) % 7]; };
    const auto peer_at = [&](uint32_t k) {
      return kind_at(k) == PA_WEIGHTING || kind_at(k) == PA_SCHEDULE ? 1 + k % 2 : k % 3;
    };
    run_script(
        w, 42,
        [&](uint32_t k) {
          Script script = script_of(w, k);
          const uint32_t kind = kind_at(k), peer = peer_at(k);
          for (uint32_t r = 0; r < 3; ++r) {
            Call& call = script.calls[r];
            if (kind == PA_UNNEEDED || (kind == PA_COMMITTED && r == 1))
              call.flags |= PA_FLAG_UNNEEDED;
            if (kind == PA_BAD_WEIGHT || kind == PA_NO_WEIGHT)
              call.flags |= PA_FLAG_WEIGHTED, call.weight = kind == PA_NO_WEIGHT ? 0 : 1;
            if (r != peer) continue;
            if (kind == PA_LAYOUT)
              call.flags |= PA_FLAG_LAYOUT, call.detail = k, call.found = 1000 + k;
            if (kind == PA_SCHEDULE) ++call.schedule, call.found = 2000 + k;
            if (kind == PA_WEIGHTING) call.flags |= PA_FLAG_WEIGHTED;
            if (kind == PA_BAD_WEIGHT) call.weight = bad[k % 3];
          }
          return script;
        },
        [&](uint32_t k, uint32_t r, const Outcome& o) {
          expect_outcome(w, r, k, o, kind_at(k), peer_at(k));
          if (o.kind == PA_SCHEDULE && (o.detail != 0 || o.found != 2000 + k))
            wrong("rank %u was told the wrong places in the schedule", r);
          if (o.kind == PA_LAYOUT && (o.detail != k || o.found != 1000 + k))
            wrong("rank %u was told the wrong tensor of the layout", r);
        });
  }
}

// A NaN or infinity on one rank, anywhere: no rank writes, all name the rank and the element, and
// the next average works.
inline void non_finite() {
  uint64_t seed = 80;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect}) {
    World w(setup_of(mode, 3, 2, seed++));
    const auto odd_at = [&](uint32_t k) {
      Odd odd;
      if (k % 2 == 1) return odd; // a good one
      const uint64_t h = mix(k * 77 + w.s.seed);
      odd.rank = uint32_t(h % 3), odd.bucket = uint32_t((h >> 8) % w.s.buckets.size());
      const auto& elements = w.s.buckets[odd.bucket].elements;
      odd.tensor = uint32_t((h >> 16) % elements.size());
      odd.element = k % 4 == 0 ? elements[odd.tensor] - 1 : (h >> 24) % elements[odd.tensor];
      odd.infinite = h >> 60 & 1;
      return odd;
    };
    run_script(
        w, 13,
        [&](uint32_t k) {
          Script script = script_of(w, k);
          script.plan.odd = odd_at(k);
          // not rejected in the last one
          for (Call& call : script.calls) call.flags = k == 12 ? 0 : PA_FLAG_REJECT_NON_FINITE;
          return script;
        },
        [&](uint32_t k, uint32_t r, const Outcome& o) {
          const Odd odd = odd_at(k);
          const bool refused = odd.rank != ~0u && k != 12;
          expect_outcome(w, r, k, o, refused ? PA_NON_FINITE : PA_COMMITTED, odd.rank);
          if (!refused) return;
          const uint64_t N = per_pack(w.s.buckets[odd.bucket].dtype);
          const uint64_t place =
              w.ranks[0].tensors[odd.bucket][odd.tensor].first_pack * N + odd.element;
          if (o.detail != 1 + (uint64_t(odd.bucket) << 56 | place))
            wrong("%s, average %u: rank %u was told element %llx, not %llx", name_of(mode), k, r,
                  (unsigned long long)o.detail, (unsigned long long)place);
        });
  }
}

// After an average that found a NaN, another rank's tensors or its own are wrong: that is reported,
// with its tensor, not the earlier finding.
inline void stale() {
  uint64_t seed = 90;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect}) {
    World w(setup_of(mode, 3, 2, seed++));
    const auto kind_at = [](uint32_t k) {
      return k % 4 == 0   ? PA_NON_FINITE
             : k % 4 == 1 ? PA_LAYOUT
             : k % 4 == 2 ? PA_BAD_WEIGHT
                          : PA_COMMITTED;
    };
    const auto peer_at = [](uint32_t k) { return k / 4 % 3; }; // the rank that held the NaN
    run_script(
        w, 24,
        [&](uint32_t k) {
          Script script = script_of(w, k);
          const uint32_t peer = peer_at(k);
          for (Call& call : script.calls) call.flags = PA_FLAG_REJECT_NON_FINITE | PA_FLAG_WEIGHTED;
          if (kind_at(k) == PA_COMMITTED) script.calls[0].flags |= PA_FLAG_JOINER;
          if (kind_at(k) == PA_NON_FINITE) script.plan.odd = {peer, 0, 0, k};
          if (kind_at(k) == PA_LAYOUT)
            script.calls[peer].flags |= PA_FLAG_LAYOUT, script.calls[peer].detail = 2,
                                                        script.calls[peer].found = k;
          if (kind_at(k) == PA_BAD_WEIGHT) script.calls[peer].weight = -1;
          return script;
        },
        [&](uint32_t k, uint32_t r, const Outcome& o) {
          expect_outcome(w, r, k, o, kind_at(k), peer_at(k));
          const uint64_t detail = kind_at(k) == PA_NON_FINITE ? 1 + k
                                  : kind_at(k) == PA_LAYOUT   ? 2
                                                              : 0;
          if (o.detail != detail)
            wrong("%s, average %u: rank %u was told %llx", name_of(mode), k, r,
                  (unsigned long long)o.detail);
          if (o.joiner != (o.kind == PA_COMMITTED))
            wrong("%s, average %u: rank %u says joiner = %d", name_of(mode), k, r, o.joiner);
          const double weight = -1;
          uint64_t found = k;
          if (kind_at(k) == PA_BAD_WEIGHT) memcpy(&found, &weight, sizeof found);
          if (kind_at(k) != PA_NON_FINITE && o.kind != PA_COMMITTED && o.found != found)
            wrong("%s, average %u: found is another's", name_of(mode), k);
        });
  }
}

// Values that are equal on all ranks that count stay as they are, bit for bit, NaN included. (By
// the ring: equal.rs.)
inline void equal() {
  uint64_t seed = 95;
  for (uint32_t world : {2u, 3u, 4u, 5u, 9u}) {
    World w(setup_of(Mode::kDirect, world, 2, 2 * seed++ + 1)); // all dtypes
    for (uint32_t k = 0; k < 4; ++k) {
      const auto bits_of = [&](uint32_t r, uint32_t b, uint32_t t, uint64_t i) {
        const uint64_t same = mix(seed << 40 ^ uint64_t(k) << 32 ^ b << 24 ^ t << 16 ^ i);
        return i % 3 == 2 && k % 2 == 1  ? make_bits(w.s.buckets[b].dtype, mix(same + r))
               : r == k % world && k > 1 ? ~same
                                         : same;
      };
      const auto each = [&](uint32_t r, auto f) {
        for (uint32_t b = 0; b < w.s.buckets.size(); ++b)
          for (uint32_t t = 0; t < w.ranks[r].tensors[b].size(); ++t)
            for (uint64_t i = 0; i < w.ranks[r].tensors[b][t].elements; ++i) {
              const unsigned bytes = kFormat[w.s.buckets[b].dtype].bytes;
              f(w.ranks[r].tensors[b][t].data + i * bytes, bytes, bits_of(r, b, t, i), b, t, i);
            }
      };
      each_rank(w, [&](uint32_t r) {
        each(r, [&](char* at, unsigned bytes, uint64_t bits, uint32_t, uint32_t, uint64_t) {
          std::memcpy(at, &bits, bytes);
        });
        Call call;
        call.flags = PA_FLAG_WEIGHTED;
        // the rank with other bits has no weight
        call.weight = r == k % world && k > 1 ? 0 : 0.3 + r;
        expect_outcome(w, r, k, w.average(r, call), PA_COMMITTED, 0);
        each(r, [&](char* at, unsigned bytes, uint64_t, uint32_t b, uint32_t t, uint64_t i) {
          const uint64_t want = bits_of(k > 1 && k % world == 0 ? 1 : 0, b, t, i),
                         mask = ~uint64_t(0) >> (64 - 8 * bytes);
          const bool differ = i % 3 == 2 && k % 2 == 1 && (world > 2 || k <= 1);
          if (differ && bytes == 2) return; // a mean of halves may equal one of them
          if ((load_bits(at, bytes) == (want & mask)) == differ)
            wrong("n=%u, average %u: rank %u, bucket %u, tensor %u[%llu]: %llx of %llx", world, k,
                  r, b, t, (unsigned long long)i, (unsigned long long)load_bits(at, bytes),
                  (unsigned long long)(want & mask));
        });
      });
    }
  }
}

// A bucket of 2^40 packs, whose memory is never touched: every pack is met once, in the order of
// addresses, in parts that count packs in 32 bits, by loops over ranges of any length.
inline void huge() {
  using T = float;
  constexpr uint64_t kTensor = (uint64_t(1) << 38) - 1; // packs; the last one has only 3 elements
  PaSegment segments[5];
  for (uint64_t s = 0; s < 5; ++s)
    segments[s] = {uint64_t(s) << 50, s == 4 ? 7 : kTensor * 4 - 1, s * kTensor};
  PaBucket bucket = {};
  bucket.segments = reinterpret_cast<uint64_t>(segments), bucket.segment_count = 5,
  bucket.packs = 4 * kTensor + 2;
  bucket.chunk = 64u << 20 >> 4, bucket.dtype = PA_F32;
  for (uint32_t channels : {1u, 3u, 1024u}) {
    bucket.channel_packs = PA_ISA::align_up((bucket.packs + channels - 1) / channels);
    uint64_t met = 0;
    for (uint32_t c = 0; c < channels; ++c)
      for (uint32_t r = 0; r < PA_MAX_WORLD; ++r) {
        const PA_ISA::Range own =
            PA_ISA::part_of(PA_ISA::channel_range(bucket, c), r, PA_MAX_WORLD);
        if (own.begin != own.end && own.begin != met)
          wrong("%u channels: part %u of channel %u begins at %llu", channels, r, c,
                (unsigned long long)own.begin);
        PA_ISA::each_part_of_any<T>(bucket, own.begin, own.end, [&](const PA_ISA::Part& part,
                                                                    uint64_t from) {
          if (from + part.first != met)
            wrong("%u channels: a part counts from elsewhere", channels);
          const PaSegment& segment = segments[part.segment];
          if (part.end <= part.first || part.whole < part.first || part.end - part.whole > 1)
            wrong("%u channels: a part of no packs", channels);
          if (part.offset != (met - segment.first_pack) * PA_PACK_BYTES)
            wrong("%u channels: pack %llu is met at %llu of its tensor", channels,
                  (unsigned long long)met, (unsigned long long)part.offset);
          met += part.end - part.first;
          const bool ends = met == segment.first_pack + (segment.elements + 3) / 4;
          if ((part.end != part.whole) != ends || (ends && part.tail != 3))
            wrong("%u channels: a tensor's last pack is taken for another", channels);
        });
      }
    if (met != bucket.packs)
      wrong("%u channels: %llu packs of %llu", channels, (unsigned long long)met,
            (unsigned long long)bucket.packs);
    // The ring's steps and the scan walk short ranges: a chunk.
    if (bucket.chunk >= PA_ISA::kMaxPiecePacks) wrong("a chunk is too long");
  }
}
