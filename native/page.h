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
#define PAGE_VERSION 1u
#define PAGE_VARIABLE "COTENANT_GATE"
#define DRIVER_VARIABLE "COTENANT_GATE_DRIVER"

#define SEATS 64
#define SLOTS 256
#define HEAD_BYTES 4096
#define SEAT_BYTES 8192
#define SLOTS_AT 4096 /* of a seat */
#define PAGE_BYTES (HEAD_BYTES + SEATS * SEAT_BYTES)

struct head {
    uint64_t magic;
    uint32_t version;
    uint32_t seats;
    _Atomic uint32_t gate;     /* odd: closed. Every change makes it one more. A futex. */
    uint32_t reserved;
    _Atomic uint64_t beat_ns;  /* CLOCK_MONOTONIC, written by the node from time to time */
    uint64_t patience_ns;      /* a beat older than this: the node is dead, the gate open */
    uint64_t bound_ns;         /* of work that may be on the device at a time, as estimated */
    uint64_t large_bytes;      /* copies and memsets from this size on are gated */
};

enum { SEAT_HOST_MARKS = 1, SEAT_ORPHANED = 2, SEAT_FAULTED = 4 };

struct seat {
    uint64_t magic;
    _Atomic uint32_t pid;      /* 0: free */
    _Atomic uint32_t attached;
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
_Static_assert(SLOTS_AT + SLOTS * sizeof(struct slot) <= SEAT_BYTES, "slots");

#endif
