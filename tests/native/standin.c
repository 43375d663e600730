/* A stand-in for the driver's libcuda.so.1, for tests of the gate.
 *
 * A thread for each stream executes what was put on it, in order. A kernel's name is its program:
 * "count_250" takes 250 us and adds one to the uint64 that its first parameter points to on the
 * device, "steps_250000" writes there how many of its 250 ms are through, "spin_250" only takes the
 * time. Device memory is host memory, accounted for. Where standin_rm.c is preloaded, a context has
 * channels, and nothing goes on while they are off.
 *
 * STANDIN_STATS: a file of 64 bytes that shows what happened (struct stats). STANDIN_FAULT: a file
 * read before each call and operation, "call N CODE", "alloc N CODE", "run N CODE", "create N
 * CODE", "hang N", "stuck N", "lost": the Nth launch, allocation or creation of physical memory is
 * refused with CODE; the Nth kernel executed breaks the context with CODE; the Nth launch never
 * returns, the Nth copy never ends; the device is gone. N is 0 for all of them. STANDIN_NO_WRITES: streams
 * cannot write values.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
enum { OK, INVALID = 1, NO_MEMORY = 2, LOST = 999, NOT_FOUND = 500, NOT_READY = 600, UNSUPPORTED = 801,
       NO_CONTEXT = 201, IMPLICIT = 906 };
enum { MEMORY = 1 << 28, OPS = 4096 };

struct stats { _Atomic uint64_t launched, executed, running, memory, marks, callbacks, in_capture, peak; };
static struct stats nothing, *stats = &nothing;

struct function { char name[64]; long us; int counts, steps; };
struct op { enum { RUN, COPY, SET, RECORD, WRITE, HOST } kind; struct function *f; uint64_t to, from;
            size_t n; unsigned value; void (*fn)(void *); void *data; struct event *event; };
struct graph { struct op *ops; int n; };
struct event { _Atomic uint64_t put, done; int64_t at; };
struct stream { pthread_t thread; pthread_mutex_t lock; pthread_cond_t change; struct op ring[OPS];
                uint64_t head, tail; int ending; struct graph *capture; };
struct context { struct stream *legacy; _Atomic int error; int device; uint32_t client; _Atomic int ended; };

static struct context contexts[8], primary;
static int made;
static _Thread_local struct context *current;
static _Thread_local struct stream *own;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int broken, initialized;
static _Atomic uint64_t calls, allocs, copied;

static uint64_t device_bytes(void);

static struct stream *streams[4096];
static _Atomic int streams_made;

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int fault(const char *kind, uint64_t number)
{
    char word[16];
    long n, code;
    const char *path = getenv("STANDIN_FAULT");
    FILE *file = path ? fopen(path, "re") : NULL;
    int found = 0;
    while (file && !found) {
        code = LOST, n = 0;
        if (fscanf(file, "%15s", word) != 1)
            break;
        if (!strcmp(word, "lost")) {
            found = LOST;
            break;
        }
        if (fscanf(file, "%ld", &n) != 1 || (strcmp(word, "hang") && strcmp(word, "stuck") && fscanf(file, "%ld", &code) != 1))
            break;
        if (!strcmp(word, kind) && (!n || (uint64_t)n == number))
            found = (int)code;
    }
    if (file)
        fclose(file);
    return found;
}

/* Of the stand-in for the kernel driver, if it is there. */
extern int standin_rm_stopped(void) __attribute__((weak));

static void wait_for_channels(void)
{
    while (standin_rm_stopped && standin_rm_stopped())
        usleep(100);
}

/* In one go, or in steps of a millisecond between which it can be stopped. */
static void compute(const struct function *f, uint32_t *progress)
{
    int64_t left = f->us * 1000, step = standin_rm_stopped || f->steps ? 1000000 : left;
    struct timespec until;
    for (uint32_t done = 1; left > 0; left -= step, done++) {
        int64_t end = now() + (left < step ? left : step);
        until.tv_sec = end / 1000000000, until.tv_nsec = end % 1000000000;
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
        wait_for_channels();
        if (f->steps)
            __atomic_store_n(progress, done, __ATOMIC_SEQ_CST);
    }
}

