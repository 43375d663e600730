/* The memory of the job on devices: counted, limited, moved out and back.
 *
 * 1. What is evictable is made by us: an address that stays reserved, and physical memory below it
 *    that comes and goes. Whole allocations move. All else is the driver's own and stays.
 * 2. Something is evicted only when the node asks, while the gate is closed, nobody is inside a
 *    call, nothing is on a stream and no stream is under capture. Then every context is waited for.
 * 3. While anything is on its way or away, nobody is let in: neither by the gate nor to a call that
 *    uses memory or asks about it (`memory_enter`). Who comes waits before the call. Freeing passes.
 * 4. A caller announces itself (`passing`, `entered`), then looks at the state; who evicts sets the
 *    state, then looks who is announced. So none is overlooked.
 * 5. When the gate opens, or the node is dead, all comes back, at the same addresses, and only then
 *    is anybody let in. Is there no room, they wait, the seat says so, and it is tried again.
 * 6. Until the first byte moves, an opened gate takes the order back: callers need not wait for us.
 * 7. What is evicted is copied before it is unmapped. What could not be copied stays.
 * 8. A context that broke has lost its memory: what was away is given up and its callers are let in,
 *    to see its error.
 * 9. All processes of the page together hold no more than the quota. Who wants some claims it
 *    first, then adds up all seats; of two at a time at least one sees the other, and waits.
 *
 *   HERE --asked--> CLOSING --quiet--> MOVING --> AWAY --opened or asked--> RETURNING --> HERE
 *                   CLOSING --opened--> HERE       RETURNING --no room--> AWAY
 *
 * One thread moves (the one that tends the gate); it alone leaves MOVING, AWAY and RETURNING.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "memory.h"

enum { BUCKETS = 4096, CLAIM_TRIES = 2000 };

struct properties { /* CUmemAllocationProp */
    int type, handle_types, location, device;
    void *unused;
    unsigned char flags[8];
};
struct access { /* CUmemAccessDesc */
    int location, device, flags;
};

struct block blocks[ROWS];
_Atomic uint32_t memory_state;
pthread_mutex_t table;

static struct known *known[BUCKETS];
static struct row *rows;
_Atomic int passing;
static int fixed_rows;
static uint64_t accessors[DEVICES]; /* bit for each device that has access besides the own */
static void *primary[DEVICES]; /* contexts, as far as they were asked for */

static void set_up_table(void)
{
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&table, &recursive);
    pthread_mutexattr_destroy(&recursive);
}

void memory_attached(void)
{
    set_up_table();
    rows = (struct row *)((char *)seat + ROWS_AT);
    atomic_store(&seat->answered, (uint32_t)(atomic_load(&head->command[seat_number]) >> 32));
}

/* A child has none of its parent's memory. */
void memory_in_child(void)
{
    memset(blocks, 0, sizeof blocks);
    memset(known, 0, sizeof known);
    memset(accessors, 0, sizeof accessors);
    memory_state = MEMORY_HERE;
    rows = NULL;
    passing = fixed_rows = 0;
    move_in_child();
    pools_in_child();
    set_up_table();
}

/* --- who is let in -------------------------------------------------------------------------- */

