/* The gate.
 *
 * 1. While it is closed a caller blocks before the call. Nothing is queued, so nothing is lost,
 *    doubled or overtaken.
 * 2. Entering is announced (`entered`) before the gate is looked at, and the node closes before it
 *    looks at `entered`. So whoever is let in is seen.
 * 3. What is on the device is bounded: a call waits, gate open or not, while the estimates of what
 *    is in flight and its own exceed `bound_ns`. Estimates are means by function, measured with
 *    events. An unknown function counts as a quarter of the bound. If nothing moves for long, one
 *    call is let through: a kernel may wait for what comes after it.
 * 4. A mark is a number that the stream writes into its slot when it gets there. One follows each
 *    eighth of the bound, and a thread of ours puts the last ones when the gate closes.
 * 5. While any stream is under capture we ask nothing: a question may end the capture. Marks are put
 *    on streams that are neither under capture nor the legacy one, where the job may launch as well,
 *    with our thread exempt from what captures forbid. Calls on a capturing stream pass.
 * 6. A node whose heartbeat is old is dead, and its gate open.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

enum { READY = 0, NOT_READY = 600, ALREADY_REGISTERED = 712 };
enum { RING = 1024, FUNCTIONS_KNOWN = 4096, SAMPLES = 16, PORTABLE_MAPPED = 3 };
enum { NO_KEY = 0, ENDING = 1, CAPTURE_RELAXED = 2 };

struct stream {
    _Atomic uint64_t key; /* NO_KEY: free; ENDING: gone, its marks still to come */
    void *stream, *context;
    pthread_mutex_t lock;
    uint32_t seen;
    int64_t issued_ns, reaped_ns, loose_ns; /* the first two only grow */
    int64_t at_mark[RING];                  /* issued_ns when the mark was put */
};

struct function {
    _Atomic uint64_t key;
    _Atomic int64_t mean_ns;
    _Atomic uint32_t calls, samples;
    _Atomic int sampling;
};

struct sample {
    _Atomic int state; /* 0 free, 1 being recorded, 2 to be read */
    void *context, *start, *end;
    struct function *function;
};

static struct head open_head = {.bound_ns = INT64_MAX, .large_bytes = SIZE_MAX};
struct head *head = &open_head;
struct seat *seat;
int seat_number;
static struct slot *slots;
static struct stream streams[SLOTS];
static struct function functions[FUNCTIONS_KNOWN];
static struct sample samples[SAMPLES];
_Atomic int attached, captures;
static _Atomic int pending, tending, leaving;
static _Atomic int host_marks; /* the stream cannot write: host functions do */
static uint64_t device_at;     /* of the slots, to the device */
static _Atomic int registered;
static pthread_mutex_t attaching = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t naming = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t collecting = PTHREAD_MUTEX_INITIALIZER;
_Thread_local int inside;

int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

void rest(int64_t ns)
{
    struct timespec t = {0, ns};
    nanosleep(&t, NULL);
}

static void wait_gate(uint32_t word, int64_t ns)
{
    struct timespec t = {ns / 1000000000ll, ns % 1000000000ll};
    syscall(SYS_futex, &head->gate, FUTEX_WAIT, word, ns ? &t : NULL, NULL, 0);
}

int orphaned(void)
{
    int64_t beat = (int64_t)atomic_load_explicit(&head->beat_ns, RELAXED);
    int found = now_ns() - beat > (int64_t)head->patience_ns;
    if (found && seat)
        atomic_fetch_or(&seat->flags, SEAT_ORPHANED);
    return found;
}

/* --- the page ----------------------------------------------------------------------------- */

