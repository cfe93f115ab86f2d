// What a scenario asks for: a world, the inputs of an average on one rank, and its outcome there.
#pragma once
#include <cstdint>
#include <vector>

#include "abi.h"

enum class Mode { kDirect, kRing, kCommit };
inline const char* name_of(Mode m) {
  return m == Mode::kDirect ? "direct" : m == Mode::kRing ? "ring" : "commit";
}

struct Shape { // one bucket
  uint32_t dtype;
  bool wire_f32;
  std::vector<uint64_t> elements;
};
struct Setup {
  Mode mode = Mode::kRing;
  uint32_t world = 3, channels = 2, lanes = 1, slots = 2, chunk = 8;
  std::vector<Shape> buckets;
  uint32_t epoch = 0;    // averages made before
  uint32_t sequence = 0; // chunks sent before over the first link; other links differ by a few
  uint64_t timeout_ns = 200'000'000'000;
  uint64_t seed = 1;
  bool steps = false; // with an outer optimizer; its state is set to 0 before each average
  bool stages = false; // with a stage on the host, which changes nothing
  bool copies = false; // of a copy of the tensors, which get its change at the end
  uint32_t kernel = PA_RING_COMMIT; // or PA_RING_INT8, PA_RING_BF16, of buckets of f32
  bool is_coded() const { return kernel != PA_RING_COMMIT; }
};
// Inputs of one average on one rank.
struct Call {
  uint32_t flags = 0;
  double weight = 1;
  uint64_t schedule = 7, detail = 0, found = 0;
  double measured[2] = {0, 0};
  uint32_t fault_step = 0, delay_ns = 0;
  // PA_RING_COMMIT: bit s: segment s begins a launch. Others begin as World::cuts() says.
  uint32_t cuts = 0;
  bool anchors = false; // Setup.steps: the average becomes the anchor, without a step
  uint32_t first_bucket = 0, bucket_count = 0; // of the average; no bucket_count: all
  bool in_full = false; // of a coded setup: the average has no code, and becomes the reference
  bool vetoes = false;  // Setup.stages: the stage refuses
  bool leaves = false;  // Setup.stages: the stage leaves a NaN where its shard begins
  // Delays before the average, between its launches, and of the last channel alone.
  uint32_t before_us = 0, between_us = 0, last_channel_us = 0;
};
// As `last_channel_us`: the last channel does not run, as on a device that fails.
constexpr uint32_t kNever = ~0u;
// Outcome on that rank.
struct Outcome {
  uint32_t kind = PA_OPEN, peer = 0, phase = 0;
  bool committed = false;
  uint64_t detail = 0, found = 0;
  bool joiner = false;
  double measured[2] = {0, 0};
  uint64_t active_ns = 0;
};
