// The functions of NCCL that the bench calls, for tests on the simulated driver, which NCCL itself
// can't use. Ranks, which are threads of one process, meet at a barrier and reduce through the
// host, with the roundings of NCCL's ring: every partial sum in the dtype, and for ncclAvg every
// input times 1/n in the dtype.
//
// FAKE_NCCL: "crash" ends the process when ranks join, "hang" never lets them, "late" lets an
// all-reduce fail in the process that measures, though it did not when it was tried.
// FAKE_NCCL_VERSION: the version that it returns.
#include "../../../../tests/support/nccl/standin.hpp"

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <unistd.h>
#include <vector>

namespace {

constexpr size_t TRIED = 1 << 16; // the elements that the bench tries it with

struct World {
    std::mutex mutex;
    std::condition_variable changed;
    int ranks = 0, arrived = 0;
    unsigned round = 0;
    std::vector<std::vector<char>> inputs;

    void meet() {
        std::unique_lock<std::mutex> lock(mutex);
        if (++arrived == ranks) {
            arrived = 0;
            ++round;
            changed.notify_all();
        } else {
            unsigned mine = round;
            changed.wait(lock, [&] { return round != mine; });
        }
    }
} world;

struct Comm { int rank; };
struct Call { uint64_t buffer; size_t count; int type, op; Comm *comm; void *stream; };
thread_local std::vector<Call> calls;

bool is(const char *fault) { return asks_for("FAKE_NCCL", fault); }

struct bf16 {
    uint16_t bits;
    bf16(float x) {
        uint32_t raw;
        std::memcpy(&raw, &x, 4);
        bits = uint16_t((raw + 0x7fff + (raw >> 16 & 1)) >> 16);
    }
    operator float() const {
        uint32_t raw = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &raw, 4);
        return x;
    }
};

template <class T, class Wide> void reduce(std::vector<char> &out, bool avg) {
    size_t count = out.size() / sizeof(T), n = world.inputs.size();
    T inverse = T(Wide(1) / Wide(n));
    for (size_t i = 0; i < count; ++i) {
        Wide sum = 0;
        for (size_t rank = 0; rank < n; ++rank) {
            T x = reinterpret_cast<const T *>(world.inputs[rank].data())[i];
            if (avg) x = T(Wide(x) * Wide(inverse));
            sum = rank ? Wide(T(sum + Wide(x))) : Wide(x);
        }
        reinterpret_cast<T *>(out.data())[i] = T(sum);
    }
}

int run(const Call &call) {
    size_t size = call.type == 8 ? 8 : call.type == 7 ? 4 : 2;
    std::vector<char> mine(call.count * size);
    auto sync = driver<int (*)(void *)>("cuStreamSynchronize");
    auto from = driver<int (*)(void *, uint64_t, size_t)>("cuMemcpyDtoH_v2");
    auto to = driver<int (*)(uint64_t, const void *, size_t)>("cuMemcpyHtoD_v2");
    int result = sync(call.stream) || from(mine.data(), call.buffer, mine.size());
    world.inputs[call.comm->rank] = mine;
    world.meet();
    switch (call.type) {
    case 6: reduce<_Float16, float>(mine, call.op == 4); break;
    case 7: reduce<float, float>(mine, call.op == 4); break;
    case 8: reduce<double, double>(mine, call.op == 4); break;
    default: reduce<bf16, float>(mine, call.op == 4); break;
    }
    world.meet();
    result = result || to(call.buffer, mine.data(), mine.size());
    return result || (is("late") && call.count != TRIED);
}

} // namespace

extern "C" {
int ncclGetVersion(int *version) {
    const char *wanted = std::getenv("FAKE_NCCL_VERSION");
    *version = wanted ? std::atoi(wanted) : 23203;
    return 0;
}
int ncclGetUniqueId(UniqueId *id) {
    std::memset(id, 7, sizeof *id);
    return 0;
}
int ncclCommInitRank(Comm **comm, int ranks, UniqueId id, int rank) {
    if (is("crash")) std::abort();
    while (is("hang")) sleep(1);
    if (id.bytes[0] != 7 || id.bytes[127] != 7) return 4;
    const char *sharing = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
    if (!sharing || *sharing != '1') return 5; // the tests have one device
    {
        std::lock_guard<std::mutex> lock(world.mutex);
        world.ranks = ranks;
        world.inputs.resize(size_t(ranks));
    }
    *comm = new Comm{rank};
    world.meet();
    return 0;
}
int ncclCommDestroy(Comm *comm) {
    world.meet();
    delete comm;
    return 0;
}
int ncclCommAbort(Comm *comm) {
    delete comm;
    return 0;
}
int ncclGroupStart() { return 0; }
int ncclAllReduce(const void *from, void *to, size_t count, int type, int op, Comm *comm,
                  void *stream) {
    if (from != to || (op != 0 && op != 4)) return 4;
    calls.push_back({uint64_t(to), count, type, op, comm, stream});
    return 0;
}
int ncclGroupEnd() {
    int result = 0;
    for (const Call &call : calls) result = result ? result : run(call);
    calls.clear();
    return result;
}
const char *ncclGetErrorString(int) { return "a fault that was asked for"; }
const char *ncclGetLastError(Comm *) { return ""; }
}
