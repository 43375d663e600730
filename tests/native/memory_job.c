/* A job of the memory tests. Reads commands, one a line; answers each with one line, a status of the
 * driver or what was asked for. NAME is a letter.
 *
 * alloc|managed|async|own|array|pitch NAME BYTES    free NAME     launch N
 * fill NAME SEED   every byte, by large copies      poke NAME VALUE   the first 8, by a small one
 * sum NAME         a checksum of every byte         ask NAME      offset of its base, its size
 * ipc|retain|dmabuf NAME                            info          MiB free, MiB in all
 * context          a new one, current from now on   destroy       that one
 * peer             may use the memory of that one; access NAME: whether the primary's device may
 * reset            the primary one                  fork BYTES    a child allocates; its status
 * threads N TIMES BYTES     N threads that allocate and free; how many were refused, then the most
 *                  that all of them held
 * begin, end       a capture                       
 * work NAME N      N kernels that count in NAME, small copies beside them; the count, and whether
 *                  what the copies wrote was always read again
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void *cuda;
#define CALL(name, ...) ((int (*)(__VA_ARGS__))dlsym(cuda, #name))
enum { OWN = 1, ARRAY, ASYNC };
static struct { uint64_t at, handle; size_t n; int kind; } named[128];
static void *context, *function, *counter, *second, *captured;
static long times;
static size_t most;
static _Atomic long refused, holding, peak;

static int own(int name, size_t n)
{
    int properties[8] = {[0] = 1, [2] = 1}, access[3] = {1, 0, 3};
    int r = CALL(cuMemAddressReserve, uint64_t *, size_t, size_t, uint64_t, unsigned long long)(&named[name].at, n, 0, 0, 0);
    if (!r && (r = CALL(cuMemCreate, uint64_t *, size_t, void *, unsigned long long)(&named[name].handle, n, properties, 0)))
        CALL(cuMemAddressFree, uint64_t, size_t)(named[name].at, n);
    if (!r)
        r = CALL(cuMemMap, uint64_t, size_t, size_t, uint64_t, unsigned long long)(named[name].at, n, 0, named[name].handle, 0);
    if (!r)
        r = CALL(cuMemSetAccess, uint64_t, size_t, void *, size_t)(named[name].at, n, access, 1);
    return r;
}

static int take(const char *verb, int name, size_t n)
{
    uint64_t *at = &named[name].at;
    size_t pitch;
    named[name].n = n;
    named[name].kind = 0;
    if (!strcmp(verb, "managed"))
        return CALL(cuMemAllocManaged, uint64_t *, size_t, unsigned)(at, n, 1);
    if (!strcmp(verb, "pitch"))
        return CALL(cuMemAllocPitch_v2, uint64_t *, size_t *, size_t, size_t, unsigned)(at, &pitch, 512, n / 512, 4);
    if (!strcmp(verb, "async")) {
        named[name].kind = ASYNC;
        return CALL(cuMemAllocAsync, uint64_t *, size_t, void *)(at, n, NULL);
    }
    if (!strcmp(verb, "array")) {
        struct { size_t w, h; unsigned format, channels; } a = {1024, n / 4096, 32, 1};
        named[name].kind = ARRAY;
        return CALL(cuArrayCreate_v2, uint64_t *, void *)(at, &a);
    }
    if (!strcmp(verb, "own")) {
        named[name].kind = OWN;
        return own(name, n);
    }
    return CALL(cuMemAlloc_v2, uint64_t *, size_t)(at, n);
}

static int give(int name)
{
    uint64_t at = named[name].at;
    if (named[name].kind == ARRAY)
        return CALL(cuArrayDestroy, uint64_t)(at);
    if (named[name].kind == ASYNC)
        return CALL(cuMemFreeAsync, uint64_t, void *)(at, NULL);
    if (named[name].kind == OWN) {
        CALL(cuMemRelease, uint64_t)(named[name].handle);
        return CALL(cuMemUnmap, uint64_t, size_t)(at, named[name].n);
    }
    return CALL(cuMemFree_v2, uint64_t)(at);
}

static int fill(int name, unsigned seed)
{
    size_t n = named[name].n;
    unsigned char *bytes = malloc(n);
    for (size_t i = 0; i < n; i++)
        bytes[i] = (unsigned char)((seed = seed * 1664525u + 1013904223u) >> 24);
    int r = CALL(cuMemcpyHtoD_v2, uint64_t, void *, size_t)(named[name].at, bytes, n);
    free(bytes);
    return r;
}

static void sum(int name)
{
    size_t n = named[name].n;
    unsigned char *bytes = malloc(n);
    uint64_t hash = 1469598103934665603ull;
    int r = CALL(cuMemcpyDtoH_v2, void *, uint64_t, size_t)(bytes, named[name].at, n);
    for (size_t i = 0; i < n; i++)
        hash = (hash ^ bytes[i]) * 1099511628211ull;
    free(bytes);
    printf("%d %lu\n", r, (unsigned long)hash);
}

static void *thrash(void *seed)
{
    unsigned state = (unsigned)(uintptr_t)seed;
    uint64_t at[8] = {0};
    size_t n[8];
    CALL(cuCtxSetCurrent, void *)(context);
    for (long i = 0; i < times; i++) {
        int k = rand_r(&state) % 8;
        if (at[k]) {
            holding -= (long)n[k];
            CALL(cuMemFree_v2, uint64_t)(at[k]);
            at[k] = 0;
            continue;
        }
        n[k] = ((size_t)rand_r(&state) << 5) % most + 1;
        if (CALL(cuMemAlloc_v2, uint64_t *, size_t)(&at[k], n[k])) {
            at[k] = 0;
            refused++;
            continue;
        }
        long now = holding += (long)n[k], before = peak;
        while (now > before && !atomic_compare_exchange_weak(&peak, &before, now))
            ;
    }
    for (int k = 0; k < 8; k++)
        if (at[k])
            CALL(cuMemFree_v2, uint64_t)(at[k]);
    return NULL;
}

static int launch(long n)
{
    void *params[] = {&context};
    int r = 0;
    for (long i = 0; i < n && !r; i++)
        r = CALL(cuLaunchKernel, void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *,
                 void **, void **)(function, 1, 1, 1, 1, 1, 1, 0, NULL, params, NULL);
    return r;
}

static void work(int name, long n)
{
    uint64_t at = named[name].at, zero = 0, count = 0, wrong = 0;
    void *params[] = {&at};
    int r = CALL(cuMemcpyHtoD_v2, uint64_t, void *, size_t)(at, &zero, 8);
    for (long i = 0; i < n && !r; i++) {
        long back = -1;
        r = CALL(cuLaunchKernel, void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *,
                 void **, void **)(counter, 1, 1, 1, 1, 1, 1, 0, NULL, params, NULL);
        if (i % 3)
            continue;
        r = r ? r : CALL(cuMemcpyHtoD_v2, uint64_t, void *, size_t)(at + 64, &i, 8);
        r = r ? r : CALL(cuMemcpyDtoH_v2, void *, uint64_t, size_t)(&back, at + 64, 8);
        wrong += back != i;
    }
    r = r ? r : CALL(cuMemcpyDtoH_v2, void *, uint64_t, size_t)(&count, at, 8);
    printf("%d %lu %lu\n", r, (unsigned long)count, (unsigned long)wrong);
}

static int setup(void)
{
    void *module;
    int r = CALL(cuInit, unsigned)(0);
    r = r ? r : CALL(cuDevicePrimaryCtxRetain, void **, int)(&context, 0);
    r = r ? r : CALL(cuCtxSetCurrent, void *)(context);
    r = r ? r : CALL(cuModuleLoadData, void **, void *)(&module, "x");
    return r ? r : CALL(cuModuleGetFunction, void **, void *, const char *)(&function, module, "spin_100") ||
           CALL(cuModuleGetFunction, void **, void *, const char *)(&counter, module, "count_20");
}

static void answer(const char *verb, const char *word, long a, long b)
{
    int name = word[0] & 127, r = 0, status;
    char handle[64];
    if (!strcmp(verb, "free"))
        r = give(name);
    else if (!strcmp(verb, "fill"))
        r = fill(name, (unsigned)a);
    else if (!strcmp(verb, "poke"))
        r = CALL(cuMemcpyHtoD_v2, uint64_t, void *, size_t)(named[name].at, &a, 8);
    else if (!strcmp(verb, "launch"))
        r = launch(atol(word));
    else if (!strcmp(verb, "ipc"))
        r = CALL(cuIpcGetMemHandle, void *, uint64_t)(handle, named[name].at);
    else if (!strcmp(verb, "retain"))
        r = CALL(cuMemRetainAllocationHandle, uint64_t *, void *)(&named[name].handle, (void *)named[name].at);
    else if (!strcmp(verb, "dmabuf"))
        r = CALL(cuMemGetHandleForAddressRange, void *, uint64_t, size_t, int, unsigned long long)(handle, named[name].at, 4096, 1, 0);
    else if (!strcmp(verb, "context"))
        r = CALL(cuCtxCreate_v2, void **, unsigned, int)(&second, 0, atoi(word));
    else if (!strcmp(verb, "peer")) {
        CALL(cuCtxSetCurrent, void *)(context);
        r = CALL(cuCtxEnablePeerAccess, void *, unsigned)(second, 0);
    } else if (!strcmp(verb, "access")) {
        int here[2] = {1, 0};
        unsigned long long flags = 0;
        r = CALL(cuMemGetAccess, unsigned long long *, void *, uint64_t)(&flags, here, named[name].at);
        r = r ? -r : (int)flags;
    } else if (!strcmp(verb, "destroy")) {
        r = CALL(cuCtxDestroy_v2, void *)(second);
        CALL(cuCtxSetCurrent, void *)(context);
    } else if (!strcmp(verb, "reset"))
        r = CALL(cuDevicePrimaryCtxReset_v2, int)(0);
    else if (!strcmp(verb, "begin")) {
        r = CALL(cuStreamCreate, void **, unsigned)(&captured, 0);
        r = r ? r : CALL(cuStreamBeginCapture_v2, void *, int)(captured, 0);
    } else if (!strcmp(verb, "end")) {
        void *graph;
        r = CALL(cuStreamEndCapture, void *, void **)(captured, &graph);
    } else if (!strcmp(verb, "work")) {
        work(name, a);
        return;
    } else if (!strcmp(verb, "info")) {
        size_t left, all;
        CALL(cuMemGetInfo_v2, size_t *, size_t *)(&left, &all);
        printf("%zu %zu\n", left >> 20, all >> 20);
        return;
    } else if (!strcmp(verb, "ask")) {
        uint64_t base = 0;
        size_t n = 0, range = 0;
        void *its = NULL;
        r = CALL(cuMemGetAddressRange_v2, uint64_t *, size_t *, uint64_t)(&base, &n, named[name].at + 8);
        r = r ? r : CALL(cuPointerGetAttribute, void *, int, uint64_t)(&range, 12, named[name].at);
        r = r ? r : CALL(cuPointerGetAttribute, void *, int, uint64_t)(&its, 1, named[name].at);
        printf("%d %ld %zu %zu %d\n", r, (long)(named[name].at - base), n, range, its == context);
        return;
    } else if (!strcmp(verb, "sum")) {
        sum(name);
        return;
    } else if (!strcmp(verb, "fork")) {
        fflush(stdout);
        if (!fork()) {
            setup();
            r = take("alloc", 'z', (size_t)atol(word));
            r = r ? r : fill('z', 1);
            usleep(200000); /* to be seen in its seat */
            _exit(r);
        }
        wait(&status);
        r = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    } else if (!strcmp(verb, "threads")) {
        pthread_t thread[32];
        long n = atol(word);
        times = a, most = (size_t)b, refused = holding = peak = 0;
        for (long i = 0; i < n; i++)
            pthread_create(&thread[i], NULL, thrash, (void *)(i + 1));
        for (long i = 0; i < n; i++)
            pthread_join(thread[i], NULL);
        printf("%ld %ld\n", refused, peak);
        return;
    } else
        r = take(verb, name, (size_t)a);
    printf("%d\n", r);
}

int main(void)
{
    char line[256], verb[32], word[64];
    setvbuf(stdout, NULL, _IOLBF, 0);
    cuda = dlopen("libcuda.so.1", RTLD_NOW);
    int r = cuda ? setup() : -1;
    printf("%d\n", r);
    while (fgets(line, sizeof line, stdin)) {
        long a = 0, b = 0;
        word[0] = 0;
        if (sscanf(line, "%31s %63s %ld %ld", verb, word, &a, &b) >= 1)
            answer(verb, word, a, b);
    }
    return 0;
}
