/* What the files about memory share: the table of allocations, the quota, how calls begin and end. */
#ifndef COTENANT_MEMORY_H
#define COTENANT_MEMORY_H

#include <pthread.h>

#include "shim.h"

#pragma GCC visibility push(hidden)

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    DEINITIALIZED = 4,
    IS_BUSY = 906, /* a stream is under capture */
    IS_OPEN = 800, /* the gate is not closed */
};
enum { DEVICES = 64 };
extern _Atomic int passing; /* callers in memory_enter .. memory_leave */

void memory_set_state(uint32_t state);
int memory_change_state(uint32_t from, uint32_t to);
int gate_is_open(void);

/* An allocation that has a row. Only its evictable ones use the second half. */
struct block {
    uint64_t at, bytes, born;
    uint32_t reason, state; /* enum reason, enum row_state */
    uint64_t asked;         /* what the job asked for; `bytes` is rounded up */
    uint64_t handle;        /* of its physical memory; none while evicted */
    uint64_t host;          /* where in the pool it is, while evicted */
    void *context;
    int device;
    int tried; /* could not be moved in this round */
    int dying; /* freed under a capture: to be freed after it */
};

/* What a name given by the driver stands for. */
enum kind { AN_ADDRESS, AN_ARRAY, AN_IMPORT, A_HANDLE, A_PHYSICAL, A_MAPPING };
struct known {
    struct known *next;
    enum kind kind;
    uint64_t key, bytes;
    uint64_t bytes_mapped; /* of mappings, whose bytes count with what is below */
    uint32_t reason;
    int row;                /* -1: none */
    void *context;          /* that was current when it was made */
    struct physical *under; /* of handles and mappings */
};

/* Physical memory that the job made or imported itself: it goes with its last handle and mapping. */
struct physical {
    struct known *counted; /* none: imported, and of unknown size */
    int handles, mappings;
};

extern struct block blocks[ROWS];
extern pthread_mutex_t table; /* recursive; before any call that changes what is below */

/* Room within the quota for an allocation that is about to be made; 0: there is none, which is said
 * on stderr if `say`. Then either `memory_keep` or `memory_unclaim`. */
int memory_claim(uint64_t bytes, int say);
/* So much more that cannot be evicted and is no allocation of its own. */
void memory_add(int64_t bytes);
void memory_unclaim(uint64_t bytes);
struct known *memory_keep(enum kind kind, uint64_t key, uint64_t bytes, uint32_t reason);
/* Without a claim. */
struct known *memory_note(enum kind kind, uint64_t key, uint64_t bytes, uint32_t reason);
/* A row's block changed: let the node see it. */
void memory_show(int row);
struct known *memory_find(enum kind kind, uint64_t key);
void memory_forget(struct known *known);
/* The reason changes. */
void memory_fix(struct known *known, uint32_t reason);

int memory_row(int fixed);
struct known *memory_keep_block(int row, uint64_t asked, uint64_t handle, void *context, int device,
                                uint64_t at, uint64_t bytes);
/* The evictable allocation that an address lies in. */
struct block *memory_block(uint64_t address);
/* Take one out of the table, and give back what it has on device and host. */
int memory_discard(struct known *known);

/* Back with physical memory what is reserved; gives the handle. */
int memory_populate(uint64_t at, uint64_t bytes, int device, uint64_t *handle);
/* Memory of `device` is made accessible to `peer`, now and later. */
void memory_share(int device, int peer);
int64_t memory_held(void);
/* This is the primary context of the device. */
void memory_primary(int device, void *context);
void *memory_primary_of(int device);
void move_context_ended(void *context);
void pools_in_child(void);
void move_in_child(void);

/* --- allocate.c, pools.c, kinds.c --- */

struct location { /* CUmemLocation */
    int type, id;
};
enum { ON_DEVICE = 1 };

extern _Atomic int memory_plain; /* from now on nothing is made evictable */
int memory_is_ours(uint64_t at);
/* Give back one of ours as the driver's cuMemFree would: when all work is through. */
int memory_free_ours(uint64_t at);
/* Forget what the driver is about to free; what it refuses to free is noted again. Until it is free
 * it is counted as such, so that nobody is given the room too early. */
struct known memory_freeing(enum kind kind, uint64_t key);
int memory_was_freed(struct known was, int result);
/* As `memory_claim`, but pools give back what they keep before anything is refused. */
int pools_claim(uint64_t bytes);

/* Begin a call that waits for what is evicted. 0: it is none of ours, the driver's function is to be
 * called; else it ends with memory_done. */
static inline int memory_begin(int *entered)
{
    gate_attach();
    return seat && (*entered = memory_enter());
}

static inline int memory_done(int entered, int result)
{
    memory_leave(entered);
    return result;
}

/* The same for a call that frees: it does not wait. */
static inline int memory_begin_free(void)
{
    gate_attach();
    return seat && !inside && (inside = 1);
}

static inline int memory_freed(int result)
{
    inside = 0;
    return result;
}

#pragma GCC visibility pop
#endif