static void execute(struct op *op)
{
    wait_for_channels();
    if (op->kind == RUN) {
        atomic_fetch_add(&stats->running, 1);
        compute(op->f, (uint32_t *)op->to);
        if (op->f->counts)
            __atomic_fetch_add((uint64_t *)op->to, 1, __ATOMIC_SEQ_CST);
        atomic_fetch_sub(&stats->running, 1);
        uint64_t number = atomic_fetch_add(&stats->executed, 1) + 1;
        int code = fault("run", number);
        if (code)
            broken = code;
    } else if (op->kind == COPY) {
        if (fault("stuck", atomic_fetch_add(&copied, 1) + 1))
            for (;;)
                pause();
        memmove((void *)op->to, (void *)op->from, op->n);
    } else if (op->kind == SET)
        memset((void *)op->to, (int)op->value, op->n);
    else if (op->kind == RECORD) {
        op->event->at = now();
        atomic_fetch_add(&op->event->done, 1);
    } else if (op->kind == WRITE) {
        atomic_fetch_add(&stats->marks, 1);
        __atomic_store_n((uint32_t *)op->to, op->value, __ATOMIC_SEQ_CST);
    } else {
        atomic_fetch_add(&stats->callbacks, 1);
        op->fn(op->data);
    }
}

static void *run(void *arg)
{
    struct stream *s = arg;
    prctl(PR_SET_TIMERSLACK, 1000);
    for (;;) {
        pthread_mutex_lock(&s->lock);
        while (s->head == s->tail && !s->ending)
            pthread_cond_wait(&s->change, &s->lock);
        if (s->head == s->tail)
            break;
        struct op op = s->ring[s->tail % OPS];
        pthread_mutex_unlock(&s->lock);
        if (!broken)
            execute(&op);
        pthread_mutex_lock(&s->lock);
        s->tail++;
        pthread_cond_broadcast(&s->change);
        pthread_mutex_unlock(&s->lock);
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static struct stream *make_stream(void)
{
    struct stream *s = calloc(1, sizeof *s);
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->change, NULL);
    pthread_create(&s->thread, NULL, run, s);
    pthread_detach(s->thread);
    int number = atomic_fetch_add(&streams_made, 1);
    if (number < 4096)
        streams[number] = s;
    return s;
}

static struct stream *stream_at(void *handle, int per_thread)
{
    if (handle == (void *)2 || (!handle && per_thread))
        return own ? own : (own = make_stream());
    if (handle && handle != (void *)1)
        return handle;
    pthread_mutex_lock(&guard);
    if (!current->legacy)
        current->legacy = make_stream();
    pthread_mutex_unlock(&guard);
    return current->legacy;
}

static int enter(void)
{
    if (!initialized)
        return 3;
    if (fault("", 0))
        broken = LOST;
    if (broken)
        return broken;
    return current ? OK : NO_CONTEXT;
}

static int put(struct stream *s, struct op op)
{
    if (broken)
        return broken;
    pthread_mutex_lock(&s->lock);
    if (s->capture) {
        s->capture->ops = realloc(s->capture->ops, (s->capture->n + 1) * sizeof op);
        s->capture->ops[s->capture->n++] = op;
        if (op.kind != RUN && op.kind != COPY && op.kind != SET)
            atomic_fetch_add(&stats->in_capture, 1);
    } else {
        while (s->head - s->tail == OPS)
            pthread_cond_wait(&s->change, &s->lock);
        s->ring[s->head++ % OPS] = op;
        pthread_cond_broadcast(&s->change);
    }
    pthread_mutex_unlock(&s->lock);
    return OK;
}

static int drain(struct stream *s)
{
    pthread_mutex_lock(&s->lock);
    while (s->head != s->tail && !broken)
        pthread_cond_wait(&s->change, &s->lock);
    pthread_mutex_unlock(&s->lock);
    return broken;
}

static int launch(struct function *f, void *stream, void **params, int per_thread)
{
    int state = enter();
    if (state)
        return state;
    uint64_t number = atomic_fetch_add(&calls, 1) + 1;
    if (fault("hang", number))
        for (;;)
            pause();
    if ((state = fault("call", number)))
        return state;
    struct op op = {.kind = RUN, .f = f};
    if (f->counts || f->steps)
        op.to = *(uint64_t *)params[0];
    struct stream *s = stream_at(stream, per_thread);
    if (!s->capture)
        atomic_fetch_add(&stats->launched, 1);
    return put(s, op);
}

/* A child has neither the threads of the streams nor the memory. */
static void forget_memory(void);
static void in_child(void)
{
    primary.legacy = NULL, primary.client = 0, own = NULL, streams_made = 0;
    for (int i = 0; i < 8; i++)
        contexts[i].legacy = NULL, contexts[i].client = 0;
    pthread_mutex_init(&guard, NULL);
    forget_memory();
}

EXPORT int cuInit(unsigned flags)
{
    if (!initialized)
        pthread_atfork(NULL, NULL, in_child);
    const char *path = getenv("STANDIN_STATS");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd >= 0 && !initialized) {
        void *at = mmap(NULL, sizeof *stats, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        stats = at == MAP_FAILED ? &nothing : at;
    }
    if (fd >= 0)
        close(fd);
    initialized = 1;
    return flags ? INVALID : OK;
}
EXPORT int cuDriverGetVersion(int *v) { *v = 13000; return OK; }
EXPORT int cuDeviceGet(int *d, int n) { *d = n; return n ? 101 : OK; }
EXPORT int cuDeviceGetCount(int *n) { *n = 1; return OK; }
EXPORT int cuDeviceGetName(char *at, int n, int d) { (void)d; snprintf(at, (size_t)n, "stand-in"); return OK; }
EXPORT int cuDeviceTotalMem_v2(size_t *n, int d) { (void)d; *n = device_bytes(); return OK; }
EXPORT int cuDeviceGetAttribute(int *v, int a, int d) { (void)a, (void)d; *v = 1; return OK; }
/* As the driver does it, in the longest of the forms that it has for it. */
static uint32_t rm_make(uint32_t client, uint32_t parent, uint32_t class)
{
    uint32_t made[12] = {client, parent, 0, class};
    struct { uint32_t number, size; void *at; } wrapped = {0x2b, sizeof made, made};
    if (class == 0x2080)
        ioctl(0, _IOWR('F', 211, wrapped), &wrapped);
    else
        ioctl(0, _IOWR('F', 0x2b, made), made);
    return made[2];
}

static void make_channels(struct context *c)
{
    if (!standin_rm_stopped || c->client)
        return;
    c->client = rm_make(0, 0, 0x41);
    uint32_t device = rm_make(c->client, c->client, 0x80);
    rm_make(c->client, device, 0x2080);
    for (int group = 0; group < 2; group++) {
        uint32_t made = rm_make(c->client, device, 0xa06c);
        for (int channel = 0; channel < 70 * !group + 1; channel++)
            rm_make(c->client, made, 0xc86f);
    }
}

static void free_channels(struct context *c)
{
    uint32_t freed[4] = {c->client, 0, c->client, 0};
    if (c->client)
        ioctl(0, _IOWR('F', 0x29, freed), freed);
    c->client = 0;
}

static int active;
EXPORT int cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; *c = &primary; active = 1; make_channels(&primary); return OK; }
static void free_of_context(struct context *c);
EXPORT int cuDevicePrimaryCtxReset_v2(int d) { (void)d; active = 0; free_channels(&primary); free_of_context(&primary); return OK; }
EXPORT int cuDevicePrimaryCtxRelease_v2(int d) { (void)d; return OK; }
EXPORT int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) { (void)d; *f = 0; *a = active; return OK; }
EXPORT int cuCtxCreate_v2(void **c, unsigned f, int d) { (void)f; *c = current = &contexts[made++ % 8]; current->device = d; current->ended = 0; current->legacy = NULL; make_channels(current); return OK; }
/* Who comes back to it is ended: a driver may do anything. */
EXPORT int cuCtxDestroy_v2(void *c) { ((struct context *)c)->ended = 1; usleep(8000); free_channels(c); free_of_context(c); if (current == c) current = NULL; return OK; }
EXPORT int cuCtxSetCurrent(void *c) { current = c; return OK; }
EXPORT int cuCtxGetCurrent(void **c) { *c = current; return OK; }
static _Thread_local struct context *below[16];
static _Thread_local int depth;
EXPORT int cuCtxPushCurrent_v2(void *c) { if (((struct context *)c)->ended) abort(); below[depth++ % 16] = current; current = c; return OK; }
EXPORT int cuCtxPopCurrent_v2(void **c) { if (c) *c = current; current = below[--depth % 16]; return OK; }
EXPORT int cuCtxGetDevice(int *d) { *d = current ? current->device : 0; return current ? OK : NO_CONTEXT; }
EXPORT int cuCtxEnablePeerAccess(void *c, unsigned f) { (void)c, (void)f; return OK; }
EXPORT int cuCtxSynchronize(void)
{
    int e = enter();
    for (int i = 0; i < streams_made && i < 4096 && !e; i++)
        if (streams[i])
            e = drain(streams[i]);
    return e;
}

