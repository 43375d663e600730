/* The control page of a job: one small file, mapped by the node and by each process of the job.
 *
 * A head, which only the node writes, then SEATS seats, each written by one process. All numbers are
 * little-endian and lie at their natural alignment. src/cotenant/devices/nvidia/page.py has the same
 * layout; a test compares the two. A change of anything here is a new PAGE_VERSION.
 */
#ifndef COTENANT_PAGE_H
#define COTENANT_PAGE_H

#include <stdatomic.h>
#include <stdint.h>

#define PAGE_MAGIC 0x4554414754544f43ull /* "COTTGATE" */
#define SEAT_MAGIC 0x5441455354544f43ull /* "COTTSEAT" */
#define PAGE_VERSION 3u
#define PAGE_VARIABLE "COTENANT_GATE"
#define DRIVER_VARIABLE "COTENANT_GATE_DRIVER"
#define MEMORY_VARIABLE "COTENANT_GATE_MEMORY" /* "plain": none of it can be evicted */

#define SEATS 64
#define SLOTS 256
#define ROWS 1024
#define HEAD_BYTES 4096
#define SEAT_BYTES 40960
#define SLOTS_AT 4096 /* of a seat */
#define ROWS_AT 8192
#define PAGE_BYTES (HEAD_BYTES + SEATS * SEAT_BYTES)

struct head {
    uint64_t magic;
    uint32_t version;
    uint32_t seats;
    _Atomic uint32_t gate;     /* odd: closed. Every change makes it one more. A futex. */
    _Atomic uint32_t hold;     /* odd: the job's channels are to be off the device. As `gate`. */
    _Atomic uint64_t beat_ns;  /* CLOCK_MONOTONIC, written by the node from time to time */
    uint64_t patience_ns;      /* a beat older than this: the node is dead, the gate open */
    uint64_t bound_ns;         /* of work that may be on the device at a time, as estimated */
    uint64_t large_bytes;      /* copies and memsets from this size on are gated */
    _Atomic uint64_t quota_bytes; /* what all processes together may hold on devices; 0: no limit */
    uint64_t pool_bytes;          /* host memory that a process may have for what is evicted */
    uint32_t channels;            /* enum channels */
    uint32_t slice_us;            /* time slice of the job's channel groups; 0: left as it is */
    _Atomic uint64_t command[SEATS]; /* to each seat: a number << 32 | MiB to be away, 0: none */
};

/* How channels are taken off the device. */
enum channels {
    CHANNELS_LEFT = 0,     /* they are not: the process's calls are not looked at */
    CHANNELS_DISABLED = 1, /* the driver disables and preempts them */
    CHANNELS_PREEMPTED = 2, /* their group is not scheduled any more, then preempted */
};

/* SEAT_ORPHANED: there was a time without beats for longer than patience. */
enum { SEAT_HOST_MARKS = 1, SEAT_ORPHANED = 2, SEAT_FAULTED = 4 };

