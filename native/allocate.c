/* The functions by which a job gets, frees and asks about device memory.
 *
 * From 2 MB on cuMemAlloc reserves an address and puts physical memory below it, one handle for an
 * allocation, so that it can be evicted. All else is the driver's own, counted with the reason why
 * it cannot be. The laws are in memory.c.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "memory.h"

struct location { /* CUmemLocation */
    int type, id;
};
struct array { /* CUDA_ARRAY_DESCRIPTOR */
    size_t width, height;
    unsigned format, channels;
};
struct array_3d { /* CUDA_ARRAY3D_DESCRIPTOR */
    size_t width, height, depth;
    unsigned format, channels, flags;
};
struct external { /* CUDA_EXTERNAL_MEMORY_HANDLE_DESC, its beginning */
    unsigned type;
    void *handle[2];
    unsigned long long size;
};
struct ipc_handle {
    char bytes[64];
};
enum { ON_DEVICE = 1, OF_CONTEXT = 1, RANGE_SIZE = 12, HAS_VMM = 102 };

static _Atomic int plain; /* from now on nothing is made evictable */
static _Atomic int dying; /* freed under a capture, to be freed after it */

/* Begin a call of ours. 0: it is none of ours, the driver's function is to be called. */
static int begin(int *entered)
{
    gate_attach();
    return seat && (*entered = memory_enter());
}

/* The same for what frees: it does not wait for what is evicted. */
static int begin_free(void)
{
    gate_attach();
    return seat && !inside && (inside = 1);
}

static int done(int entered, int result)
{
    memory_leave(entered);
    return result;
}

static int freed(int result)
{
    inside = 0;
    return result;
}

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

static int claim(uint64_t bytes)
{
    int could = atomic_load(&head->quota_bytes) && pools[0].pool;
    return could ? memory_claim(bytes, 0) || (trim_pools(), memory_claim(bytes, 1)) : memory_claim(bytes, 1);
}

/* --- what can be evicted -------------------------------------------------------------------- */

static int may_be_evictable(uint64_t bytes)
{
    static _Atomic int told; /* 1: plain, 2: not */
    if (!told) {
        const char *word = getenv(MEMORY_VARIABLE);
        told = word && !strcmp(word, "plain") ? 1 : 2;
    }
    return bytes >= EVICTABLE_FROM && told == 2 && !plain && head->pool_bytes &&
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
static int free_ours(uint64_t at)
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
    if (!dying || captures)
        return;
    dying = 0;
    for (int i = 0; i < ROWS; i++)
        if (blocks[i].dying) {
            blocks[i].dying = 0;
            free_ours(blocks[i].at);
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
    if (claim(bytes)) {
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
    if (!begin(&entered))
        return real(at, bytes);
    free_dying();
    if (at && may_be_evictable(bytes))
        result = allocate(at, bytes);
    if (result == UNSUITED) {
        if (!claim(bytes))
            return done(entered, OUT_OF_MEMORY);
        if ((result = real(at, bytes)))
            memory_unclaim(bytes);
        else
            memory_keep(AN_ADDRESS, *at, bytes, IS_PLAIN);
    }
    return done(entered, result);
}

/* Forget what the driver is about to free; what it refuses to free is noted again. Until it is free
 * it is counted as such, so that nobody is given the room too early. */
static struct known forget(enum kind kind, uint64_t key)
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

static int forgotten(struct known was, int result)
{
    if (result && was.key)
        memory_note(was.kind, was.key, was.bytes, was.reason);
    if (was.key && was.reason != IS_IMPORTED)
        atomic_fetch_sub(&seat->freeing, (int64_t)was.bytes);
    return result;
}

static int is_ours(uint64_t at)
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
    if (!begin_free())
        return real(at);
    free_dying();
    if (is_ours(at))
        return freed(free_ours(at));
    struct known was = forget(AN_ADDRESS, at);
    return freed(forgotten(was, real(at)));
}

/* --- the driver's own kinds ------------------------------------------------------------------ */

EXPORT int cuMemAllocPitch_v2(uint64_t *at, size_t *pitch, size_t width, size_t height, unsigned element)
{
    int (*real)(uint64_t *, size_t *, size_t, size_t, unsigned) = driver_of(AT_cuMemAllocPitch_v2);
    uint64_t guess = (width + 511) / 512 * 512 * height;
    int entered, result;
    if (!begin(&entered))
        return real(at, pitch, width, height, element);
    if (!claim(guess))
        return done(entered, OUT_OF_MEMORY);
    result = real(at, pitch, width, height, element);
    memory_unclaim(guess);
    if (!result)
        memory_note(AN_ADDRESS, *at, *pitch * height, IS_PLAIN);
    return done(entered, result);
}

EXPORT int cuMemAllocManaged(uint64_t *at, size_t bytes, unsigned flags)
{
    int (*real)(uint64_t *, size_t, unsigned) = driver_of(AT_cuMemAllocManaged), entered, result;
    if (!begin(&entered))
        return real(at, bytes, flags);
    if (!claim(bytes))
        return done(entered, OUT_OF_MEMORY);
    if ((result = real(at, bytes, flags)))
        memory_unclaim(bytes);
    else
        memory_keep(AN_ADDRESS, *at, bytes, IS_MANAGED);
    return done(entered, result);
}

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
    int ours = begin(&entered), counted = ours && !is_capturing(stream);
    if (counted) {
        if (!from_pool && !REAL(cuCtxGetDevice, int *)(&device))
            REAL(cuDeviceGetMemPool, void **, int)(&pool, device);
        pthread_mutex_lock(&table);
        struct pool *p = pool ? pool_of(pool, 1) : NULL;
        counted = !p || !p->elsewhere;
        pthread_mutex_unlock(&table);
    }
    if (counted && !claim(bytes))
        return done(entered, OUT_OF_MEMORY);
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
    return ours ? done(entered, result) : result;
}

