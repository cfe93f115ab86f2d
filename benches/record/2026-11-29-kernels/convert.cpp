// One thread works both ranks' halves in turn; the time is this thread's CPU time.
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
static char* buf(size_t n) {
  char* p = (char*)aligned_alloc(2 << 20, (n + (2 << 20) - 1) / (2 << 20) * (2 << 20));
  madvise(p, n, MADV_HUGEPAGE);
  for (size_t i = 0; i < n; i += 2) {
    p[i] = char(i * 7);
    p[i + 1] = char(0x3f);
  }
  return p;
}
template <class T>
__attribute__((noinline)) void direct(Block& b, const PaBucket& k) {
#ifdef OLD
  if (b.a.world <= 2)
    Direct<T, 2>(b, k).run();
  else if (b.a.world <= 4)
    Direct<T, 4>(b, k).run();
  else
    Direct<T, 0>(b, k).run();
#else
  switch (b.a.world) {
    case 2:
      Direct<T, 2>(b, k).run();
      break;
    case 3:
      Direct<T, 3>(b, k).run();
      break;
    case 4:
      Direct<T, 4>(b, k).run();
      break;
    default:
      Direct<T, 0>(b, k).run();
  }
#endif
}
__attribute__((noinline)) void limit(char** p, int n, size_t bytes) {
  typedef long V __attribute__((vector_size(32)));
  for (size_t i = 0; i < bytes; i += 32) {
    V x = *(V*)(p[0] + i);
    for (int r = 1; r < n; r++) x ^= *(V*)(p[r] + i);
    for (int r = 0; r < n; r++) *(V*)(p[r] + i) = x;
  }
}
int main(int c, char** v) {
  size_t sizes[] = {16 << 10, 256 << 10, 64 << 20};
  int worlds[] = {2, 3, 4, 8};
  for (int n : worlds)
    for (size_t bytes : sizes) {
      std::vector<char*> p;
      for (int r = 0; r < n; r++) p.push_back(buf(bytes));
      alignas(128) static PaChannel ch;
      PaBucket bk{};
      std::vector<PaSegment> seg(n);
      PaArgs a{};
      a.channel = (uint64_t)&ch;
      a.world = n;
      a.channels = 1;
      for (int r = 0; r < n; r++) {
        ch.scale[r] = 1.0 / n;
        ch.segments[r] = (uint64_t)&seg[r];
      }
      ch.divisor = ch.divisor_f32 = (n == 3) ? 3 * 1.0 / 3 : 1;
      if (n == 3) {
        for (int r = 0; r < n; r++) ch.scale[r] = 0.25;
        ch.divisor = ch.divisor_f32 = 0.75;
      }
      bk.packs = bytes / 16;
      bk.channel_packs = bk.packs;
      bk.segment_count = 1;
      auto time = [&](auto f) {
        int reps = std::max<size_t>(1, (32 << 20) / bytes / (bytes > (1 << 20) ? 1 : 1));
        if (bytes > (1 << 20)) reps = 1;
        double best = 1e9;
        for (int k = 0; k < 9; k++) {
          double s = now();
          for (int i = 0; i < reps; i++) f();
          best = std::min(best, (now() - s) / reps);
        }
        return best / bytes / n * 1e9;
      };
      double lim = time([&] { limit(p.data(), n, bytes); });
      printf("n=%d %8zu KiB limit %.4f ns/B", n, bytes >> 10, lim);
      auto go = [&](const char* name, auto e) {
        using T = decltype(e);
        for (int r = 0; r < n; r++) seg[r] = {(uint64_t)p[r], bytes / sizeof(T), 0};
        double t = time([&] {
          for (int r = 0; r < n; r++) {
            a.rank = r;
            bk.segments = (uint64_t)&seg[r];
            Block b(Exec{{0}}, a, false);
            direct<T>(b, bk);
          }
        });
        printf("  %s %.2f", name, t / lim);
      };
      go("f32", float{});
      go("bf16", BF16{});
      go("f16", F16{});
      go("f64", double{});
      puts("");
      for (auto q : p) free(q);
    }
}
