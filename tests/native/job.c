/* A job of the gate's tests, linked to nothing: job VERB [STREAMS] [N] [US] [WAYS]
 *
 * run STREAMS N US   a thread for each stream; N launches of US us on each; prints the sum that
 *                    the kernels counted. The ways of launching take turns.
 * threads ...        the same on the per-thread default stream
 * forever ...        the same without end
 * capture N US       captures N kernels, launches the graph N times; prints the count
 * beside N US        while a stream is under capture, launches on the default stream of another thread
 *                    until there is input
 * contexts N US      makes and ends N contexts, with a kernel in each that nobody waits for
 * fork N US          its child runs N; prints what the child counted
 * exec N US          replaces itself by "run 1 N US"
 * destroy N US       as run, but a new stream for each ten launches
 * ask VERSION FLAGS NAME...  prints for each name, one a line, whether cuGetProcAddress_v2 answers
 *                    with a function of the preloaded library
 * pass               prints the stand-in's sum of eleven arguments
 * error N            launches until an error comes; prints its number
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void *cuda;
#define CALL(name, ...) ((int (*)(__VA_ARGS__))dlsym(cuda, #name))
#define CHECK(call) do { int r_ = (call); if (r_) { fprintf(stderr, "%s: %d\n", #call, r_); _exit(3); } } while (0)

struct config { unsigned shape[7]; void *stream; };
static void *context, *function;
static uint64_t counter;
static long launches, us;
static int per_thread, renew;
static volatile int forever;

static void setup(void)
{
    void *module;
    char name[32];
    CHECK(CALL(cuInit, unsigned)(0));
    CHECK(CALL(cuDevicePrimaryCtxRetain, void **, int)(&context, 0));
    CHECK(CALL(cuCtxSetCurrent, void *)(context));
    CHECK(CALL(cuModuleLoadData, void **, const void *)(&module, "x"));
    snprintf(name, sizeof name, "count_%ld", us);
    CHECK(CALL(cuModuleGetFunction, void **, void *, const char *)(&function, module, name));
    CHECK(CALL(cuMemAlloc_v2, uint64_t *, size_t)(&counter, 8));
}

static int launch(void *stream, long way)
{
    void *params[] = {&counter};
    struct config config = {{1, 1, 1, 1, 1, 1, 0}, stream};
    if (per_thread)
        return CALL(cuLaunchKernel_ptsz, void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                    unsigned, void *, void **, void **)(function, 1, 1, 1, 1, 1, 1, 0, NULL, params, NULL);
    if (way % 3 == 1)
        return CALL(cuLaunchKernelEx, void *, void *, void **, void **)(&config, function, params, NULL);
    if (way % 3 == 2)
        return CALL(cuLaunchCooperativeKernel, void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                    unsigned, void *, void **)(function, 1, 1, 1, 1, 1, 1, 0, stream, params);
    return CALL(cuLaunchKernel, void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                void *, void **, void **)(function, 1, 1, 1, 1, 1, 1, 0, stream, params, NULL);
}

static void *work(void *unused)
{
    void *stream = NULL;
    (void)unused;
    CHECK(CALL(cuCtxSetCurrent, void *)(context));
    for (long i = 0; i < launches || forever; i++) {
        if (!per_thread && (!stream || (renew && i % 10 == 0))) {
            if (stream)
                CHECK(CALL(cuStreamDestroy_v2, void *)(stream));
            CHECK(CALL(cuStreamCreate, void **, unsigned)(&stream, 0));
        }
        CHECK(launch(stream, i));
    }
    CHECK(CALL(cuStreamSynchronize, void *)(per_thread ? (void *)2 : stream));
    return NULL;
}

static uint64_t counted(void)
{
    uint64_t value = 0;
    CHECK(CALL(cuMemcpyDtoH_v2, void *, uint64_t, size_t)(&value, counter, 8));
    return value;
}

static void run(int streams)
{
    pthread_t threads[64];
    setup();
    for (int i = 0; i < streams; i++)
        pthread_create(&threads[i], NULL, work, NULL);
    for (int i = 0; i < streams; i++)
        pthread_join(threads[i], NULL);
    if (renew) /* what is on streams that were destroyed */
        for (int i = 0; i < 2000 && counted() < (uint64_t)launches * streams; i++)
            usleep(5000);
    printf("%lu\n", (unsigned long)counted());
}

