// What the stand-ins for NCCL share. They run on the simulated driver, which NCCL itself can't use:
// they show that a program calls NCCL as it should, and nothing of what NCCL does.
#pragma once
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>

struct UniqueId { char bytes[128]; };

/// A function of the driver.
template <class F> F driver(const char *name) {
    static void *library = dlopen("libcuda.so.1", RTLD_NOW);
    return reinterpret_cast<F>(dlsym(library, name));
}

/// True if the variable asks for this fault.
inline bool asks_for(const char *variable, const char *fault) {
    const char *wanted = std::getenv(variable);
    return wanted && !std::strcmp(wanted, fault);
}
