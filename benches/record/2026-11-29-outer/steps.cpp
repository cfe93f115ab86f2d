// Direct averages with an outer optimizer beside the plain one, in turns. One thread does the work
// of all ranks, one after another; the time is this thread's CPU time, which other programs on the
// machine's cores do not add to (their use of caches and memory does).
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <vector>

#include "direct.h"
using namespace PA_ISA;

static double now() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
// Memory of huge pages, filled with small positive numbers of any type.
static char* buffer(size_t n) {
  const size_t page = 2 << 20;
  char* p = (char*)aligned_alloc(page, (n + page - 1) / page * page);
  madvise(p, n, MADV_HUGEPAGE);
  for (size_t i = 0; i < n; i += 2) p[i] = char(i * 7), p[i + 1] = char(0x3f);
  return p;
}

enum Way { kPlain, kNesterov, kAdam, kWays };
static const char* const kNames[] = {"plain", "nesterov", "adam"};

template <class T, int kWorld, class End>
__attribute__((noinline)) void run(Block& b, const PaBucket& k, const End& end) {
  Direct<T, kWorld>(b, k).run(end);
}
template <class T, class End> void run_in_world(Block& b, const PaBucket& k, const End& end) {
  if (b.a.world == 2) run<T, 2>(b, k, end);
  else run<T, 4>(b, k, end);
}

template <class T> void measure(const char* name, int n, size_t bytes) {
  std::vector<char*> tensors, states;
  const size_t state_bytes = bytes / n * (sizeof(SumOf<T>) / sizeof(T));
  for (int r = 0; r < n; r++) tensors.push_back(buffer(bytes)), states.push_back(buffer(3 * state_bytes));
  alignas(128) static PaChannel channel;
  std::vector<PaSegment> segments(n);
  PaArgs a{};
  a.channel = (uint64_t)&channel, a.world = n, a.channels = 1;
  for (int r = 0; r < n; r++) {
    channel.scale[r] = 1.0 / n, channel.segments[r] = (uint64_t)&segments[r];
    segments[r] = {(uint64_t)tensors[r], bytes / sizeof(T), 0};
  }
  channel.divisor = channel.divisor_f32 = 1;
  PaBucket k{};
  k.packs = k.channel_packs = bytes / 16, k.segment_count = 1, k.shard_packs = bytes / 16 / n;
  const auto turn = [&](Way way) {
    const double start = now();
    for (int r = 0; r < n; r++) {
      a.rank = r, k.segments = (uint64_t)&segments[r], k.state = (uint64_t)states[r];
      k.outer = {};
      k.outer.lr = 0.7, k.outer.a = 1, k.outer.b = k.outer.mu = 0.9, k.outer.mix = 1;
      k.outer.beta2 = 0.99, k.outer.tau = 1e-3;
      Block b(Exec{{0}}, a, false);
      if (way == kPlain) run_in_world<T>(b, k, EndsInMean<T>{});
      if (way == kNesterov) run_in_world<T>(b, k, EndsInStep<T, false>{{k, a, 0}});
      if (way == kAdam) run_in_world<T>(b, k, EndsInStep<T, true>{{k, a, 0}});
    }
    return now() - start;
  };
  std::vector<double> times[kWays];
  for (int round = 0; round < 16; round++)
    for (int way = 0; way < kWays; way++) {
      const double time = turn(Way(way));
      if (round > 0) times[way].push_back(time);
    }
  // State is in the type of sums: twice as many bytes for elements of 16 bits.
  const double wide = double(sizeof(SumOf<T>)) / sizeof(T);
  const double bytes_as[] = {1, 1 + 4 * wide / (2 * n), 1 + 6 * wide / (2 * n)};
  for (auto& t : times) std::sort(t.begin(), t.end());
  const double plain = times[kPlain][times[kPlain].size() / 2];
  for (int way = 0; way < kWays; way++) {
    const double median = times[way][times[way].size() / 2];
    const double moved = 2.0 * bytes * n * bytes_as[way];
    printf("%d ranks  %-4s  %-8s  %7.2f ms (%.2f..%.2f)  %5.1f GB/s  time / plain %.2f, bytes / plain"
           " %.2f: %.2f\n",
           n, name, kNames[way], median * 1e3, times[way][0] * 1e3, times[way].back() * 1e3,
           moved / median * 1e-9, median / plain, bytes_as[way], median / plain / bytes_as[way]);
  }
  for (auto p : tensors) free(p);
  for (auto p : states) free(p);
}

int main(int, char** arguments) {
  const size_t bytes = size_t(atoi(arguments[1])) << 20;
  for (int n : {2, 4}) {
    measure<float>("f32", n, bytes);
    measure<BF16>("bf16", n, bytes);
    measure<F16>("f16", n, bytes);
  }
}
