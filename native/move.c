/* Moves allocations to host memory and back, as the node asks. The laws are in memory.c. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "memory.h"

enum { STREAMS = 8, CONTEXTS = 64, PORTABLE = 1, NON_BLOCKING = 1, ALREADY_REGISTERED = 712 };
#define CHUNK (64ull << 20) /* the pool is pinned, and copied, by so much at a time */
#define AGAIN (5 * MS)      /* between two attempts to restore */

static struct {
    void *context, *stream;
} movers[STREAMS];
static char *pool; /* address space of pool_bytes; pages come as they are used, and stay */
static uint64_t pinned;

void move_in_child(void)
{
    memset(movers, 0, sizeof movers);
    pool = NULL; /* its pages were not given to the child */
    pinned = 0;
}

void move_context_ended(void *context)
{
    for (int i = 0; i < STREAMS; i++)
        if (movers[i].context == context)
            movers[i].context = NULL;
    pinned = 0; /* it may have been pinned in this one */
}

/* --- the pool ------------------------------------------------------------------------------- */

/* Where in the pool there is room for so many bytes; at its limit: nowhere. */
static uint64_t find_room(uint64_t bytes)
{
    uint64_t at = 0;
    for (int i = 0; i < ROWS && at + bytes <= head->pool_bytes;) {
        struct block *b = &blocks[i];
        if (b->state == ROW_AWAY && b->host < at + bytes && at < b->host + b->bytes) {
            at = b->host + b->bytes; /* and look at all of them again */
            i = 0;
        } else
            i++;
    }
    return at;
}

static int pin(uint64_t end)
{
    if (!pool) {
        char *found = mmap(NULL, head->pool_bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED)
            return OUT_OF_MEMORY;
        madvise(found, head->pool_bytes, MADV_DONTFORK);
        pool = found;
    }
    while (pinned < end) {
        uint64_t left = head->pool_bytes - pinned, bytes = left < CHUNK ? left : CHUNK;
        int result = REAL(cuMemHostRegister_v2, void *, size_t, unsigned)(pool + pinned, bytes, PORTABLE);
        if (result && result != ALREADY_REGISTERED)
            return result;
        pinned += bytes;
    }
    return SUCCESS;
}

/* --- one allocation ------------------------------------------------------------------------- */

/* A stream of ours in the current context. */
static int stream_here(void **stream)
{
    void *context = NULL;
    int i = 0;
    REAL(cuCtxGetCurrent, void **)(&context);
    while (i < STREAMS && movers[i].context && movers[i].context != context)
        i++;
    if (i == STREAMS) { /* all taken: the first gives way, its stream is left to its context */
        i = 0;
        movers[i].context = NULL;
    }
    if (!movers[i].context) {
        int result = REAL(cuStreamCreate, void **, unsigned)(&movers[i].stream, NON_BLOCKING);
        if (result)
            return result;
        movers[i].context = context;
    }
    *stream = movers[i].stream;
    return SUCCESS;
}

/* Copy an allocation to its place in the pool or from it. No copy crosses a seam of the pinning. */
static int copy_block(struct block *b, int out)
{
    void *stream = NULL;
    int result = stream_here(&stream);
    for (uint64_t done = 0; !result && done < b->bytes;) {
        uint64_t host = b->host + done, n = CHUNK - host % CHUNK;
        if (n > b->bytes - done)
            n = b->bytes - done;
        if (out)
            result = REAL(cuMemcpyDtoHAsync_v2, void *, uint64_t, size_t, void *)(
                pool + host, b->at + done, n, stream);
        else
            result = REAL(cuMemcpyHtoDAsync_v2, uint64_t, const void *, size_t, void *)(
                b->at + done, pool + host, n, stream);
        done += n;
    }
    int waited = stream ? REAL(cuStreamSynchronize, void *)(stream) : SUCCESS;
    return result ? result : waited;
}

