/* What the files of the shim share. The laws are in gate.c, memory.c and docs/gate.md. */
#ifndef COTENANT_SHIM_H
#define COTENANT_SHIM_H

#include <stddef.h>
#include <stdint.h>

#include "page.h"
#include "table.h"

#define EXPORT __attribute__((visibility("default")))
#define ALWAYS SIZE_MAX
#define REAL(name, ...) ((int (*)(__VA_ARGS__))driver_of(AT_##name))
#define RELAXED memory_order_relaxed
#define US 1000ll
#define MS 1000000ll

#pragma GCC visibility push(hidden)

/* Structures of the driver API, as far as the gate looks into them. */
struct launch_config {
    unsigned grid[3], block[3], shared;
    void *stream;
};
struct launch_params {
    void *f;
    unsigned grid[3], block[3], shared;
    void *stream;
    void **params;
};
struct copy_2d {
    char ends[112]; /* two of: x, y, kind of memory, host, device, array, pitch */
    size_t width, height;
};
struct copy_3d {
    char ends[176]; /* two of: x, y, z, level, kind, host, device, array, context, pitch, height */
    size_t width, height, depth;
};

/* --- driver.c: the driver's own functions --- */

struct form {
    const char *name; /* as it is asked for */
    int since;        /* CUDA version that brought it; 0: unknown, older than the others */
    int per_thread;   /* for the per-thread default stream */
    int index;
    void *ours;       /* 0: not gated */
};
extern const char *const driver_name[FUNCTIONS];
extern const struct form gated_form[];

/* Address of the driver's own; never 0: what it lacks is a function that answers "not found". */
void *driver_of(int index);
/* Whether the driver has it. */
int driver_has(int index);

/* --- gate.c --- */

struct function;
struct sample;
struct call {
    void *stream;
    int64_t estimate_ns;
    struct function *function;
    struct sample *sample;
    int counted;
    int copy;
};

/* The page, or what stands for it where there is none: an open gate, no seat. */
extern struct head *head;
extern struct seat *seat;
extern int seat_number;
extern _Thread_local int inside; /* in a call into the driver: what comes back to us passes */
extern _Atomic int captures;

int64_t now_ns(void);
void rest(int64_t ns);
int orphaned(void);
void gate_start_tending(void);
/* Contexts that have, or had, work: at most `most` of them. */
int gate_contexts(void **found, int most);

/* Called once the driver is open, in every process anew. */
void gate_attach_slow(void);
extern _Atomic int attached;
static inline void gate_attach(void)
{
    if (__builtin_expect(!atomic_load_explicit(&attached, memory_order_acquire), 0))
        gate_attach_slow();
}
/* Whether a call is too small for the gate; it is then made, and its result goes to gate_passed. */
int gate_passes(size_t bytes);
int gate_passed(int pass, int result);
void gate_begin(struct call *call, void *stream, uint64_t key, int copy);
int gate_end(struct call *call, int result);

int capture_begin(void *stream);
int capture_begin_done(void *stream, int before, int result);
int capture_end(void *stream);
int capture_end_done(void *stream, int before, int result);
void stream_ends(void *stream);
int ends_begin(void);
int context_ended(int begun, void *context, int result);
int device_ended(int begun, int device, int result);

/* --- memory.c --- */

extern _Atomic uint32_t memory_state;

/* Around a call that uses device memory or asks about it: waits while anything is evicted. */
int memory_enter(void);
void memory_leave(int entered);
/* Returns when everything is back. */
void memory_wait(void);
/* By the thread that tends the gate: carry out what the node asks. `closed`: and the node lives;
 * `quiet`: nobody is inside a call and nothing is on a stream. Returns ns until it wants to be
 * called again; 0: no matter. */
int64_t memory_tend(int closed, int quiet);
void memory_attached(void);
void memory_in_child(void);
/* Around what ends contexts. */
void memory_hold(void);
void memory_release(void);
void memory_context_ended(void *context);
void memory_device_ended(int device);
/* The allocation at this address is known elsewhere from now on. */
void memory_pin(uint64_t at, int reason);

/* --- channel.c --- */

/* By the thread that tends the gate: have the channels off if the node wants it and they `may` be. */
void channels_tend(int may);
int channels_off(void);
void channels_in_child(void);

#define STREAM_LEGACY ((void *)1)
#define STREAM_PER_THREAD ((void *)2)

/* The stream that a call means by no stream. */
static inline void *stream_of(void *stream, int per_thread)
{
    if (stream)
        return stream;
    return per_thread ? STREAM_PER_THREAD : STREAM_LEGACY;
}

#pragma GCC visibility pop

/* Copies of the same kind and about the same size are one function to the estimates. */
static inline uint64_t copy_key(int index, size_t bytes)
{
    return (uint64_t)index << 8 | (unsigned)(64 - __builtin_clzll(bytes | 1));
}

static inline size_t sum_of(const size_t *sizes, size_t count)
{
    size_t sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += sizes[i];
    return sum;
}

#endif