EXPORT int cuMemPoolCreate(void **pool, const struct location *properties)
{
    int (*real)(void **, const void *) = driver_of(AT_cuMemPoolCreate), entered;
    if (!begin(&entered))
        return real(pool, properties);
    int result = real(pool, properties);
    if (!result && properties[1].type != ON_DEVICE) {
        pthread_mutex_lock(&table);
        struct pool *p = pool_of(*pool, 1);
        if (p)
            p->elsewhere = 1;
        pthread_mutex_unlock(&table);
    }
    return done(entered, result);
}

EXPORT int cuMemPoolDestroy(void *pool)
{
    int (*real)(void *) = driver_of(AT_cuMemPoolDestroy);
    if (!begin_free())
        return real(pool);
    pthread_mutex_lock(&table);
    int result = real(pool);
    struct pool *p = result ? NULL : pool_of(pool, 0);
    if (p) {
        memory_add(-p->kept);
        memset(p, 0, sizeof *p);
    }
    pthread_mutex_unlock(&table);
    return freed(result);
}

EXPORT int cuMemPoolTrimTo(void *pool, size_t least)
{
    int (*real)(void *, size_t) = driver_of(AT_cuMemPoolTrimTo);
    if (!begin_free())
        return real(pool, least);
    pthread_mutex_lock(&table);
    int result = real(pool, least);
    look_at_pools();
    pthread_mutex_unlock(&table);
    return freed(result);
}

EXPORT int cuMemAllocAsync(uint64_t *at, size_t n, void *s) { return pool_alloc(at, n, NULL, s, 0, AT_cuMemAllocAsync); }
EXPORT int cuMemAllocAsync_ptsz(uint64_t *at, size_t n, void *s) { return pool_alloc(at, n, NULL, s, 0, AT_cuMemAllocAsync_ptsz); }
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
    if (!begin_free())
        return real(at, stream);
    if (is_ours(at)) /* of cuMemAlloc: waits, which is later than asked for, but not too early */
        return freed(free_ours(at));
    if (is_capturing(stream))
        return freed(real(at, stream));
    struct known was = forget(AN_ADDRESS, at);
    int result = forgotten(was, real(at, stream));
    pthread_mutex_lock(&table);
    look_at_pools();
    pthread_mutex_unlock(&table);
    return freed(result);
}

EXPORT int cuMemFreeAsync(uint64_t at, void *s) { return free_async(at, s, AT_cuMemFreeAsync); }
EXPORT int cuMemFreeAsync_ptsz(uint64_t at, void *s) { return free_async(at, s, AT_cuMemFreeAsync_ptsz); }

/* About what an array takes; the driver pads it. */
static uint64_t array_bytes(struct array_3d a)
{
    unsigned format = a.format & 0xff;
    uint64_t element = format == 1 || format == 8 ? 1 : format == 2 || format == 9 || format == 16 ? 2 : 4;
    return a.width * (a.height ? a.height : 1) * (a.depth ? a.depth : 1) * element * (a.channels ? a.channels : 1);
}

#define MAKE_ARRAY(made, bytes, call) \
    int entered, result; \
    if (!begin(&entered)) \
        return call; \
    if (!claim(bytes)) \
        return done(entered, OUT_OF_MEMORY); \
    if ((result = call)) \
        memory_unclaim(bytes); \
    else \
        memory_keep(AN_ARRAY, (uintptr_t)*(made), bytes, IS_ARRAY); \
    return done(entered, result)

EXPORT int cuArrayCreate_v2(void **made, const struct array *a)
{
    int (*real)(void **, const struct array *) = driver_of(AT_cuArrayCreate_v2);
    uint64_t bytes = a ? array_bytes((struct array_3d){a->width, a->height, 0, a->format, a->channels, 0}) : 0;
    MAKE_ARRAY(made, bytes, real(made, a));
}

