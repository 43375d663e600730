/* Stream-ordered memory: pools, what is in use of them and what they keep. The driver's own. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "memory.h"

/* --- pools, and what they keep ------------------------------------------------------------------ */

enum { POOLS = 64, RESERVED_NOW = 5, USED_NOW = 7 };

/* A pool that was used. What it keeps beyond what is in use is memory of the job's all the same. */
static struct pool {
    void *pool;
    int64_t kept;
    int elsewhere; /* not on a device: none of it counts */
} pools[POOLS];

void pools_in_child(void) { memset(pools, 0, sizeof pools); }

/* Under the lock. */
static struct pool *pool_of(void *pool, int make)
{
    struct pool *unused = NULL;
    for (int i = 0; i < POOLS; i++) {
        if (pools[i].pool == pool)
            return &pools[i];
        if (!pools[i].pool && !unused)
            unused = &pools[i];
    }
    if (make && unused)
        unused->pool = pool;
    return make ? unused : NULL;
}

/* Under the lock: see what each pool keeps now. */
static void look_at_pools(void)
{
    for (int i = 0; i < POOLS; i++) {
        uint64_t reserved = 0, used = 0;
        struct pool *p = &pools[i];
        if (!p->pool || p->elsewhere ||
            REAL(cuMemPoolGetAttribute, void *, int, void *)(p->pool, RESERVED_NOW, &reserved) ||
            REAL(cuMemPoolGetAttribute, void *, int, void *)(p->pool, USED_NOW, &used))
            continue;
        int64_t kept = reserved > used ? (int64_t)(reserved - used) : 0;
        memory_add(kept - p->kept);
        p->kept = kept;
    }
}

/* Have pools give back what they keep; whether there was any. */
static int trim_pools(void)
{
    int any = 0;
    pthread_mutex_lock(&table);
    look_at_pools();
    for (int i = 0; i < POOLS; i++)
        if (pools[i].pool && pools[i].kept) {
            any = 1;
            REAL(cuMemPoolTrimTo, void *, size_t)(pools[i].pool, 0);
        }
    if (any)
        look_at_pools();
    pthread_mutex_unlock(&table);
    return any;
}

int pools_claim(uint64_t bytes)
{
    int could = atomic_load(&head->quota_bytes) && pools[0].pool;
    return could ? memory_claim(bytes, 0) || (trim_pools(), memory_claim(bytes, 1)) : memory_claim(bytes, 1);
}

/* --- allocations ---------------------------------------------------------------------------- */

static int is_capturing(void *stream)
{
    int status = 0;
    return captures && !REAL(cuStreamIsCapturing, void *, int *)(stream, &status) && status;
}

/* Under a capture nothing is allocated: the graph does that when it runs. */
static int pool_alloc(uint64_t *at, size_t bytes, void *pool, void *stream, int from_pool, int index)
{
    int entered, result, device;
    void *real = driver_of(index);
    int ours = memory_begin(&entered), counted = ours && !is_capturing(stream);
    if (counted) {
        if (!from_pool && !REAL(cuCtxGetDevice, int *)(&device))
            REAL(cuDeviceGetMemPool, void **, int)(&pool, device);
        pthread_mutex_lock(&table);
        struct pool *p = pool ? pool_of(pool, 1) : NULL;
        counted = !p || !p->elsewhere;
        pthread_mutex_unlock(&table);
    }
    if (counted && !pools_claim(bytes))
        return memory_done(entered, OUT_OF_MEMORY);
    if (from_pool)
        result = ((int (*)(uint64_t *, size_t, void *, void *))real)(at, bytes, pool, stream);
    else
        result = ((int (*)(uint64_t *, size_t, void *))real)(at, bytes, stream);
    if (counted && result)
        memory_unclaim(bytes);
    else if (counted) {
        pthread_mutex_lock(&table);
        look_at_pools();
        memory_keep(AN_ADDRESS, *at, bytes, IS_POOLED);
        pthread_mutex_unlock(&table);
    }
    return ours ? memory_done(entered, result) : result;
}

EXPORT int cuMemPoolCreate(void **pool, const struct location *properties)
{
    int (*real)(void **, const void *) = driver_of(AT_cuMemPoolCreate), entered;
    if (!memory_begin(&entered))
        return real(pool, properties);
    int result = real(pool, properties);
    if (!result && properties[1].type != ON_DEVICE) {
        pthread_mutex_lock(&table);
        struct pool *p = pool_of(*pool, 1);
        if (p)
            p->elsewhere = 1;
        pthread_mutex_unlock(&table);
    }
    return memory_done(entered, result);
}

EXPORT int cuMemPoolDestroy(void *pool)
{
    int (*real)(void *) = driver_of(AT_cuMemPoolDestroy);
    if (!memory_begin_free())
        return real(pool);
    pthread_mutex_lock(&table);
    int result = real(pool);
    struct pool *p = result ? NULL : pool_of(pool, 0);
    if (p) {
        memory_add(-p->kept);
        memset(p, 0, sizeof *p);
    }
    pthread_mutex_unlock(&table);
    return memory_freed(result);
}

EXPORT int cuMemPoolTrimTo(void *pool, size_t least)
{
    int (*real)(void *, size_t) = driver_of(AT_cuMemPoolTrimTo);
    if (!memory_begin_free())
        return real(pool, least);
    pthread_mutex_lock(&table);
    int result = real(pool, least);
    look_at_pools();
    pthread_mutex_unlock(&table);
    return memory_freed(result);
}

EXPORT int cuMemAllocAsync(uint64_t *at, size_t n, void *s)
{
    return pool_alloc(at, n, NULL, s, 0, AT_cuMemAllocAsync);
}
EXPORT int cuMemAllocAsync_ptsz(uint64_t *at, size_t n, void *s)
{
    return pool_alloc(at, n, NULL, s, 0, AT_cuMemAllocAsync_ptsz);
}
EXPORT int cuMemAllocFromPoolAsync(uint64_t *at, size_t n, void *p, void *s)
{
    return pool_alloc(at, n, p, s, 1, AT_cuMemAllocFromPoolAsync);
}
EXPORT int cuMemAllocFromPoolAsync_ptsz(uint64_t *at, size_t n, void *p, void *s)
{
    return pool_alloc(at, n, p, s, 1, AT_cuMemAllocFromPoolAsync_ptsz);
}

static int free_async(uint64_t at, void *stream, int index)
{
    int (*real)(uint64_t, void *) = driver_of(index);
    if (!memory_begin_free())
        return real(at, stream);
    if (memory_is_ours(at)) /* of cuMemAlloc: waits, which is later than asked for, but not too early */
        return memory_freed(memory_free_ours(at));
    if (is_capturing(stream))
        return memory_freed(real(at, stream));
    struct known was = memory_freeing(AN_ADDRESS, at);
    int result = memory_was_freed(was, real(at, stream));
    pthread_mutex_lock(&table);
    look_at_pools();
    pthread_mutex_unlock(&table);
    return memory_freed(result);
}

EXPORT int cuMemFreeAsync(uint64_t at, void *s) { return free_async(at, s, AT_cuMemFreeAsync); }
EXPORT int cuMemFreeAsync_ptsz(uint64_t at, void *s) { return free_async(at, s, AT_cuMemFreeAsync_ptsz); }
