// Waiting for a peer. A wait ends with the awaited word, or with a failure that names a rank.
// At the exit barrier, see wait_slow(), only the word or the departure of the peer ends it.
#pragma once
#include "straggler.h"

namespace PA_ISA {

// True if `rank` departed before completing this epoch. Departure after completion is legal.
// Relaxed: `completed` was last written before `departed`, which is acquired first.
PA_FN bool is_lost(WaitCtx ctx, uint32_t rank) {
  return has_departed(ctx, rank) &&
         !reached(load_relaxed(&ctx.host()->completed[rank]), ctx.epoch);
}

// Reason to stop waiting for `peer`, or 0. `all`: looks at all ranks, since `peer` may be stuck
// behind a stopped rank while a third one has died.
PA_FN uint32_t poll_interrupt(WaitCtx ctx, uint32_t peer, bool all) {
  PaControl* control = ctx.control();
  const uint32_t poisoned = poison_cause(ctx);
  if (poisoned != 0) return poisoned;
  if (!ctx.committed) {
    const uint64_t decision = load_acquire(&control->decision);
    if (epoch_of(decision) == ctx.epoch && kind_of(code_of(decision)) != PA_COMMITTED)
      return code_of(decision);
  }
  if (has_departed(ctx, peer)) return code_of(uint32_t(PA_DEPARTED), peer);
  if (all)
    for (uint32_t r = 0; r < ctx.a->world; ++r)
      if (r != ctx.a->rank && is_lost(ctx, r)) return code_of(uint32_t(PA_DEPARTED), r);
  return 0;
}

// Flags of a record. Loaded as a word, since nvcc would load the bytes that it needs.
PA_FN uint32_t flags_of(const PaRecord& record) { return load_relaxed(&record.flags); }

// First rank whose record has none of these flags, or 0: the others' calls are compared with its.
PA_FN uint32_t first_without(const PaControl* control, uint32_t world, uint32_t parity,
                             uint32_t flags) {
  for (uint32_t r = 0; r < world; ++r)
    if (!(flags_of(control->board[r].record[parity]) & flags)) return r;
  return 0;
}

// Writes the status record.
PA_FN void write_status(WaitCtx ctx, uint32_t code, uint32_t phase) {
  const uint32_t kind = kind_of(code), rank = rank_of(code), parity = ctx.epoch & 1;
  PaStatus& status = ctx.me->status;
  status.outcome = kind;
  status.peer = rank;
  status.phase = phase;
  // No other kind is about a record: a rank that others gave up on may be writing its own now.
  const bool about_record = kind == PA_LAYOUT || kind == PA_NON_FINITE ||
                            kind == PA_BAD_WEIGHT || kind == PA_SCHEDULE;
  const PaRecord& record = ctx.control()->board[rank].record[parity];
  status.detail = about_record ? record.detail : 0;
  status.found = about_record ? record.found : 0;
  if (kind == PA_BAD_WEIGHT) memcpy(&status.found, &record.weight, sizeof record.weight);
  if (kind == PA_UNNEEDED)
    for (uint32_t r = 0; r < ctx.a->world; ++r)
      status.detail += flags_of(ctx.control()->board[r].record[parity]) & PA_FLAG_DONE ? 1 : 0;
  if (kind == PA_SCHEDULE) {
    const uint32_t first = first_without(ctx.control(), ctx.a->world, parity, PA_FLAG_DONE);
    status.detail = ctx.control()->board[first].record[parity].found;
  }
}

// Resolves a wait that ended with `failure`. True if that ends this rank's average. False if the
// others have committed, which they can only after the awaited word was written.
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

// The leader's wait until *word, which `peer` writes, reaches `want`. False: the average ended.
PA_NOINLINE bool wait_slow(Exec ex, WaitCtx ctx, uint32_t* word, uint32_t* sleepers, uint32_t want,
                           uint32_t peer, uint32_t phase) {
  constexpr uint64_t kMaxAwakeNs = 25'000'000;
  uint32_t* waiting_on = &ctx.control()->board[ctx.a->rank].waiting_on;
  const uint64_t start = ex.now_ns();
  uint64_t last = 0, watched = 0; // 0: the watch has not begun
  uint32_t failure = 0, heartbeat = heartbeat_of(start);
  store_relaxed(waiting_on, heartbeat << 8 | (peer + 1)); // read by find_straggler()
  for (uint32_t spins = 1;; ++spins) {
    const uint32_t seen = load_acquire(word);
    if (reached(seen, want)) break;
    // At the exit barrier only the word itself, or the departure of the peer, ends the wait: until
    // a peer has exited, it may write into this rank's tensors, which the caller is free to drop.
    // Peers reach the exit without waiting, unless their device fails. A rank departs when its
    // kernels have ended.
    // Not at each poll: a GPU reads memory of the host here.
    const bool looks = spins % kLookAround == 0 || ex.sleeps(spins, ctx.a->spins);
    if (looks && phase != PA_AT_EXIT) {
      const uint64_t now = ex.now_ns(), waited = now - start;
      const bool ticked = heartbeat != heartbeat_of(now);
      if (ticked) {
        heartbeat = heartbeat_of(now);
        // Also names the awaited rank again, after another block's wait has reset the word.
        store_relaxed(waiting_on, heartbeat << 8 | (peer + 1));
      }
      failure = poll_interrupt(ctx, peer, ticked);
      if (failure == 0 && waited + watch_ns(*ctx.a) >= ctx.a->timeout_ns) {
        // Time for which this block itself was stopped is not time in which it watched others.
        if (last != 0) watched += min(now - last, kMaxAwakeNs);
        else begin_watch(ctx);
        last = now;
        if (waited > ctx.a->timeout_ns && watched >= watch_ns(*ctx.a))
          failure = code_of(uint32_t(PA_TIMEOUT), find_straggler(ctx, peer));
      }
    } else if (looks && is_lost(ctx, peer)) {
      failure = code_of(uint32_t(PA_DEPARTED), peer);
    }
    // A rank may have published the word before it departed.
    if (failure != 0 && reached(load_acquire(word), want)) failure = 0;
    if (failure != 0) break;
    ex.pause(spins, ctx.a->spins, word, seen, sleepers);
  }
  ctx.me->status.waited_ns += ex.now_ns() - start;
  const bool ended = failure != 0 && resolve_failure(ex, ctx, failure, phase);
  if (!ended) store_relaxed(waiting_on, 0); // stays after a failure, for find_straggler()
  return !ended;
}

PA_FN bool wait(Exec ex, WaitCtx ctx, uint32_t* word, uint32_t* sleepers, uint32_t want,
                uint32_t peer, uint32_t phase) {
  return reached(load_acquire(word), want) ||
         wait_slow(ex, ctx, word, sleepers, want, peer, phase);
}
// Waits for a word of a rank's board.
PA_FN bool wait_for_board(Exec ex, WaitCtx ctx, uint32_t rank, uint32_t* word, uint32_t want,
                          uint32_t phase) {
  return wait(ex, ctx, word, &ctx.control()->board[rank].sleepers, want, rank, phase);
}
PA_FN void publish_board(WaitCtx ctx, uint32_t* word, uint32_t value) {
  store_release(word, value);
  wake(word, &ctx.control()->board[ctx.a->rank].sleepers);
}
} // namespace PA_ISA
