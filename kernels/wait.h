// Waiting.
#pragma once
#include "decision.h"

namespace PA_ISA {

// A rank that waits shows for whom, and beats: the clock moves what it shows once in a millisecond or so. One that was stopped
// while it waited shows it, too, but does not beat. Blocks of a rank that wait for different ranks show them by turns.
PA_FN uint32_t beat_of(uint64_t now_ns) { return uint32_t(now_ns >> 20) & 0xffffu; }
PA_FN uint32_t shown_beat(PaControl* control, uint32_t rank) { return load_relaxed(&control->board[rank].waiting_on) >> 8; }

// Before somebody is blamed for a timeout, all are watched for a while, which ends with the deadline. It is half the timeout
// for those that are shorter than any rank can be sure to beat in.
PA_FN uint64_t watch_ns(const PaArgs& a) { return least(a.timeout_ns / 2, 250'000'000); }
PA_SLOW void begin_watch(Place p) {
  for (uint32_t r = 0; r < p.a->world; ++r) p.me->beats[r] = uint16_t(shown_beat(p.control(), r));
}
// Who is to blame when `peer` does not move: the first of those that wait for one another that has not beaten meanwhile, since it
// was stopped or does not wait. Relaxed: a hint for an error message, read when everything has stood still for long.
PA_SLOW uint32_t culprit(Place p, uint32_t peer) {
  PaControl* control = p.control();
  const uint32_t n = p.a->world, self = p.a->rank;
  const bool says_through = (p.a->flags & PA_FLAG_THROUGH) != 0;
  const auto beats = [&](uint32_t shown, uint32_t r) { return uint16_t(shown >> 8) != p.me->beats[r]; };
  for (uint32_t suspect = peer, hop = 0; hop < n; ++hop) {
    const uint32_t shown = load_relaxed(&control->board[suspect].waiting_on), behind = shown & 0xffu;
    if (behind == 0 || behind - 1 == suspect || !beats(shown, suspect)) return suspect; // for itself: for a block that has left
    if (behind - 1 == self) break;
    suspect = behind - 1;
  }
  // A circle, of ranks some of whose blocks wait for somebody else. One of them does for the one that is to blame.
  for (uint32_t r = 0; r < n; ++r) {
    const bool through = says_through && reached(load_relaxed(&control->board[r].through), p.epoch);
    if (r != self && !through && !beats(load_relaxed(&control->board[r].waiting_on), r)) return r;
  }
  return peer;
}

// Whether a rank will not do its part of this average any more. It is not asked for more than that: who is through with an average
// may go at once. Relaxed: `through` was last written before `gone`, which is acquired first.
PA_FN bool is_lost(Place p, uint32_t rank) {
  const PaBoard& board = p.control()->board[rank];
  return load_acquire(&board.gone) != 0 && !reached(load_relaxed(&board.through), p.epoch);
}

// Why to stop waiting, or 0. `all`: with a look at all ranks, not only at the awaited one, which may be stuck behind one that
// is stopped, while a third one has died.
PA_FN uint32_t trouble(Place p, uint32_t peer, bool all) {
  PaControl* control = p.control();
  const uint32_t poisoned = poison(control);
  if (poisoned != 0) return poisoned;
  if (!p.committed) {
    const uint64_t decision = load_acquire(&control->decision);
    if (epoch_of(decision) == p.epoch && kind_of(code_of(decision)) != PA_COMMITTED) return code_of(decision);
  }
  if (load_acquire(&control->board[peer].gone) != 0) return code_of(uint32_t(PA_LEFT), peer);
  if (all && (p.a->flags & PA_FLAG_THROUGH))
    for (uint32_t r = 0; r < p.a->world; ++r)
      if (r != p.a->rank && is_lost(p, r)) return code_of(uint32_t(PA_LEFT), r);
  return 0;
}

// Writes the status record.
PA_FN void ends(Place p, uint32_t code, uint32_t where) {
  p.me->outcome = kind_of(code);
  p.me->peer = rank_of(code);
  p.me->where = where;
  // No other kind is about a record: a rank that others gave up on may be writing its own at this moment.
  const uint32_t kind = kind_of(code);
  const bool about_record = kind == PA_LAYOUT || kind == PA_NON_FINITE || kind == PA_BAD_WEIGHT || kind == PA_SCHEDULE;
  const PaRecord& record = p.control()->board[rank_of(code)].record[p.epoch & 1];
  p.me->detail = about_record ? record.detail : 0;
  p.me->found = about_record ? record.found : 0;
  if (kind == PA_BAD_WEIGHT) memcpy(&p.me->found, &record.weight, sizeof record.weight);
  if (kind == PA_SCHEDULE) p.me->detail = p.control()->board[0].record[p.epoch & 1].found; // compared with that of rank 0
}

// A wait ended with `failure`. True if that ends this rank's average; false if the others have already decided that all
// is well, which they can only when what was waited for has happened.
PA_SLOW bool fails(Exec ex, Place p, uint32_t failure, uint32_t where) {
  if (!p.committed) {
    const uint64_t decision = propose(ex, p, where, failure);
    if (epoch_of(decision) != p.epoch || kind_of(code_of(decision)) == PA_COMMITTED) return false;
    failure = code_of(decision);
    where = where_of(decision);
  }
  if (kind_of(failure) >= PA_TIMEOUT) {
    const uint32_t first = poison_with(ex, p, failure);
    if (p.committed) failure = first;
  }
  ends(p, failure, where);
  return true;
}

// The leader's wait until *word has reached `want`, which is up to `peer`. False: the average ended instead.
PA_SLOW bool poll_slowly(Exec ex, Place p, uint32_t* word, uint32_t* sleepers, uint32_t want, uint32_t peer, uint32_t where) {
  constexpr uint32_t kLookAround = 16; // polls between two looks at everything else that may end a wait
  constexpr uint64_t kMostAwakeNs = 25'000'000;
  uint32_t* waiting_on = &p.control()->board[p.a->rank].waiting_on;
  const uint64_t start = ex.now_ns();
  uint64_t last = 0, watched = 0; // 0: the watch has not begun
  uint32_t failure = 0, beat = beat_of(start);
  store_relaxed(waiting_on, beat << 8 | (peer + 1)); // read by culprit()
  for (uint32_t spins = 1;; ++spins) {
    const uint32_t seen = load_acquire(word);
    if (reached(seen, want)) break;
    // At the exit nothing but the word itself will do: until a peer has left, it may write into this rank's tensors,
    // which the caller is free to drop. Peers wait for nobody on their way there.
    if ((spins % kLookAround == 0 || ex.sleeps(spins, p.a->spins)) && where != PA_AT_EXIT) {
      const uint64_t now = ex.now_ns(), waited = now - start;
      const bool beats = beat != beat_of(now);
      if (beats) {
        beat = beat_of(now);
        // Also where another block of this rank has waited too, and got what it waited for.
        store_relaxed(waiting_on, beat << 8 | (peer + 1));
      }
      failure = trouble(p, peer, beats);
      if (failure == 0 && waited + watch_ns(*p.a) >= p.a->timeout_ns) {
        // Time that this block itself was stopped for is no time in which it has watched others.
        if (last != 0) watched += least(now - last, kMostAwakeNs);
        else begin_watch(p);
        last = now;
        if (waited > p.a->timeout_ns && watched >= watch_ns(*p.a)) failure = code_of(uint32_t(PA_TIMEOUT), culprit(p, peer));
      }
      // A rank that is gone may have said all it had to say first.
      if (failure != 0 && reached(load_acquire(word), want)) failure = 0;
      if (failure != 0) break;
    }
    ex.pause(spins, p.a->spins, word, seen, sleepers);
  }
  p.me->waited_ns += ex.now_ns() - start;
  const bool ended = failure != 0 && fails(ex, p, failure, where);
  if (!ended) store_relaxed(waiting_on, 0); // one that gave up stays stuck: others may yet ask for the culprit
  return !ended;
}

PA_FN bool wait(Exec ex, Place p, uint32_t* word, uint32_t* sleepers, uint32_t want, uint32_t peer, uint32_t where) {
  return reached(load_acquire(word), want) || poll_slowly(ex, p, word, sleepers, want, peer, where);
}
// For a word of a rank's board.
PA_FN bool wait_for_board(Exec ex, Place p, uint32_t rank, uint32_t* word, uint32_t want, uint32_t where) {
  return wait(ex, p, word, &p.control()->board[rank].sleepers, want, rank, where);
}
PA_FN void announce(Place p, uint32_t* word, uint32_t value) {
  store_release(word, value);
  wake(word, &p.control()->board[p.a->rank].sleepers);
}
} // namespace PA_ISA
