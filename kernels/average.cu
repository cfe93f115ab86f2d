// CUDA entry points, with PaArgs by value. Launch `channels` blocks of a power of two of threads,
// at most PA_THREADS, all resident together with those of every other rank on the device
// (cooperative launch).
#include "direct.h"
#include "ring.h"
#include "scan.h"

#define PA_THREADS 512
#define PA_KERNEL(name, body)                                 \
  extern "C" __global__ void __launch_bounds__(PA_THREADS, 1) \
      name(const __grid_constant__ PaArgs args) {             \
    const PA_ISA::Exec ex{};                                  \
    PA_ISA::body(ex, args);                                   \
  }

PA_KERNEL(pa_direct, run_direct)
PA_KERNEL(pa_ring, run_ring<PA_RING>)
PA_KERNEL(pa_ring_reduce, run_ring<PA_RING_REDUCE>)
PA_KERNEL(pa_ring_gather, run_ring<PA_RING_GATHER>)
PA_KERNEL(pa_scan, run_scan)

// Probe of peer access: writes `words` words derived from `seed` to `memory`, or, where `differs`
// is not null, compares them and sets *differs if one differs. One block.
extern "C" __global__ void pa_probe(uint32_t* memory, uint32_t words, uint32_t seed,
                                    uint32_t* differs) {
  const uint32_t spread = 2654435761u; // no bit stays the same from word to word
  for (uint32_t i = threadIdx.x; i < words; i += blockDim.x) {
    const uint32_t value = (i + seed) * spread;
    if (differs == nullptr) PA_ISA::store_relaxed(memory + i, value);
    else if (PA_ISA::load_relaxed(memory + i) != value) PA_ISA::store_relaxed(differs, 1);
  }
}
