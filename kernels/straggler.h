// Heartbeats of waiting ranks, and the rank that a timeout names.
#pragma once
#include "decision.h"

namespace PA_ISA {

// A waiting rank publishes the awaited rank and a heartbeat that follows the clock, one beat per
// millisecond or so. A rank stopped in a wait still shows the awaited rank, but its heartbeat
// stands. Blocks of one rank that wait for different ranks publish in turn.
PA_FN uint32_t heartbeat_of(uint64_t now_ns) { return uint32_t(now_ns >> 20) & 0xffffu; }
PA_FN uint32_t shown_heartbeat(PaControl* control, uint32_t rank) {
  return load_relaxed(&control->board[rank].waiting_on) >> 8;
}

// Time for which all ranks are watched before a timeout names one; it ends with the deadline.
// Half of a timeout that is too short for every rank to beat.
PA_FN uint64_t watch_ns(const PaArgs& a) { return min(a.timeout_ns / 2, 250'000'000); }
PA_NOINLINE void begin_watch(WaitCtx ctx) {
  for (uint32_t r = 0; r < ctx.a->world; ++r)
    ctx.me->heartbeat[r] = uint16_t(shown_heartbeat(ctx.control(), r));
}
// The rank that a timeout names when `peer` does not move: the first in the chain of waits whose
// heartbeat stands, because it was stopped or does not wait. Relaxed: a hint for an error message,
// read after everything has stood still for long.
PA_NOINLINE uint32_t find_straggler(WaitCtx ctx, uint32_t peer) {
  PaControl* control = ctx.control();
  const uint32_t n = ctx.a->world, self = ctx.a->rank;
  const auto alive = [&](uint32_t shown, uint32_t r) {
    return uint16_t(shown >> 8) != ctx.me->heartbeat[r];
  };
  for (uint32_t suspect = peer, hop = 0; hop < n; ++hop) {
    const uint32_t shown = load_relaxed(&control->board[suspect].waiting_on);
    const uint32_t behind = shown & 0xffu;
    // A rank that waits for itself waits for a block of its own that has ended.
    if (behind == 0 || behind - 1 == suspect || !alive(shown, suspect)) return suspect;
    if (behind - 1 == self) break;
    suspect = behind - 1;
  }
  // A cycle. Some block of its ranks waits for the straggler, which is outside of it.
  for (uint32_t r = 0; r < n; ++r) {
    const bool completed = reached(load_relaxed(&ctx.host()->completed[r]), ctx.epoch);
    if (r != self && !completed && !alive(load_relaxed(&control->board[r].waiting_on), r)) return r;
  }
  return peer;
}
} // namespace PA_ISA