static void capture(void)
{
    void *stream, *graph, *exec;
    setup();
    CHECK(CALL(cuStreamCreate, void **, unsigned)(&stream, 0));
    CHECK(launch(stream, 0));
    CHECK(CALL(cuStreamBeginCapture_v2, void *, int)(stream, 0));
    printf("capturing\n"), fflush(stdout);
    getchar(); /* until the test says so */
    for (long i = 0; i < launches; i++)
        CHECK(launch(stream, i));
    CHECK(CALL(cuStreamEndCapture, void *, void **)(stream, &graph));
    printf("captured\n"), fflush(stdout);
    CHECK(CALL(cuGraphInstantiateWithFlags, void **, void *, unsigned long long)(&exec, graph, 0));
    for (long i = 0; i < launches; i++)
        CHECK(CALL(cuGraphLaunch, void *, void *)(exec, stream));
    CHECK(CALL(cuStreamSynchronize, void *)(stream));
    printf("%lu\n", (unsigned long)counted());
}

static void beside(void)
{
    pthread_t thread;
    void *stream, *graph;
    setup();
    CHECK(CALL(cuStreamCreate, void **, unsigned)(&stream, 0));
    CHECK(launch((void *)2, 0)); /* the first call names the page's memory to the driver */
    per_thread = 1;
    pthread_create(&thread, NULL, work, NULL);
    pthread_join(thread, NULL);
    CHECK(CALL(cuStreamBeginCapture_v2, void *, int)(stream, 0));
    forever = 1;
    pthread_create(&thread, NULL, work, NULL);
    printf("capturing\n"), fflush(stdout);
    getchar();
    forever = 0;
    pthread_join(thread, NULL);
    CHECK(CALL(cuStreamEndCapture, void *, void **)(stream, &graph));
    printf("ended\n");
}

static void contexts(void)
{
    setup();
    for (long i = 0; i < launches; i++) {
        void *made, *stream;
        CHECK(CALL(cuCtxCreate_v2, void **, unsigned, int)(&made, 0, 0));
        CHECK(CALL(cuStreamCreate, void **, unsigned)(&stream, 0));
        CHECK(launch(stream, i));
        CHECK(CALL(cuCtxDestroy_v2, void *)(made));
    }
    printf("%ld\n", launches);
}

int main(int argc, char **argv)
{
    const char *verb = argv[1];
    char *again[] = {argv[0], "run", "1", argv[2], argc > 3 ? argv[3] : NULL, NULL};
    int streams = 1, first = 2;
    cuda = dlopen("libcuda.so.1", RTLD_NOW);
    if (!cuda)
        return 4;
    if (!strcmp(verb, "pass")) {
        printf("%d\n", CALL(cuProfilerStart, long, long, long, long, long, long, double, double, long, long, long)(
                           1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11));
        return 0;
    }
    if (!strcmp(verb, "ask")) {
        Dl_info ours, found;
        dladdr(dlsym(cuda, "cuInit"), &ours);
        for (int i = 4; i < argc; i++) {
            void *at = NULL;
            int r = CALL(cuGetProcAddress_v2, const char *, void **, int, uint64_t, int *)(
                argv[i], &at, atoi(argv[2]), (uint64_t)atoi(argv[3]), NULL);
            printf("%s\n", r || !at ? "none" : !dladdr(at, &found) ? "lost" :
                   found.dli_fbase == ours.dli_fbase ? found.dli_sname : "driver");
        }
        return 0;
    }
    if (!strcmp(verb, "run") || !strcmp(verb, "forever") || !strcmp(verb, "threads"))
        streams = atoi(argv[first++]);
    launches = atol(argv[first++]);
    us = argc > first ? atol(argv[first]) : 100;
    per_thread = !strcmp(verb, "threads");
    renew = !strcmp(verb, "destroy");
    forever = !strcmp(verb, "forever");
    if (!strcmp(verb, "capture"))
        capture();
    else if (!strcmp(verb, "beside"))
        beside();
    else if (!strcmp(verb, "contexts"))
        contexts();
    else if (!strcmp(verb, "exec")) {
        CALL(cuInit, unsigned)(0);
        execv(argv[0], again);
    } else if (!strcmp(verb, "error")) {
        int result = 0;
        setup();
        while (!result)
            result = launch((void *)1, 0);
        printf("%d\n", result);
    } else if (!strcmp(verb, "fork")) {
        int status;
        CALL(cuInit, unsigned)(0); /* attached before it forks */
        if (!fork()) {
            run(1);
            fflush(stdout);
            _exit(0);
        }
        wait(&status);
    } else
        run(streams);
    return 0;
}
