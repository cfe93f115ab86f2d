// Ranks that are stopped at any point, as processes are by a signal: which of several waiting ranks
// is the straggler, and that a death beside a stop ends every wait at once.
#pragma once
#include "scenario_turns.h"
#include "scenarios_bad.h"

// ---- a death beside a stop ----------------------------------------------------------------------

// Two ranks are missing and one has departed: ranks that wait for the other notice at once, too.
inline void departed_beside_a_late_rank(Mode mode, uint64_t seed) {
  World w(setup_of(mode, 4, 2, seed));
  const uint32_t departed = uint32_t(seed % 4), late = (departed + 1 + uint32_t(mix(seed) % 3)) % 4;
  std::vector<Outcome> o(4);
  std::atomic<uint32_t> back{0};
  each_rank(w, [&](uint32_t r) {
    fill(w, Plan{}, r);
    if (r == departed) {
      usleep(uint32_t(mix(seed + 1) % 4000));
      return w.depart(r);
    }
    while (r == late && back < 2) usleep(100);
    const uint64_t start = PA_ISA::cpu_now_ns();
    o[r] = w.average(r, Call{});
    if (PA_ISA::cpu_now_ns() - start > kSoonNs)
      wrong("%s: rank %u took too long to notice", name_of(mode), r);
    expect_outcome(w, r, 0, o[r], PA_DEPARTED, departed);
    ++back;
  });
  if (check_agreement(w, Plan{}, o, departed))
    wrong("%s: committed without rank %u", name_of(mode), departed);
}

// Stops this rank in any of its waits, also in the last ones.
inline void stop_sometime(World& w, uint32_t r, uint64_t chance) {
  const uint32_t looks = 1 + uint32_t(chance % 60);
  if (w.s.mode == Mode::kCommit && chance >> 60 & 1) w.stop[r].later_looks = looks;
  else w.stop[r].looks = looks;
}
// Number of ranks that completed the average, and whether it was committed.
struct Came {
  uint32_t completed = 0;
  bool committed = false;
};
inline Came came(const std::vector<Outcome>& o) {
  Came all;
  for (const Outcome& outcome : o)
    all.completed += outcome.kind == PA_COMMITTED, all.committed |= outcome.committed;
  return all;
}
// One rank is killed at any of its looks at the clock and another one stopped, while a third one is
// slow, so that they wait.
inline Came killed_beside_a_stopped_rank(Mode mode, uint64_t seed) {
  Setup s = setup_of(mode, 4, 1 + uint32_t(seed % 2), 2 * seed);
  s.buckets = {{PA_F32, false, {190, 3, 70}}};
  World w(s);
  const uint32_t dead = uint32_t(seed % 4), idle = (dead + 1 + uint32_t(mix(seed) % 3)) % 4,
                 slow = uint32_t(mix(seed + 1) % 4);
  stop_sometime(w, dead, mix(seed + 2));
  stop_sometime(w, idle, mix(seed + 3));
  std::vector<Outcome> o(4);
  std::atomic<uint32_t> back{0};
  std::atomic<bool> has_ended[4] = {};
  std::thread watcher([&] {
    const auto is_still = [&](uint32_t r) { return w.stop[r].stopped || has_ended[r]; };
    for (int ms = 0; !is_still(dead) || (!is_still(idle) && ms < 50); ++ms) {
      // it waits for the other rank, short of where it was to be stopped
      if (ms == 50) w.stop[dead].stopped = true;
      usleep(1000);
    }
    // With `dead` done and `idle` stopped, the others would wait for the timeout.
    if (has_ended[dead]) w.stop[idle].goes_on = true;
    else w.depart(dead);
    const uint64_t start = PA_ISA::cpu_now_ns();
    while (back < 2) {
      if (PA_ISA::cpu_now_ns() - start > kSoonNs)
        wrong("%s, seed %llu: not noticed soon", name_of(mode), (unsigned long long)seed);
      usleep(100);
    }
    w.stop[dead].goes_on = w.stop[idle].goes_on = true;
  });
  each_rank(w, [&](uint32_t r) {
    fill(w, Plan{}, r);
    Call call;
    if (r == slow) call.delay_ns = 3'000'000;
    o[r] = w.average(r, call);
    has_ended[r] = true;
    if (o[r].kind != PA_COMMITTED) expect_outcome(w, r, 0, o[r], PA_DEPARTED, dead);
    if (r != dead && r != idle) ++back;
  });
  watcher.join();
  check_agreement(w, Plan{}, o, ~0u);
  return came(o);
}