/* When a process started, in ticks since boot; 0: there is none, or only its remains. */
static uint64_t started(uint32_t pid)
{
    char path[32] = "/proc/self/stat", text[1024], *at;
    if (pid != (uint32_t)getpid()) /* whichever processes /proc shows */
        snprintf(path, sizeof path, "/proc/%u/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[n > 0 ? n : 0] = 0;
    if (!(at = strrchr(text, ')')) || strlen(at) < 3 || at[2] == 'Z' || at[2] == 'X')
        return 0;
    for (int field = 2; field < 22 && at; field++)
        at = strchr(at + 1, ' ');
    return at ? strtoull(at, NULL, 10) : 0;
}

/* Whether who has a seat is gone, or another process by now has its number. */
static int left_behind(const struct seat *s, uint64_t taken)
{
    uint64_t since = started((uint32_t)taken);
    return !since || (taken >> 32 && s->started != since);
}

static struct seat *take_seat(char *page)
{
    uint32_t mine = (uint32_t)getpid();
    for (int own = 1; own >= 0; own--) /* after exec our own is still there */
        for (int i = 0; i < SEATS; i++) {
            struct seat *s = (struct seat *)(page + HEAD_BYTES + i * SEAT_BYTES);
            uint64_t seen = atomic_load(&s->taken);
            uint32_t pid = (uint32_t)seen; /* the lower half */
            if (own ? pid != mine : pid && pid != mine && !left_behind(s, seen))
                continue;
            if (!atomic_compare_exchange_strong(&s->taken, &seen, mine))
                continue;
            memset(&s->started, 0, SEAT_BYTES - offsetof(struct seat, started));
            return s;
        }
    return NULL;
}

static void map_page(void)
{
    struct stat about;
    const char *path = getenv(PAGE_VARIABLE);
    int fd = path && *path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    char *page = MAP_FAILED;
    if (!fstat(fd, &about) && about.st_size >= PAGE_BYTES)
        page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page == MAP_FAILED)
        return;
    struct head *found = (struct head *)page;
    struct seat *mine = NULL;
    if (found->magic == PAGE_MAGIC && found->version == PAGE_VERSION && found->seats == SEATS)
        mine = take_seat(page);
    if (!mine) {
        munmap(page, PAGE_BYTES);
        return;
    }
    mprotect(page, HEAD_BYTES, PROT_READ); /* the head is the node's */
    mine->magic = SEAT_MAGIC;
    mine->started = started((uint32_t)getpid());
    slots = (struct slot *)((char *)mine + SLOTS_AT);
    seat_number = (int)(((char *)mine - page - HEAD_BYTES) / SEAT_BYTES);
    head = found;
    seat = mine;
    memory_attached();
    atomic_store(&mine->attached, 1);
}

static void in_child(void)
{
    head = &open_head;
    seat = NULL;
    slots = NULL;
    memset(streams, 0, sizeof streams);
    memset(samples, 0, sizeof samples);
    for (int i = 0; i < FUNCTIONS_KNOWN; i++)
        functions[i].sampling = 0;
    attached = pending = captures = tending = 0;
    registered = host_marks = inside = 0;
    memory_in_child();
    channels_in_child();
    pthread_mutex_init(&attaching, NULL);
    pthread_mutex_init(&naming, NULL);
    pthread_mutex_init(&collecting, NULL);
}

void gate_attach_slow(void)
{
    static int watched;
    pthread_mutex_lock(&attaching);
    if (!attached) {
        if (!watched++)
            pthread_atfork(NULL, NULL, in_child);
        for (int i = 0; i < SLOTS; i++)
            pthread_mutex_init(&streams[i].lock, NULL);
        map_page();
        atomic_store_explicit(&attached, 1, memory_order_release);
    }
    pthread_mutex_unlock(&attaching);
}

/* --- streams, marks ------------------------------------------------------------------------ */

static int capturing(void *stream)
{
    int status = 0;
    return !REAL(cuStreamIsCapturing, void *, int *)(stream, &status) && status;
}

static void *context(void)
{
    void *found = NULL;
    REAL(cuCtxGetCurrent, void **)(&found);
    return found;
}