static int move_out(struct block *b)
{
    b->host = find_room(b->bytes);
    if (b->host + b->bytes > head->pool_bytes)
        return OUT_OF_MEMORY;
    int result = pin(b->host + b->bytes);
    if (!result)
        result = copy_block(b, 1);
    if (!result)
        result = REAL(cuMemUnmap, uint64_t, size_t)(b->at, b->bytes);
    if (result)
        return result;
    REAL(cuMemRelease, uint64_t)(b->handle);
    b->handle = 0;
    b->state = ROW_AWAY;
    return SUCCESS;
}

static int move_back(struct block *b)
{
    int result = memory_populate(b->at, b->bytes, b->device, &b->handle);
    if (result)
        return result;
    pin(b->host + b->bytes); /* for speed: it is there anyhow */
    if ((result = copy_block(b, 0))) {
        REAL(cuMemUnmap, uint64_t, size_t)(b->at, b->bytes);
        REAL(cuMemRelease, uint64_t)(b->handle);
        b->handle = 0;
        return result;
    }
    b->state = ROW_HERE;
    return SUCCESS;
}

/* What the context says when all its work is through: an error, if it is beyond help. */
static int health(void) { return REAL(cuCtxSynchronize, void)(); }

/* Into the context of an allocation. If that is gone, but the memory is not, the device's primary. */
static int push(struct block *b)
{
    void *other = memory_primary_of(b->device);
    return !REAL(cuCtxPushCurrent_v2, void *)(b->context) ||
           (other && !REAL(cuCtxPushCurrent_v2, void *)(other));
}

/* Move one, in its context, and count it; gives bytes that moved. */
static int64_t move(int i, int out, int *error)
{
    struct block *b = &blocks[i];
    int64_t moved = 0;
    void *was;
    int pushed = push(b);
    int result = !pushed ? INVALID_VALUE : out ? move_out(b) : move_back(b);
    if (!out && (!pushed || (result && result != OUT_OF_MEMORY && health()))) {
        b->state = ROW_HERE; /* nothing is below it any more: its users get the context's error */
        b->handle = 0;
        atomic_fetch_or(&seat->flags, SEAT_FAULTED);
    }
    if (pushed)
        REAL(cuCtxPopCurrent_v2, void **)(&was);
    if (b->state == (out ? ROW_AWAY : ROW_HERE)) {
        moved = (int64_t)b->bytes;
        atomic_fetch_add(&seat->evictable, out ? -moved : moved);
        atomic_fetch_add(&seat->evicted, out ? moved : -moved);
        memory_show(i);
    }
    if (result)
        *error = result;
    return moved;
}

/* --- all of them ---------------------------------------------------------------------------- */

static void answer(uint32_t number, int64_t moved, int64_t from, int error)
{
    atomic_store(&seat->moved_bytes, (uint64_t)moved);
    atomic_store(&seat->moved_ns, (uint64_t)(now_ns() - from));
    atomic_store(&seat->memory_error, (uint32_t)error);
    atomic_store(&seat->answered, number);
}

/* Wait for all work in all contexts. What slots know is through; this is for what has none. */
static int synchronize(void)
{
    void *contexts[CONTEXTS], *was;
    int n = gate_contexts(contexts, CONTEXTS), result = SUCCESS;
    for (int i = 0; i < ROWS; i++) {
        int have = blocks[i].state == ROW_FREE || !blocks[i].context || n == CONTEXTS;
        for (int k = 0; k < n; k++)
            have |= contexts[k] == blocks[i].context;
        if (!have)
            contexts[n++] = blocks[i].context;
    }
    for (int i = 0; i < n && !result; i++) {
        if (REAL(cuCtxPushCurrent_v2, void *)(contexts[i]))
            continue; /* it is gone */
        result = health();
        REAL(cuCtxPopCurrent_v2, void **)(&was);
    }
    return result;
}

/* The next to go: those that no launch could touch yet before the others, then the largest. */
static int choose(void)
{
    int best = -1, best_cold = 0;
    uint64_t launches = atomic_load(&seat->launches);
    for (int i = 0; i < ROWS; i++) {
        struct block *b = &blocks[i];
        if (b->state != ROW_HERE || b->reason != EVICTABLE || !b->handle || b->tried || b->dying)
            continue;
        int cold = b->born >= launches;
        if (best < 0 || cold > best_cold || (cold == best_cold && b->bytes > blocks[best].bytes))
            best = i, best_cold = cold;
    }
    return best;
}

