// CUDA entry points, with PaLaunch by value. Launch a grid of (channels, args) blocks of a power of
// two of threads, at most PA_THREADS. Blocks wait for one another, so all must find room; a plain
// launch is enough, since what else runs on the device ends without them.
#include "coded.h"
#include "direct.h"
#include "host_stage.h"
#include "overlap.h"
#include "probe.h"
#include "sample.h"
#include "scan.h"

#define PA_THREADS 512
static_assert(PA_THREADS == PA_ISA::kMostLanes);

namespace PA_ISA {
// Copies the arguments of this block's rank to shared memory: addresses there are constants, while
// an index into the parameters would hold registers throughout, and spill others.
PA_FN void load_args(PaArgs* own, const PaLaunch& launch) {
  static_assert(sizeof(PaArgs) % 8 == 0, "copied by words");
  const uint64_t* from = reinterpret_cast<const uint64_t*>(&launch.args[blockIdx.y]);
  uint64_t* to = reinterpret_cast<uint64_t*>(own);
  for (uint32_t i = threadIdx.x; i < sizeof(PaArgs) / 8; i += blockDim.x) to[i] = from[i];
  __syncthreads();
}
} // namespace PA_ISA
#define PA_KERNEL(name, body)                                 \
  extern "C" __global__ void __launch_bounds__(PA_THREADS, 1) \
      name(const __grid_constant__ PaLaunch launch) {         \
    __shared__ PaArgs args;                                   \
    PA_ISA::load_args(&args, launch);                         \
    PA_ISA::body(PA_ISA::Exec{}, args);                       \
  }

PA_KERNEL(pa_direct, run_direct<PA_ISA::DirectEnd::kMean>)
PA_KERNEL(pa_direct_step, run_direct<PA_ISA::DirectEnd::kStep>)
PA_KERNEL(pa_direct_delta, run_direct<PA_ISA::DirectEnd::kDelta>)
PA_KERNEL(pa_ring, run_ring)
PA_KERNEL(pa_ring_commit, run_ring_commit)
PA_KERNEL(pa_ring_step, run_ring_step)
PA_KERNEL(pa_ring_vote, run_ring_vote)
PA_KERNEL(pa_ring_mix, run_ring_mix)
PA_KERNEL(pa_ring_int8, run_ring_coded<PA_ISA::Int8>)
PA_KERNEL(pa_ring_bf16, run_ring_coded<PA_ISA::Bf16>)
PA_KERNEL(pa_reference, run_reference)
PA_KERNEL(pa_anchor, run_anchor)
PA_KERNEL(pa_sample, run_sample)
PA_KERNEL(pa_compare, run_compare)
PA_KERNEL(pa_snapshot, run_snapshot)
PA_KERNEL(pa_apply, run_apply)
PA_KERNEL(pa_scan, run_scan)

// Both sides of a probe at the same time: blocks of a power of two of threads, as many on each
// side.
extern "C" __global__ void __launch_bounds__(256)
    pa_probe(const __grid_constant__ PaProbeSide side) {
  PA_ISA::run_probe(PA_ISA::Exec{}, side);
}