/* Under the lock: take what was reached out of what is in flight. */
static void reap(int i)
{
    struct stream *s = &streams[i];
    uint32_t done = atomic_load_explicit(&slots[i].done, memory_order_acquire);
    uint32_t put = atomic_load_explicit(&slots[i].put, RELAXED);
    if (done == s->seen || done - s->seen > put - s->seen) /* nothing new, or nonsense */
        return;
    int64_t reached = s->at_mark[done % RING];
    atomic_fetch_sub(&seat->in_flight_ns, reached - s->reaped_ns);
    s->reaped_ns = reached;
    s->seen = done;
    if (s->key == ENDING && done == put)
        atomic_store(&s->key, NO_KEY);
}

/* Under the lock: nothing of it will be reached any more, or all of it was. */
static void forget(int i)
{
    struct stream *s = &streams[i];
    uint32_t put = atomic_load(&slots[i].put);
    atomic_fetch_sub(&seat->in_flight_ns, s->issued_ns - s->reaped_ns);
    s->reaped_ns = s->issued_ns;
    s->loose_ns = 0;
    s->seen = put;
    atomic_store(&slots[i].done, put);
    atomic_store(&slots[i].loose, 0);
    if (s->key == ENDING)
        atomic_store(&s->key, NO_KEY);
}

/* The host's way of writing a mark; the argument is slot and number. */
static void write_mark(void *packed)
{
    uint64_t value = (uint64_t)(uintptr_t)packed;
    if (slots)
        atomic_store_explicit(&slots[(value >> 32) % SLOTS].done, (uint32_t)value,
                              memory_order_release);
}

static void register_slots(void)
{
    pthread_mutex_lock(&naming);
    if (!registered) {
        int result = REAL(cuMemHostRegister_v2, void *, size_t, unsigned)(
            slots, ROWS_AT - SLOTS_AT, PORTABLE_MAPPED);
        host_marks = !driver_has(AT_cuStreamWriteValue32_v2) ||
                     (result && result != ALREADY_REGISTERED) ||
                     REAL(cuMemHostGetDevicePointer_v2, uint64_t *, void *, unsigned)(&device_at,
                                                                                      slots, 0);
        if (host_marks)
            atomic_fetch_or(&seat->flags, SEAT_HOST_MARKS);
        atomic_store(&registered, 1);
    }
    pthread_mutex_unlock(&naming);
}

/* The first mark names our memory to the driver, which may end a capture. */
static int may_mark(const struct stream *s)
{
    return !captures ||
           (registered && s->key > ENDING && s->stream != STREAM_LEGACY && !capturing(s->stream));
}

/* Put one on the stream; 0 if it is there. */
static int put_mark(int i, uint32_t number)
{
    void *stream = streams[i].stream;
    if (!registered)
        register_slots();
    if (!host_marks) {
        if (!REAL(cuStreamWriteValue32_v2, void *, uint64_t, uint32_t, unsigned)(
                stream, device_at + i * sizeof *slots, number, 0))
            return 0;
        if (captures) /* not to be asked why */
            return 1;
        if (REAL(cuStreamQuery, void *)(stream) == READY ||
            REAL(cuStreamQuery, void *)(stream) == NOT_READY) {
            host_marks = 1; /* the stream is well: it is the way that does not work */
            atomic_fetch_or(&seat->flags, SEAT_HOST_MARKS);
        }
    }
    uint64_t packed = (uint64_t)i << 32 | number;
    return REAL(cuLaunchHostFunc, void *, void (*)(void *), void *)(stream, write_mark,
                                                                    (void *)(uintptr_t)packed);
}

/* The same beside captures. */
static int put_mark_beside(int i, uint32_t number)
{
    int mode = CAPTURE_RELAXED;
    if (!captures)
        return put_mark(i, number);
    if (REAL(cuThreadExchangeStreamCaptureMode, int *)(&mode))
        return 1;
    int result = put_mark(i, number);
    REAL(cuThreadExchangeStreamCaptureMode, int *)(&mode);
    return result;
}

