// The decision.
#pragma once
#include "exec.h"

namespace PA_ISA {

// A failure or a verdict: (PaKind << 8) | rank. 0: none.
PA_FN uint32_t code_of(uint32_t kind, uint32_t rank) { return kind << 8 | rank; }
PA_FN uint32_t kind_of(uint32_t code) { return code >> 8; }
PA_FN uint32_t rank_of(uint32_t code) { return code & 0xffu; }

PA_FN bool reached(uint32_t seen, uint32_t want) { return int32_t(seen - want) >= 0; }

// ---- the decision: one word, one winner an average: (epoch << 32) | (where << 16) | (kind << 8) | rank -------------
PA_FN uint32_t epoch_of(uint64_t decision) { return uint32_t(decision >> 32); }
PA_FN uint32_t code_of(uint64_t decision) { return uint32_t(decision) & 0xffffu; }
PA_FN uint32_t phase_of(uint64_t decision) { return uint32_t(decision) >> 16; }

// What a wait needs to know of the block that waits. Passed in registers: its address would put it into memory.
struct WaitCtx {
  const PaArgs* a;
  PaChannel* me;
  uint32_t epoch;
  bool committed;
  PA_FN PaControl* control() const { return at<PaControl>(a->control); }
};

// ---- taking turns ----------------------------------------------------------------------------------------------
// Words that every rank may write are written in turn. Ranks may be on different devices or in different processes, between
// which not every machine has a read-modify-write, so a turn is taken by loads and stores: Lamport's one-bit lock ("The
// Mutual Exclusion Problem", part II, 1986). Each rank has a flag of its own and raises it before it looks at the others'; a rank
// that finds the flag of a lower one up lowers its own until that is down. Of two that raise theirs, one sees the other's.
// The blocks of a rank queue on a lock of their own first. A turn is a few loads and stores: a rank that is gone is not waited
// for, nor one that holds up its flag for longer than longest_turn_ns(), since it was stopped.
//
// That is a sixteenth of the timeout at most, so that an average that waits for three turns, to decide, then to fail and to poison
// the world, ends within the timeout and a third. Two ranks can then be in a turn at once. On CPUs, where a signal stops a
// process anywhere, that is safe however short the wait is: replace() is a compare-and-swap there. On CUDA devices it is a plain
// store, and the last of two such turns would win. Nothing stops a kernel there but the end of its time slice, which others'
// slices follow, a few milliseconds each: a turn outlasts the wait only if such a slice ends between the turn's last look at the
// word and its store, and the others' then last for a sixteenth of the timeout. Ranks that wait for the same stopped one lose
// patience one after another, the lowest first, since they hold up their own flags as well.
PA_FN uint64_t max_turn_ns(const PaArgs& a) {
  const uint64_t base_ns = min(a.timeout_ns / 16, PA_MAX_TURN_NS);
  return base_ns + base_ns / 32 * a.rank;
}
PA_FN bool has_turn(PaBoard& board, uint64_t waited_ns, uint64_t longest_ns) {
  return load_flag(&board.deciding) != 0 && load_acquire(&board.departed) == 0 && waited_ns <= longest_ns;
}
PA_FN void end_turn(WaitCtx ctx) {
  store_release(&ctx.control()->board[ctx.a->rank].deciding, 0);
  store_release(&at<PaChannel>(ctx.a->channel)->deciding, 0);
}
// False: `over` meanwhile, so there is no need for one.
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
      if (r == a.rank || !has_turn(other, ex.now_ns() - start, longest)) continue;
      if (r < a.rank) {
        store_release(&own.deciding, 0);
        first = false;
      }
      for (uint32_t spins = 1; has_turn(other, ex.now_ns() - start, longest); ++spins) {
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

// Proposes how this average ends, and returns how it does. If the word is already about a later average, this one ended
// without a failure and its outcome follows from the records and the votes: what was proposed by reading all of them is
// right.
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

// What poisoned this world, or 0: a failure of a kernel, or a host's abort. One that came first is a failure by now, or will be.
PA_FN uint32_t poison_cause(PaControl* control) {
  const uint32_t failed = load_acquire(&control->failed);
  return failed != 0 ? failed : load_acquire(&control->abort);
}
// Poisons it, and returns the failure that did so first.
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