static void tell_state(uint32_t state)
{
    uint32_t told;
    do
        atomic_store(&seat->memory_state, told = atomic_load(&memory_state));
    while (told != memory_state);
    if (state == MEMORY_HERE)
        syscall(SYS_futex, &memory_state, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

void memory_set_state(uint32_t state)
{
    atomic_store(&memory_state, state);
    tell_state(state);
}

int memory_change_state(uint32_t from, uint32_t to)
{
    if (!atomic_compare_exchange_strong(&memory_state, &from, to))
        return 0;
    tell_state(to);
    return 1;
}

int gate_is_open(void) { return !(atomic_load(&head->gate) & 1) || orphaned(); }

void memory_wait(void)
{
    int64_t from = now_ns();
    struct timespec look = {0, 10 * MS};
    uint32_t state;
    atomic_fetch_add(&seat->blocks, 1);
    atomic_fetch_add(&seat->waiting, 1);
    while ((state = atomic_load(&memory_state)))
        if (!(state == MEMORY_CLOSING && gate_is_open() && memory_change_state(state, MEMORY_HERE)))
            syscall(SYS_futex, &memory_state, FUTEX_WAIT_PRIVATE, state, &look, NULL, 0);
    atomic_fetch_sub(&seat->waiting, 1);
    atomic_fetch_add(&seat->blocked_ns, (uint64_t)(now_ns() - from));
}

int memory_enter(void)
{
    if (!seat || inside)
        return 0;
    for (;;) {
        atomic_fetch_add(&passing, 1);
        if (!atomic_load(&memory_state)) {
            inside = 1;
            return 1;
        }
        atomic_fetch_sub(&passing, 1);
        memory_wait();
    }
}

void memory_leave(int entered)
{
    if (!entered)
        return;
    inside = 0;
    atomic_fetch_sub(&passing, 1);
}

/* --- the quota ------------------------------------------------------------------------------ */

static struct seat *seat_at(int number)
{
    return (struct seat *)((char *)head + HEAD_BYTES + (size_t)number * SEAT_BYTES);
}

/* What all living processes hold, and what is on its way. Memory goes from claimed to held to being
 * freed; read in that order, what moves meanwhile is seen twice rather than not at all. */
static int64_t all_held(int64_t *moving)
{
    int64_t held = 0;
    *moving = 0;
    for (int i = 0; i < SEATS; i++) {
        struct seat *s = seat_at(i);
        uint32_t pid = atomic_load(&s->pid);
        if (!pid || pid > INT_MAX)
            continue;
        int64_t claimed = atomic_load(&s->claimed), has = atomic_load(&s->held);
        int64_t freeing = atomic_load(&s->freeing);
        if ((claimed <= 0 && has <= 0 && freeing <= 0) || (s != seat && kill((pid_t)pid, 0) && errno == ESRCH))
            continue;
        *moving += (claimed > 0 ? claimed : 0) + (freeing > 0 ? freeing : 0);
        held += has > 0 ? has : 0;
    }
    return held;
}

int64_t memory_held(void)
{
    int64_t moving;
    return all_held(&moving);
}

static void say_limit(uint64_t bytes, int64_t held, int64_t quota)
{
    static _Atomic int64_t said;
    int64_t now = now_ns(), before = said;
    char line[256];
    atomic_fetch_add(&seat->refusals, 1);
    if ((before && now - before < 1000 * MS) || !atomic_compare_exchange_strong(&said, &before, now))
        return; /* whoever tries again and again is told once a second */
    int n = snprintf(line, sizeof line,
                     "cotenant: out of memory: this job's own limit of %lld MiB on the device, not the "
                     "card's: it holds %lld MiB and asked for %lld MiB more\n",
                     (long long)(quota >> 20), (long long)(held >> 20),
                     (long long)((bytes + (1 << 20) - 1) >> 20));
    if (n > 0 && write(STDERR_FILENO, line, (size_t)n) < 0)
        return;
}

int memory_claim(uint64_t bytes, int say)
{
    if (bytes > INT64_MAX / 4) /* the driver's to refuse */
        return 1;
    int64_t n = (int64_t)bytes, held = 0, moving, quota = (int64_t)atomic_load(&head->quota_bytes);
    unsigned seed = (unsigned)syscall(SYS_gettid);
    for (int tries = 0; tries < CLAIM_TRIES; tries++) {
        atomic_fetch_add(&seat->claimed, n);
        if (quota <= 0)
            return 1;
        held = all_held(&moving);
        if (held + moving <= quota)
            return 1;
        atomic_fetch_sub(&seat->claimed, n);
        if (held + n > quota)
            break;
        rest((20 + rand_r(&seed) % 500) * US); /* others are at it: one may fail, or free some */
    }
    if (say)
        say_limit(bytes, held, quota);
    return 0;
}

void memory_unclaim(uint64_t bytes)
{
    if (bytes <= INT64_MAX / 4)
        atomic_fetch_sub(&seat->claimed, (int64_t)bytes);
}

static void count_memory(uint32_t reason, int64_t bytes, int row)
{
    if (reason == IS_IMPORTED) {
        atomic_fetch_add(&seat->imported, bytes);
        return;
    }
    atomic_fetch_add(&seat->held, bytes);
    atomic_fetch_add(reason == EVICTABLE  ? &seat->evictable
                     : reason == IS_SMALL ? &seat->small
                                          : &seat->fixed,
                     bytes);
    if (row < 0 && reason != IS_SMALL)
        atomic_fetch_add(&seat->unlisted, bytes);
}

void memory_add(int64_t bytes)
{
    atomic_fetch_add(&seat->held, bytes);
    atomic_fetch_add(&seat->fixed, bytes);
    atomic_fetch_add(&seat->unlisted, bytes);
}

/* --- the table ------------------------------------------------------------------------------ */

static struct known **bucket(enum kind kind, uint64_t key)
{
    uint64_t mixed = (key ^ key >> 21 ^ (uint64_t)kind << 60) * 0x9e3779b97f4a7c15ull;
    return &known[mixed >> 52];
}

struct known *memory_find(enum kind kind, uint64_t key)
{
    struct known *k = *bucket(kind, key);
    while (k && (k->kind != kind || k->key != key))
        k = k->next;
    return k;
}

/* A free row; -1: none. Those that cannot be evicted leave half of them to those that can. */
int memory_row(int fixed)
{
    if (fixed && fixed_rows >= ROWS / 2)
        return -1;
    for (int i = 0; i < ROWS; i++)
        if (blocks[i].state == ROW_FREE) {
            memset(&blocks[i], 0, sizeof blocks[i]);
            blocks[i].state = ROW_HERE;
            blocks[i].reason = fixed ? IS_PLAIN : EVICTABLE;
            fixed_rows += fixed;
            return i;
        }
    return -1;
}

/* As the node sees it. */
void memory_show(int i)
{
    struct block *b = &blocks[i];
    atomic_store(&rows[i].state, ROW_FREE);
    if (b->state == ROW_FREE)
        return;
    atomic_store(&rows[i].at, b->at);
    atomic_store(&rows[i].bytes, b->bytes);
    atomic_store(&rows[i].born, b->born);
    atomic_store(&rows[i].reason, b->reason);
    atomic_store(&rows[i].state, b->state);
    if ((uint32_t)i >= atomic_load(&seat->rows))
        atomic_store(&seat->rows, (uint32_t)i + 1);
}

static struct known *add(enum kind kind, uint64_t key, uint64_t bytes, uint32_t reason, int row)
{
    struct known *k = calloc(1, sizeof *k), **at = bucket(kind, key);
    if (!k)
        abort(); /* it would be freed without being known, and counted for ever */
    *k = (struct known){*at, kind, key, bytes, 0, reason, row, NULL, NULL};
    REAL(cuCtxGetCurrent, void **)(&k->context);
    *at = k;
    if (row >= 0) {
        blocks[row].at = key;
        blocks[row].bytes = bytes;
        blocks[row].reason = reason;
        blocks[row].born = atomic_load(&seat->launches);
        memory_show(row);
    }
    return k;
}

struct known *memory_note(enum kind kind, uint64_t key, uint64_t bytes, uint32_t reason)
{
    pthread_mutex_lock(&table);
    int listed = bytes >= EVICTABLE_FROM;
    if (!listed && reason != IS_IMPORTED)
        reason = IS_SMALL;
    struct known *k = add(kind, key, bytes, reason, listed ? memory_row(1) : -1);
    count_memory(k->reason, (int64_t)bytes, k->row);
    pthread_mutex_unlock(&table);
    return k;
}

struct known *memory_keep(enum kind kind, uint64_t key, uint64_t bytes, uint32_t reason)
{
    struct known *k = memory_note(kind, key, bytes, reason);
    memory_unclaim(bytes);
    return k;
}

struct known *memory_keep_block(int row, uint64_t asked, uint64_t handle, void *context, int device,
                                uint64_t at, uint64_t bytes)
{
    pthread_mutex_lock(&table);
    struct block *b = &blocks[row];
    b->asked = asked;
    b->handle = handle;
    b->context = context;
    b->device = device;
    struct known *k = add(AN_ADDRESS, at, bytes, EVICTABLE, row);
    count_memory(EVICTABLE, (int64_t)bytes, row);
    memory_unclaim(bytes);
    pthread_mutex_unlock(&table);
    gate_start_tending();
    return k;
}

void memory_forget(struct known *gone)
{
    pthread_mutex_lock(&table);
    struct known **at = bucket(gone->kind, gone->key);
    while (*at && *at != gone)
        at = &(*at)->next;
    if (*at)
        *at = gone->next;
    int away = gone->row >= 0 && blocks[gone->row].state == ROW_AWAY;
    count_memory(gone->reason, -(int64_t)gone->bytes, gone->row);
    if (away) { /* counted as evicted, not as evictable */
        atomic_fetch_add(&seat->evictable, (int64_t)gone->bytes);
        atomic_fetch_sub(&seat->evicted, (int64_t)gone->bytes);
    }
    if (gone->row >= 0) {
        fixed_rows -= !blocks[gone->row].asked;
        blocks[gone->row].state = ROW_FREE;
        memory_show(gone->row);
    }
    pthread_mutex_unlock(&table);
    free(gone);
}

void memory_fix(struct known *k, uint32_t reason)
{
    if (k->reason == IS_SMALL || k->reason == IS_IMPORTED)
        return;
    count_memory(k->reason, -(int64_t)k->bytes, k->row);
    k->reason = reason;
    count_memory(reason, (int64_t)k->bytes, k->row);
    if (k->row >= 0) {
        blocks[k->row].reason = reason;
        memory_show(k->row);
    }
}

/* Ours, whether it may still be evicted or not. */
struct block *memory_block(uint64_t address)
{
    uint32_t used = rows ? atomic_load(&seat->rows) : 0;
    for (uint32_t i = 0; i < used && i < ROWS; i++) {
        struct block *b = &blocks[i];
        if (b->state != ROW_FREE && b->asked && address - b->at < b->bytes)
            return b;
    }
    return NULL;
}

void memory_pin(uint64_t at, int reason)
{
    uint64_t base = at;
    if (!seat)
        return;
    pthread_mutex_lock(&table);
    struct block *b = memory_block(at);
    struct known *k = NULL;
    if (b)
        k = memory_find(AN_ADDRESS, b->at);
    else if (!REAL(cuMemGetAddressRange_v2, uint64_t *, size_t *, uint64_t)(&base, NULL, at))
        k = memory_find(AN_ADDRESS, base);
    if (k)
        memory_fix(k, (uint32_t)reason);
    pthread_mutex_unlock(&table);
}

int memory_discard(struct known *k)
{
    struct block b = blocks[k->row];
    int result = SUCCESS;
    if (b.state == ROW_HERE && b.handle) {
        result = REAL(cuMemUnmap, uint64_t, size_t)(b.at, b.bytes);
        REAL(cuMemRelease, uint64_t)(b.handle);
    }
    REAL(cuMemAddressFree, uint64_t, size_t)(b.at, b.bytes);
    memory_forget(k);
    return result;
}

void memory_hold(void) { pthread_mutex_lock(&table); }

void memory_release(void) { pthread_mutex_unlock(&table); }

void memory_device_ended(int device)
{
    if (device >= 0 && device < DEVICES && primary[device])
        memory_context_ended(primary[device]);
}

void *memory_primary_of(int device)
{
    return device >= 0 && device < DEVICES ? primary[device] : NULL;
}

void memory_primary(int device, void *context)
{
    if (device >= 0 && device < DEVICES)
        primary[device] = context;
}

/* The driver frees what belongs to a context with it; what is ours we have to. */
void memory_context_ended(void *context)
{
    pthread_mutex_lock(&table);
    for (int i = 0; i < ROWS; i++)
        if (blocks[i].state != ROW_FREE && blocks[i].context == context)
            memory_discard(memory_find(AN_ADDRESS, blocks[i].at));
    for (int i = 0; i < BUCKETS; i++)
        for (struct known *k = known[i], *next; k; k = next) {
            next = k->next;
            if (k->context == context && k->reason != IS_POOLED &&
                (k->kind == AN_ADDRESS || k->kind == AN_ARRAY))
                memory_forget(k);
        }
    move_context_ended(context);
    pthread_mutex_unlock(&table);
}

/* --- physical memory ------------------------------------------------------------------------ */

static int give_access(uint64_t at, uint64_t bytes, int device)
{
    struct access access[DEVICES];
    int n = 0;
    for (int i = 0; i < DEVICES; i++)
        if (i == device || accessors[device % DEVICES] >> i & 1)
            access[n++] = (struct access){1, i, 3};
    return REAL(cuMemSetAccess, uint64_t, size_t, const struct access *, size_t)(at, bytes, access,
                                                                                (size_t)n);
}

int memory_populate(uint64_t at, uint64_t bytes, int device, uint64_t *handle)
{
    struct properties wanted = {.type = 1, .location = 1, .device = device};
    int result = REAL(cuMemCreate, uint64_t *, size_t, const struct properties *,
                      unsigned long long)(handle, bytes, &wanted, 0);
    if (result)
        return result;
    result = REAL(cuMemMap, uint64_t, size_t, size_t, uint64_t, unsigned long long)(at, bytes, 0,
                                                                                    *handle, 0);
    if (!result && (result = give_access(at, bytes, device)))
        REAL(cuMemUnmap, uint64_t, size_t)(at, bytes);
    if (result)
        REAL(cuMemRelease, uint64_t)(*handle);
    return result;
}

void memory_share(int device, int peer)
{
    if (device < 0 || device >= DEVICES || peer < 0 || peer >= DEVICES)
        return;
    pthread_mutex_lock(&table);
    accessors[device] |= 1ull << peer;
    for (int i = 0; i < ROWS; i++)
        if (blocks[i].state == ROW_HERE && blocks[i].asked && blocks[i].device == device)
            give_access(blocks[i].at, blocks[i].bytes, device);
    pthread_mutex_unlock(&table);
}
