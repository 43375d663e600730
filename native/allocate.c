/* The functions by which a job gets and frees device memory, and asks about it.
 *
 * From 2 MB on cuMemAlloc reserves an address and puts physical memory below it, one handle for an
 * allocation, so that it can be evicted. What is the driver's own is counted with the reason why it
 * cannot be: here, in pools.c and in kinds.c. The laws are in memory.c.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "memory.h"

enum { OF_CONTEXT = 1, RANGE_SIZE = 12, HAS_VMM = 102 };

_Atomic int memory_plain;
static _Atomic int dying; /* freed under a capture, to be freed after it */

/* --- what can be evicted -------------------------------------------------------------------- */

static int may_be_evictable(uint64_t bytes)
{
    static _Atomic int told; /* 1: plain, 2: not */
    if (!told) {
        const char *word = getenv(MEMORY_VARIABLE);
        told = word && !strcmp(word, "plain") ? 1 : 2;
    }
    return bytes >= EVICTABLE_FROM && told == 2 && !memory_plain && head->pool_bytes &&
           driver_has(AT_cuMemCreate) && driver_has(AT_cuMemAddressReserve);
}

static uint64_t granularity(int device)
{
    static _Atomic uint64_t known[DEVICES];
    int wanted[8] = {[0] = 1, [2] = 1, [3] = device}, able = 0; /* CUmemAllocationProp */
    size_t found = 0;
    if (device < 0 || device >= DEVICES)
        return 0;
    if (known[device])
        return known[device];
    if (REAL(cuDeviceGetAttribute, int *, int, int)(&able, HAS_VMM, device) || !able ||
        REAL(cuMemGetAllocationGranularity, size_t *, const void *, int)(&found, wanted, 0))
        return 0;
    return known[device] = found;
}

/* Give back one of ours as the driver's cuMemFree would: when all work is through. */
int memory_free_ours(uint64_t at)
{
    void *context = NULL, *was;
    pthread_mutex_lock(&table);
    struct known *k = memory_find(AN_ADDRESS, at);
    int mine = k && k->row >= 0 && blocks[k->row].asked && !blocks[k->row].dying;
    int wait = mine && blocks[k->row].state == ROW_HERE;
    if (wait && captures) { /* to wait now would end the capture */
        blocks[k->row].dying = 1;
        dying = 1;
        pthread_mutex_unlock(&table);
        return SUCCESS;
    }
    if (wait)
        context = blocks[k->row].context;
    pthread_mutex_unlock(&table);
    if (!mine)
        return INVALID_VALUE;
    if (wait && !REAL(cuCtxPushCurrent_v2, void *)(context)) {
        int result = REAL(cuCtxSynchronize, void)();
        REAL(cuCtxPopCurrent_v2, void **)(&was);
        if (result)
            return result;
    }
    pthread_mutex_lock(&table);
    int result = INVALID_VALUE;
    if ((k = memory_find(AN_ADDRESS, at)) && k->row >= 0 && blocks[k->row].asked)
        result = memory_discard(k);
    pthread_mutex_unlock(&table);
    return result;
}

static void free_dying(void)
{
    if (captures || !atomic_load_explicit(&dying, memory_order_relaxed) ||
        !atomic_exchange(&dying, 0))
        return;
    for (int i = 0; i < ROWS; i++) {
        pthread_mutex_lock(&table);
        uint64_t at = blocks[i].dying ? blocks[i].at : 0;
        blocks[i].dying = 0;
        pthread_mutex_unlock(&table);
        if (at)
            memory_free_ours(at);
    }
}

/* An evictable allocation. UNSUITED: the driver's own kind is to be tried. */
enum { UNSUITED = -1 };
static int allocate(uint64_t *at, uint64_t asked)
{
    void *context = NULL;
    int device = -1, result;
    uint64_t handle, unit;
    REAL(cuCtxGetCurrent, void **)(&context);
    if (!context || REAL(cuCtxGetDevice, int *)(&device) || !(unit = granularity(device)))
        return UNSUITED;
    uint64_t bytes = (asked + unit - 1) / unit * unit, found = 0;
    if (bytes < asked)
        return UNSUITED;
    pthread_mutex_lock(&table);
    int row = memory_row(0);
    pthread_mutex_unlock(&table);
    if (row < 0)
        return UNSUITED;
    result = OUT_OF_MEMORY;
    if (pools_claim(bytes)) {
        result = REAL(cuMemAddressReserve, uint64_t *, size_t, size_t, uint64_t, unsigned long long)(
            &found, bytes, unit, 0, 0);
        if (result)
            result = UNSUITED;
        else if ((result = memory_populate(found, bytes, device, &handle)))
            REAL(cuMemAddressFree, uint64_t, size_t)(found, bytes);
        if (!result) {
            memory_keep_block(row, asked, handle, context, device, found, bytes);
            *at = found;
            return SUCCESS;
        }
        memory_unclaim(bytes);
    }
    pthread_mutex_lock(&table);
    blocks[row].state = ROW_FREE;
    pthread_mutex_unlock(&table);
    /* Memory of the card's is short for any kind; else the driver's own kind may do. */
    return result == OUT_OF_MEMORY ? result : UNSUITED;
}

EXPORT int cuMemAlloc_v2(uint64_t *at, size_t bytes)
{
    int (*real)(uint64_t *, size_t) = driver_of(AT_cuMemAlloc_v2), entered, result = UNSUITED;
    if (!memory_begin(&entered))
        return real(at, bytes);
    free_dying();
    if (at && may_be_evictable(bytes))
        result = allocate(at, bytes);
    if (result == UNSUITED) {
        if (!pools_claim(bytes))
            return memory_done(entered, OUT_OF_MEMORY);
        if ((result = real(at, bytes)))
            memory_unclaim(bytes);
        else
            memory_keep(AN_ADDRESS, *at, bytes, IS_PLAIN);
    }
    return memory_done(entered, result);
}