/* Under the lock. */
static void mark(int i)
{
    struct stream *s = &streams[i];
    uint32_t put = atomic_load_explicit(&slots[i].put, RELAXED);
    reap(i);
    if (!may_mark(s) || put - s->seen >= RING - 1)
        return; /* a later call marks, or the tending thread */
    s->at_mark[(put + 1) % RING] = s->issued_ns;
    atomic_store(&slots[i].put, put + 1);
    if (put_mark_beside(i, put + 1)) {
        atomic_store(&slots[i].put, put);
        if (captures)
            return;
        int state = REAL(cuStreamQuery, void *)(s->stream);
        if (state != READY && state != NOT_READY) {
            atomic_fetch_or(&seat->flags, SEAT_FAULTED);
            forget(i);
        }
        return;
    }
    atomic_store(&slots[i].loose, 0);
    s->loose_ns = 0;
}

/* Number of the stream's slot, taken if it has none; -1 if there is none left. */
static int slot_of(void *stream, int make)
{
    uint64_t key = (uintptr_t)stream;
    if (stream == STREAM_LEGACY)
        key = (uintptr_t)context() | 1ull << 63;
    else if (stream == STREAM_PER_THREAD)
        key = (uintptr_t)context() ^ (uint64_t)syscall(SYS_gettid) << 40 ^ 1ull << 62;
    uint32_t used = atomic_load_explicit(&seat->slots, memory_order_acquire);
    if (used > SLOTS)
        used = SLOTS;
    for (uint32_t i = 0; i < used; i++)
        if (atomic_load_explicit(&streams[i].key, memory_order_acquire) == key)
            return (int)i;
    if (!make)
        return -1;
    int found = -1;
    pthread_mutex_lock(&naming);
    for (int i = 0; i < SLOTS && found < 0; i++) {
        struct stream *s = &streams[i];
        if (s->key == ENDING && !pthread_mutex_trylock(&s->lock)) {
            reap(i);
            pthread_mutex_unlock(&s->lock);
        }
        if (s->key != NO_KEY)
            continue;
        found = i;
        s->stream = stream;
        s->context = context();
        if ((uint32_t)found >= atomic_load(&seat->slots))
            atomic_store(&seat->slots, (uint32_t)found + 1);
        atomic_store_explicit(&s->key, key, memory_order_release);
    }
    pthread_mutex_unlock(&naming);
    return found;
}

/* Mark what is loose on every stream, and see what came of earlier marks; whether anything is
 * outstanding. `ask`: ask streams that owe something whether they are at their end or broken. */
static int settle(int ask)
{
    int outstanding = 0;
    void *current = context(), *was;
    uint32_t used = atomic_load(&seat->slots);
    for (uint32_t i = 0; i < used && i < SLOTS; i++) {
        struct stream *s = &streams[i];
        if (pthread_mutex_trylock(&s->lock)) {
            outstanding = 1;
            continue;
        }
        reap((int)i);
        int loose = atomic_load(&slots[i].loose) != 0;
        int owes = slots[i].done != slots[i].put;
        outstanding |= loose || owes;
        /* another thread's per-thread stream has no name here; its calls are marked one by one */
        int asks = ask && !captures;
        if ((loose || (owes && asks)) && s->key > ENDING && s->stream != STREAM_PER_THREAD) {
            int push = s->context && s->context != current;
            if (!push || !REAL(cuCtxPushCurrent_v2, void *)(s->context)) {
                if (loose)
                    mark((int)i);
                if (asks) {
                    int state = REAL(cuStreamQuery, void *)(s->stream);
                    if (state != NOT_READY) {
                        if (state != READY)
                            atomic_fetch_or(&seat->flags, SEAT_FAULTED);
                        forget((int)i);
                    }
                }
                if (push)
                    REAL(cuCtxPopCurrent_v2, void **)(&was);
            }
        }
        pthread_mutex_unlock(&s->lock);
    }
    return outstanding;
}

