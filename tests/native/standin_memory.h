/* Memory of the stand-in, part of standin.c. Device memory is host memory, accounted for over all
 * processes in stats->memory; STANDIN_MEMORY says how much the device has. Physical memory that is
 * mapped is really there, and really gone when it is unmapped: who touches it then crashes.
 */
static uint64_t device_bytes(void)
{
    const char *word = getenv("STANDIN_MEMORY");
    return word ? strtoull(word, NULL, 10) : MEMORY;
}

static int take(uint64_t n)
{
    uint64_t used = atomic_fetch_add(&stats->memory, n) + n, peak = stats->peak;
    if (used > device_bytes()) {
        atomic_fetch_sub(&stats->memory, n);
        return NO_MEMORY;
    }
    while (used > peak && !atomic_compare_exchange_weak(&stats->peak, &peak, used))
        ;
    return OK;
}

/* --- allocations ------------------------------------------------------------------------------ */

enum { BLOCKS = 8192, VMM = 1, GRAIN = 2 << 20 };
static struct block { void *at; size_t n; struct context *context; int kind; } blocks[BLOCKS];
static struct physical { char *base; size_t n; int handles, maps; } physical[BLOCKS];
static struct mapping { char *at; size_t n; int of; unsigned access; } mappings[BLOCKS];
static _Atomic uint64_t creations;

static int allocate(uint64_t *at, size_t n)
{
    int state = enter();
    if (!state)
        state = fault("alloc", atomic_fetch_add(&allocs, 1) + 1);
    if (state || !n)
        return state ? state : INVALID;
    if (take(n))
        return NO_MEMORY;
    pthread_mutex_lock(&guard);
    state = NO_MEMORY;
    for (int i = 0; i < BLOCKS && state; i++)
        if (!blocks[i].at) {
            blocks[i] = (struct block){calloc(1, n), n, current, 0};
            *at = (uint64_t)blocks[i].at;
            state = OK;
        }
    pthread_mutex_unlock(&guard);
    return state;
}

static void drop(struct block *b)
{
    free(b->at);
    stats->memory -= b->n;
    b->at = NULL;
}

static int release(uint64_t at)
{
    int state = INVALID;
    pthread_mutex_lock(&guard);
    for (int i = 0; i < BLOCKS && at; i++)
        if (blocks[i].at == (void *)at) {
            drop(&blocks[i]);
            state = OK;
        }
    pthread_mutex_unlock(&guard);
    return state;
}

static void free_of_context(struct context *c)
{
    pthread_mutex_lock(&guard);
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].at && blocks[i].context == c)
            drop(&blocks[i]);
    pthread_mutex_unlock(&guard);
}

static void forget_memory(void)
{
    memset(blocks, 0, sizeof blocks);
    memset(physical, 0, sizeof physical);
    memset(mappings, 0, sizeof mappings);
}