inline void beside() {
  uint64_t seed = 4000;
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect})
    for (int i = 0; i < 12; ++i) departed_beside_a_late_rank(mode, seed++);
  uint32_t before = 0, after = 0, in_vain = 0;
  for (Mode mode : {Mode::kRing, Mode::kCommit})
    for (int i = 0; i < 32; ++i) {
      const Came all = killed_beside_a_stopped_rank(mode, seed++);
      ++(all.completed == 4 ? in_vain : all.committed ? after : before);
    }
  std::printf(
      "beside: %u ranks killed before the commit, %u after it, %u when they were not needed any "
      "more\n",
      before, after, in_vain);
  if (before < 10 || after < 10) wrong("hardly any rank was killed there");
}

// ---- stopped in its turn ------------------------------------------------------------------------

// One rank is stopped while it holds the turn lock or waits for it: the others end within the
// timeout and a little, and it finds their decision when it goes on.
inline bool rank_is_stopped_in_its_turn(Mode mode, uint64_t seed) {
  Setup s = setup_of(mode, 3 + uint32_t(seed % 2), 1 + uint32_t(mix(seed) % 2), 2 * seed);
  s.buckets = {{PA_F32, false, {190, 3, 70}}};
  s.timeout_ns = 2 * kTimeoutNs;
  World w(s);
  const uint32_t idle = uint32_t(mix(seed + 1) % s.world);
  w.stop[idle].in_its_turn = true;
  std::vector<Outcome> o(s.world);
  std::atomic<uint32_t> back{0};
  each_rank(w, [&](uint32_t r) {
    fill(w, Plan{}, r);
    Call call;
    // Arrives last, when the others sleep, so that it takes the lock first.
    if (r == idle) call.before_us = 8000, call.between_us = 8000;
    const uint64_t start = PA_ISA::cpu_now_ns();
    o[r] = w.average(r, call);
    if (r != idle && PA_ISA::cpu_now_ns() - start > kSoonNs)
      wrong("%s: rank %u was held for too long", name_of(mode), r);
    if (o[r].kind != PA_COMMITTED) expect_outcome(w, r, 0, o[r], PA_TIMEOUT, idle);
    if (r != idle && ++back == s.world - 1) w.stop[idle].goes_on = true;
  });
  check_agreement(w, Plan{}, o, ~0u);
  return w.stop[idle].stopped;
}

// The same rank never goes on and so never reaches the entry barrier either.
inline void never_resumed_in_its_turn(Mode mode, uint64_t seed) {
  Setup s = setup_of(mode, 3, 2, seed);
  s.timeout_ns = kTimeoutNs;
  World w(s);
  w.control()->board[1].deciding = 1;
  std::vector<Outcome> o(s.world);
  each_rank(w, [&](uint32_t r) {
    fill(w, Plan{}, r);
    if (r == 1) return;
    const uint64_t start = PA_ISA::cpu_now_ns();
    o[r] = w.average(r, Call{});
    if (PA_ISA::cpu_now_ns() - start > kSoonNs)
      wrong("%s: rank %u was held for too long", name_of(mode), r);
    expect_outcome(w, r, 0, o[r], PA_TIMEOUT, 1);
  });
  check_agreement(w, Plan{}, o, 1);
}

inline void stopped_in_its_turn() {
  for (Mode mode : {Mode::kRing, Mode::kCommit, Mode::kDirect})
    never_resumed_in_its_turn(mode, 6900 + uint64_t(mode));
  std::atomic<uint64_t> next{0};
  std::atomic<uint32_t> stops{0};
  constexpr uint64_t kRuns = 24;
  std::vector<std::thread> helpers; // mostly waiting for deadlines
  for (uint32_t i = 0; i < 8; ++i)
    helpers.emplace_back([&, i] {
      delay_state = mix(i + 7000);
      for (uint64_t run; (run = next++) < kRuns;)
        stops += rank_is_stopped_in_its_turn(run % 2 ? Mode::kCommit : Mode::kRing, 7000 + run);
    });
  for (auto& helper : helpers) helper.join();
  std::printf("stopped_in_its_turn: %u of %u\n", stops.load(), uint32_t(kRuns));
  if (stops < 6) wrong("hardly any rank was stopped in its turn");
}

// ---- the straggler ------------------------------------------------------------------------------

