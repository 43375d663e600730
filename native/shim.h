/* What the files of the shim share. The laws are in gate.c and docs/gate.md. */
#ifndef COTENANT_SHIM_H
#define COTENANT_SHIM_H

#include <stddef.h>
#include <stdint.h>

#include "page.h"
#include "table.h"

#define EXPORT __attribute__((visibility("default")))
#define ALWAYS SIZE_MAX

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

/* Called once the driver is open, in every process anew. */
void gate_attach(void);
int gate_large(size_t bytes);
void gate_begin(struct call *call, void *stream, uint64_t key, int copy);
int gate_end(struct call *call, int result);

int capture_begin(void *stream);
int capture_begin_done(void *stream, int before, int result);
int capture_end(void *stream);
int capture_end_done(void *stream, int before, int result);
void stream_ends(void *stream);
int context_ended(void *context, int result);
int device_ended(int device, int result);

#define STREAM_LEGACY ((void *)1)
#define STREAM_PER_THREAD ((void *)2)

/* The stream that a call means by no stream. */
static inline void *stream_of(void *stream, int per_thread)
{
    if (stream)
        return stream;
    return per_thread ? STREAM_PER_THREAD : STREAM_LEGACY;
}

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