int gate_contexts(void **found, int most)
{
    int n = 0;
    for (int i = 0; i < SLOTS && n < most; i++) {
        void *its = streams[i].key > ENDING ? streams[i].context : NULL;
        int known = !its;
        for (int k = 0; k < n; k++)
            known |= found[k] == its;
        if (!known)
            found[n++] = its;
    }
    return n;
}

/* --- measured times ------------------------------------------------------------------------- */

static struct function *function_of(uint64_t key)
{
    uint64_t at = (key ^ key >> 29) * 0x9e3779b97f4a7c15ull >> 40;
    if (!key)
        return NULL;
    for (int tries = 0; tries < 64; tries++, at++) {
        struct function *f = &functions[at % FUNCTIONS_KNOWN];
        uint64_t there = atomic_load_explicit(&f->key, memory_order_acquire);
        if (there == key)
            return f;
        if (!there && (atomic_compare_exchange_strong(&f->key, &there, key) || there == key))
            return f;
    }
    return NULL; /* full: counts as unknown */
}

static struct sample *sample_begin(struct function *f, void *stream)
{
    uint32_t calls = atomic_load_explicit(&f->calls, RELAXED); /* may miss some: it only spaces samples */
    atomic_store_explicit(&f->calls, calls + 1, RELAXED);
    if ((atomic_load_explicit(&f->samples, RELAXED) >= 3 && calls & 63) || captures ||
        atomic_exchange(&f->sampling, 1))
        return NULL;
    void *current = context();
    for (int i = 0; i < SAMPLES; i++) {
        struct sample *s = &samples[i];
        int expected = 0;
        if (!atomic_compare_exchange_strong(&s->state, &expected, 1))
            continue;
        if (s->context != current) {
            s->context = NULL; /* the events of the other context are left to it */
            if (!REAL(cuEventCreate, void **, unsigned)(&s->start, 0) &&
                !REAL(cuEventCreate, void **, unsigned)(&s->end, 0))
                s->context = current;
        }
        s->function = f;
        if (s->context && !REAL(cuEventRecord, void *, void *)(s->start, stream))
            return s;
        atomic_store(&s->state, 0);
        break;
    }
    atomic_store(&f->sampling, 0);
    return NULL;
}

static void sample_drop(struct sample *s)
{
    atomic_store(&s->function->sampling, 0);
    atomic_store(&s->state, 0);
}

static void sample_end(struct sample *s, void *stream, int result)
{
    if (result || captures || REAL(cuEventRecord, void *, void *)(s->end, stream)) {
        sample_drop(s);
        return;
    }
    atomic_fetch_add(&pending, 1);
    atomic_store_explicit(&s->state, 2, memory_order_release);
}

/* Read the samples that are through. */
static void collect(void)
{
    if (pthread_mutex_trylock(&collecting))
        return;
    for (int i = 0; i < SAMPLES && !captures; i++) {
        struct sample *s = &samples[i];
        int expected = 2;
        float ms = 0;
        if (!atomic_compare_exchange_strong(&s->state, &expected, 3))
            continue;
        int state = REAL(cuEventQuery, void *)(s->end);
        if (state == NOT_READY) {
            atomic_store(&s->state, 2);
            continue;
        }
        if (state == READY &&
            !REAL(cuEventElapsedTime, float *, void *, void *)(&ms, s->start, s->end)) {
            struct function *f = s->function;
            int64_t took = (int64_t)(ms * 1e6f), mean = f->mean_ns;
            mean = f->samples ? mean + (took - mean) / 8 : took;
            atomic_store(&f->mean_ns, mean);
            atomic_fetch_add(&f->samples, 1);
        } else
            s->context = NULL;
        atomic_fetch_sub(&pending, 1);
        sample_drop(s);
    }
    pthread_mutex_unlock(&collecting);
}

static int64_t estimate(struct function *f)
{
    if (!f || !atomic_load_explicit(&f->samples, RELAXED))
        return (int64_t)(head->bound_ns / 4);
    int64_t mean = atomic_load_explicit(&f->mean_ns, RELAXED);
    return mean < US ? US : mean;
}

/* --- the gate ------------------------------------------------------------------------------- */

