// The segment table: placement of tensors in a bucket, and access to the tensors' memory by ranges
// of packs. Flatten and unflatten happen here, in the loop that adds or copies.
//
//   bucket   |0       1       2       3       4 |5       6 |7 …        packs
//   tensors  |wte: 18 elements of f32 ········- |ln: 8     |…          -: zeros on the wire
#pragma once
#include "pack.h"

namespace PA_ISA {

// ---- how a bucket is shared out ----------------------------------------------------------------
struct Range {
  uint64_t begin, end;
  PA_FN uint64_t packs() const { return end - begin; }
};
PA_FN uint64_t align_up(uint64_t packs) {
  return (packs + PA_ALIGN_PACKS - 1) / PA_ALIGN_PACKS * PA_ALIGN_PACKS;
}

PA_FN Range channel_range(const PaBucket& bucket, uint32_t channel) {
  const uint64_t begin = min(channel * bucket.channel_packs, bucket.packs);
  return {begin, min(begin + bucket.channel_packs, bucket.packs)};
}
// Part number `part` of `parts` equal parts of a range; the last ones may be short or empty.
PA_FN Range part_of(Range all, uint32_t part, uint32_t parts) {
  const uint64_t each = align_up((all.packs() + parts - 1) / parts);
  const uint64_t begin = min(all.begin + part * each, all.end);
  return {begin, min(begin + each, all.end)};
}

// ---- access to a tensor ------------------------------------------------------------------------
// Memory of whole packs: pack i of the range lies at base + 16 i.
template <class T> struct Whole {
  char* base;
  template <int K> PA_FN Raw<T, K> load(uint32_t i) const {
    return load_raw<T, K>(base + 16 * uint64_t(i));
  }
  template <int K> PA_FN void store(uint32_t i, const Raw<T, K>& r) const {
    store_raw<T, K>(base + 16 * uint64_t(i), r);
  }
  template <int K> PA_FN void store_nt(uint32_t i, const Raw<T, K>& r) const {
    store_raw_nt<T, K>(base + 16 * uint64_t(i), r);
  }
};
// Memory of packs at any address; of pack `last` only `tail` elements belong to the tensor.
// `aligned`: all others are as Whole has them.
template <class T> struct Ragged {
  char* base;
  uint32_t last, tail;
  bool aligned;
  PA_FN uint32_t count(uint32_t i) const { return i == last ? tail : Element<T>::kPerPack; }
  template <int K> PA_FN Raw<T, K> load(uint32_t i) const {
    if (aligned && i != last) return load_raw<T, K>(base + 16 * uint64_t(i));
    return load_ragged<T>(base + 16 * uint64_t(i), count(i));
  }
  template <int K> PA_FN void store(uint32_t i, const Raw<T, K>& r) const {
    if (aligned && i != last) return store_raw<T, K>(base + 16 * uint64_t(i), r);
    store_ragged<T>(base + 16 * uint64_t(i), count(i), r);
  }
  template <int K> PA_FN void store_nt(uint32_t i, const Raw<T, K>& r) const { store<K>(i, r); }
};

// Intersection of one tensor with a range of packs, counted from the range's begin: packs
// first … whole are full; a last one with only `tail` elements follows if end > whole. Pack `first`
// lies `offset` bytes into the tensor, which begins at `address`.
struct Part {
  uint32_t segment;
  uint64_t address, offset;
  uint32_t first, whole, end;
  uint32_t tail;
};

// The last of segments low … high that begins at or before `pack`, as segment `low` does.
PA_FN uint32_t last_at(const PaSegment* segments, uint32_t low, uint32_t high, uint64_t pack) {
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (segments[middle].first_pack <= pack) low = middle;
    else high = middle;
  }
  return low;
}
// The same among all segments, where `low` begins at or before `pack` and is most likely near: one
// load where it is the one.
PA_FN uint32_t last_at_from(const PaBucket& bucket, uint32_t low, uint64_t pack) {
  const PaSegment* segments = at<const PaSegment>(bucket.segments);
  uint32_t step = 1;
  while (step < bucket.segment_count - low && segments[low + step].first_pack <= pack) {
    low += step;
    step *= 2;
  }
  return last_at(segments, low, uint32_t(min(low + uint64_t(step), bucket.segment_count)), pack);
}

