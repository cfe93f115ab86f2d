// A driver that refuses what NVIDIA's documentation says is refused and cudasim lets pass, and
// fails where a test says so. Everything else is cudasim's, which the loader finds behind this
// library: it is linked to it.
//
// STRICT_PEERS: so many peers a context may be given access to.
// strict_fail(function, calls): after so many more calls of it by this thread, one fails.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace {

enum Result {
  SUCCESS = 0,
  LAUNCH_OUT_OF_RESOURCES = 701,
  TOO_MANY_PEERS = 711,
  STREAM_CAPTURE_UNSUPPORTED = 900,
  STREAM_CAPTURE_INVALIDATED = 901,
  STREAM_CAPTURE_IMPLICIT = 906,
  CAPTURED_EVENT = 907,
};
enum Status { INVALIDATED = 2 };
enum Mode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Capture {
  uint64_t id;
  int mode;
  const void* thread;
  bool blocking;
};

std::mutex lock;
std::map<void*, Capture> captures; // by the stream that they began on
std::set<uint64_t> ended;
std::map<void*, uint64_t> captured_events; // and their captures
std::map<void*, int> peers;                // of a context

thread_local int mode = GLOBAL;
thread_local const char* failing = "";
thread_local int calls_before = 0;

template <class... Args> int cudasim(const char* function, Args... args) {
  static void* library = dlopen("libcuda.so.1", RTLD_LAZY);
  return reinterpret_cast<int (*)(Args...)>(dlsym(library, function))(args...);
}

bool fails(const char* function) {
  if (strcmp(function, failing) != 0 || calls_before-- > 0) return false;
  failing = "";
  return true;
}

// See cuThreadExchangeStreamCaptureMode: what may wait for a capture, or be part of one without
// being seen.
bool is_unsafe() {
  std::lock_guard guard(lock);
  if (mode == RELAXED) return false;
  for (const auto& [stream, capture] : captures) {
    if (capture.mode == GLOBAL && mode == GLOBAL) return true;
    if (capture.thread == &mode && capture.mode != RELAXED) return true;
  }
  return false;
}

// True if work on the legacy null stream would wait for a stream that is being captured.
bool is_implicit(void* stream) {
  std::lock_guard guard(lock);
  if (reinterpret_cast<uintptr_t>(stream) > 1) return false;
  for (const auto& [other, capture] : captures)
    if (capture.blocking) return true;
  return false;
}

// Id of the capture that a stream takes part in, or 0.
uint64_t capture_of(void* stream) {
  int status = 0;
  uint64_t id = 0;
  cudasim("cuStreamGetCaptureInfo", stream, &status, &id);
  return status != 0 ? id : 0;
}
} // namespace

#define API extern "C" __attribute__((visibility("default")))

API void strict_fail(const char* function, int calls) { failing = function, calls_before = calls; }

API int cuThreadExchangeStreamCaptureMode(int* other) {
  std::swap(*other, mode);
  return SUCCESS;
}

API int cuStreamBeginCapture_v2(void* stream, int capture_mode) {
  const int result = cudasim("cuStreamBeginCapture_v2", stream, capture_mode);
  unsigned flags = 0;
  if (result != SUCCESS) return result;
  cudasim("cuStreamGetFlags", stream, &flags);
  std::lock_guard guard(lock);
  captures[stream] = {capture_of(stream), capture_mode, &mode, (flags & 1) == 0};
  return result;
}

API int cuStreamEndCapture(void* stream, void** graph) {
  {
    std::lock_guard guard(lock);
    const auto capture = captures.find(stream);
    if (capture != captures.end()) {
      ended.insert(capture->second.id);
      captures.erase(capture);
    }
  }
  return cudasim("cuStreamEndCapture", stream, graph);
}

API int cuStreamIsCapturing(void* stream, int* status) {
  if (is_implicit(stream)) return STREAM_CAPTURE_IMPLICIT;
  return cudasim("cuStreamIsCapturing", stream, status);
}

API int cuEventRecord(void* event, void* stream) {
  if (fails("cuEventRecord")) return LAUNCH_OUT_OF_RESOURCES;
  if (is_implicit(stream)) return STREAM_CAPTURE_IMPLICIT;
  {
    std::lock_guard guard(lock);
    captured_events.erase(event);
    if (const uint64_t capture = capture_of(stream)) captured_events[event] = capture;
  }
  return cudasim("cuEventRecord", event, stream);
}

API int cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
  if (fails("cuStreamWaitEvent")) return LAUNCH_OUT_OF_RESOURCES;
  if (is_implicit(stream)) return STREAM_CAPTURE_IMPLICIT;
  {
    std::lock_guard guard(lock);
    const auto captured = captured_events.find(event);
    if (captured != captured_events.end() && ended.count(captured->second) != 0)
      return CAPTURED_EVENT;
  }
  return cudasim("cuStreamWaitEvent", stream, event, flags);
}

API int cuEventDestroy_v2(void* event) {
  {
    std::lock_guard guard(lock);
    captured_events.erase(event);
  }
  return cudasim("cuEventDestroy_v2", event);
}

API int cuCtxEnablePeerAccess(void* context, unsigned flags) {
  const char* most = getenv("STRICT_PEERS");
  void* current = nullptr;
  cudasim("cuCtxGetCurrent", &current);
  std::lock_guard guard(lock);
  const int result = cudasim("cuCtxEnablePeerAccess", context, flags);
  if (result != SUCCESS || most == nullptr || peers[current]++ < atoi(most)) return result;
  peers[current]--;
  cudasim("cuCtxDisablePeerAccess", context);
  return TOO_MANY_PEERS;
}

API int cuCtxDisablePeerAccess(void* context) {
  void* current = nullptr;
  cudasim("cuCtxGetCurrent", &current);
  std::lock_guard guard(lock);
  const int result = cudasim("cuCtxDisablePeerAccess", context);
  if (result == SUCCESS) peers[current]--;
  return result;
}

API int cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                       unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                       void** args, void** extra) {
  int status = 0;
  if (fails("cuLaunchKernel")) return LAUNCH_OUT_OF_RESOURCES;
  if (cudasim("cuStreamIsCapturing", stream, &status) == SUCCESS && status == INVALIDATED)
    return STREAM_CAPTURE_INVALIDATED;
  return cudasim("cuLaunchKernel", kernel, x, y, z, threads_x, threads_y, threads_z, shared,
                 stream, args, extra);
}

API int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  if (fails("cuMemcpyHtoDAsync_v2")) return LAUNCH_OUT_OF_RESOURCES;
  return cudasim("cuMemcpyHtoDAsync_v2", to, from, bytes, stream);
}

// Calls that a capture in the global mode forbids to all threads.
#define UNSAFE(name, declared, ...) \
  API int name declared { \
    return is_unsafe() ? STREAM_CAPTURE_UNSUPPORTED : cudasim(#name, __VA_ARGS__); \
  }
UNSAFE(cuMemAlloc_v2, (uint64_t* address, size_t bytes), address, bytes)
UNSAFE(cuMemFree_v2, (uint64_t address), address)
UNSAFE(cuMemHostAlloc, (void** address, size_t bytes, unsigned flags), address, bytes, flags)
UNSAFE(cuMemFreeHost, (void* address), address)
UNSAFE(cuEventQuery, (void* event), event)
UNSAFE(cuEventSynchronize, (void* event), event)
UNSAFE(cuStreamSynchronize, (void* stream), stream)