// A rank's board during a wait of rank 0 that reaches its deadline.
struct Shows {
  uint32_t rank, behind; // the awaited rank + 1, or 0
  bool alive;
  bool completed = false;
};
// The rank that rank 0 names when `peer` does not move. `stop_for_ns`: time for which rank 0 was
// stopped itself, soon after it began to wait.
inline uint32_t straggler_of(uint32_t world, uint32_t peer, const std::vector<Shows>& boards,
                             uint64_t stop_for_ns = 0) {
  Setup s = setup_of(Mode::kRing, world, 1, 5000);
  s.timeout_ns = 100'000'000;
  World w(s);
  const PaArgs a = w.args(0, Call{});
  const PA_ISA::WaitCtx p{&a, w.channel(0, 0), 1, false};
  const auto show = [&](const Shows& board, uint64_t now_ns) {
    const uint32_t heartbeat = board.behind == 0 ? 0 : PA_ISA::heartbeat_of(now_ns);
    PA_ISA::store_relaxed(&w.control()->board[board.rank].waiting_on,
                          heartbeat << 8 | board.behind);
    if (board.completed) PA_ISA::store_release(&w.host()->completed[board.rank], 1);
  };
  for (const Shows& board : boards) show(board, PA_ISA::cpu_now_ns());
  std::atomic<bool> over{false};
  std::thread others([&] {
    for (; !over; usleep(300))
      for (const Shows& board : boards)
        if (board.alive) show(board, PA_ISA::cpu_now_ns());
  });
  std::thread waits([&] {
    uint32_t never = 0, sleepers = 0;
    look_after_stop = stop_for_ns != 0 ? 3 : 0;
    stop_ns = stop_for_ns;
    if (PA_ISA::wait(leader_of(0), p, &never, &sleepers, 1, peer, PA_AT_REDUCE))
      wrong("the wait ended though no rank wrote the word");
  });
  waits.join();
  over = true;
  others.join();
  const PaStatus& status = w.channel(0, 0)->status;
  if (status.outcome != PA_TIMEOUT) wrong("not a timeout");
  return status.peer;
}
inline void expect_straggler(const char* what, uint32_t straggler, uint32_t named) {
  if (named != straggler)
    wrong("%s: the straggler is rank %u, not rank %u", what, straggler, named);
}
inline void straggler_is_found() {
  expect_straggler("the last of those that wait", 3,
                   straggler_of(4, 1, {{1, 1 + 2, true}, {2, 1 + 3, true}, {3, 0, false}}));
  // Rank 2 has arrived since, and has completed what the others wait for.
  expect_straggler("stopped while it waited", 1,
                   straggler_of(3, 1, {{1, 1 + 2, false}, {2, 0, false}}));
  expect_straggler("stopped while it waited for one that waits", 2,
                   straggler_of(4, 1, {{1, 1 + 2, true}, {2, 1 + 3, false}, {3, 1 + 2, true}}));
  expect_straggler("waits for one of its own blocks", 2,
                   straggler_of(3, 1, {{1, 1 + 2, true}, {2, 1 + 2, true}}));
  expect_straggler("a circle with rank 0", 2,
                   straggler_of(3, 1, {{1, 1 + 0, true}, {2, 1 + 1, false}}));
  expect_straggler(
      "a circle of others", 4,
      straggler_of(5, 1, {{1, 1 + 2, true}, {2, 1 + 1, true}, {3, 0, false, true}, {4, 0, false}}));
  expect_straggler("was stopped itself", 2,
                   straggler_of(3, 1, {{1, 1 + 2, true}, {2, 0, false}}, 3'000'000'000));
}

// One rank is stopped at any of its looks at the clock, while another is slow, so that it waits.
inline Came one_is_stopped(Mode mode, uint64_t seed) {
  const uint32_t world = 3 + uint32_t(seed % 2);
  Setup s = setup_of(mode, world, 1 + uint32_t(mix(seed) % 2), 2 * seed);
  s.buckets = {{PA_F32, false, {190, 3, 70}}};
  s.timeout_ns = 6 * kTimeoutNs; // a rank that waits for a core is not the stopped one
  World w(s);
  const uint32_t idle = uint32_t(mix(seed + 1) % world),
                 slow = (idle + 1 + uint32_t(mix(seed + 2) % (world - 1))) % world;
  stop_sometime(w, idle, mix(seed + 3));
  std::vector<Outcome> o(world);
  std::atomic<uint32_t> back{0};
  each_rank(w, [&](uint32_t r) {
    fill(w, Plan{}, r);
    Call call;
    if (r == slow) call.delay_ns = 4'000'000;
    o[r] = w.average(r, call);
    if (o[r].kind != PA_COMMITTED) expect_outcome(w, r, 0, o[r], PA_TIMEOUT, idle);
    if (r != idle && ++back == world - 1) w.stop[idle].goes_on = true;
  });
  check_agreement(w, Plan{}, o, ~0u);
  return came(o);
}

inline void stopped() {
  straggler_is_found();
  std::atomic<uint64_t> next{0};
  std::atomic<uint32_t> before{0}, after{0};
  constexpr uint64_t kRuns = 32;
  std::vector<std::thread> helpers; // mostly waiting for deadlines
  for (uint32_t i = 0; i < 10; ++i)
    helpers.emplace_back([&, i] {
      delay_state = mix(i + 6000);
      for (uint64_t run; (run = next++) < kRuns;)
        ++(one_is_stopped(run / 2 % 2 ? Mode::kCommit : Mode::kRing, 6000 + run).committed
               ? after
               : before);
    });
  for (auto& helper : helpers) helper.join();
  std::printf("stopped: %u stops were too long before the commit, %u after it\n", before.load(),
              after.load());
  if (before < 3 || after < 3) wrong("hardly any stop was met there");
}
