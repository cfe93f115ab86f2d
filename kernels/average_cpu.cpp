// CPU entry points: one block of one kernel, on the calling thread. Compiled once per instruction
// set, PA_ISA.
#include "coded.h"
#include "direct.h"
#include "host_stage.h"
#include "overlap.h"
#include "sample.h"
#include "scan.h"

namespace PA_ISA {
// A function per kernel: with all in one, the ring's code made the direct average 1.4 times slower
// (g++ 12).
PA_NOINLINE void direct(const Exec& ex, const PaArgs& args) {
  run_direct<DirectEnd::kMean>(ex, args);
}
PA_NOINLINE void direct_step(const Exec& ex, const PaArgs& args) {
  run_direct<DirectEnd::kStep>(ex, args);
}
PA_NOINLINE void direct_delta(const Exec& ex, const PaArgs& args) {
  run_direct<DirectEnd::kDelta>(ex, args);
}
PA_NOINLINE void ring(const Exec& ex, const PaArgs& args) { run_ring(ex, args); }
PA_NOINLINE void ring_commit(const Exec& ex, const PaArgs& args) { run_ring_commit(ex, args); }
PA_NOINLINE void ring_step(const Exec& ex, const PaArgs& args) { run_ring_step(ex, args); }
PA_NOINLINE void ring_vote(const Exec& ex, const PaArgs& args) { run_ring_vote(ex, args); }
PA_NOINLINE void ring_mix(const Exec& ex, const PaArgs& args) { run_ring_mix(ex, args); }
PA_NOINLINE void ring_int8(const Exec& ex, const PaArgs& args) { run_ring_coded<Int8>(ex, args); }
PA_NOINLINE void ring_bf16(const Exec& ex, const PaArgs& args) { run_ring_coded<Bf16>(ex, args); }
PA_NOINLINE void reference(const Exec& ex, const PaArgs& args) { run_reference(ex, args); }
PA_NOINLINE void anchor(const Exec& ex, const PaArgs& args) { run_anchor(ex, args); }
PA_NOINLINE void sample(const Exec& ex, const PaArgs& args) { run_sample(ex, args); }
PA_NOINLINE void compare(const Exec& ex, const PaArgs& args) { run_compare(ex, args); }
PA_NOINLINE void snapshot(const Exec& ex, const PaArgs& args) { run_snapshot(ex, args); }
PA_NOINLINE void apply(const Exec& ex, const PaArgs& args) { run_apply(ex, args); }
PA_NOINLINE void scan(const Exec& ex, const PaArgs& args) { run_scan(ex, args); }
PA_FN void run_kernel(const Exec& ex, const PaArgs& args, uint32_t kernel) {
  switch (kernel) {
    case PA_DIRECT: return direct(ex, args);
    case PA_RING: return ring(ex, args);
    case PA_RING_COMMIT: return ring_commit(ex, args);
    case PA_DIRECT_STEP: return direct_step(ex, args);
    case PA_RING_STEP: return ring_step(ex, args);
    case PA_RING_VOTE: return ring_vote(ex, args);
    case PA_RING_INT8: return ring_int8(ex, args);
    case PA_RING_BF16: return ring_bf16(ex, args);
    case PA_REFERENCE: return reference(ex, args);
    case PA_ANCHOR: return anchor(ex, args);
    case PA_RING_MIX: return ring_mix(ex, args);
    case PA_SAMPLE: return sample(ex, args);
    case PA_COMPARE: return compare(ex, args);
    case PA_SNAPSHOT: return snapshot(ex, args);
    case PA_APPLY: return apply(ex, args);
    case PA_DIRECT_DELTA: return direct_delta(ex, args);
    default: return scan(ex, args);
  }
}
} // namespace PA_ISA

// Sets the default floating-point environment. The trainer's thread may round in another direction,
// flush subnormals or trap; results must not depend on that.
struct DefaultFpEnv {
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  DefaultFpEnv() { _mm_setcsr(0x1f80); } // to nearest, nothing flushed, nothing trapped
  ~DefaultFpEnv() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  DefaultFpEnv() {
    asm volatile("mrs %0, fpcr" : "=r"(before)::"memory");
    asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)) : "memory");
  }
  ~DefaultFpEnv() { asm volatile("msr fpcr, %0" ::"r"(before) : "memory"); }
#endif
};

#if !defined(PA_LANES)
#define PA_JOIN(a, b) a##b
#define PA_NAME(prefix, isa) PA_JOIN(prefix, isa)
extern "C" void PA_NAME(pa_run_block_, PA_ISA)(const PaArgs* args, uint32_t kernel,
                                               uint32_t channel) {
  const DefaultFpEnv fp_env;
  PA_ISA::run_kernel(PA_ISA::Exec{{channel}}, *args, kernel);
}
#endif