/* Puts the last marks when the gate closes, asks streams that owe some, takes channels off the device
 * and moves memory. What is away must come back even while the process ends: its last calls wait for
 * it. */
static void *tend(void *unused)
{
    (void)unused;
    inside = 1;
    for (unsigned round = 0; !leaving || memory_state || channels_off();) {
        uint32_t word = atomic_load(&head->gate);
        channels_tend(word & 1 && !orphaned());
        if (channels_off()) { /* nothing drains, and no call may be made that waits */
            wait_gate(word, word & 1 ? 50 * MS : MS);
            continue;
        }
        if (!(word & 1)) {
            round = 0;
            wait_gate(word, memory_tend(0, 0));
            continue;
        }
        atomic_fetch_add(&seat->entered, 1);
        int outstanding = leaving ? 0 : settle(++round % 16 == 0);
        atomic_fetch_add(&seat->left, 1);
        int quiet = !outstanding && seat->entered == seat->left;
        int64_t soon = memory_tend(!orphaned(), quiet);
        if (soon)
            wait_gate(word, soon);
        else if (quiet)
            wait_gate(word, 50 * MS);
        else
            rest(200 * US);
    }
    return NULL;
}

static void leave(void)
{
    atomic_store(&leaving, 1); /* the seat is ours until the process is gone */
}