EXPORT int cuArray3DCreate_v2(void **made, const struct array_3d *a)
{
    int (*real)(void **, const struct array_3d *) = driver_of(AT_cuArray3DCreate_v2);
    uint64_t bytes = a ? array_bytes(*a) : 0;
    MAKE_ARRAY(made, bytes, real(made, a));
}

EXPORT int cuMipmappedArrayCreate(void **made, const struct array_3d *a, unsigned levels)
{
    int (*real)(void **, const struct array_3d *, unsigned) = driver_of(AT_cuMipmappedArrayCreate);
    uint64_t bytes = a ? array_bytes(*a) : 0;
    if (levels > 1)
        bytes += bytes / 3;
    MAKE_ARRAY(made, bytes, real(made, a, levels));
}

static int destroy(enum kind kind, void *handle, int index)
{
    int (*real)(void *) = driver_of(index);
    if (!begin_free())
        return real(handle);
    struct known was = forget(kind, (uintptr_t)handle);
    return freed(forgotten(was, real(handle)));
}

EXPORT int cuArrayDestroy(void *array) { return destroy(AN_ARRAY, array, AT_cuArrayDestroy); }
EXPORT int cuMipmappedArrayDestroy(void *array) { return destroy(AN_ARRAY, array, AT_cuMipmappedArrayDestroy); }
EXPORT int cuDestroyExternalMemory(void *m) { return destroy(AN_IMPORT, m, AT_cuDestroyExternalMemory); }

EXPORT int cuImportExternalMemory(void **made, const struct external *what)
{
    int (*real)(void **, const struct external *) = driver_of(AT_cuImportExternalMemory), entered, result;
    if (!begin(&entered))
        return real(made, what);
    if (!(result = real(made, what)))
        memory_note(AN_IMPORT, (uintptr_t)*made, what->size, IS_IMPORTED);
    return done(entered, result);
}

/* --- between processes ------------------------------------------------------------------------ */

/* The driver exports no memory of our kind. So a job that asks for it once gets, from then on, the
 * driver's own kind. */
EXPORT int cuIpcGetMemHandle(struct ipc_handle *handle, uint64_t at)
{
    int (*real)(struct ipc_handle *, uint64_t) = driver_of(AT_cuIpcGetMemHandle), entered, result;
    if (!begin(&entered))
        return real(handle, at);
    plain = 1;
    if (!(result = real(handle, at)))
        memory_pin(at, IS_EXPORTED);
    return done(entered, result);
}

EXPORT int cuIpcOpenMemHandle_v2(uint64_t *at, struct ipc_handle handle, unsigned flags)
{
    int (*real)(uint64_t *, struct ipc_handle, unsigned) = driver_of(AT_cuIpcOpenMemHandle_v2);
    int entered, result;
    size_t bytes = 0;
    if (!begin(&entered))
        return real(at, handle, flags);
    if (!(result = real(at, handle, flags))) {
        REAL(cuMemGetAddressRange_v2, uint64_t *, size_t *, uint64_t)(NULL, &bytes, *at);
        memory_note(AN_IMPORT, *at, bytes, IS_IMPORTED);
    }
    return done(entered, result);
}

EXPORT int cuIpcCloseMemHandle(uint64_t at)
{
    int (*real)(uint64_t) = driver_of(AT_cuIpcCloseMemHandle);
    if (!begin_free())
        return real(at);
    struct known was = forget(AN_IMPORT, at);
    return freed(forgotten(was, real(at)));
}

/* --- physical memory of the job's own ---------------------------------------------------------- */

static void refer(uint64_t handle, struct physical *physical)
{
    struct known *k = memory_note(A_HANDLE, handle, 0, IS_SMALL);
    k->under = physical;
    physical->handles++;
}

static void let_go(struct physical *physical)
{
    if (physical->handles || physical->mappings)
        return;
    if (physical->counted)
        memory_forget(physical->counted);
    free(physical);
}

EXPORT int cuMemCreate(uint64_t *handle, size_t bytes, const void *properties, unsigned long long flags)
{
    int (*real)(uint64_t *, size_t, const void *, unsigned long long) = driver_of(AT_cuMemCreate);
    int entered, result;
    if (!begin(&entered))
        return real(handle, bytes, properties, flags);
    int counts = properties && ((const struct location *)properties)[1].type == ON_DEVICE;
    if (counts && !claim(bytes))
        return done(entered, OUT_OF_MEMORY);
    result = real(handle, bytes, properties, flags);
    if (counts && result)
        memory_unclaim(bytes);
    struct physical *physical = counts && !result ? calloc(1, sizeof *physical) : NULL;
    if (physical) {
        pthread_mutex_lock(&table);
        static uint64_t number;
        physical->counted = memory_keep(A_PHYSICAL, ++number, bytes, IS_OWN);
        refer(*handle, physical);
        pthread_mutex_unlock(&table);
    }
    return done(entered, result);
}