EXPORT int cuMemAlloc_v2(uint64_t *at, size_t n) { return allocate(at, n); }
EXPORT int cuMemAllocManaged(uint64_t *at, size_t n, unsigned f) { (void)f; return allocate(at, n); }
EXPORT int cuMemAllocPitch_v2(uint64_t *at, size_t *pitch, size_t w, size_t h, unsigned e)
{
    (void)e;
    *pitch = (w + 511) / 512 * 512;
    return allocate(at, *pitch * h);
}
EXPORT int cuMemFree_v2(uint64_t at)
{
    int e = current ? cuCtxSynchronize() : OK;
    return e ? e : release(at);
}
/* One pool. With STANDIN_POOL_KEEPS what is freed stays reserved until it is used again or trimmed. */
static _Atomic uint64_t kept, pool_used;
EXPORT int cuMemAllocFromPoolAsync(uint64_t *at, size_t n, void *p, void *s)
{
    (void)p, (void)s;
    uint64_t again = kept < n ? kept : n;
    stats->memory -= again;
    kept -= again;
    int state = allocate(at, n);
    if (state) {
        stats->memory += again;
        kept += again;
    } else
        pool_used += n;
    return state;
}
EXPORT int cuMemAllocAsync(uint64_t *at, size_t n, void *s) { return cuMemAllocFromPoolAsync(at, n, NULL, s); }
EXPORT int cuMemFreeAsync(uint64_t at, void *s)
{
    uint64_t before = stats->memory;
    int e = enter();
    if (e || (e = drain(stream_at(s, 0))) || (e = release(at)))
        return e;
    uint64_t n = before - stats->memory;
    pool_used -= n;
    if (getenv("STANDIN_POOL_KEEPS")) {
        stats->memory += n;
        kept += n;
    }
    return OK;
}
EXPORT int cuMemPoolTrimTo(void *p, size_t least)
{
    (void)p, (void)least;
    stats->memory -= kept;
    kept = 0;
    return OK;
}
EXPORT int cuMemPoolGetAttribute(void *p, int attribute, void *value)
{
    (void)p;
    *(uint64_t *)value = attribute == 5 ? kept + pool_used : pool_used;
    return OK;
}
EXPORT int cuMemPoolCreate(void **p, const void *props) { (void)props; *p = &primary; return OK; }
EXPORT int cuMemPoolDestroy(void *p) { (void)p; return OK; }
EXPORT int cuDeviceGetDefaultMemPool(void **p, int d) { (void)d; *p = &primary; return OK; }
EXPORT int cuDeviceGetMemPool(void **p, int d) { (void)d; *p = &primary; return OK; }
EXPORT int cuMemGetInfo_v2(size_t *left, size_t *all) { *all = device_bytes(); *left = *all - stats->memory; return enter(); }

struct array { size_t width, height; unsigned format, channels; };
EXPORT int cuArrayCreate_v2(void **made, const struct array *a)
{
    return allocate((uint64_t *)made, a->width * (a->height ? a->height : 1) * a->channels * 4);
}
EXPORT int cuArrayDestroy(void *array) { return release((uint64_t)array); }

/* --- virtual memory ---------------------------------------------------------------------------- */

EXPORT int cuMemGetAllocationGranularity(size_t *n, const void *p, int f) { (void)p, (void)f; *n = GRAIN; return OK; }

EXPORT int cuMemAddressReserve(uint64_t *at, size_t n, size_t align, uint64_t hint, unsigned long long f)
{
    (void)hint, (void)f;
    align = align ? align : GRAIN;
    char *base = mmap(NULL, n + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED || n % 4096)
        return INVALID;
    char *first = (char *)(((uint64_t)base + align - 1) / align * align);
    if (first > base)
        munmap(base, (size_t)(first - base));
    munmap(first + n, align - (size_t)(first - base));
    *at = (uint64_t)first;
    return OK;
}

EXPORT int cuMemAddressFree(uint64_t at, size_t n) { return munmap((void *)at, n) ? INVALID : OK; }

EXPORT int cuMemCreate(uint64_t *handle, size_t n, const void *p, unsigned long long f)
{
    (void)p, (void)f;
    int state = !initialized ? 3 : broken ? broken : fault("", 0);
    if (!state)
        state = fault("create", atomic_fetch_add(&creations, 1) + 1);
    if (state || !n || n % GRAIN)
        return state ? state : INVALID;
    if (take(n))
        return NO_MEMORY;
    pthread_mutex_lock(&guard);
    int i = 0;
    while (physical[i].n)
        i++;
    char *base = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    physical[i] = (struct physical){base, n, 1, 0};
    *handle = (uint64_t)i + 1;
    pthread_mutex_unlock(&guard);
    return OK;
}

static void settle_physical(int i)
{
    if (physical[i].handles || physical[i].maps)
        return;
    munmap(physical[i].base, physical[i].n);
    stats->memory -= physical[i].n;
    physical[i].n = 0;
}

EXPORT int cuMemRelease(uint64_t handle)
{
    if (!handle || handle > BLOCKS || !physical[handle - 1].handles)
        return INVALID;
    pthread_mutex_lock(&guard);
    physical[handle - 1].handles--;
    settle_physical((int)handle - 1);
    pthread_mutex_unlock(&guard);
    return OK;
}