EXPORT int cuModuleLoadData(void **m, const void *image) { (void)image; *m = &primary; return enter(); }
EXPORT int cuModuleUnload(void *m) { (void)m; return OK; }
EXPORT int cuModuleGetFunction(void **f, void *m, const char *name)
{
    struct function *made = calloc(1, sizeof *made);
    (void)m;
    const char *us = strrchr(name, '_');
    snprintf(made->name, sizeof made->name, "%s", name);
    made->us = us ? atol(us + 1) : 0;
    made->counts = !strncmp(name, "count_", 6);
    made->steps = !strncmp(name, "steps_", 6);
    *f = made;
    return OK;
}

#include "standin_memory.h"
EXPORT int cuMemHostRegister_v2(void *at, size_t n, unsigned f) { (void)at, (void)n, (void)f; return OK; }
EXPORT int cuMemHostUnregister(void *at) { (void)at; return OK; }
EXPORT int cuMemHostGetDevicePointer_v2(uint64_t *d, void *at, unsigned f) { (void)f; *d = (uint64_t)at; return OK; }

static int copy(uint64_t to, uint64_t from, size_t n, void *stream, int wait)
{
    int state = enter();
    struct stream *s = state ? NULL : stream_at(stream, 0);
    if (!state)
        state = put(s, (struct op){.kind = COPY, .to = to, .from = from, .n = n});
    return state || !wait ? state : drain(s);
}
EXPORT int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t n) { return copy(to, (uint64_t)from, n, NULL, 1); }
EXPORT int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t n) { return copy((uint64_t)to, from, n, NULL, 1); }
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *s) { return copy(to, (uint64_t)from, n, s, 0); }
EXPORT int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t n, void *s) { return copy((uint64_t)to, from, n, s, 0); }
EXPORT int cuMemsetD8Async(uint64_t to, unsigned char v, size_t n, void *s)
{
    int state = enter();
    return state ? state : put(stream_at(s, 0), (struct op){.kind = SET, .to = to, .value = v, .n = n});
}

