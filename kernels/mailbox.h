// What one block of one rank says to the same block of its neighbours, and how it waits for them.
//
//   previous rank            this rank                     next rank
//   ─────────────            ─────────                     ─────────
//   writes slot s   ──────▶  inbox[s]   outbox[s]  ──────▶  (its inbox)
//   filled_out      ──────▶  filled_in  filled_out ──────▶  filled_in       "so many chunks are in"
//   drained_in      ◀──────  drained_out  drained_in ◀────  drained_out     "so many chunks are out again"
//
// Every counter lives beside the one who polls it, has one writer and only grows; comparisons survive the wrap. A step
// waits for a chunk in the inbox, or for room in the outbox, or for both; works; and publishes. Every wait ends: with
// what it waited for, or with a failure that names a rank; only the one at the exit of the direct average, see
// poll_slowly, takes nothing but what it waits for.
#pragma once
#include "bucket.h"

namespace PA_ISA {

// A failure or a verdict: (PaKind << 8) | rank. 0: none.
PA_FN uint32_t code_of(uint32_t kind, uint32_t rank) { return kind << 8 | rank; }
PA_FN uint32_t kind_of(uint32_t code) { return code >> 8; }
PA_FN uint32_t rank_of(uint32_t code) { return code & 0xffu; }

PA_FN bool reached(uint32_t seen, uint32_t want) { return int32_t(seen - want) >= 0; }

// ---- the decision: one word, one winner an average: (epoch << 32) | (where << 16) | (kind << 8) | rank -------------
PA_FN uint32_t epoch_of(uint64_t decision) { return uint32_t(decision >> 32); }
PA_FN uint32_t code_of(uint64_t decision) { return uint32_t(decision) & 0xffffu; }
PA_FN uint32_t where_of(uint64_t decision) { return uint32_t(decision) >> 16; }

// What a wait needs to know of the block that waits. Passed in registers: its address would put it into memory.
struct Place {
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
PA_FN uint64_t longest_turn_ns(const PaArgs& a) {
  const uint64_t least_ns = least(a.timeout_ns / 16, PA_MOST_TURN_NS);
  return least_ns + least_ns / 32 * a.rank;
}
PA_FN bool has_turn(PaBoard& board, uint64_t waited_ns, uint64_t longest_ns) {
  return load_flag(&board.deciding) != 0 && load_acquire(&board.gone) == 0 && waited_ns <= longest_ns;
}
PA_FN void end_turn(Place p) {
  store_release(&p.control()->board[p.a->rank].deciding, 0);
  store_release(&at<PaChannel>(p.a->channel)->deciding, 0);
}
// False: `over` meanwhile, so there is no need for one.
template <class Over> PA_FN bool take_turn(Exec ex, Place p, Over over) {
  const PaArgs& a = *p.a;
  PaBoard& own = p.control()->board[a.rank];
  uint32_t* blocks = &at<PaChannel>(a.channel)->deciding;
  for (uint32_t spins = 1; !try_lock(blocks); ++spins) {
    if (over()) return false;
    ex.pause(spins, a.spins, blocks, 1, &own.sleepers);
  }
  const uint64_t start = ex.now_ns(), longest = longest_turn_ns(a);
  for (bool first = false; !first;) {
    raise_flag(&own.deciding);
    first = true;
    for (uint32_t r = 0; first && r < a.world; ++r) {
      PaBoard& other = p.control()->board[r];
      if (r == a.rank || !has_turn(other, ex.now_ns() - start, longest)) continue;
      if (r < a.rank) {
        store_release(&own.deciding, 0);
        first = false;
      }
      for (uint32_t spins = 1; has_turn(other, ex.now_ns() - start, longest); ++spins) {
        if (over()) {
          end_turn(p);
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
PA_SLOW uint64_t propose(Exec ex, Place p, uint32_t where, uint32_t code) {
  uint64_t* decision = &p.control()->decision;
  const uint64_t mine = uint64_t(p.epoch) << 32 | where << 16 | code;
  uint64_t seen;
  const auto over = [&] {
    seen = load_acquire(decision);
    return int32_t(epoch_of(seen) - p.epoch) >= 0;
  };
  if (over() || !take_turn(ex, p, over)) return seen;
  if (!over()) replace(decision, seen, mine) ? void(seen = mine) : void(over());
  end_turn(p);
  return seen;
}

// What poisoned this world, or 0: a failure of a kernel, or a host's abort. One that came first is a failure by now, or will be.
PA_FN uint32_t poison(PaControl* control) {
  const uint32_t failed = load_acquire(&control->failed);
  return failed != 0 ? failed : load_acquire(&control->abort);
}
// Poisons it, and returns the failure that did so first.
PA_SLOW uint32_t poison_with(Exec ex, Place p, uint32_t failure) {
  uint32_t* failed = &p.control()->failed;
  uint32_t seen;
  const auto over = [&] { return (seen = load_acquire(failed)) != 0; };
  if (over() || !take_turn(ex, p, over)) return seen;
  if (!over()) replace(failed, seen, failure) ? void(seen = failure) : void(over());
  end_turn(p);
  return seen;
}

// ---- waiting ---------------------------------------------------------------------------------------------------
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

// Tests: waits for a while that depends on who is where. Blocks then meet in orders that they would not meet in by themselves.
PA_SLOW void dawdle(Exec ex, Place p, uint32_t step) {
  uint64_t h = (uint64_t(p.epoch) << 32 | step) * 0x9e3779b97f4a7c15u + (uint64_t(p.a->rank) << 16 | ex.block()) * 0xbf58476d1ce4e5b9u;
  h = (h ^ h >> 31) * 0x94d049bb133111ebu;
  const uint64_t start = ex.now_ns(), longest = (h >> 32) % p.a->delay_ns;
  while (ex.now_ns() - start < longest) {
  }
}

// Whether this block has failed for good. A graph may be replayed all the same, which begins no other average: its decision
// would hide the one that slower ranks have yet to learn of, and its record the one that says whether tensors are half written.
PA_FN bool has_failed(const Exec& ex, const PaArgs& a) {
  return at<PaChannel>(a.channel)[ex.block()].outcome >= PA_TIMEOUT;
}

// ---- a block -----------------------------------------------------------------------------------------------------
// One block's view of its rank during one launch. All members have the same value in all lanes.
struct Block {
  const Exec ex;
  const PaArgs& a;
  PaChannel* me;
  uint32_t epoch, send_seq, recv_seq, step;
  bool committed;
  bool far; // slots of the outbox are written past the caches

  PA_FN Block(const Exec& ex_, const PaArgs& a_, bool begins)
      : ex(ex_), a(a_), me(at<PaChannel>(a_.channel) + ex_.block()), epoch(me->epoch + (begins ? 1 : 0)),
        send_seq(me->send_seq), recv_seq(me->recv_seq), step(begins ? 0 : me->step), committed(false), far(me->far != 0) {
    ex.sync(); // all lanes have read before the leader writes
    if (begins && ex.leader()) {
      me->outcome = PA_OPEN;
      me->waited_ns = 0;
      me->committed = 0;
      me->guest = 0;
    }
  }

  PA_FN Place place() const { return {&a, me, epoch, committed}; }
  PA_FN uint32_t next() const { return a.rank + 1 == a.world ? 0 : a.rank + 1; }
  PA_FN uint32_t previous() const { return a.rank == 0 ? a.world - 1 : a.rank - 1; }
  PA_FN uint32_t* line(uint64_t lines) const { return at<uint32_t>(lines) + ex.block() * PA_LINE_WORDS; }
  PA_FN char* slot(uint64_t box, uint32_t seq) const {
    const uint64_t index = uint64_t(ex.block()) * a.slots + (seq & (a.slots - 1));
    return at<char>(box) + index * a.slot_packs * PA_PACK_BYTES;
  }
  PA_FN char* inbox() const { return slot(a.inbox, recv_seq); }
  PA_FN char* outbox() const { return slot(a.outbox, send_seq); }

  // Begins a protocol step. Tests end a block here (fault_step; false in all lanes) or delay it (delay_ns). In production
  // both are 0, and no step has the number 0.
  PA_FN bool begin_step() {
    if (++step == a.fault_step) return false;
    if (ex.leader() && a.delay_ns != 0) dawdle(ex, place(), step);
    return true;
  }

  // Enters one protocol step, for at most `chunk` packs: waits for a chunk in the inbox and for room in the outbox, and
  // finds out how far away the reader is. False in all lanes if the average ended here. Is also the block barrier between
  // the leader's acquire and the lanes' loads.
  template <bool kReceive, bool kSend> PA_FN bool enter(uint32_t where, uint32_t chunk) {
    if (!begin_step()) return false;
    bool failed = false;
    if (ex.leader()) {
      if constexpr (kReceive) {
        uint32_t* filled = line(a.filled_in);
        failed = !wait_for_line(filled, recv_seq + 1, previous(), where);
      }
      if constexpr (kSend) {
        uint32_t* drained = line(a.drained_in);
        if (!failed) failed = !wait_for_line(drained, send_seq + 1 - a.slots, next(), where);
      }
      // Once a turn of the mailbox: threads move between cores, and virtual cores between real ones.
      if constexpr (kSend) {
        if (!failed && (send_seq & (a.slots - 1)) == 0) far = is_far(outbox(), uint64_t(chunk) * PA_PACK_BYTES, a.far_ns);
      }
    }
    return !ex.any(failed);
  }

  PA_FN bool wait_for_line(uint32_t* word, uint32_t want, uint32_t peer, uint32_t where) {
    return wait(ex, place(), word, word + 1, want, peer, where);
  }

  // Leaves the step: the slot that was read is free, the slot that was written is full.
  template <bool kReceive, bool kSend> PA_FN void leave() {
    if (kSend && far) stream_fence();
    ex.sync();
    if (kReceive) ++recv_seq;
    if (kSend) ++send_seq;
    if (ex.leader()) {
      if (kSend) publish(line(a.filled_out), send_seq);
      if (kReceive) publish(line(a.drained_out), recv_seq);
    }
  }
  PA_FN void publish(uint32_t* word, uint32_t value) {
    store_release(word, value);
    wake(word, word + 1);
  }
  // Ends the launch: what the next one starts from.
  PA_FN void save() {
    stream_fence();
    ex.sync();
    if (ex.leader()) {
      me->send_seq = send_seq;
      me->recv_seq = recv_seq;
      me->epoch = epoch;
      me->step = step;
      me->committed = committed;
      me->far = far;
    }
  }
};
} // namespace PA_ISA