/* A handle of what another process exported: counted where it was made. */
EXPORT int cuMemImportFromShareableHandle(uint64_t *handle, void *from, int type)
{
    int (*real)(uint64_t *, void *, int) = driver_of(AT_cuMemImportFromShareableHandle), entered;
    if (!begin(&entered))
        return real(handle, from, type);
    int result = real(handle, from, type);
    struct physical *physical = result ? NULL : calloc(1, sizeof *physical);
    if (physical) {
        pthread_mutex_lock(&table);
        refer(*handle, physical);
        pthread_mutex_unlock(&table);
    }
    return done(entered, result);
}

EXPORT int cuMemRelease(uint64_t handle)
{
    int (*real)(uint64_t) = driver_of(AT_cuMemRelease);
    if (!begin_free())
        return real(handle);
    pthread_mutex_lock(&table);
    int result = real(handle);
    struct known *k = result ? NULL : memory_find(A_HANDLE, handle);
    if (k) {
        struct physical *physical = k->under;
        memory_forget(k);
        physical->handles--;
        let_go(physical);
    }
    pthread_mutex_unlock(&table);
    return freed(result);
}

EXPORT int cuMemMap(uint64_t at, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags)
{
    int (*real)(uint64_t, size_t, size_t, uint64_t, unsigned long long) = driver_of(AT_cuMemMap);
    int entered;
    if (!begin(&entered))
        return real(at, bytes, offset, handle, flags);
    pthread_mutex_lock(&table);
    int result = real(at, bytes, offset, handle, flags);
    struct known *k = result ? NULL : memory_find(A_HANDLE, handle);
    if (k) {
        struct physical *physical = k->under;
        int imported = !physical->counted;
        struct known *mapping = memory_note(A_MAPPING, at, imported ? bytes : 0, imported ? IS_IMPORTED : IS_SMALL);
        mapping->under = physical;
        mapping->bytes_mapped = bytes;
        physical->mappings++;
    }
    pthread_mutex_unlock(&table);
    return done(entered, result);
}

EXPORT int cuMemUnmap(uint64_t at, size_t bytes)
{
    int (*real)(uint64_t, size_t) = driver_of(AT_cuMemUnmap);
    if (!begin_free())
        return real(at, bytes);
    pthread_mutex_lock(&table);
    int result = real(at, bytes);
    for (uint64_t from = at; !result && from < at + bytes;) {
        struct known *k = memory_find(A_MAPPING, from);
        if (!k) {
            from += 64 << 10; /* no kind of memory is mapped by less */
            continue;
        }
        struct physical *physical = k->under;
        from += k->bytes_mapped;
        memory_forget(k);
        physical->mappings--;
        let_go(physical);
    }
    pthread_mutex_unlock(&table);
    return freed(result);
}

EXPORT int cuMemRetainAllocationHandle(uint64_t *handle, void *at)
{
    int (*real)(uint64_t *, void *) = driver_of(AT_cuMemRetainAllocationHandle), entered, result;
    if (!begin(&entered))
        return real(handle, at);
    memory_pin((uintptr_t)at, IS_REGISTERED);
    pthread_mutex_lock(&table);
    if (!(result = real(handle, at))) {
        struct known *k = memory_find(A_HANDLE, *handle);
        if (k && k->under)
            refer(*handle, k->under);
    }
    pthread_mutex_unlock(&table);
    return done(entered, result);
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
    if (!begin(&entered))
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
    return done(entered, result);
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
    if (!begin(&entered))
        return real(data, attribute, at);
    int result = real(data, attribute, at);
    if (!result)
        correct(attribute, data, at);
    return done(entered, result);
}

EXPORT int cuPointerGetAttributes(unsigned n, int *attributes, void **data, uint64_t at)
{
    int (*real)(unsigned, int *, void **, uint64_t) = driver_of(AT_cuPointerGetAttributes), entered;
    if (!begin(&entered))
        return real(n, attributes, data, at);
    int result = real(n, attributes, data, at);
    for (unsigned i = 0; !result && i < n; i++)
        correct(attributes[i], data[i], at);
    return done(entered, result);
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
    if (!begin(&entered))
        return real(peer, flags);
    int result = real(peer, flags);
    if (!result && !REAL(cuCtxGetDevice, int *)(&here) && !REAL(cuCtxPushCurrent_v2, void *)(peer)) {
        REAL(cuCtxGetDevice, int *)(&there);
        REAL(cuCtxPopCurrent_v2, void **)(&was);
        memory_share(there, here);
    }
    return done(entered, result);
}
