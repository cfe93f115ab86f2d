// The two agreement points of an average: the entry barrier, which validates that all ranks request
// the same operation, and the commit vote, before any tensor is written. The outcome is written
// once, under the turn lock; late ranks adopt it.
#pragma once
#include "mailbox.h"

namespace PA_ISA {

// Record that the weighting of all ranks with news is compared with: the first of theirs.
PA_FN const PaRecord& first_with_news(const PaControl* control, uint32_t world, uint32_t parity) {
  return control->board[first_without(control, world, parity, PA_FLAG_DONE | PA_FLAG_UNNEEDED)]
      .record[parity];
}

// Weight of a rank, where `news` is the first record with news. If that passes a weight, a rank
// that has no news, and may not know of weights yet, counts nothing.
PA_FN double weight_of(const PaRecord& record, const PaRecord& news) {
  const uint32_t passes = PA_FLAG_WEIGHTED, others = PA_FLAG_DONE | PA_FLAG_UNNEEDED;
  const bool weighted = (flags_of(news) & (passes | others)) == passes;
  return weighted && !(flags_of(record) & PA_FLAG_WEIGHTED) ? 0 : record.weight;
}

// Validates the records of an epoch. Returns 0, or the error with the lowest rank at fault: the
// same on every rank. Calls are compared with that of the first rank that is not done.
PA_FN uint32_t check_records(const PaControl* control, uint32_t world, uint32_t epoch) {
  const uint32_t parity = epoch & 1;
  const uint32_t compared = first_without(control, world, parity, PA_FLAG_DONE);
  const PaRecord& first = control->board[compared].record[parity];
  const PaRecord& news = first_with_news(control, world, parity);
  bool needed = false, counts = false;
  uint32_t layout = 0, weight = 0, weighting = 0, schedule = 0, non_finite = 0;
  for (uint32_t r = world; r-- > 0;) {
    const PaRecord& record = control->board[r].record[parity];
    const uint32_t flags = flags_of(record);
    const bool done = flags & PA_FLAG_DONE, unneeded = flags & PA_FLAG_UNNEEDED;
    needed |= !unneeded;
    counts |= weight_of(record, news) > 0;
    if (flags & PA_FLAG_LAYOUT) layout = code_of(uint32_t(PA_LAYOUT), r);
    if (!(record.weight >= 0) || record.weight - record.weight != 0)
      weight = code_of(uint32_t(PA_BAD_WEIGHT), r);
    // A rank without news may not know yet that the others pass weights.
    if (!done && !unneeded && (flags ^ flags_of(news)) & PA_FLAG_WEIGHTED)
      weighting = code_of(uint32_t(PA_WEIGHTING), r);
    const bool joins = done && (flags_of(first) & (PA_FLAG_OF_SCHEDULE | PA_FLAG_DONE));
    const bool fits = !((flags ^ flags_of(first)) & PA_FLAG_CODED);
    if (!fits || (!joins && record.schedule != first.schedule))
      schedule = code_of(uint32_t(PA_SCHEDULE), r);
    if (flags & PA_FLAG_NON_FINITE) non_finite = code_of(uint32_t(PA_NON_FINITE), r);
  }
  if (layout) return layout;
  if (schedule) return schedule;
  if (weighting) return weighting;
  if (weight) return weight;
  const bool of_hosts = flags_of(first) & PA_FLAG_HOSTS;
  if (!needed && !of_hosts) return code_of(uint32_t(PA_UNNEEDED), 0);
  if (!counts && !of_hosts) return code_of(uint32_t(PA_NO_WEIGHT), 0);
  return non_finite;
}

// Computes each rank's scale, w / max w, and the divisor, Σ w / max w. Both are multiplied by a
// power of two that is at most 1 over the number of ranks that count, so that no partial sum
// overflows where the mean does not. Both are 1 where one rank counts: its values arrive unchanged.
PA_FN void compute_scales(const PaControl* control, uint32_t world, uint32_t epoch, PaChannel* me) {
  // Smallest scale: a smaller one would be 0 in f32, which turns infinity into NaN.
  constexpr double kLeast = 0x1p-126;
  double most = 0, part = 1, sum = 0, lost = 0, sum_f32 = 0;
  uint32_t count = 0;
  const PaRecord& news = first_with_news(control, world, epoch & 1);
  for (uint32_t r = 0; r < world; ++r) {
    const double w = weight_of(control->board[r].record[epoch & 1], news);
    if (w > most) most = w;
    if (w > 0) ++count;
  }
  const bool alike = count == 0; // PA_FLAG_HOSTS
  if (alike) most = 1, count = world;
  for (uint32_t power = 1; power < count; power *= 2) part *= 0.5;
  for (uint32_t r = 0; r < world; ++r) {
    const double w = alike ? 1 : weight_of(control->board[r].record[epoch & 1], news);
    const double ratio = w / most * part, scale = ratio > kLeast ? ratio : kLeast;
    me->scale[r] = w > 0 ? scale : -1.0;
    if (!(w > 0)) continue;
    const double next = sum + scale;
    lost += sum >= scale ? sum - next + scale : scale - next + sum; // one rounding in all
    sum = next;
    sum_f32 += double(float(scale));
  }
  me->divisor = sum + lost;
  me->divisor_f32 = sum_f32;
}

// True if any rank knows of a joiner: the same on all ranks, so that all admit it or none does. A
// rank that is done does not know at which step the others are.
PA_FN uint32_t has_joiner(const PaControl* control, uint32_t world, uint32_t epoch) {
  uint32_t flags = 0;
  for (uint32_t r = 0; r < world; ++r) flags |= flags_of(control->board[r].record[epoch & 1]);
  return (flags & (PA_FLAG_JOINER | PA_FLAG_DONE)) == PA_FLAG_JOINER;
}

// Largest value of all records of what each rank has measured: the same on all ranks. NaN, and what
// a rank has not measured, count as 0.
PA_FN void agree_on_measured(const PaControl* control, uint32_t world, uint32_t epoch,
                             PaStatus& status) {
  const uint32_t turn = epoch & 1;
  double most[2] = {0, 0};
  for (uint32_t r = 0; r < world; ++r) {
    const PaBoard& board = control->board[r];
    if (!(flags_of(board.record[turn]) & PA_FLAG_MEASURED)) continue;
    for (uint32_t i = 0; i < 2; ++i) {
      const double value = board.measured[turn][i];
      if (value > most[i]) most[i] = value;
    }
  }
  for (uint32_t i = 0; i < 2; ++i) status.measured[i] = most[i];
}

// First non-finite value that this rank's blocks have found, or 0: PaChannel.bad. One in its
// tensors comes before what a stage has left, which it may have caused.
PA_FN uint64_t first_bad(const PaArgs& a) {
  uint64_t before = ~uint64_t(0); // the least `bad` less 1, where that of none is the most
  for (uint32_t c = 0; c < a.channels; ++c)
    before = min(before, at<PaChannel>(a.channel)[c].bad - 1);
  return before + 1;
}

// Publishes this rank's record. Block 0, before the entry barrier.
PA_NOINLINE void publish_record_as_leader(Exec, WaitCtx ctx, bool is_bad) {
  const PaArgs& a = *ctx.a;
  PaBoard& own = ctx.control()->board[a.rank];
  PaRecord& record = own.record[ctx.epoch & 1];
  const uint64_t bad = is_bad ? first_bad(a) : 0;
  record.schedule = a.schedule;
  record.weight = a.flags & PA_FLAG_WEIGHTED ? a.weight : 1.0;
  record.buckets = a.buckets;
  record.detail = bad != 0 ? bad : a.detail;
  record.found = a.found;
  if (a.flags & PA_FLAG_MEASURED)
    for (uint32_t i = 0; i < 2; ++i) own.measured[ctx.epoch & 1][i] = a.measured[i];
  record.flags = a.flags | (bad != 0 ? uint32_t(PA_FLAG_NON_FINITE) : 0u);
  publish_board(ctx, &own.arrived, ctx.epoch);
}

// The leader's part of the entry barrier. False: the average ended. `commits`: the agreement is
// also the decision to write (PA_DIRECT, PA_RING).
PA_NOINLINE bool entry_barrier_as_leader(Exec ex, WaitCtx ctx, bool commits) {
  const PaArgs& a = *ctx.a;
  PaControl* control = ctx.control();
  for (uint32_t r = 0; r < a.world; ++r) {
    if (!wait_for_board(ex, ctx, r, &control->board[r].arrived, ctx.epoch, PA_AT_MEET))
      return false;
  }
  const uint32_t poisoned = poison_cause(ctx);
  if (poisoned != 0 && resolve_failure(ex, ctx, poisoned, PA_AT_MEET)) return false;
  uint32_t code = check_records(control, a.world, ctx.epoch);
  if (code == 0 && commits) code = code_of(uint32_t(PA_COMMITTED), 0);
  if (code != 0) {
    // Where there is nothing to decide, a rank that gave up here is noticed at the commit vote.
    const uint64_t decision = decide(ex, ctx, PA_AT_MEET, code);
    if (epoch_of(decision) == ctx.epoch) code = code_of(decision);
    if (kind_of(code) >= PA_TIMEOUT) return !resolve_failure(ex, ctx, code, PA_AT_MEET);
    if (kind_of(code) != PA_COMMITTED) {
      write_status(ctx, code, PA_AT_MEET);
      return false;
    }
  }
  compute_scales(control, a.world, ctx.epoch, ctx.me);
  ctx.me->status.joiner = has_joiner(control, a.world, ctx.epoch);
  // Only for a rank that asks: this takes a tenth of an average of a few bytes.
  if (a.flags & PA_FLAG_MEASURED) {
    agree_on_measured(control, a.world, ctx.epoch, ctx.me->status);
    ctx.me->agreed_ns = ex.now_ns();
  }
  return true;
}

// First protocol step. False in all lanes if the average ended here.
PA_FN bool publish_record(Block& b, bool commits) {
  if (!b.begin_step()) return false;
  if (b.ex.block() != 0) return true;
  // Result of this average's scan, the launch before this one. Tensors of a wrong layout are not
  // scanned: `bad` is an earlier average's then.
  const bool scanned =
      commits && (b.a.flags & PA_FLAG_REJECT_NON_FINITE) && !(b.a.flags & PA_FLAG_LAYOUT);
  bool is_bad = false;
  if (scanned) {
    for (uint32_t c = b.ex.lane(); c < b.a.channels; c += b.ex.lanes())
      is_bad |= at<PaChannel>(b.a.channel)[c].bad != 0;
    is_bad = b.ex.any(is_bad);
  }
  if (b.ex.leader()) publish_record_as_leader(b.ex, b.wait_ctx(), is_bad);
  return true;
}
PA_FN bool entry_barrier(Block& b, bool commits) {
  bool failed = false;
  if (b.ex.leader()) failed = !entry_barrier_as_leader(b.ex, b.wait_ctx(), commits);
  if (b.ex.any(failed)) return false;
  b.committed = commits;
  return true;
}

// Casts this rank's vote when the last of its blocks has reduced its shard. The block barrier of
// the last step orders the shard, which this block alone reads, and the lanes' `bad`.
PA_NOINLINE void cast_vote_as_leader(WaitCtx ctx) {
  const PaArgs& a = *ctx.a;
  uint32_t* finished = &at<PaChannel>(a.channel)->finished;
  // The upper half counts the blocks that have found a bad value.
  const uint32_t mine = ctx.me->bad != 0 ? 0x10001u : 1u;
  const uint32_t seen = fetch_add(finished, mine) + mine;
  if ((seen & 0xffffu) != a.channels) return;
  store_relaxed(finished, 0); // read next by the next average
  PaBoard& own = ctx.control()->board[a.rank];
  const uint64_t vetoed = a.flags & PA_FLAG_VETO ? uint64_t(PA_VETOED) : 0;
  const uint64_t bad = seen >> 16 != 0 ? first_bad(a) : vetoed;
  if (bad != 0) own.record[ctx.epoch & 1].detail = bad;
  publish_board(ctx, &own.vote, 2 * ctx.epoch + (bad != 0 ? 1 : 0));
}

// The leader's part of the commit vote.
PA_NOINLINE bool commit_vote_as_leader(Exec ex, WaitCtx ctx) {
  const PaArgs& a = *ctx.a;
  PaControl* control = ctx.control();
  const uint32_t good = 2 * ctx.epoch;
  uint32_t code = code_of(uint32_t(PA_COMMITTED), 0);
  bool is_bad = false;
  for (uint32_t r = a.world; r-- > 0;) {
    uint32_t* vote = &control->board[r].vote;
    if (!wait_for_board(ex, ctx, r, vote, good, PA_AT_COMMIT)) return false;
    if (load_acquire(vote) != good + 1) continue;
    // A value that is not finite is told rather than a veto, which it may have caused.
    const bool vetoes = control->board[r].record[ctx.epoch & 1].detail >= PA_VETOED;
    if (!vetoes || !is_bad) code = code_of(uint32_t(PA_NON_FINITE), r);
    is_bad |= !vetoes;
  }
  const uint64_t decision = decide(ex, ctx, PA_AT_COMMIT, code);
  if (epoch_of(decision) == ctx.epoch) code = code_of(decision);
  if (kind_of(code) == PA_COMMITTED) return true;
  if (kind_of(code) >= PA_TIMEOUT) return !resolve_failure(ex, ctx, code, phase_of(decision));
  write_status(ctx, code, PA_AT_COMMIT);
  return false;
}

// A protocol step: the vote for this rank's shard. False in all lanes if a test ends the block.
PA_FN bool cast_vote(Block& b) {
  if (!b.begin_step()) return false;
  if (b.ex.leader()) cast_vote_as_leader(b.wait_ctx());
  return true;
}
// All or nothing: true in all lanes if every rank has reduced its shard and will write. False:
// no rank writes.
PA_FN bool commit_vote(Block& b) {
  bool failed = false;
  if (b.ex.leader()) failed = !commit_vote_as_leader(b.ex, b.wait_ctx());
  if (b.ex.any(failed)) return false;
  b.committed = true;
  return true;
}
} // namespace PA_ISA