// Calls f for each part of a range of fewer than 2^32 packs. Segment s, which is `segment`, is the
// last one that begins at or before the range's begin. Returns the last one before its end.
template <class T, class F>
PA_FN uint32_t each_part_from(const PaBucket& bucket, uint32_t s, PaSegment segment,
                              const Range& range, F f) {
  constexpr uint64_t N = Element<T>::kPerPack;
  for (;;) {
    const uint64_t begin = range.begin, end = range.end;
    const uint64_t start = segment.first_pack, elements = segment.elements;
    const uint64_t full = elements / N, packs = (elements + N - 1) / N;
    const uint64_t from = start < begin ? begin - start : 0;
    const bool goes_on = packs < end - start; // what lies beyond the end is not looked at
    const uint64_t to = goes_on ? packs : end - start;
    const uint64_t whole = to < full ? to : full > from ? full : from;
    if (from < to)
      f(Part{s, segment.address, from * 16, uint32_t(start + from - begin),
             uint32_t(start + whole - begin), uint32_t(start + to - begin),
             uint32_t(elements - full * N)});
    if (!goes_on) return s;
    segment = at<const PaSegment>(bucket.segments)[++s];
  }
}
template <class T, class F>
PA_FN void each_part(const PaBucket& bucket, uint64_t begin, uint64_t end, F f) {
  if (begin == end) return;
  const PaSegment* segments = at<const PaSegment>(bucket.segments);
  const uint32_t s = last_at(segments, 0, bucket.segment_count, begin);
  each_part_from<T>(bucket, s, segments[s], Range{begin, end}, f);
}

// Splits a range into pieces of at most `most` packs: a Part counts packs in 32 bits.
constexpr uint64_t kMaxPiecePacks = 1u << 30;
template <class F> PA_FN void in_pieces(uint64_t begin, uint64_t end, uint64_t most, F f) {
  for (uint64_t next; begin < end; begin = next) {
    next = end - begin < most ? end : begin + most;
    f(begin, next);
  }
}
// each_part() of a range of any length. f also gets the pack from which its part counts.
template <class T, class F>
PA_FN void each_part_of_any(const PaBucket& bucket, uint64_t begin, uint64_t end, F f) {
  in_pieces(begin, end, kMaxPiecePacks,
            [&](uint64_t from, uint64_t to) {
              each_part<T>(bucket, from, to, [&](const Part& part) { f(part, from); });
            });
}

// ---- loops over packs --------------------------------------------------------------------------
// Packs of one part, by load(access, group, i) and store(access, group, i, value). whole() and
// ragged() make the two kinds of access; for `lead` see each_pack().
template <int kDeep, class MakeWhole, class MakeRagged, class Load, class Store>
PA_FN void each_pack_of(const Exec& ex, const Part& part, uint32_t lead, bool aligned,
                        MakeWhole whole, MakeRagged ragged, Load load, Store store) {
  uint32_t i = part.first + ex.first(part.first);
  if (kAnyAlignment || aligned) {
    const auto access = whole();
    i = each_pack<kDeep>(
        ex, part.first, lead, part.whole, [&](auto g, uint32_t at) { return load(access, g, at); },
        [&](auto g, uint32_t at, const auto& v) { store(access, g, at, v); });
  }
  constexpr Group<1> one;
  for (; i < part.end; i += ex.lanes()) {
    const auto access = ragged(!kAnyAlignment && aligned);
    store(access, one, i, load(access, one, i));
  }
}

// Asks for the packs of a range that lie in the segment in which it begins, before a step waits:
// on a GPU they are on their way from memory to the cache meanwhile.
PA_FN void prefetch_own(const Exec& ex, const PaSegment& segment, Range range) {
  if constexpr (kInFlight == 1) return; // a CPU's core looks ahead by itself
  constexpr uint64_t kLine = 128;
  const uint64_t into = 16 * (range.begin - segment.first_pack);
  const uint64_t last = segment.address + into + 16 * range.packs() - 1; // may lie beyond it
  for (uint64_t p = segment.address + into + kLine * ex.lane(); p <= last; p += kLine * ex.lanes())
    ex.prefetch(at<const char>(p));
}
// Packs of one part of the own tensors, `kDeep` of a lane in flight.
template <class T, int kDeep = kInFlight, class Load, class Store>
PA_FN void each_own_pack(const Exec& ex, const Part& part, Load load, Store store) {
  char* base = at<char>(part.address + part.offset) - 16 * uint64_t(part.first);
  const uint32_t lead = (0u - part.first) % kGroup; // groups are aligned in the chunk
  each_pack_of<kDeep>(
      ex, part, lead, part.address % 16 == 0, [&] { return Whole<T>{base}; },
      [&](bool whole) { return Ragged<T>{base, part.whole, part.tail, whole}; }, load, store);
}
// Packs begin … end of the own tensors.
template <class T, class Load, class Store>
PA_FN void each_own(const Exec& ex, const PaBucket& bucket, uint64_t begin, uint64_t end, Load load,
                    Store store) {
  each_part<T>(bucket, begin, end,
               [&](const Part& part) { each_own_pack<T>(ex, part, load, store); });
}
} // namespace PA_ISA
