// The kernels' CPU execution alone: worlds of ranks as threads, in averages that succeed and that
// fail. Built by protocol.rs with ThreadSanitizer, with AddressSanitizer, with one lane per
// block and with many (PA_LANES).
//
//   harness SCENARIO… [--mutant K] [--limit SECONDS]
//
// Exit status 0: success. 1: a wrong result, which is printed. 3: a hang. Sanitizers have their
// own.
#include <cstdlib>

static int chosen_mutant = 0; // the mutant that counts, of those in a build with PA_MUTANTS
#include "scenario_coded.h"
#include "scenario_done.h"
#include "scenario_measured.h"
#include "scenario_parts.h"
#include "scenario_stage.h"
#include "scenario_turns.h"
#include "scenarios_bad.h"
#include "scenarios_stopped.h"

struct Scenario {
  const char* name;
  void (*run)();
};
constexpr Scenario kScenarios[] = {
    {"ring", ring},
    {"commit", commit},
    {"direct", direct},
    {"largest", largest},
    {"wrap", wrap},
    {"weights", weights},
    {"joiners", joiners},
    {"measured", measured},
    {"keep", keep},
    {"layout", layout},
    {"done", done},
    {"non_finite", non_finite},
    {"timeout", timeout},
    {"departed", departed},
    {"lost_at_exit", lost_at_exit},
    {"abort", aborted},
    {"decision", decision},
    {"leave_at_each_step", leave_at_each_step},
    {"leave_at_each_coded_step", leave_at_each_coded_step},
    {"coded", coded},
    {"coded_in_sequence", coded_in_sequence},
    {"coded_copies", coded_copies},
    {"turns", turns},
    {"beside", beside},
    {"stopped", stopped},
    {"stopped_in_its_turn", stopped_in_its_turn},
    {"equal", equal},
    {"huge", huge},
    {"stale", stale},
    {"sequenced", sequenced},
    {"parts", parts},
    {"staged", staged},
    {"steps", steps},
    {"copies", copies},
    {"given_up", given_up},
};

static void watch(unsigned seconds) {
  std::thread([seconds] {
    sleep(seconds);
    std::printf("HANG %s: not done after %u s\n", scenario_name.load(), seconds);
    std::fflush(stdout);
    _exit(3);
  }).detach();
}

int main(int count, char** words) {
  unsigned limit = 240;
  std::vector<std::string> names;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--mutant" && i + 1 < count) chosen_mutant = std::atoi(words[++i]);
    else if (word == "--limit" && i + 1 < count) limit = unsigned(std::atoi(words[++i]));
    else names.push_back(word);
  }
  if (names.empty()) names.push_back("all");
#if !defined(PA_MUTANTS)
  if (chosen_mutant != 0) return std::printf("this build has no mutants\n"), 2;
#endif
  watch(limit);
  for (const std::string& name : names) {
    bool found = false;
    for (const Scenario& scenario : kScenarios) {
      if (name != "all" && name != scenario.name) continue;
      found = true;
      scenario_name = scenario.name;
      const uint64_t start = PA_ISA::cpu_now_ns();
      scenario.run();
      std::printf("%-20s %6.2f s\n", scenario.name, double(PA_ISA::cpu_now_ns() - start) * 1e-9);
      std::fflush(stdout);
    }
    if (!found) return std::printf("no scenario %s\n", name.c_str()), 2;
  }
  return 0;
}