EXPORT int cuStreamCreate(void **s, unsigned f) { (void)f; int e = enter(); if (!e) *s = make_stream(); return e; }
EXPORT int cuStreamDestroy_v2(void *h)
{
    struct stream *s = h; /* not freed: its thread may be at it */
    pthread_mutex_lock(&s->lock);
    s->ending = 1;
    pthread_cond_broadcast(&s->change);
    pthread_mutex_unlock(&s->lock);
    return OK;
}
EXPORT int cuStreamSynchronize(void *h) { int e = enter(); return e ? e : drain(stream_at(h, 0)); }
EXPORT int cuStreamQuery(void *h)
{
    int e = enter();
    struct stream *s = e ? NULL : stream_at(h, 0);
    return e ? e : s->capture ? IMPLICIT : s->head == s->tail ? OK : NOT_READY;
}
EXPORT int cuStreamIsCapturing(void *h, int *status)
{
    *status = !broken && h > (void *)2 && ((struct stream *)h)->capture != NULL;
    return OK;
}
static _Atomic int capturing_now;
EXPORT int cuStreamBeginCapture_v2(void *h, int mode)
{
    (void)mode;
    capturing_now++;
    stream_at(h, 0)->capture = calloc(1, sizeof(struct graph));
    return OK;
}
EXPORT int cuStreamEndCapture(void *h, void **g)
{
    struct stream *s = stream_at(h, 0);
    *g = s->capture;
    s->capture = NULL;
    capturing_now--;
    return OK;
}
EXPORT int cuGraphInstantiateWithFlags(void **e, void *g, unsigned long long f) { (void)f; *e = g; return OK; }
EXPORT int cuGraphDestroy(void *g) { (void)g; return OK; }
EXPORT int cuGraphExecDestroy(void *g) { (void)g; return OK; }
EXPORT int cuGraphLaunch(void *e, void *h)
{
    struct graph *g = e;
    int state = enter();
    for (int i = 0; i < g->n && !state; i++) {
        atomic_fetch_add(&stats->launched, 1);
        state = put(stream_at(h, 0), g->ops[i]);
    }
    return state;
}

