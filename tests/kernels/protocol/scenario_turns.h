// The turn lock alone (take_turn in kernels/decision.h): mutual exclusion, progress, and no lock
// held by a departed rank.
#pragma once
#include "scenarios_good.h"

inline PA_ISA::Exec leader_of(uint32_t channel) {
#if defined(PA_LANES)
  return {{channel}, 0, 1, nullptr};
#else
  return {{channel}};
#endif
}

// A rank that reads a decision sees everything its writer saw.
inline void decision_carries_what_led_to_it() {
  World w(setup_of(Mode::kRing, 2, 1, 3100));
  uint64_t known = 0; // not atomic
  each_rank(w, [&](uint32_t r) {
    const PaArgs a = w.args(r, Call{});
    const PA_ISA::WaitCtx p{&a, w.channel(r, 0), w.s.epoch + 1, false};
    const uint32_t code = PA_ISA::code_of(uint32_t(PA_LAYOUT), 0);
    if (r == 0) {
      known = 1;
      PA_ISA::decide(leader_of(0), p, PA_AT_MEET, code);
    } else {
      while (PA_ISA::epoch_of(PA_ISA::load_acquire(&w.control()->decision)) != p.epoch)
        sched_yield();
      if (known != 1 || PA_ISA::decide(leader_of(0), p, PA_AT_COMMIT, 0) != w.control()->decision)
        wrong("not what was decided");
    }
  });
}

// A rank that is stopped while it holds the lock, is taken for departed and goes on overwrites
// nothing.
inline void rank_taken_for_departed() {
  World w(setup_of(Mode::kRing, 2, 1, 3200));
  const PaArgs a[] = {w.args(0, Call{}), w.args(1, Call{})};
  const PA_ISA::WaitCtx p[] = {{&a[0], w.channel(0, 0), 1, false},
                               {&a[1], w.channel(1, 0), 1, false}};
  uint64_t* decision = &w.control()->decision;
  if (!PA_ISA::take_turn(leader_of(0), p[0], [] { return false; })) wrong("no turn");
  const uint64_t seen = PA_ISA::load_acquire(decision);
  w.depart(0);
  const uint64_t decided =
      PA_ISA::decide(leader_of(0), p[1], PA_AT_MEET, PA_ISA::code_of(uint32_t(PA_DEPARTED), 0));
  if (PA_ISA::replace(decision, seen, uint64_t(1) << 32 | PA_COMMITTED << 8))
    wrong("it was not told that it is late");
  PA_ISA::end_turn(p[0]);
  if (PA_ISA::load_acquire(decision) != decided) wrong("what others decided was overwritten");
}

inline void turns() {
  decision_carries_what_led_to_it();
  rank_taken_for_departed();
  constexpr uint32_t kRanks = 4, kBlocks = 2, kTurns = 60;
  const uint64_t usual_ns = test_max_turn_ns;
  test_max_turn_ns = ~uint64_t(0); // a thread that waits for a core is not stopped
  for (uint32_t round = 0; round < 2 * kRanks; ++round) {
    Setup s = setup_of(Mode::kRing, kRanks, kBlocks, 3000 + round);
    s.timeout_ns = 100'000'000'000'000;
    World w(s);
    uint64_t taken = 0; // not atomic: two holders at once are a race
    const bool one_departed = round >= kRanks;
    const uint32_t departed = round % kRanks;
    if (one_departed) {
      w.control()->board[departed].deciding = 1;
      w.depart(departed);
    }
    each_rank(w, [&](uint32_t r) {
      if (one_departed && r == departed) return;
      const PaArgs a = w.args(r, Call{});
      const uint64_t seed = random_bits();
      std::vector<std::thread> blocks;
      for (uint32_t c = 0; c < kBlocks; ++c)
        blocks.emplace_back([&, c] {
          delay_state = mix(seed + c);
          const PA_ISA::WaitCtx p{&a, w.channel(r, c), 1, false};
          for (uint32_t turn = 0; turn < kTurns; ++turn) {
            perturb(3);
            if (!PA_ISA::take_turn(leader_of(c), p, [] { return false; }))
              wrong("rank %u: no turn", r);
            ++taken;
            perturb(3);
            PA_ISA::end_turn(p);
          }
        });
      for (auto& block : blocks) block.join();
    });
    const uint64_t want = (kRanks - one_departed) * kBlocks * kTurns;
    if (taken != want)
      wrong("%llu turns of %llu", (unsigned long long)taken, (unsigned long long)want);
  }
  test_max_turn_ns = usual_ns;
}
