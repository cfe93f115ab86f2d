// The decision: how an average ended, written once per epoch under the turn lock. Also the words
// that poison the world.
#pragma once
#include "exec.h"

namespace PA_ISA {

// A failure or a verdict: (PaKind << 8) | rank. 0: none.
PA_FN uint32_t code_of(uint32_t kind, uint32_t rank) { return kind << 8 | rank; }
PA_FN uint32_t kind_of(uint32_t code) { return code >> 8; }
PA_FN uint32_t rank_of(uint32_t code) { return code & 0xffu; }

PA_FN bool reached(uint32_t seen, uint32_t want) { return int32_t(seen - want) >= 0; }

// Fields of PaControl.decision.
PA_FN uint32_t epoch_of(uint64_t decision) { return uint32_t(decision >> 32); }
PA_FN uint32_t code_of(uint64_t decision) { return uint32_t(decision) & 0xffffu; }
PA_FN uint32_t phase_of(uint64_t decision) { return uint32_t(decision) >> 16; }

// Context of a block that waits. Passed by value: its address would force it into memory.
struct WaitCtx {
  const PaArgs* a;
  PaChannel* me;
  uint32_t epoch;
  bool committed;
  PA_FN PaControl* control() const { return at<PaControl>(a->control); }
  PA_FN PaHost* host() const { return at<PaHost>(a->host); }
};

// True if `rank` has dropped its averager.
PA_FN bool has_departed(WaitCtx ctx, uint32_t rank) {
  return load_acquire(&ctx.host()->departed) >> rank & 1;
}

// ---- the turn lock ---------------------------------------------------------------------------
// Serialises writes to words that every rank may write. Ranks may be on different devices or in
// different processes, between which not every machine has a read-modify-write, so the lock needs
// loads and stores only: Lamport's one-bit lock ("The Mutual Exclusion Problem", part II, 1986).
// A rank raises its flag, then looks at the others'; if a lower rank's flag is up, it lowers its
// own until that is down. Of two ranks that raise theirs, one sees the other's. The blocks of a
// rank first queue on a lock of their own. A critical section is a few loads and stores: a
// departed rank is not waited for, nor one that holds the lock for longer than max_turn_ns(),
// since it was stopped.
//
// Longest wait for a holder: a sixteenth of the timeout at most, so that an average that takes the
// lock three times (decide, fail, poison) ends within the timeout and a third. After it, two ranks
// can hold the lock at once. On CPUs, where a signal stops a process anywhere, that is safe:
// replace() is a compare-and-swap there. On CUDA devices it is a plain store and the last one would
// win, but only the end of its time slice stops a kernel, and the slices of others take a few
// milliseconds each: the holder would have to be stopped between its last look and its store, for a
// sixteenth of the timeout. Waits grow by rank, so that ranks that wait for one stopped holder
// give up one after another, the lowest first.
PA_FN uint64_t max_turn_ns(const PaArgs& a) {
  const uint64_t base_ns = min(a.timeout_ns / 16, PA_MAX_TURN_NS);
  return base_ns + base_ns / 32 * a.rank;
}
PA_FN bool has_turn(WaitCtx ctx, uint32_t rank, uint64_t waited_ns, uint64_t max_ns) {
  return load_flag(&ctx.control()->board[rank].deciding) != 0 && !has_departed(ctx, rank) &&
         waited_ns <= max_ns;
}
PA_FN void end_turn(WaitCtx ctx) {
  store_release(&ctx.control()->board[ctx.a->rank].deciding, 0);
  store_release(&at<PaChannel>(ctx.a->channel)->deciding, 0);
}
// Takes the lock. False without it if `over` meanwhile: there is nothing left to write.
template <class Over> PA_FN bool take_turn(Exec ex, WaitCtx ctx, Over over) {
  const PaArgs& a = *ctx.a;
  PaBoard& own = ctx.control()->board[a.rank];
  uint32_t* blocks = &at<PaChannel>(a.channel)->deciding;
  for (uint32_t spins = 1; !try_lock(blocks); ++spins) {
    if (over()) return false;
    ex.pause(spins, a.spins, blocks, 1, &own.sleepers);
  }
  const uint64_t start = ex.now_ns(), longest = max_turn_ns(a);
  for (bool first = false; !first;) {
    raise_flag(&own.deciding);
    first = true;
    for (uint32_t r = 0; first && r < a.world; ++r) {
      PaBoard& other = ctx.control()->board[r];
      if (r == a.rank || !has_turn(ctx, r, ex.now_ns() - start, longest)) continue;
      if (r < a.rank) {
        store_release(&own.deciding, 0);
        first = false;
      }
      for (uint32_t spins = 1; has_turn(ctx, r, ex.now_ns() - start, longest); ++spins) {
        if (over()) {
          end_turn(ctx);
          return false;
        }
        ex.pause(spins, a.spins, &other.deciding, 1, &other.sleepers);
      }
    }
  }
  return true;
}

// Proposes an outcome of this epoch and returns the decision. A decision about a later epoch means
// that this one ended without a failure: its outcome follows from records and votes, and the
// proposal of a rank that has read all of them is right.
PA_NOINLINE uint64_t decide(Exec ex, WaitCtx ctx, uint32_t phase, uint32_t code) {
  uint64_t* decision = &ctx.control()->decision;
  const uint64_t mine = uint64_t(ctx.epoch) << 32 | phase << 16 | code;
  uint64_t seen;
  const auto over = [&] {
    seen = load_acquire(decision);
    return int32_t(epoch_of(seen) - ctx.epoch) >= 0;
  };
  if (over() || !take_turn(ex, ctx, over)) return seen;
  if (!over()) replace(decision, seen, mine) ? void(seen = mine) : void(over());
  end_turn(ctx);
  return seen;
}

// Cause that poisoned the world, or 0: a failure found by a kernel, else a host's abort. A kernel
// turns an abort into a failure.
PA_FN uint32_t poison_cause(WaitCtx ctx) {
  const uint32_t failed = load_acquire(&ctx.control()->failed);
  return failed != 0 ? failed : load_acquire(&ctx.host()->abort);
}
// Poisons the world. Returns the first failure that did.
PA_NOINLINE uint32_t poison(Exec ex, WaitCtx ctx, uint32_t failure) {
  uint32_t* failed = &ctx.control()->failed;
  uint32_t seen;
  const auto over = [&] { return (seen = load_acquire(failed)) != 0; };
  if (over() || !take_turn(ex, ctx, over)) return seen;
  if (!over()) replace(failed, seen, failure) ? void(seen = failure) : void(over());
  end_turn(ctx);
  return seen;
}
} // namespace PA_ISA
