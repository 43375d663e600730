/* Loops of the check that Python is too slow for: launches in a row, and the watch over a drain.
 *
 * The driver is whatever libcuda.so.1 this process gets, the shim where it is preloaded. Every
 * function answers 0 or the driver's error.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <time.h>

enum { NO_DRIVER = 100, NOT_READY = 600 };

/* Shared with the process that closes the gate: a file, mapped by both. Times are CLOCK_MONOTONIC. */
struct talk {
    _Atomic uint64_t stop;
    _Atomic uint64_t launched;
    _Atomic uint64_t watching; /* a closing is about to be asked about: the watcher spins */
    _Atomic uint64_t asked;    /* closings; the watcher answers each by ... */
    _Atomic uint64_t answered;
    _Atomic uint64_t recorded_ns; /* ... when it put an event behind what is on the stream */
    _Atomic uint64_t over_ns;     /* ... and when that event was reached */
};

static int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **,
                     void **);
static int (*synchronize)(void *), (*set_current)(void *), (*create)(void **, unsigned), (*record)(void *, void *),
    (*query)(void *);

struct watch {
    struct talk *talk;
    void *context, *stream;
    _Atomic int over;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void rest(long ns)
{
    struct timespec t = {0, ns};
    nanosleep(&t, NULL);
}

int loop_open(void)
{
    void *cuda = dlopen("libcuda.so.1", RTLD_NOW);
    if (!cuda)
        return NO_DRIVER;
    *(void **)&launch = dlsym(cuda, "cuLaunchKernel");
    *(void **)&synchronize = dlsym(cuda, "cuStreamSynchronize");
    *(void **)&set_current = dlsym(cuda, "cuCtxSetCurrent");
    *(void **)&create = dlsym(cuda, "cuEventCreate");
    *(void **)&record = dlsym(cuda, "cuEventRecord");
    *(void **)&query = dlsym(cuda, "cuEventQuery");
    return launch && synchronize && set_current && create && record && query ? 0 : NO_DRIVER;
}

static int one(void *f, unsigned grid, unsigned block, void *stream, void **params)
{
    return launch(f, grid, 1, 1, block, 1, 1, 0, stream, params, NULL);
}

/* N launches, then wait: how long the launches took, and all of it. */
int loop_burst(void *f, unsigned grid, unsigned block, void *stream, void **params, long n, uint64_t took_ns[2])
{
    uint64_t from = now_ns();
    int result = 0;
    for (long i = 0; i < n && !result; i++)
        result = one(f, grid, block, stream, params);
    took_ns[0] = now_ns() - from;
    if (!result)
        result = synchronize(stream);
    took_ns[1] = now_ns() - from;
    return result;
}

/* Answers each closing: when was the stream really empty, as an event says. */
static void *watch(void *arg)
{
    struct watch *w = arg;
    struct talk *talk = w->talk;
    void *event = NULL;
    prctl(PR_SET_TIMERSLACK, 1000);
    if (set_current(w->context) || create(&event, 2 /* without times */))
        return NULL;
    while (!w->over) {
        uint64_t asked = talk->asked;
        if (asked == talk->answered) {
            if (!talk->watching)
                rest(20000);
            continue;
        }
        for (uint64_t from = now_ns(); now_ns() - from < 10000;) /* whoever is inside a call gets out */
            ;
        if (record(event, w->stream))
            break;
        talk->recorded_ns = now_ns();
        while (query(event) == NOT_READY)
            ;
        talk->over_ns = now_ns();
        talk->answered = asked;
    }
    return NULL;
}

/* Launch until told to stop; no more than `depth` launches are on their way. */
int loop_drive(void *f, unsigned grid, unsigned block, void *context, void *stream, void **params, long depth,
               struct talk *talk)
{
    struct watch w = {.talk = talk, .context = context, .stream = stream};
    pthread_t thread;
    void *half[2];
    int result = set_current(context);
    for (int i = 0; i < 2 && !result; i++)
        result = create(&half[i], 2);
    int watched = !pthread_create(&thread, NULL, watch, &w);
    for (long i = 1; !talk->stop && !result; i++) {
        if (!(result = one(f, grid, block, stream, params)))
            atomic_fetch_add_explicit(&talk->launched, 1, memory_order_relaxed);
        long each = depth / 2, turn = i / each;
        if (i % each || result || (result = record(half[turn % 2], stream)) || turn < 2)
            continue;
        while (query(half[(turn - 1) % 2]) == NOT_READY)
            rest(5000);
    }
    if (!result)
        result = synchronize(stream);
    w.over = 1;
    if (watched)
        pthread_join(thread, NULL);
    return result;
}
