// A stand-in for NCCL: the functions that `NcclHosts` calls, for processes on the simulated driver.
// Communicators do not block. Ranks meet at the process that has made the id, whose address is in
// it, and are connected by TCP. A group waits for its place in the stream, as a kernel would, and
// holds the stream up until its bytes are there, a rank is lost, or the communicator is aborted. A
// call that NCCL does not allow ends the process.
//
// STANDIN_NCCL: "old" is a version before 2.27.3, "init" fails as ranks meet, "group" fails in the
// second group, "abort" never returns from ncclCommAbort, "after" fails behind the second group,
// when its stream is done. STANDIN_NCCL_ADDRESS: where other hosts reach this one.
#include "../support/nccl/standin.hpp"

#include <arpa/inet.h>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

enum { Success = 0, System = 2, Usage = 5, Remote = 6, InProgress = 7 };

bool is(const char *fault) { return asks_for("STANDIN_NCCL", fault); }

[[noreturn]] void misuse(const char *what) {
    std::fprintf(stderr, "stand-in for NCCL: misuse: %s\n", what);
    std::abort();
}

struct Place { uint32_t address; uint16_t port; };
struct Hello { int32_t rank, ranks; Place place; };

sockaddr_in address_of(Place place) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = place.address;
    address.sin_port = place.port;
    return address;
}

/// The address where other ranks reach this process.
uint32_t own_address() {
    const char *given = std::getenv("STANDIN_NCCL_ADDRESS");
    in_addr address{};
    if (inet_pton(AF_INET, given ? given : "127.0.0.1", &address) != 1) misuse("no address");
    return address.s_addr;
}

int listen_anywhere(Place &place) {
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = address_of({htonl(INADDR_ANY), 0});
    socklen_t length = sizeof address;
    if (bind(listener, reinterpret_cast<sockaddr *>(&address), length) || listen(listener, 64) ||
        getsockname(listener, reinterpret_cast<sockaddr *>(&address), &length))
        misuse("no socket");
    place = {own_address(), address.sin_port};
    return listener;
}

/// A socket that is connected, unless nothing listens there: then nothing can be sent.
int connected(Place place) {
    int made = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = address_of(place);
    (void)!connect(made, reinterpret_cast<sockaddr *>(&address), sizeof address);
    return made;
}

/// Waits until a socket is ready. False if that is over.
bool wait_for(int socket, short what, const std::atomic<bool> &over) {
    pollfd polled{socket, what, 0};
    while (!over)
        if (poll(&polled, 1, 5) > 0) return true;
    return false;
}

template <class T> bool receive(int socket, T *to, size_t count, const std::atomic<bool> &over) {
    char *at = reinterpret_cast<char *>(to), *end = at + count * sizeof(T);
    while (at < end) {
        if (!wait_for(socket, POLLIN, over)) return false;
        ssize_t bytes = recv(socket, at, size_t(end - at), MSG_DONTWAIT);
        if (bytes <= 0) return false;
        at += bytes;
    }
    return true;
}

template <class T> bool send_all(int socket, const T *from, size_t count) {
    size_t bytes = count * sizeof(T); // small: they fit into the socket
    return send(socket, from, bytes, MSG_NOSIGNAL) == ssize_t(bytes);
}

/// Tells all ranks where all are, when all have come.
void be_root(int listener) {
    static const std::atomic<bool> never{false};
    std::vector<int> sockets;
    std::vector<Place> places;
    for (size_t come = 0; come == 0 || come < sockets.size(); ++come) {
        int socket = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        Hello hello;
        bool is_whole = socket >= 0 && receive(socket, &hello, 1, never);
        if (is_whole && come == 0) {
            sockets.assign(size_t(hello.ranks), -1);
            places.resize(sockets.size());
        }
        size_t rank = size_t(hello.rank);
        if (!is_whole || size_t(hello.ranks) != sockets.size() || sockets[rank] >= 0)
            return; // no rank gets an answer before its process has ended
        sockets[rank] = socket;
        places[rank] = hello.place;
    }
    for (int socket : sockets) send_all(socket, places.data(), places.size()), close(socket);
    close(listener);
}

struct Part {
    bool is_sent;
    uint64_t address;
    size_t bytes;
    int peer;
    size_t done;
    std::vector<char> data;
};
struct Group { std::vector<Part> parts; void *stream; };

struct Comm {
    static constexpr uint64_t LIVE = 0x6e63636c6c697665;
    std::atomic<uint64_t> magic{LIVE};
    int rank, ranks;
    UniqueId id;
    void *context = nullptr, *stream = nullptr;
    std::vector<int> sockets;
    std::atomic<int> state{InProgress};
    std::atomic<bool> over{false};
    bool is_finalized = false;
    /// In page-locked memory: the last group that has its turn in the stream, and that has ended.
    std::atomic<uint32_t> *turns = nullptr;
    uint32_t made = 0;
    /// Looks at the second group since it was enqueued, and its stream.
    int looks = 0;
    void *second = nullptr;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Group> groups; // without a stream: the last
    std::thread thread;

