// Waiting.
#pragma once
#include "decision.h"

namespace PA_ISA {

// A rank that waits shows for whom, and beats: the clock moves what it shows once in a millisecond or so. One that was stopped
// while it waited shows it, too, but does not beat. Blocks of a rank that wait for different ranks show them by turns.
PA_FN uint32_t heartbeat_of(uint64_t now_ns) { return uint32_t(now_ns >> 20) & 0xffffu; }
PA_FN uint32_t shown_heartbeat(PaControl* control, uint32_t rank) { return load_relaxed(&control->board[rank].waiting_on) >> 8; }

// Before somebody is blamed for a timeout, all are watched for a while, which ends with the deadline. It is half the timeout
// for those that are shorter than any rank can be sure to beat in.
PA_FN uint64_t watch_ns(const PaArgs& a) { return min(a.timeout_ns / 2, 250'000'000); }
PA_NOINLINE void begin_watch(WaitCtx ctx) {
  for (uint32_t r = 0; r < ctx.a->world; ++r) ctx.me->heartbeat[r] = uint16_t(shown_heartbeat(ctx.control(), r));
}
// Who is to blame when `peer` does not move: the first of those that wait for one another that has not beaten meanwhile, since it
// was stopped or does not wait. Relaxed: a hint for an error message, read when everything has stood still for long.
PA_NOINLINE uint32_t find_straggler(WaitCtx ctx, uint32_t peer) {
  PaControl* control = ctx.control();
  const uint32_t n = ctx.a->world, self = ctx.a->rank;
  const bool reports_completed = (ctx.a->flags & PA_FLAG_COMPLETED) != 0;
  const auto alive = [&](uint32_t shown, uint32_t r) { return uint16_t(shown >> 8) != ctx.me->heartbeat[r]; };
  for (uint32_t suspect = peer, hop = 0; hop < n; ++hop) {
    const uint32_t shown = load_relaxed(&control->board[suspect].waiting_on), behind = shown & 0xffu;
    if (behind == 0 || behind - 1 == suspect || !alive(shown, suspect)) return suspect; // for itself: for a block that has left
    if (behind - 1 == self) break;
    suspect = behind - 1;
  }
  // A circle, of ranks some of whose blocks wait for somebody else. One of them does for the one that is to blame.
  for (uint32_t r = 0; r < n; ++r) {
    const bool completed = reports_completed && reached(load_relaxed(&control->board[r].completed), ctx.epoch);
    if (r != self && !completed && !alive(load_relaxed(&control->board[r].waiting_on), r)) return r;
  }
  return peer;
}

// Whether a rank will not do its part of this average any more. It is not asked for more than that: who is through with an average
// may go at once. Relaxed: `through` was last written before `gone`, which is acquired first.
PA_FN bool is_lost(WaitCtx ctx, uint32_t rank) {
  const PaBoard& board = ctx.control()->board[rank];
  return load_acquire(&board.departed) != 0 && !reached(load_relaxed(&board.completed), ctx.epoch);
}

// Why to stop waiting, or 0. `all`: with a look at all ranks, not only at the awaited one, which may be stuck behind one that
// is stopped, while a third one has died.
PA_FN uint32_t poll_interrupt(WaitCtx ctx, uint32_t peer, bool all) {
  PaControl* control = ctx.control();
  const uint32_t poisoned = poison_cause(control);
  if (poisoned != 0) return poisoned;
  if (!ctx.committed) {
    const uint64_t decision = load_acquire(&control->decision);
    if (epoch_of(decision) == ctx.epoch && kind_of(code_of(decision)) != PA_COMMITTED) return code_of(decision);
  }
  if (load_acquire(&control->board[peer].departed) != 0) return code_of(uint32_t(PA_DEPARTED), peer);
  if (all && (ctx.a->flags & PA_FLAG_COMPLETED))
    for (uint32_t r = 0; r < ctx.a->world; ++r)
      if (r != ctx.a->rank && is_lost(ctx, r)) return code_of(uint32_t(PA_DEPARTED), r);
  return 0;
}

// Writes the status record.
PA_FN void write_status(WaitCtx ctx, uint32_t code, uint32_t phase) {
  ctx.me->outcome = kind_of(code);
  ctx.me->peer = rank_of(code);
  ctx.me->phase = phase;
  // No other kind is about a record: a rank that others gave up on may be writing its own at this moment.
  const uint32_t kind = kind_of(code);
  const bool about_record = kind == PA_LAYOUT || kind == PA_NON_FINITE || kind == PA_BAD_WEIGHT || kind == PA_SCHEDULE;
  const PaRecord& record = ctx.control()->board[rank_of(code)].record[ctx.epoch & 1];
  ctx.me->detail = about_record ? record.detail : 0;
  ctx.me->found = about_record ? record.found : 0;
  if (kind == PA_BAD_WEIGHT) memcpy(&ctx.me->found, &record.weight, sizeof record.weight);
  if (kind == PA_SCHEDULE) ctx.me->detail = ctx.control()->board[0].record[ctx.epoch & 1].found; // compared with that of rank 0
}

// A wait ended with `failure`. True if that ends this rank's average; false if the others have already decided that all
// is well, which they can only when what was waited for has happened.
PA_NOINLINE bool resolve_failure(Exec ex, WaitCtx ctx, uint32_t failure, uint32_t phase) {
  if (!ctx.committed) {
    const uint64_t decision = decide(ex, ctx, phase, failure);
    if (epoch_of(decision) != ctx.epoch || kind_of(code_of(decision)) == PA_COMMITTED) return false;
    failure = code_of(decision);
    phase = phase_of(decision);
  }
  if (kind_of(failure) >= PA_TIMEOUT) {
    const uint32_t first = poison(ex, ctx, failure);
    if (ctx.committed) failure = first;
  }
  write_status(ctx, failure, phase);
  return true;
}

// The leader's wait until *word has reached `want`, which is up to `peer`. False: the average ended instead.
PA_NOINLINE bool wait_slow(Exec ex, WaitCtx ctx, uint32_t* word, uint32_t* sleepers, uint32_t want, uint32_t peer, uint32_t phase) {
  constexpr uint32_t kLookAround = 16; // polls between two looks at everything else that may end a wait
  constexpr uint64_t kMaxAwakeNs = 25'000'000;
  uint32_t* waiting_on = &ctx.control()->board[ctx.a->rank].waiting_on;
  const uint64_t start = ex.now_ns();
  uint64_t last = 0, watched = 0; // 0: the watch has not begun
  uint32_t failure = 0, heartbeat = heartbeat_of(start);
  store_relaxed(waiting_on, heartbeat << 8 | (peer + 1)); // read by culprit()
  for (uint32_t spins = 1;; ++spins) {
    const uint32_t seen = load_acquire(word);
    if (reached(seen, want)) break;
    // At the exit nothing but the word itself will do: until a peer has left, it may write into this rank's tensors,
    // which the caller is free to drop. Peers wait for nobody on their way there.
    if ((spins % kLookAround == 0 || ex.sleeps(spins, ctx.a->spins)) && phase != PA_AT_EXIT) {
      const uint64_t now = ex.now_ns(), waited = now - start;
      const bool ticked = heartbeat != heartbeat_of(now);
      if (ticked) {
        heartbeat = heartbeat_of(now);
        // Also where another block of this rank has waited too, and got what it waited for.
        store_relaxed(waiting_on, heartbeat << 8 | (peer + 1));
      }
      failure = poll_interrupt(ctx, peer, ticked);
      if (failure == 0 && waited + watch_ns(*ctx.a) >= ctx.a->timeout_ns) {
        // Time that this block itself was stopped for is no time in which it has watched others.
        if (last != 0) watched += min(now - last, kMaxAwakeNs);
        else begin_watch(ctx);
        last = now;
        if (waited > ctx.a->timeout_ns && watched >= watch_ns(*ctx.a)) failure = code_of(uint32_t(PA_TIMEOUT), find_straggler(ctx, peer));
      }
      // A rank that is gone may have said all it had to say first.
      if (failure != 0 && reached(load_acquire(word), want)) failure = 0;
      if (failure != 0) break;
    }
    ex.pause(spins, ctx.a->spins, word, seen, sleepers);
  }
  ctx.me->waited_ns += ex.now_ns() - start;
  const bool ended = failure != 0 && resolve_failure(ex, ctx, failure, phase);
  if (!ended) store_relaxed(waiting_on, 0); // one that gave up stays stuck: others may yet ask for the culprit
  return !ended;
}

PA_FN bool wait(Exec ex, WaitCtx ctx, uint32_t* word, uint32_t* sleepers, uint32_t want, uint32_t peer, uint32_t phase) {
  return reached(load_acquire(word), want) || wait_slow(ex, ctx, word, sleepers, want, peer, phase);
}
// For a word of a rank's board.
PA_FN bool wait_for_board(Exec ex, WaitCtx ctx, uint32_t rank, uint32_t* word, uint32_t want, uint32_t phase) {
  return wait(ex, ctx, word, &ctx.control()->board[rank].sleepers, want, rank, phase);
}
PA_FN void publish_board(WaitCtx ctx, uint32_t* word, uint32_t value) {
  store_release(word, value);
  wake(word, &ctx.control()->board[ctx.a->rank].sleepers);
}
} // namespace PA_ISA