struct seat {
    uint64_t magic;
    union {
        _Atomic uint64_t taken; /* both at once: who takes the seat is not attached yet */
        struct {
            _Atomic uint32_t pid; /* 0: free */
            _Atomic uint32_t attached;
        };
    };
    uint64_t started;          /* of the process, field 22 of /proc/PID/stat */
    _Atomic uint64_t entered;  /* gated calls begun ... */
    _Atomic uint64_t left;     /* ... and ended or blocked: equal if nobody is inside one */
    _Atomic uint64_t launches; /* gated calls that the driver accepted */
    _Atomic uint64_t copies;   /* those of them that are copies and memsets */
    _Atomic uint64_t blocks;   /* times that a caller waited for the gate ... */
    _Atomic uint64_t blocked_ns;
    _Atomic uint64_t throttled_ns; /* ... and for what is in flight */
    _Atomic uint64_t overruns;     /* let through although the bound was reached: nothing moved */
    _Atomic uint64_t uncounted;    /* on streams that found no slot */
    _Atomic int64_t in_flight_ns;  /* estimated */
    _Atomic uint32_t waiting;      /* callers at the gate now */
    _Atomic uint32_t flags;
    _Atomic uint32_t capturing;    /* streams under capture */
    _Atomic uint32_t slots;        /* slots beyond this many were never used */
    /* Memory of devices, in bytes. What is evicted is still held. */
    _Atomic int64_t held;      /* all that counts for the quota */
    _Atomic int64_t claimed;   /* asked of the driver now; not in `held` yet */
    _Atomic int64_t freeing;   /* being freed by the driver; no longer in `held` */
    _Atomic int64_t evictable; /* of what is held: here, and can be evicted; */
    _Atomic int64_t evicted;   /* in host memory; */
    _Atomic int64_t small;     /* in allocations below EVICTABLE_FROM; */
    _Atomic int64_t fixed;     /* in others that cannot be evicted; */
    _Atomic int64_t unlisted;  /* of those, in allocations that found no row */
    _Atomic int64_t imported;  /* other processes', or other interfaces'; not in `held` */
    _Atomic uint64_t refusals; /* allocations refused for the quota */
    _Atomic uint64_t moved_bytes; /* by the last command, either way, ... */
    _Atomic uint64_t moved_ns;    /* ... and how long it took */
    _Atomic uint32_t answered;     /* number of the last command that was carried out or refused */
    _Atomic uint32_t memory_state; /* enum memory_state */
    _Atomic uint32_t memory_error; /* of the last move: the driver's number; 0: none */
    _Atomic uint32_t rows;         /* rows beyond this many were never used */
    /* Channels. Errors are the kernel driver's status, or the system's error << 16. */
    _Atomic uint32_t groups;       /* channel groups that are known */
    _Atomic uint32_t hold_done;    /* last `hold` that was answered; odd: they are off, unless ... */
    _Atomic uint32_t hold_error;   /* ... this says why they are not */
    _Atomic uint32_t slice_error;  /* of the time slice */
};

enum memory_state {
    MEMORY_HERE = 0,      /* all of it is on the device */
    MEMORY_CLOSING = 1,   /* asked to evict; those who use memory wait, those at it finish */
    MEMORY_MOVING = 2,    /* being copied out */
    MEMORY_AWAY = 3,      /* something is evicted */
    MEMORY_RETURNING = 4, /* being copied back */
};

#define EVICTABLE_FROM (2ull << 20)

/* Why an allocation cannot be evicted. */
enum reason {
    EVICTABLE = 0,
    IS_SMALL = 1,      /* below EVICTABLE_FROM; has no row */
    IS_PLAIN = 2,      /* the driver's own kind: told so, or IPC is used, or it has no other */
    IS_POOLED = 3,     /* of a stream-ordered pool */
    IS_OWN = 4,        /* made by the job with cuMemCreate: the handle is the job's */
    IS_MANAGED = 5,
    IS_ARRAY = 6,
    IS_EXPORTED = 7,   /* another process may have it mapped */
    IS_IMPORTED = 8,   /* another process's, or another interface's */
    IS_REGISTERED = 9, /* its physical memory is known elsewhere: dma-buf, multicast, a handle */
};

enum row_state { ROW_FREE = 0, ROW_HERE = 1, ROW_AWAY = 2 };

/* An allocation. */
struct row {
    _Atomic uint64_t at;    /* address or handle */
    _Atomic uint64_t bytes; /* that it takes */
    _Atomic uint64_t born;  /* `launches` when it was made: every later one could touch it */
    _Atomic uint32_t reason;
    _Atomic uint32_t state;
};

/* A stream. `done` is written by the stream itself as it gets there. */
struct slot {
    _Atomic uint32_t done;  /* number of the last mark that was reached */
    _Atomic uint32_t put;   /* number of the last mark that was put on the stream */
    _Atomic uint32_t loose; /* accepted calls after that mark */
    uint32_t reserved;
};

_Static_assert(sizeof(struct head) <= HEAD_BYTES, "head");
_Static_assert(sizeof(struct seat) <= SLOTS_AT, "seat");
_Static_assert(SLOTS_AT + SLOTS * sizeof(struct slot) <= ROWS_AT, "slots");
_Static_assert(ROWS_AT + ROWS * sizeof(struct row) <= SEAT_BYTES, "rows");

#endif
