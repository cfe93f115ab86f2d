// CPU entry points: one block of one phase, on the calling thread. Compiled once per instruction set, PA_ISA.
#include "direct.h"
#include "ring.h"

namespace PA_ISA {
PA_FN void run_phase(const Exec& ex, const PaArgs& args, uint32_t phase) {
  switch (phase) {
    case PA_DIRECT: return run_direct(ex, args);
    case PA_RING: return run_ring<PA_RING>(ex, args);
    case PA_RING_REDUCE: return run_ring<PA_RING_REDUCE>(ex, args);
    case PA_RING_GATHER: return run_ring<PA_RING_GATHER>(ex, args);
    default: return run_scan(ex, args);
  }
}
} // namespace PA_ISA

#if !defined(PA_LANES)
#define PA_JOIN(a, b) a##b
#define PA_NAME(prefix, isa) PA_JOIN(prefix, isa)
extern "C" void PA_NAME(pa_run_block_, PA_ISA)(const PaArgs* args, uint32_t phase, uint32_t channel) {
  PA_ISA::run_phase(PA_ISA::Exec{channel}, *args, phase);
}


#endif
