/* What a call costs, in ns: a launch, a small copy, a small allocation with its end; the least of
 * the rounds. For benchmarks/gate.py. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

enum { ROUNDS = 15, CALLS = 300000 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

#define MEASURE(best, n, call) do { \
        double from = now(); \
        for (int i = 0; i < (n); i++) call; \
        double took = (now() - from) / (n); \
        if (!round || took < best) best = took; \
    } while (0)

int main(void)
{
    void *cuda = dlopen("libcuda.so.1", RTLD_NOW);
    if (!cuda)
        return 1;
    int (*init)(unsigned) = dlsym(cuda, "cuInit");
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                  void **) = dlsym(cuda, "cuLaunchKernel");
    int (*copy)(uint64_t, const void *, size_t, void *) = dlsym(cuda, "cuMemcpyHtoDAsync_v2");
    int (*alloc)(uint64_t *, size_t) = dlsym(cuda, "cuMemAlloc_v2");
    int (*release)(uint64_t) = dlsym(cuda, "cuMemFree_v2");
    double launches = 0, copies = 0, allocations = 0;
    uint64_t at;
    void *stream = &at;
    init(0);
    for (int round = 0; round < ROUNDS; round++) {
        MEASURE(launches, CALLS, launch((void *)0x1000, 1, 1, 1, 1, 1, 1, 0, stream, 0, 0));
        MEASURE(copies, CALLS, copy(0x1000, &at, 8, stream));
        MEASURE(allocations, CALLS / 10, (alloc(&at, 100), release(at)));
    }
    printf("%.1f %.1f %.1f\n", launches, copies, allocations);
    return 0;
}
