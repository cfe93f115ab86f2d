// Ranks that are missing, late, dead or aborted: every other rank ends soon, with the same outcome,
// and no tensor has changed unless all ranks had agreed to write.
#pragma once
#include "scenarios_good.h"

// Long enough for a rank that only waits for a core: the sanitizers' threads outnumber the cores.
constexpr uint64_t kTimeoutNs = 400'000'000;
constexpr uint64_t kSoonNs = 20 * kTimeoutNs;

// Checks one average in which anything may have failed. Returns whether it was committed. `dead`:
// the rank that fault_step ended, which has no outcome; ~0u: none.
inline bool check_agreement(const World& w, const Plan& plan, const std::vector<Outcome>& o,
                            uint32_t dead) {
  const uint32_t witness = dead == 0 ? 1 : 0;
  for (uint32_t r = 0; r < w.s.world; ++r) {
    if (r == dead) continue;
    if (o[r].committed != o[witness].committed)
      wrong("%s, seed %llu: rank %u committed=%d, rank %u committed=%d (outcomes %u and %u)",
            name_of(w.s.mode), (unsigned long long)w.s.seed, witness, o[witness].committed, r,
            o[r].committed, o[witness].kind, o[r].kind);
    if (!o[r].committed && (o[r].kind != o[witness].kind || o[r].peer != o[witness].peer))
      wrong("%s: rank %u ended with %u of rank %u, rank %u with %u of rank %u", name_of(w.s.mode),
            witness, o[witness].kind, o[witness].peer, r, o[r].kind, o[r].peer);
    if (o[r].kind == PA_OPEN) wrong("%s: rank %u has no outcome", name_of(w.s.mode), r);
  }
  const bool committed = o[witness].committed;
  for (uint32_t r = 0; r < w.s.world; ++r)
    check(w, plan, r,
          !committed                                 ? Expect::kLocal
          : o[r].kind == PA_COMMITTED && dead == ~0u ? Expect::kMean
                                                     : Expect::kEither);
  return committed;
}

// Rank `absent` makes `good` averages and then none; the others must end with `kind`, naming it.
inline void without_a_rank(Setup s, uint32_t good, uint32_t absent, uint32_t kind,
                           const std::function<void(World&)>& meanwhile) {
  World w(s);
  std::vector<Outcome> o(s.world);
  Plan last;
  last.number = good;
  std::atomic<uint32_t> done{0};
  each_rank(w, [&](uint32_t r) {
    for (uint32_t k = 0; k < good; ++k) {
      const Script script = script_of(w, k);
      fill(w, script.plan, r);
      expect_outcome(w, r, k, w.average(r, Call{}), PA_COMMITTED, 0);
    }
    fill(w, last, r);
    ++done;
    if (r == absent) {
      while (done < s.world) usleep(100); // an abort would end a good average that a rank is in
      return meanwhile(w);
    }
    const uint64_t start = PA_ISA::cpu_now_ns();
    o[r] = w.average(r, Call{});
    if (PA_ISA::cpu_now_ns() - start > kSoonNs)
      wrong("%s: rank %u took too long to notice", name_of(s.mode), r);
    expect_outcome(w, r, good, o[r], kind, absent);
  });
  if (check_agreement(w, last, o, absent))
    wrong("%s: committed without rank %u", name_of(s.mode), absent);
}

inline void timeout() {
  uint64_t seed = 100;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect})
    for (uint32_t good : {0u, 3u}) {
      Setup s = setup_of(mode, 3 + seed % 2, 2, seed);
      s.timeout_ns = kTimeoutNs;
      s.epoch = 0xfffffffdu; // the epoch of the failing average has wrapped
      without_a_rank(s, good, uint32_t(seed % s.world), PA_TIMEOUT, [](World&) {});
      ++seed;
    }
}

// The absent rank publishes its departure: no rank waits for the timeout.
inline void departed() {
  uint64_t seed = 120;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect}) {
    const Setup s = setup_of(mode, 3, 2, seed++);
    const uint32_t absent = uint32_t(seed % 3);
    without_a_rank(s, 2, absent, PA_DEPARTED, [&](World& w) { w.depart(absent); });
  }
  // A rank departs as soon as its last average is done, while others still work on it, one of them
  // for long: they succeed.
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect})
    for (uint32_t i = 0; i < 48; ++i) {
      Setup s = setup_of(mode, 3, 1 + i % 2, 2 * seed++);
      if (i % 3 == 0) s.buckets = {{PA_F32, false, {190, 3, 70}}};
      s.epoch = 0xffffffffu; // the epoch wraps
      World w(s);
      each_rank(w, [&](uint32_t r) {
        const Plan plan;
        fill(w, plan, r);
        Call call;
        if (i % 3 == 0 && r == i / 3 % 3) call.delay_ns = 6'000'000;
        expect_outcome(w, r, 0, w.average(r, call), PA_COMMITTED, 0);
        w.depart(r);
        check(w, plan, r, Expect::kMean);
      });
    }
}

