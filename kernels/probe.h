// Probe of a path between two devices: the steps of the ring, with known data. Both devices run
// this kernel at the same time, and each block exchanges chunks with the same block of the other
// device: 128-bit stores, then a flag, in one kernel; the reader polls the flag while the writer
// goes on. Slots are used again after the reader has drained them. CUDA only.
#pragma once
#include "pack.h"

namespace PA_ISA {
// Differs from pack to pack, from round to round, and from what fresh memory holds.
PA_FN uint4 probe_pack(uint32_t seed, uint32_t round, uint32_t pack) {
  const uint32_t x = (seed + round) * 2654435761u ^ pack;
  return make_uint4(x * 2246822519u, (x + 1) * 2246822519u, ~x, x ^ 0x9e3779b9u);
}

// Waits until *word is at least `value`. False on every lane if that took until `end`.
PA_FN bool probe_wait(const Exec& ex, const uint32_t* word, uint32_t value, uint64_t end) {
  bool late = false;
  if (ex.leader()) {
    for (uint32_t spins = 0; int32_t(load_acquire(word) - value) < 0; ++spins) {
      if (ex.now_ns() > end) {
        late = true;
        break;
      }
      ex.pause(spins, 0, word, 0, nullptr);
    }
  }
  return !ex.any(late);
}

PA_FN void run_probe(const Exec& ex, const PaProbeSide& side) {
  const PaLink &from = side.links[PA_IN], &to = side.links[PA_OUT];
  const uint64_t end = ex.now_ns() + side.limit_ns;
  const uint32_t line = ex.block() * PA_LINE_WORDS;
  const uint64_t block = uint64_t(ex.block()) * side.slots;
  PaProbeResult* result = at<PaProbeResult>(side.result);
  uint64_t begin = 0;
  uint32_t wrong = 0;
  for (uint32_t round = 0; round < side.rounds; ++round) {
    const uint64_t offset = (block + round % side.slots) * side.packs * PA_PACK_BYTES;
    if (round >= side.slots &&
        !probe_wait(ex, at<uint32_t>(to.drained) + line, round - side.slots + 1, end)) {
      if (ex.leader()) fetch_add(&result->late, 1);
      break;
    }
    char* out = at<char>(to.slots + offset);
    for (uint32_t i = ex.lane(); i < side.packs; i += ex.lanes())
      store_16(out + uint64_t(i) * PA_PACK_BYTES, probe_pack(side.seed_out, round, i));
    ex.sync();
    if (ex.leader()) store_release(at<uint32_t>(to.filled) + line, round + 1);
    if (!probe_wait(ex, at<uint32_t>(from.filled) + line, round + 1, end)) {
      if (ex.leader()) fetch_add(&result->late, 1);
      break;
    }
    const char* in = at<char>(from.slots + offset);
    uint32_t i = ex.lane();
    const auto check = [&](uint4 found, uint32_t pack) {
      const uint4 v = probe_pack(side.seed_in, round, pack);
      wrong += ((found.x ^ v.x) | (found.y ^ v.y) | (found.z ^ v.z) | (found.w ^ v.w)) != 0;
    };
    for (; i + 3 * ex.lanes() < side.packs; i += 4 * ex.lanes()) {
      uint4 found[4];
      PA_UNROLL for (uint32_t u = 0; u < 4; ++u)
        found[u] = load_16(in + uint64_t(i + u * ex.lanes()) * PA_PACK_BYTES);
      PA_UNROLL for (uint32_t u = 0; u < 4; ++u) check(found[u], i + u * ex.lanes());
    }
    for (; i < side.packs; i += ex.lanes()) check(load_16(in + uint64_t(i) * PA_PACK_BYTES), i);
    ex.sync();
    if (ex.leader()) store_release(at<uint32_t>(from.drained) + line, round + 1);
    if (ex.block() == 0 && ex.leader()) {
      if (round == 0) begin = ex.now_ns();
      result->ns = ex.now_ns() - begin;
    }
  }
  if (wrong != 0) fetch_add(&result->wrong, wrong);
}
} // namespace PA_ISA