static void evict(int64_t wanted, uint32_t number)
{
    int64_t from = now_ns(), moved = 0;
    int error = synchronize(), trouble = SUCCESS; /* with one of them: the others may go */
    if (captures)
        error = IS_BUSY;
    if (memory_state == MEMORY_AWAY) /* nobody was let in since: go on */
        memory_set_state(MEMORY_MOVING);
    else if (!memory_change_state(MEMORY_CLOSING, MEMORY_MOVING)) /* opened meanwhile */
        return;
    for (int i = 0; i < ROWS; i++)
        blocks[i].tried = 0;
    while (!error && atomic_load(&seat->evicted) < wanted && !gate_is_open()) {
        int failed = SUCCESS;
        pthread_mutex_lock(&table);
        int i = choose();
        if (i >= 0) {
            moved += move(i, 1, &failed);
            blocks[i].tried = 1;
        }
        pthread_mutex_unlock(&table);
        if (i < 0)
            break;
        if (failed && failed != OUT_OF_MEMORY) /* the pool being full is no error */
            trouble = failed;
    }
    memory_set_state(atomic_load(&seat->evicted) > 0 ? MEMORY_AWAY : MEMORY_HERE);
    answer(number, moved, from, error ? error : trouble);
}

/* Bring everything back; the error if that could not be. */
static int restore(int64_t *moved)
{
    int error = SUCCESS;
    memory_set_state(MEMORY_RETURNING);
    for (int i = 0; i < ROWS && !error; i++) {
        pthread_mutex_lock(&table);
        if (blocks[i].state == ROW_AWAY)
            *moved += move(i, 0, &error);
        if (blocks[i].state == ROW_HERE)
            error = SUCCESS; /* given up, or back: on to the next */
        pthread_mutex_unlock(&table);
    }
    if (error)
        atomic_store(&seat->memory_error, (uint32_t)error);
    memory_set_state(error ? MEMORY_AWAY : MEMORY_HERE);
    return error;
}

/* The gate is open, or counts as open. */
static int64_t return_all(uint32_t number)
{
    int64_t moved = 0, from = now_ns();
    memory_change_state(MEMORY_CLOSING, MEMORY_HERE);
    if (memory_state == MEMORY_AWAY) {
        int error = restore(&moved);
        if (error)
            return AGAIN;
        answer(number, moved, from, SUCCESS);
    } else if (number != atomic_load(&seat->answered) && gate_is_open())
        answer(number, 0, from, (uint32_t)atomic_load(&head->command[seat_number]) ? IS_OPEN : SUCCESS);
    return 0;
}

int64_t memory_tend(int closed, int quiet)
{
    uint64_t command = atomic_load(&head->command[seat_number]);
    uint32_t number = (uint32_t)(command >> 32);
    int64_t wanted = (int64_t)(command & UINT32_MAX) << 20, moved = 0, from = now_ns();
    if (!closed)
        return return_all(number);
    if (memory_state == MEMORY_AWAY && !atomic_load(&seat->evicted))
        memory_set_state(MEMORY_HERE); /* the job freed all of it */
    if (number == atomic_load(&seat->answered))
        return 0;
    if (!wanted) {
        memory_change_state(MEMORY_CLOSING, MEMORY_HERE);
        int error = memory_state == MEMORY_AWAY ? restore(&moved) : SUCCESS;
        answer(number, moved, from, error);
        return 0;
    }
    if (atomic_load(&seat->evicted) >= wanted || captures) {
        memory_change_state(MEMORY_CLOSING, MEMORY_HERE);
        answer(number, 0, from, captures ? IS_BUSY : SUCCESS);
        return 0;
    }
    if (memory_state == MEMORY_HERE) {
        memory_set_state(MEMORY_CLOSING); /* who comes from now on waits; then look again */
        return 50 * US;
    }
    if (!quiet || passing)
        return 100 * US;
    evict(wanted, number);
    return 0;
}