// Direct: a device fails while its rank writes, so that the rank publishes no exit. Peers wait
// until it departs, which is when its other blocks have ended, and then end.
inline void lost_at_exit() {
  for (uint64_t seed = 150; seed < 162; ++seed) {
    const Setup s = setup_of(Mode::kDirect, 2 + seed % 3, 2 + seed % 2, seed);
    const uint32_t lost = uint32_t(seed / 2 % s.world);
    World w(s);
    std::vector<Outcome> o(s.world);
    std::thread device([&] {
      const uint32_t written = s.channels - 1;
      while (PA_ISA::load_acquire(&w.channel(lost, 0)->finished) != written) usleep(50);
      usleep(seed % 2 == 0 ? 2000 : 0);
      w.depart(lost);
    });
    each_rank(w, [&](uint32_t r) {
      fill(w, Plan{}, r);
      Call call;
      if (r == lost) call.last_channel_us = kNever;
      o[r] = w.average(r, call);
    });
    device.join();
    for (uint32_t r = 0; r < s.world; ++r) {
      expect_outcome(w, r, 0, o[r], PA_DEPARTED, lost);
      if (o[r].phase != PA_AT_EXIT || !o[r].committed)
        wrong("rank %u ended in phase %u, committed %u", r, o[r].phase, o[r].committed);
      if (r != lost) check(w, Plan{}, r, Expect::kEither);
    }
  }
}

inline void abort_world(World& w, uint32_t rank) {
  PA_ISA::store_release(&w.host()->abort, PA_ISA::code_of(uint32_t(PA_ABORTED), rank));
}
// An abort while all others wait for a missing rank, and one before any rank arrives.
inline void abort_at_rest(Mode mode, uint64_t seed) {
  without_a_rank(setup_of(mode, 3, 2, seed), 1, 1, PA_ABORTED, [&](World& w) {
    usleep(3000);
    abort_world(w, 1);
  });
  World w(setup_of(mode, 3, 2, seed + 1));
  abort_world(w, 2);
  std::vector<Outcome> o(3);
  each_rank(w, [&](uint32_t r) {
    fill(w, Plan{}, r);
    o[r] = w.average(r, Call{});
    expect_outcome(w, r, 0, o[r], PA_ABORTED, 2);
  });
  check_agreement(w, Plan{}, o, ~0u);
}
// Ranks that start further averages after a failure, as replayed graphs do: slower ranks must still
// learn of the same failure.
inline void abort_and_go_on(Mode mode, uint64_t seed) {
  World w(setup_of(mode, 3, 2, seed));
  abort_world(w, 2);
  std::vector<Outcome> o(3);
  each_rank(w, [&](uint32_t r) {
    fill(w, Plan{}, r);
    for (int again = 0; again < 3; ++again) {
      o[r] = w.average(r, Call{});
      expect_outcome(w, r, 0, o[r], PA_ABORTED, 2);
    }
  });
  check_agreement(w, Plan{}, o, ~0u);
}
// An abort after all others have arrived: rank 0 waits for no rank and must notice all the same.
inline void abort_between_arrivals(Mode mode, uint64_t seed) {
  World w(setup_of(mode, 3, 1, seed));
  for (uint32_t r = 1; r < 3; ++r) {
    PaRecord& record = w.control()->board[r].record[1];
    record.schedule = Call{}.schedule, record.weight = 1,
    record.buckets = w.ranks[r].buckets->address();
    w.control()->board[r].arrived = 1;
  }
  abort_world(w, 2);
  fill(w, Plan{}, 0);
  const Outcome o = w.average(0, Call{});
  expect_outcome(w, 0, 0, o, PA_ABORTED, 2);
  if (o.committed) wrong("%s: committed after an abort", name_of(mode));
}
// An abort while a rank is slow, or at any time. Ranks read their tensors as soon as they return:
// no peer may still write them.
inline void abort_within(Mode mode, uint64_t seed, bool slow) {
  Setup s = setup_of(mode, 3, 2, seed);
  s.buckets = two_dtypes();
  World w(s);
  std::vector<Outcome> o(3);
  std::thread aborter([&] {
    delay_state = mix(seed);
    usleep(unsigned(slow ? 10'000 : random_below(mode == Mode::kCommit ? 1500 : 800)));
    abort_world(w, 2);
  });
  each_rank(w, [&](uint32_t r) {
    fill(w, Plan{}, r);
    Call call;
    call.between_us = uint32_t(random_below(300));
    if (slow && r == 1) call.last_channel_us = 30'000;
    o[r] = w.average(r, call);
    if (o[r].kind != PA_COMMITTED) expect_outcome(w, r, 0, o[r], PA_ABORTED, 2);
    check(w, Plan{}, r, o[r].committed ? Expect::kEither : Expect::kLocal);
    if (o[r].kind == PA_COMMITTED) return;
    // A graph replayed now must keep the status that says whether tensors are half written.
    const uint32_t kernels[] = {PA_RING, PA_RING_COMMIT, PA_DIRECT};
    w.launch(r, w.args(r, Call{}),
             kernels[mode == Mode::kRing     ? 0
                     : mode == Mode::kCommit ? 1
                                             : 2],
             0);
    bool committed = false;
    for (uint32_t c = 0; c < 2; ++c) committed |= w.status(r, c)->committed != 0;
    if (committed != o[r].committed)
      wrong("%s: rank %u: a replay hides that tensors are half written", name_of(mode), r);
  });
  aborter.join();
  check_agreement(w, Plan{}, o, ~0u);
}
inline void aborted() {
  uint64_t seed = 160;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect}) {
    abort_at_rest(mode, seed++);
    abort_between_arrivals(mode, seed++);
    for (int i = 0; i < 16; ++i) abort_and_go_on(mode, seed++);
    for (uint32_t i = 0; i < 24; ++i) abort_within(mode, seed++, i == 0);
  }
}

