// Mailboxes between a block and the same block of the neighbouring ranks.
//
//   previous rank    links[PA_IN]    this rank    links[PA_OUT]   next rank
//   ─────────────    ────────────    ─────────    ─────────────   ─────────
//   writes slot s ──▶ slots[s] ─────▶ reads, writes ──▶ slots[s] ──▶ reads
//   adds          ──▶ filled   ─────▶ polls, adds   ──▶ filled   ──▶ polls     chunks put in
//   polls        ◀─── drained  ◀───── adds, polls  ◀─── drained ◀─── adds      chunks taken out
//
// Every counter lies beside the rank that polls it, has one writer and only grows; comparisons
// survive the wrap. Slots lie wherever both ranks reach them: the memory model orders them by the
// counters alone. A protocol step waits for a chunk in links[PA_IN], for room in links[PA_OUT], or
// for both; works; and publishes.
#pragma once
#include "pack.h"
#include "wait.h"

namespace PA_ISA {

// Tests: delays a block by a pseudo-random time, so that blocks meet in orders that are rare else.
PA_NOINLINE void inject_delay(Exec ex, WaitCtx ctx, uint32_t step) {
  uint64_t h = (uint64_t(ctx.epoch) << 32 | step) * 0x9e3779b97f4a7c15u +
               (uint64_t(ctx.a->rank) << 16 | ex.block()) * 0xbf58476d1ce4e5b9u;
  h = (h ^ h >> 31) * 0x94d049bb133111ebu;
  const uint64_t start = ex.now_ns(), longest = (h >> 32) % ctx.a->delay_ns;
  while (ex.now_ns() - start < longest) {
  }
}

// True if this block has failed for good. A graph may be replayed all the same. That must begin no
// further average: its decision would overwrite the one that slower ranks have yet to read, and its
// status the record of whether tensors are half written.
PA_FN bool has_failed(const Exec& ex, const PaArgs& a) {
  return at<PaChannel>(a.channel)[ex.block()].status.outcome >= PA_TIMEOUT;
}

// State of one block during one launch. All members have the same value in all lanes.
struct Block {
  const Exec ex;
  const PaArgs& a;
  PaChannel* me;
  uint32_t epoch, send_seq, recv_seq, step;
  bool committed;
  bool remote; // slots of the outbox are written by non-temporal stores

  PA_FN Block(const Exec& ex_, const PaArgs& a_, bool begins)
      : ex(ex_), a(a_), me(at<PaChannel>(a_.channel) + ex_.block()),
        epoch(me->status.epoch + (begins ? 1 : 0)), send_seq(me->send_seq),
        recv_seq(me->recv_seq), step(begins ? 0 : me->status.step),
        committed(!begins && me->status.committed != 0), remote(me->remote != 0) {
    ex.sync(); // all lanes have read before the leader writes
    if (begins && ex.leader()) {
      me->status.outcome = PA_OPEN;
      me->status.waited_ns = 0;
      me->status.committed = 0;
      me->status.joiner = 0;
    }
  }

  PA_FN WaitCtx wait_ctx() const { return {&a, me, epoch, committed}; }
  PA_FN uint32_t next() const { return a.rank + 1 == a.world ? 0 : a.rank + 1; }
  PA_FN uint32_t previous() const { return a.rank == 0 ? a.world - 1 : a.rank - 1; }
  PA_FN uint32_t* line(uint64_t lines) const {
    return at<uint32_t>(lines) + ex.block() * PA_LINE_WORDS;
  }
  PA_FN char* slot(uint64_t box, uint32_t seq) const {
    const uint64_t index = uint64_t(ex.block()) * a.slots + (seq & (a.slots - 1));
    return at<char>(box) + index * a.slot_packs * PA_PACK_BYTES;
  }
  PA_FN char* inbox() const { return slot(a.links[PA_IN].slots, recv_seq); }
  PA_FN char* outbox() const { return slot(a.links[PA_OUT].slots, send_seq); }

  // Begins a protocol step. Tests end a block here (fault_step; false in all lanes) or delay it
  // (delay_ns). In production both are 0, and no step has the number 0.
  PA_FN bool begin_step() {
    if (++step == a.fault_step) return false;
    if (ex.leader() && a.delay_ns != 0) inject_delay(ex, wait_ctx(), step);
    return true;
  }

  // Enters a protocol step of at most `chunk` packs: waits for the mailboxes and measures whether
  // the reader is remote. False in all lanes if the average ended. Also the block barrier between
  // the leader's acquire and the lanes' loads.
  template <bool kReceive, bool kSend> PA_FN bool enter(uint32_t phase, uint32_t chunk) {
    if (!begin_step()) return false;
    bool failed = false;
    if (ex.leader()) {
      if constexpr (kReceive) {
        uint32_t* filled = line(a.links[PA_IN].filled);
        failed = !wait_for_line(filled, recv_seq + 1, previous(), phase);
      }
      if constexpr (kSend) {
        uint32_t* drained = line(a.links[PA_OUT].drained);
        if (!failed) failed = !wait_for_line(drained, send_seq + 1 - a.slots, next(), phase);
      }
      // Once per turn of the mailbox: threads move between cores, virtual cores between real ones.
      if constexpr (kSend) {
        if (!failed && (send_seq & (a.slots - 1)) == 0)
          remote = reader_is_remote(outbox(), uint64_t(chunk) * PA_PACK_BYTES, a.remote_ns);
      }
    }
    return !ex.any(failed);
  }

  PA_FN bool wait_for_line(uint32_t* word, uint32_t want, uint32_t peer, uint32_t phase) {
    return wait(ex, wait_ctx(), word, word + 1, want, peer, phase);
  }

  // Leaves the step: the slot that was read is free, the slot that was written is full.
  template <bool kReceive, bool kSend> PA_FN void leave() {
    if (kSend && remote) fence_nt();
    ex.sync();
    if (kReceive) ++recv_seq;
    if (kSend) ++send_seq;
    if (ex.leader()) {
      fence_release();
      if (kSend) publish(line(a.links[PA_OUT].filled), send_seq);
      if (kReceive) publish(line(a.links[PA_IN].drained), recv_seq);
    }
  }
  PA_FN void publish(uint32_t* word, uint32_t value) {
    store_after_fence(word, value);
    wake(word, word + 1);
  }
  // Ends the launch: saves the state that the next one starts from, and shows the host its status.
  PA_FN void save() {
    fence_nt();
    ex.sync();
    if (ex.leader()) {
      me->send_seq = send_seq;
      me->recv_seq = recv_seq;
      me->remote = remote;
      me->status.epoch = epoch;
      me->status.step = step;
      me->status.committed = committed;
      if ((a.flags & PA_FLAG_MEASURED) && me->status.outcome == PA_COMMITTED)
        me->status.active_ns = ex.now_ns() - me->agreed_ns;
      at<PaStatus>(a.status)[ex.block()] = me->status;
    }
  }
};
} // namespace PA_ISA