void gate_start_tending(void)
{
    static int registered_exit;
    pthread_t thread;
    pthread_attr_t attr;
    sigset_t all, before;

    if (atomic_exchange(&tending, 1))
        return;
    if (!registered_exit++)
        atexit(leave);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    if (pthread_create(&thread, &attr, tend, NULL))
        tending = 0;
    pthread_attr_destroy(&attr);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void wait_open(uint32_t word)
{
    int64_t from = now_ns(), patience = (int64_t)head->patience_ns / 4;
    atomic_fetch_add(&seat->blocks, 1);
    atomic_fetch_add(&seat->waiting, 1);
    while (atomic_load(&head->gate) == word && !orphaned())
        wait_gate(word, patience < MS ? MS : patience > 500 * MS ? 500 * MS : patience);
    atomic_fetch_sub(&seat->waiting, 1);
    atomic_fetch_add(&seat->blocked_ns, (uint64_t)(now_ns() - from));
}

/* Reserve room in flight; whether there was any. */
static int reserve(int64_t ns)
{
    int64_t before = atomic_fetch_add(&seat->in_flight_ns, ns);
    if (before <= 0 || before + ns <= (int64_t)head->bound_ns)
        return 1;
    atomic_fetch_sub(&seat->in_flight_ns, ns);
    return 0;
}

/* Wait until something in flight is through, or the gate closes; 0 if nothing moves. */
static int wait_room(int64_t ns)
{
    int64_t from = now_ns(), stall = 8 * (int64_t)head->bound_ns, level = seat->in_flight_ns;
    if (stall < 100 * MS)
        stall = 100 * MS;
    int moved = 0;
    for (unsigned round = 1; !moved; round++) {
        atomic_fetch_add(&seat->entered, 1); /* it may put marks: as the node sees it, a call */
        collect();
        settle(round % 64 == 0);
        atomic_fetch_add(&seat->left, 1);
        int64_t in_flight = atomic_load(&seat->in_flight_ns);
        moved = in_flight <= 0 || in_flight + ns <= (int64_t)head->bound_ns || head->gate & 1;
        if (in_flight < level)
            from = now_ns(), level = in_flight;
        if (!moved) {
            if (now_ns() - from > stall)
                break;
            rest(50 * US);
        }
    }
    return moved;
}

enum { GATED = 0, PASS = 1, PASS_ENTERED = 2 };

/* Small copies pass a closed gate, but not while memory is away: then they wait as large ones do. */
int gate_passes(size_t bytes)
{
    gate_attach();
    if (bytes >= head->large_bytes)
        return GATED;
    return memory_enter() ? PASS_ENTERED : PASS;
}

int gate_passed(int pass, int result)
{
    memory_leave(pass == PASS_ENTERED);
    return result;
}

/* Returns when the call may be made. */
void gate_begin(struct call *call, void *stream, uint64_t key, int copy)
{
    gate_attach();
    call->counted = 0;
    call->sample = NULL;
    if (!seat || inside || (captures && capturing(stream)))
        return;
    inside = 1;
    call->counted = 1;
    call->copy = copy;
    call->stream = stream;
    call->function = function_of(key);
    for (int force = 0;;) {
        call->estimate_ns = estimate(call->function);
        atomic_fetch_add(&seat->entered, 1);
        uint32_t word = atomic_load_explicit(&head->gate, RELAXED);
        if (__builtin_expect(word & 1, 0) && !orphaned()) {
            atomic_fetch_add(&seat->left, 1);
            wait_open(word);
            continue;
        }
        if (__builtin_expect(memory_state, 0)) {
            atomic_fetch_add(&seat->left, 1);
            memory_wait();
            continue;
        }
        if (__builtin_expect(force || reserve(call->estimate_ns), 1)) {
            if (force)
                atomic_fetch_add(&seat->in_flight_ns, call->estimate_ns);
            break;
        }
        atomic_fetch_add(&seat->left, 1);
        int64_t from = now_ns();
        force = !wait_room(call->estimate_ns);
        if (force)
            atomic_fetch_add(&seat->overruns, 1);
        atomic_fetch_add(&seat->throttled_ns, (uint64_t)(now_ns() - from));
    }
    if (call->function)
        call->sample = sample_begin(call->function, stream);
}

/* Under the lock: until there is room for a mark. Nobody else can mark this stream later. */
static void wait_for_mark(int i)
{
    for (int round = 0; round < 2000; round++) {
        reap(i);
        if (atomic_load_explicit(&slots[i].put, RELAXED) - streams[i].seen < RING - 1)
            return;
        rest(50 * US);
    }
}

static void count(struct call *call)
{
    atomic_fetch_add_explicit(&seat->launches, 1, RELAXED);
    if (call->copy)
        atomic_fetch_add_explicit(&seat->copies, 1, RELAXED);
    int i = slot_of(call->stream, 1);
    if (i < 0) {
        atomic_fetch_add(&seat->uncounted, 1);
        atomic_fetch_sub(&seat->in_flight_ns, call->estimate_ns);
        return;
    }
    struct stream *s = &streams[i];
    pthread_mutex_lock(&s->lock);
    reap(i);
    s->issued_ns += call->estimate_ns;
    s->loose_ns += call->estimate_ns;
    uint32_t loose = atomic_load_explicit(&slots[i].loose, RELAXED); /* written under the lock only */
    atomic_store_explicit(&slots[i].loose, loose + 1, memory_order_release);
    if (s->stream == STREAM_PER_THREAD)
        wait_for_mark(i);
    if (s->loose_ns >= (int64_t)head->bound_ns / 8 || s->stream == STREAM_PER_THREAD)
        mark(i);
    pthread_mutex_unlock(&s->lock);
}

int gate_end(struct call *call, int result)
{
    if (!call->counted)
        return result;
    if (call->sample)
        sample_end(call->sample, call->stream, result);
    if (!result)
        count(call);
    else
        atomic_fetch_sub(&seat->in_flight_ns, call->estimate_ns);
    if (pending && atomic_load_explicit(&seat->launches, RELAXED) % 16 == 0)
        collect(); /* whoever waits for room collects at once */
    if (!tending)
        gate_start_tending();
    atomic_fetch_add(&seat->left, 1);
    inside = 0;
    return result;
}

/* --- captures, ends ------------------------------------------------------------------------- */

static void captures_changed(int by)
{
    atomic_fetch_add(&captures, by);
    if (seat)
        atomic_store(&seat->capturing, (uint32_t)captures);
}

/* Counted before it begins: from then on nobody marks or asks. */
int capture_begin(void *stream)
{
    gate_attach();
    if (inside || capturing(stream))
        return 0;
    int i = seat ? slot_of(stream, 0) : -1;
    if (i >= 0) { /* what is on it can be marked now and not later */
        pthread_mutex_lock(&streams[i].lock);
        if (atomic_load(&slots[i].loose))
            mark(i);
        pthread_mutex_unlock(&streams[i].lock);
    }
    int entered = memory_enter(); /* nothing is evicted under a capture */
    captures_changed(1);
    memory_leave(entered);
    pthread_mutex_lock(&collecting);
    pthread_mutex_unlock(&collecting);
    for (int i = 0; seat && i < SLOTS; i++) { /* let those who are at it finish */
        pthread_mutex_lock(&streams[i].lock);
        pthread_mutex_unlock(&streams[i].lock);
    }
    return 1;
}

int capture_begin_done(void *stream, int before, int result)
{
    if (before && !capturing(stream))
        captures_changed(-1);
    return result;
}

int capture_end(void *stream) { return captures > 0 && !inside && capturing(stream); }

int capture_end_done(void *stream, int before, int result)
{
    if (before && !capturing(stream))
        captures_changed(-1);
    return result;
}

/* Before a stream is destroyed: what is on it is still done, and its handle may come again. */
void stream_ends(void *stream)
{
    gate_attach();
    if (!seat || inside)
        return;
    int was_capturing = captures && capturing(stream);
    if (was_capturing)
        captures_changed(-1);
    int i = slot_of(stream, 0);
    if (i < 0)
        return;
    atomic_fetch_add(&seat->entered, 1);
    pthread_mutex_lock(&streams[i].lock);
    if (atomic_load(&slots[i].loose) && !was_capturing)
        mark(i);
    reap(i);
    atomic_store(&streams[i].key, ENDING);
    if (slots[i].done == slots[i].put || slots[i].loose)
        forget(i);
    pthread_mutex_unlock(&streams[i].lock);
    atomic_fetch_add(&seat->left, 1);
}

/* Around what ends contexts: nobody of us touches a stream or an event meanwhile. */
int ends_begin(void)
{
    gate_attach();
    if (!seat || inside)
        return 0;
    memory_hold();
    pthread_mutex_lock(&collecting);
    for (int i = 0; i < SLOTS; i++)
        pthread_mutex_lock(&streams[i].lock);
    inside = 1;
    return 1;
}

static void ends_done(void)
{
    inside = 0;
    for (int i = 0; i < SLOTS; i++)
        pthread_mutex_unlock(&streams[i].lock);
    pthread_mutex_unlock(&collecting);
    memory_release();
}

/* Under all locks. */
static void forget_all(void *context_or_none)
{
    for (int i = 0; i < SLOTS; i++) {
        struct stream *s = &streams[i];
        if (s->key != NO_KEY && (!context_or_none || s->context == context_or_none)) {
            atomic_store(&s->key, ENDING);
            forget(i);
        }
    }
    for (int i = 0; i < SAMPLES; i++) {
        int expected = 2;
        if ((context_or_none && samples[i].context != context_or_none) ||
            !atomic_compare_exchange_strong(&samples[i].state, &expected, 3))
            continue;
        samples[i].context = NULL;
        atomic_fetch_sub(&pending, 1);
        sample_drop(&samples[i]);
    }
    registered = 0; /* the page may have been registered in it */
}

int context_ended(int begun, void *ended, int result)
{
    if (!begun)
        return result;
    if (!result && ended) {
        forget_all(ended);
        memory_context_ended(ended);
    }
    ends_done();
    return result;
}

int device_ended(int begun, int device, int result)
{
    unsigned flags;
    int active = 1;
    if (!begun)
        return result;
    if (!result &&
        !REAL(cuDevicePrimaryCtxGetState, int, unsigned *, int *)(device, &flags, &active) && !active) {
        forget_all(NULL);
        memory_device_ended(device);
    }
    ends_done();
    return result;
}