// Deadlines so short that they race with the entry barrier, the reduce and the commit vote.
inline void decision() {
  uint64_t seed = 1000;
  uint32_t committed = 0, refused = 0;
  max_delay_us = 200;
  for (Mode mode : {Mode::kCommit, Mode::kRing, Mode::kDirect})
    for (uint32_t i = 0; i < (kLanes[0] > 1 ? 50 : 120); ++i) {
      Setup s = setup_of(mode, 2 + i % 3, 1 + i % 2, 2 * seed++); // even: two dtypes
      s.timeout_ns = 200'000 + mix(seed) % 4'000'000;
      const uint32_t longest_us = uint32_t(s.timeout_ns / 700);
      World w(s);
      std::vector<Outcome> o(s.world);
      Plan plan;
      for (bool healthy = true; healthy && plan.number < 3; ++plan.number) {
        each_rank(w, [&](uint32_t r) {
          fill(w, plan, r);
          Call call;
          if (random_below(2)) call.before_us = uint32_t(random_below(longest_us));
          if (random_below(2)) call.between_us = uint32_t(random_below(longest_us));
          o[r] = w.average(r, call);
        });
        (check_agreement(w, plan, o, ~0u) ? committed : refused) += 1;
        for (const Outcome& outcome : o) healthy &= outcome.kind == PA_COMMITTED;
      }
    }
  max_delay_us = 40;
  std::printf("decision: %u averages committed, %u refused\n", committed, refused);
}

// Ends one rank before its first protocol step, its second, … until it completes the average.
inline void leave_at_each_step_of(Mode mode, uint32_t kernel) {
  std::atomic<uint32_t> next_step{1};
  std::atomic<bool> completed{false};
  const auto try_steps = [&](uint32_t helper) {
    delay_state = mix(helper + 5);
    while (!completed) {
      const uint32_t step = next_step++;
      Setup s = setup_of(mode, 3 + step % 2, 1 + step % 2, 2 * (300 + step));
      s.buckets = {{PA_F32, false, {190, 3, 70}}};
      s.timeout_ns = kTimeoutNs;
      s.kernel = kernel;
      const uint32_t dead = step % s.world;
      World w(s);
      std::vector<Outcome> o(s.world);
      each_rank(w, [&](uint32_t r) {
        fill(w, Plan{}, r);
        Call call;
        if (r == dead) call.fault_step = step;
        o[r] = w.average(r, call);
      });
      if (o[dead].kind == PA_COMMITTED) {
        for (uint32_t r = 0; r < s.world; ++r) expect_outcome(w, r, 0, o[r], PA_COMMITTED, 0);
        check_agreement(w, Plan{}, o, ~0u);
        completed = true;
        return;
      }
      const bool committed = check_agreement(w, Plan{}, o, dead);
      for (uint32_t r = 0; r < s.world; ++r)
        // Direct, after the entry barrier: an ended rank publishes its exit, so that no peer
        // waits.
        if (r != dead && o[r].kind != PA_COMMITTED)
          expect_outcome(w, r, 0, o[r],
                         mode == Mode::kDirect && step > 1 ? PA_DEPARTED : PA_TIMEOUT, dead);
      for (uint32_t r = 0; r < s.world; ++r)
        if (mode == Mode::kDirect && o[r].kind == PA_COMMITTED)
          wrong("direct: rank %u does not know that rank %u left its part undone", r, dead);
      if (committed && !o[dead].committed)
        wrong("%s: committed although rank %u died before step %u, not having agreed",
              name_of(mode), dead, step);
    }
  };
  std::vector<std::thread> helpers; // mostly waiting for deadlines
  for (uint32_t i = 0; i < 4; ++i) helpers.emplace_back(try_steps, i);
  for (auto& helper : helpers) helper.join();
}
inline void leave_at_each_step() {
  for (Mode mode : {Mode::kCommit, Mode::kRing, Mode::kDirect})
    leave_at_each_step_of(mode, PA_RING_COMMIT);
}
inline void leave_at_each_coded_step() {
  for (uint32_t kernel : {PA_RING_INT8, PA_RING_BF16}) leave_at_each_step_of(Mode::kCommit, kernel);
}