EXPORT int cuEventCreate(void **e, unsigned f) { (void)f; *e = calloc(1, sizeof(struct event)); return enter(); }
EXPORT int cuEventDestroy_v2(void *e) { (void)e; return OK; }
EXPORT int cuEventRecord(void *e, void *h)
{
    int state = enter();
    if (state)
        return state;
    ((struct event *)e)->put++;
    return put(stream_at(h, 0), (struct op){.kind = RECORD, .event = e});
}
EXPORT int cuEventQuery(void *h) { struct event *e = h; return broken ? broken : e->put == e->done ? OK : NOT_READY; }
EXPORT int cuEventElapsedTime(float *ms, void *a, void *b)
{
    *ms = (float)(((struct event *)b)->at - ((struct event *)a)->at) / 1e6f;
    return OK;
}
/* While anything is under capture only a thread that is exempt may do what captures forbid. */
static _Thread_local int capture_mode;
static int forbidden(void)
{
    int found = capture_mode != 2 && capturing_now;
    if (found)
        atomic_fetch_add(&stats->in_capture, 1);
    return found ? 900 : OK;
}
EXPORT int cuThreadExchangeStreamCaptureMode(int *mode)
{
    int was = capture_mode;
    capture_mode = *mode, *mode = was;
    return OK;
}
EXPORT int cuStreamWriteValue32_v2(void *h, uint64_t at, uint32_t value, unsigned f)
{
    (void)f;
    if (forbidden())
        return 900;
    if (getenv("STANDIN_NO_WRITES"))
        return UNSUPPORTED;
    int state = enter();
    return state ? state : put(stream_at(h, 0), (struct op){.kind = WRITE, .to = at, .value = value});
}
EXPORT int cuLaunchHostFunc(void *h, void (*fn)(void *), void *data)
{
    int state = enter();
    return state ? state : put(stream_at(h, 0), (struct op){.kind = HOST, .fn = fn, .data = data});
}

#define SHAPE unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared
#define UNUSED (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared
struct config { unsigned shape[7]; void *stream; };
EXPORT int cuLaunchKernel(void *f, SHAPE, void *s, void **p, void **x) { UNUSED, (void)x; return launch(f, s, p, 0); }
EXPORT int cuLaunchKernel_ptsz(void *f, SHAPE, void *s, void **p, void **x) { UNUSED, (void)x; return launch(f, s, p, 1); }
EXPORT int cuLaunchCooperativeKernel(void *f, SHAPE, void *s, void **p) { UNUSED; return launch(f, s, p, 0); }
EXPORT int cuLaunchKernelEx(const struct config *c, void *f, void **p, void **x) { (void)x; return launch(f, c->stream, p, 0); }
EXPORT int cuGetErrorName(int e, const char **s) { (void)e; *s = "error"; return OK; }
EXPORT int cuGetErrorString(int e, const char **s) { (void)e; *s = "error"; return OK; }

/* Eleven arguments of two kinds, to see that a trampoline passes all of them. Not of the driver. */
EXPORT int cuProfilerStart(long a, long b, long c, long d, long e, long f, double g, double h, long i, long j, long k)
{
    return (int)(a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i + 10 * j + 11 * k);
}

#include <dlfcn.h>
static int lookup(const char *name, void **found, uint64_t flags)
{
    static const char *const suffix[] = {"_v2", ""};
    char full[128];
    Dl_info self;
    dladdr((void *)lookup, &self);
    void *here = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    *found = NULL;
    for (int threads = (flags & 2) != 0; threads >= 0 && !*found; threads--)
        for (int i = 0; i < 2 && !*found; i++) {
            snprintf(full, sizeof full, "%s%s%s", name, suffix[i], threads ? "_ptsz" : "");
            *found = dlsym(here, full);
        }
    dlclose(here);
    return *found ? OK : NOT_FOUND;
}
EXPORT int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *status)
{
    (void)version;
    int result = lookup(name, found, flags);
    if (status)
        *status = result != OK;
    return result;
}

#include "standin_green.h"