/* Forget what the driver is about to free; what it refuses to free is noted again. Until it is free
 * it is counted as such, so that nobody is given the room too early. */
struct known memory_freeing(enum kind kind, uint64_t key)
{
    struct known was = {0};
    pthread_mutex_lock(&table);
    struct known *k = memory_find(kind, key);
    if (k) {
        was = *k;
        if (was.reason != IS_IMPORTED)
            atomic_fetch_add(&seat->freeing, (int64_t)was.bytes);
        memory_forget(k);
    }
    pthread_mutex_unlock(&table);
    return was;
}

int memory_was_freed(struct known was, int result)
{
    if (result && was.key)
        memory_note(was.kind, was.key, was.bytes, was.reason);
    if (was.key && was.reason != IS_IMPORTED)
        atomic_fetch_sub(&seat->freeing, (int64_t)was.bytes);
    return result;
}

int memory_is_ours(uint64_t at)
{
    pthread_mutex_lock(&table);
    struct known *k = memory_find(AN_ADDRESS, at);
    int found = k && k->row >= 0 && blocks[k->row].asked;
    pthread_mutex_unlock(&table);
    return found;
}

EXPORT int cuMemFree_v2(uint64_t at)
{
    int (*real)(uint64_t) = driver_of(AT_cuMemFree_v2);
    if (!memory_begin_free())
        return real(at);
    free_dying();
    if (memory_is_ours(at))
        return memory_freed(memory_free_ours(at));
    struct known was = memory_freeing(AN_ADDRESS, at);
    return memory_freed(memory_was_freed(was, real(at)));
}

/* --- what is asked ------------------------------------------------------------------------------ */

EXPORT int cuMemGetInfo_v2(size_t *left, size_t *all)
{
    int (*real)(size_t *, size_t *) = driver_of(AT_cuMemGetInfo_v2);
    int result = real(left, all);
    gate_attach();
    uint64_t quota = seat ? atomic_load(&head->quota_bytes) : 0;
    if (result || !quota || inside)
        return result;
    uint64_t held = (uint64_t)memory_held(), free_of_it = held < quota ? quota - held : 0;
    if (all && *all > quota)
        *all = quota;
    if (left && *left > free_of_it)
        *left = free_of_it;
    return result;
}

EXPORT int cuMemGetAddressRange_v2(uint64_t *base, size_t *bytes, uint64_t at)
{
    int (*real)(uint64_t *, size_t *, uint64_t) = driver_of(AT_cuMemGetAddressRange_v2), entered;
    if (!memory_begin(&entered))
        return real(base, bytes, at);
    int result = real(base, bytes, at);
    pthread_mutex_lock(&table);
    struct block *b = memory_block(at);
    if (b) { /* as it was asked for, not as it was rounded up */
        if (base)
            *base = b->at;
        if (bytes)
            *bytes = b->asked;
        result = SUCCESS;
    }
    pthread_mutex_unlock(&table);
    return memory_done(entered, result);
}

/* What the driver answers otherwise for memory of our kind than for its own. */
static void correct(int attribute, void *data, uint64_t at)
{
    if (!data || (attribute != OF_CONTEXT && attribute != RANGE_SIZE))
        return;
    pthread_mutex_lock(&table);
    struct block *b = memory_block(at);
    if (b && attribute == OF_CONTEXT)
        *(void **)data = b->context;
    else if (b)
        *(size_t *)data = b->asked;
    pthread_mutex_unlock(&table);
}

EXPORT int cuPointerGetAttribute(void *data, int attribute, uint64_t at)
{
    int (*real)(void *, int, uint64_t) = driver_of(AT_cuPointerGetAttribute), entered;
    if (!memory_begin(&entered))
        return real(data, attribute, at);
    int result = real(data, attribute, at);
    if (!result)
        correct(attribute, data, at);
    return memory_done(entered, result);
}

EXPORT int cuPointerGetAttributes(unsigned n, int *attributes, void **data, uint64_t at)
{
    int (*real)(unsigned, int *, void **, uint64_t) = driver_of(AT_cuPointerGetAttributes), entered;
    if (!memory_begin(&entered))
        return real(n, attributes, data, at);
    int result = real(n, attributes, data, at);
    for (unsigned i = 0; !result && i < n; i++)
        correct(attributes[i], data[i], at);
    return memory_done(entered, result);
}

/* --- devices ------------------------------------------------------------------------------------- */

EXPORT int cuDevicePrimaryCtxRetain(void **context, int device)
{
    int (*real)(void **, int) = driver_of(AT_cuDevicePrimaryCtxRetain);
    int result = real(context, device);
    if (!result && context)
        memory_primary(device, *context);
    return result;
}

/* Who may use the memory of a context's device may use what is ours there, too. */
EXPORT int cuCtxEnablePeerAccess(void *peer, unsigned flags)
{
    int (*real)(void *, unsigned) = driver_of(AT_cuCtxEnablePeerAccess), entered;
    int here = -1, there = -1;
    void *was;
    if (!memory_begin(&entered))
        return real(peer, flags);
    int result = real(peer, flags);
    if (!result && !REAL(cuCtxGetDevice, int *)(&here) && !REAL(cuCtxPushCurrent_v2, void *)(peer)) {
        REAL(cuCtxGetDevice, int *)(&there);
        REAL(cuCtxPopCurrent_v2, void **)(&was);
        memory_share(there, here);
    }
    return memory_done(entered, result);
}