    bool meet() {
        Place root, own;
        std::memcpy(&root, id.bytes + 8, sizeof root);
        int listener = listen_anywhere(own), asking = connected(root);
        Hello hello{rank, ranks, own};
        std::vector<Place> places(size_t(ranks), Place{});
        bool met = send_all(asking, &hello, 1) &&
                   receive(asking, places.data(), places.size(), over);
        close(asking);
        for (int peer = 0; met && peer < rank; ++peer) {
            sockets[size_t(peer)] = connected(places[size_t(peer)]);
            met = send_all(sockets[size_t(peer)], &rank, 1);
        }
        for (int peer = rank + 1; met && peer < ranks; ++peer) {
            int other = -1, socket = -1;
            met = wait_for(listener, POLLIN, over) &&
                  (socket = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC)) >= 0 &&
                  receive(socket, &other, 1, over) && other > rank && other < ranks;
            if (met) sockets[size_t(other)] = socket;
        }
        close(listener);
        return met;
    }

    /// Sends and receives all parts at once. False if a rank is lost, or this one aborts.
    bool carry(std::vector<Part> &parts) {
        for (;;) {
            bool is_done = true;
            for (Part &part : parts) {
                int socket = sockets[size_t(part.peer)];
                while (part.done < part.bytes) {
                    char *at = part.data.data() + part.done;
                    size_t left = part.bytes - part.done;
                    int flags = MSG_DONTWAIT | MSG_NOSIGNAL;
                    ssize_t bytes = part.is_sent ? send(socket, at, left, flags)
                                                 : recv(socket, at, left, flags);
                    if (bytes < 0 && errno == EAGAIN) break;
                    if (bytes <= 0) return false;
                    part.done += size_t(bytes);
                }
                is_done &= part.done == part.bytes;
            }
            if (is_done || over) return is_done;
            usleep(100);
        }
    }

    int run(Group &group) {
        using Value = int (*)(void *, uint64_t, uint32_t, unsigned);
        auto write = driver<Value>("cuStreamWriteValue32_v2");
        auto wait = driver<Value>("cuStreamWaitValue32_v2");
        auto from = driver<int (*)(void *, uint64_t, size_t, void *)>("cuMemcpyDtoHAsync_v2");
        auto to = driver<int (*)(uint64_t, const void *, size_t, void *)>("cuMemcpyHtoDAsync_v2");
        auto sync = driver<int (*)(void *)>("cuStreamSynchronize");
        uint32_t turn = ++made;
        if (write(group.stream, uint64_t(&turns[0]), turn, 0) ||
            wait(group.stream, uint64_t(&turns[1]), turn, 0))
            return System;
        if (turn == 2) second = group.stream;
        state = Success; // what is enqueued; the group goes on
        while (turns[0] < turn)
            if (over) return Success;
            else usleep(50);
        for (Part &part : group.parts) {
            part.data.resize(part.bytes);
            if (part.is_sent && from(part.data.data(), part.address, part.bytes, stream))
                return System;
        }
        if (sync(stream)) return System;
        if (is("group") && turn == 2) return System;
        if (!carry(group.parts)) return Remote;
        for (Part &part : group.parts)
            if (!part.is_sent && to(part.address, part.data.data(), part.bytes, stream))
                return System;
        if (sync(stream)) return System;
        turns[1] = turn;
        return Success;
    }

    void work() {
        driver<int (*)(void *)>("cuCtxSetCurrent")(context);
        state = is("init") ? System : meet() ? Success : Remote;
        while (state == Success) {
            std::unique_lock<std::mutex> lock(mutex);
            changed.wait(lock, [&] { return over || !groups.empty(); });
            if (over) return;
            Group group = std::move(groups.front());
            groups.pop_front();
            lock.unlock();
            int result = group.stream ? run(group) : Success;
            if (result != Success) state = result; // the stream waits until the abort
            else if (!group.stream) state = Success;
            if (!group.stream) return;
        }
    }

    void post(Group group) {
        state = InProgress;
        std::lock_guard<std::mutex> lock(mutex);
        groups.push_back(std::move(group));
        changed.notify_all();
    }

    void end() {
        over = true;
        {
            std::lock_guard<std::mutex> lock(mutex);
            changed.notify_all();
        }
        thread.join();
        turns[1] = INT32_MAX;
        for (int socket : sockets)
            if (socket >= 0) close(socket);
        magic = 0; // and is kept, so that a later call is found out
    }
};