EXPORT int cuMemMap(uint64_t at, size_t n, size_t offset, uint64_t handle, unsigned long long f)
{
    (void)f;
    struct physical *p = &physical[handle - 1];
    if (!handle || handle > BLOCKS || !p->handles || offset + n > p->n || at % GRAIN || n % GRAIN)
        return INVALID;
    if (mremap(p->base + offset, 0, n, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)at) == MAP_FAILED)
        return INVALID;
    mprotect((void *)at, n, PROT_NONE);
    pthread_mutex_lock(&guard);
    p->maps++;
    int i = 0;
    while (mappings[i].n)
        i++;
    mappings[i] = (struct mapping){(char *)at, n, (int)handle - 1, 0};
    pthread_mutex_unlock(&guard);
    return OK;
}

static struct mapping *mapping_at(uint64_t at)
{
    for (int i = 0; i < BLOCKS; i++)
        if (mappings[i].n && at - (uint64_t)mappings[i].at < mappings[i].n)
            return &mappings[i];
    return NULL;
}

EXPORT int cuMemSetAccess(uint64_t at, size_t n, const int *who, size_t count)
{
    struct mapping *m = mapping_at(at);
    for (size_t i = 0; m && i < count; i++)
        m->access |= 1u << who[3 * i + 1];
    return mprotect((void *)at, n, PROT_READ | PROT_WRITE) ? INVALID : OK;
}

EXPORT int cuMemUnmap(uint64_t at, size_t n)
{
    int state = INVALID;
    pthread_mutex_lock(&guard);
    for (int i = 0; i < BLOCKS; i++) {
        struct mapping *m = &mappings[i];
        if (!m->n || (uint64_t)m->at < at || (uint64_t)m->at + m->n > at + n)
            continue;
        mmap(m->at, m->n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        m->n = 0;
        physical[m->of].maps--;
        settle_physical(m->of);
        state = OK;
    }
    pthread_mutex_unlock(&guard);
    return state;
}

EXPORT int cuMemGetAccess(unsigned long long *flags, const int *where, uint64_t at)
{
    struct mapping *m = mapping_at(at);
    *flags = m && m->access >> where[1] & 1 ? 3 : 0;
    return m ? OK : INVALID;
}

EXPORT int cuMemRetainAllocationHandle(uint64_t *handle, void *at)
{
    struct mapping *m = mapping_at((uint64_t)at);
    if (!m)
        return INVALID;
    physical[m->of].handles++;
    *handle = (uint64_t)m->of + 1;
    return OK;
}

/* --- asked about addresses ---------------------------------------------------------------------- */

static int range(uint64_t *base, size_t *n, uint64_t at)
{
    struct mapping *m = mapping_at(at);
    if (m) {
        if (base) *base = (uint64_t)m->at;
        if (n) *n = m->n;
        return VMM;
    }
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].at && at - (uint64_t)blocks[i].at < blocks[i].n) {
            if (base) *base = (uint64_t)blocks[i].at;
            if (n) *n = blocks[i].n;
            return OK;
        }
    return -1;
}

EXPORT int cuMemGetAddressRange_v2(uint64_t *base, size_t *n, uint64_t at) { return range(base, n, at) < 0 ? NOT_FOUND : OK; }

EXPORT int cuPointerGetAttribute(void *data, int attribute, uint64_t at)
{
    size_t n = 0;
    int kind = range(NULL, &n, at);
    if (kind < 0)
        return INVALID;
    if (attribute == 1)
        *(void **)data = kind == VMM ? NULL : (void *)&primary;
    else if (attribute == 2)
        *(unsigned *)data = 2;
    else if (attribute == 12)
        *(size_t *)data = n;
    else
        return UNSUPPORTED;
    return OK;
}

EXPORT int cuPointerGetAttributes(unsigned n, int *attributes, void **data, uint64_t at)
{
    int state = OK;
    for (unsigned i = 0; i < n && !state; i++)
        state = cuPointerGetAttribute(data[i], attributes[i], at);
    return state;
}

EXPORT int cuIpcGetMemHandle(void *handle, uint64_t at)
{
    memset(handle, 0, 64);
    return range(NULL, NULL, at) == OK ? OK : INVALID;
}
EXPORT int cuMemGetHandleForAddressRange(void *handle, uint64_t at, size_t n, int type, unsigned long long f)
{
    (void)n, (void)type, (void)f;
    *(int *)handle = -1;
    return range(NULL, NULL, at) < 0 ? INVALID : OK;
}