thread_local bool is_in_group = false;
thread_local Group group;
thread_local Comm *comm_of_group = nullptr;

Comm &live(Comm *comm) {
    if (!comm || comm->magic != Comm::LIVE) misuse("a communicator that has ended");
    return *comm;
}

int add(bool is_sent, void *at, size_t bytes, int type, int peer, Comm *comm, void *stream) {
    if (!is_in_group || type != 1 || peer < 0 || peer >= live(comm).ranks || peer == comm->rank)
        misuse("ncclSend or ncclRecv");
    if (comm->state == InProgress) misuse("a call before the one before is made");
    if (comm->state != Success) return comm->state;
    comm_of_group = comm;
    group.stream = stream;
    group.parts.push_back({is_sent, uint64_t(at), bytes, peer, 0, {}});
    return Success;
}

} // namespace

extern "C" {
struct Config { size_t size; unsigned magic, version; int blocking; };

int ncclGetVersion(int *version) {
    *version = is("old") ? 22602 : 22703;
    return Success;
}
int ncclGetUniqueId(UniqueId *id) {
    Place place;
    std::thread(be_root, listen_anywhere(place)).detach();
    std::memset(id, 0, sizeof *id);
    std::memcpy(id->bytes, "standin", 8);
    std::memcpy(id->bytes + 8, &place, sizeof place);
    return Success;
}
int ncclCommInitRankConfig(Comm **made, int ranks, UniqueId id, int rank, Config *config) {
    if (config->size < sizeof *config || config->magic != 0xcafebeef || config->version < 21400 ||
        config->blocking != 0 || std::strcmp(id.bytes, "standin") || rank < 0 || rank >= ranks)
        misuse("ncclCommInitRankConfig");
    Comm *comm = new Comm{};
    comm->rank = rank, comm->ranks = ranks, comm->id = id;
    comm->sockets.assign(size_t(ranks), -1);
    if (driver<int (*)(void **)>("cuCtxGetCurrent")(&comm->context) || !comm->context)
        misuse("no device is current");
    void *memory = nullptr;
    if (driver<int (*)(void **, size_t, unsigned)>("cuMemHostAlloc")(&memory, 64, 3) ||
        driver<int (*)(void **, unsigned)>("cuStreamCreate")(&comm->stream, 1))
        return 1;
    std::memset(memory, 0, 64);
    comm->turns = static_cast<std::atomic<uint32_t> *>(memory);
    comm->thread = std::thread(&Comm::work, comm);
    *made = comm;
    return InProgress;
}
int ncclCommGetAsyncError(Comm *comm, int *state) {
    *state = live(comm).state;
    // The caller's first look finds the group enqueued, and copies its bytes behind it.
    if (is("after") && *state == Success && comm->second && ++comm->looks == 2) {
        while (comm->turns[1] < 2) usleep(50);
        if (driver<int (*)(void *)>("cuCtxSetCurrent")(comm->context) ||
            driver<int (*)(void *)>("cuStreamSynchronize")(comm->second))
            misuse("the stream of a group");
        *state = comm->state = Remote;
    }
    return Success;
}
int ncclGroupStart() {
    if (is_in_group) misuse("ncclGroupStart");
    is_in_group = true;
    return Success;
}
int ncclSend(const void *from, size_t bytes, int type, int peer, Comm *comm, void *stream) {
    return add(true, const_cast<void *>(from), bytes, type, peer, comm, stream);
}
int ncclRecv(void *to, size_t bytes, int type, int peer, Comm *comm, void *stream) {
    return add(false, to, bytes, type, peer, comm, stream);
}
int ncclGroupEnd() {
    if (!is_in_group) misuse("ncclGroupEnd");
    is_in_group = false;
    if (!comm_of_group) return Success;
    comm_of_group->post(std::move(group));
    comm_of_group = nullptr;
    group = Group{};
    return InProgress;
}
int ncclCommFinalize(Comm *comm) {
    if (live(comm).state == InProgress || comm->is_finalized) misuse("ncclCommFinalize");
    if (comm->state != Success) return comm->state;
    comm->is_finalized = true;
    comm->post(Group{});
    return InProgress;
}
int ncclCommDestroy(Comm *comm) {
    if (!live(comm).is_finalized || comm->state != Success) misuse("ncclCommDestroy");
    comm->end();
    return Success;
}
int ncclCommAbort(Comm *comm) {
    while (is("abort")) sleep(1);
    live(comm).end();
    return Success;
}
const char *ncclGetErrorString(int result) {
    return result == Remote ? "remote process exited or there was a network error"
           : result == System ? "unhandled system error"
                              : "another error";
}
const char *ncclGetLastError(Comm *) { return "simulated"; }
}
