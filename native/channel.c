/* The process's own channels: how a kernel that is running is taken off the device.
 *
 * 1. The driver's library makes clients, devices, channel groups and channels by ioctl. We come
 *    before that in the loader's order, see them made and freed, and keep a table. Nothing is
 *    changed on its way.
 * 2. `hold` of the page is odd while the node wants the channels off, which is obeyed behind a
 *    closed gate only, and while the node lives. The thread that tends the gate asks the kernel
 *    driver for it, of every group that is in the table.
 * 3. While they are off we make no call that could wait for the device: the thread that would let
 *    them run again must not be one that waits for them.
 * 4. What was asked is not what was done. Reports differ by card and driver whether the controls
 *    have any effect. So nobody relies on them before a kernel of ours was seen to stop.
 *
 * Numbers and layouts are those of NVIDIA's open kernel modules: nv_escape.h, nvos.h, class/clXXXX.h,
 * ctrl/ctrla06c.h, ctrl/ctrla06f, ctrl/ctrl2080/ctrl2080fifo.h.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>

#include "shim.h"

enum { FREE = 0x29, CONTROL = 0x2a, ALLOC = 0x2b, WRAPPED = 211 };
enum { SUBDEVICE = 0x2080, GROUP = 0xa06c, CHANNEL_MASK = 0xff, CHANNEL = 0x6f };
enum {
    GROUP_SCHEDULE = 0xa06c0101,
    GROUP_SET_TIME_SLICE = 0xa06c0103,
    GROUP_PREEMPT = 0xa06c0105,
    DISABLE_CHANNELS = 0x2080110b,
};
enum { OBJECTS = 4096, AT_ONCE = 64, PREEMPT_WITHIN_US = 100000 };
enum { NO_SUBDEVICE = 0x57 }; /* NV_ERR_OBJECT_NOT_FOUND */

struct made { /* NVOS21_PARAMETERS and NVOS64_PARAMETERS begin like this */
    uint32_t client, parent, handle, class;
    uint64_t parameters;
};
struct freed {
    uint32_t client, parent, handle, status;
};
struct asked {
    uint32_t client, object, command, flags;
    void *parameters;
    uint32_t size, status;
};
struct wrapped {
    uint32_t number, size;
    void *parameters;
};
struct disabling {
    uint8_t disable;
    uint32_t count;
    uint8_t only_scheduling, rewind;
    void *event;
    uint32_t clients[AT_ONCE], channels[AT_ONCE];
};
struct preempting {
    uint8_t wait, own_timeout;
    uint32_t timeout_us;
};

_Static_assert(sizeof(struct asked) == 32, "NVOS54_PARAMETERS");
_Static_assert(sizeof(struct disabling) == 536, "NV2080_CTRL_FIFO_DISABLE_CHANNELS_PARAMS");
_Static_assert(sizeof(struct preempting) == 8, "NVA06C_CTRL_PREEMPT_PARAMS");

struct object {
    uint32_t client, handle, parent, class;
    int fd;
    int sliced; /* of a group: its time slice was asked for */
};

static struct object objects[OBJECTS];
static int used;
static int unknown; /* the table lacks something, so nothing is said to be off */
static int off;
static pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER;

static int next_ioctl(int fd, unsigned long request, void *argument)
{
    static int (*next)(int, unsigned long, ...);
    if (!next)
        next = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    return next(fd, request, argument);
}

/* --- what there is ------------------------------------------------------------------------- */

/* Whether what was made lies in what was freed. */
static int lies_in(const struct object *o, uint32_t client, uint32_t handle)
{
    for (int depth = 0; o && depth < 16; depth++) {
        if (o->client != client)
            return 0;
        if (handle == client || o->handle == handle || o->parent == handle)
            return 1;
        const struct object *above = NULL;
        for (int i = 0; i < used && !above; i++)
            if (objects[i].client == client && objects[i].handle == o->parent)
                above = &objects[i];
        o = above;
    }
    return 0;
}

static void forget(uint32_t client, uint32_t handle)
{
    char goes[OBJECTS];
    int kept = 0;
    for (int i = 0; i < used; i++)
        goes[i] = (char)lies_in(&objects[i], client, handle);
    for (int i = 0; i < used; i++)
        if (!goes[i])
            objects[kept++] = objects[i];
    used = kept;
}

static void see_made(int fd, const struct made *made, uint32_t size)
{
    /* the status is the last word of the older form, and the last but one of the newer */
    const uint32_t *words = (const uint32_t *)made;
    uint32_t status = size == 48 ? words[10] : words[size / 4 - 1];
    int wanted = made->class == SUBDEVICE || made->class == GROUP ||
                 (made->class & CHANNEL_MASK) == CHANNEL;
    if (status || !wanted)
        return;
    if (used == OBJECTS) {
        unknown = 1;
        return;
    }
    objects[used++] = (struct object){made->client, made->handle, made->parent, made->class, fd, 0};
}

static void count(void)
{
    uint32_t groups = 0;
    for (int i = 0; i < used; i++)
        groups += objects[i].class == GROUP;
    if (seat)
        atomic_store(&seat->groups, groups);
}

/* Not under the lock: a call that frees may wait for work that only we can let go on. */
static int watch(int fd, unsigned long request, void *argument, uint32_t number, void *parameters,
                 uint32_t size)
{
    const struct freed *freed = parameters;
    int frees = number == FREE && size == sizeof *freed;
    int makes = number == ALLOC && (size == 32 || size == 40 || size == 48);
    if (frees) {
        pthread_mutex_lock(&table);
        forget(freed->client, freed->handle);
        count();
        pthread_mutex_unlock(&table);
    }
    int result = next_ioctl(fd, request, argument), error = errno;
    pthread_mutex_lock(&table);
    if (makes && !result)
        see_made(fd, parameters, size);
    if (frees && (result || freed->status))
        unknown = 1;
    count();
    pthread_mutex_unlock(&table);
    errno = error;
    return result;
}

EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);

    if (_IOC_TYPE(request) != 'F' || !argument || !head->channels)
        return next_ioctl(fd, request, argument);
    uint32_t number = _IOC_NR(request), size = _IOC_SIZE(request);
    void *parameters = argument;
    if (number == WRAPPED && size == sizeof(struct wrapped)) {
        const struct wrapped *wrapped = argument;
        number = wrapped->number, size = wrapped->size, parameters = wrapped->parameters;
    }
    if ((number != ALLOC && number != FREE) || !parameters)
        return next_ioctl(fd, request, argument);
    return watch(fd, request, argument, number, parameters, size);
}

/* --- asking -------------------------------------------------------------------------------- */

/* The kernel driver's status, or the system's error above 16 bits; 0: done. */
static uint32_t control(const struct object *of, uint32_t object, uint32_t command, void *parameters,
                        uint32_t size)
{
    struct asked asked = {of->client, object, command, 0, parameters, size, ~0u};
    if (next_ioctl(of->fd, _IOWR('F', CONTROL, struct asked), &asked))
        return (uint32_t)errno << 16;
    return asked.status;
}

static uint32_t disable(const struct object *group, int disabled)
{
    struct disabling ask = {.disable = (uint8_t)disabled};
    const struct object *subdevice = NULL;
    uint32_t error = 0;
    for (int i = 0; i < used; i++)
        if (objects[i].class == SUBDEVICE && objects[i].client == group->client &&
            objects[i].parent == group->parent)
            subdevice = &objects[i];
    if (!subdevice)
        return NO_SUBDEVICE;
    for (int i = 0; i <= used && !error; i++) {
        const struct object *o = &objects[i];
        if (i < used && (o->class & CHANNEL_MASK) == CHANNEL && o->client == group->client &&
            o->parent == group->handle) {
            ask.clients[ask.count] = o->client;
            ask.channels[ask.count++] = o->handle;
        }
        if (ask.count == AT_ONCE || (i == used && ask.count)) {
            error = control(subdevice, subdevice->handle, DISABLE_CHANNELS, &ask, sizeof ask);
            ask.count = 0;
        }
    }
    return error;
}

static uint32_t schedule(const struct object *group, int disabled)
{
    uint8_t ask[3] = {!disabled, 0, 0}; /* drivers before 575 know the first two only */
    uint32_t error = control(group, group->handle, GROUP_SCHEDULE, ask, 3);
    return error ? control(group, group->handle, GROUP_SCHEDULE, ask, 2) : 0;
}

static uint32_t preempt(const struct object *group)
{
    struct preempting ask = {.wait = 1, .own_timeout = 1, .timeout_us = PREEMPT_WITHIN_US};
    return control(group, group->handle, GROUP_PREEMPT, &ask, sizeof ask);
}

/* Take a group off the device, or let it run again. */
static uint32_t turn(const struct object *group, int disabled)
{
    if (head->channels == CHANNELS_DISABLED)
        return disable(group, disabled);
    uint32_t error = schedule(group, disabled);
    return error || !disabled ? error : preempt(group);
}

static uint32_t turn_all(int disabled)
{
    uint32_t first = 0, error;
    for (int i = 0; i < used; i++)
        if (objects[i].class == GROUP && (error = turn(&objects[i], disabled)) && !first)
            first = error;
    return !first && disabled && unknown ? (uint32_t)ENOSPC << 16 : first;
}

static void slice(void)
{
    uint64_t us = head->slice_us;
    for (int i = 0; us && i < used; i++)
        if (objects[i].class == GROUP && !objects[i].sliced) {
            objects[i].sliced = 1;
            uint32_t error =
                control(&objects[i], objects[i].handle, GROUP_SET_TIME_SLICE, &us, sizeof us);
            if (error)
                atomic_store(&seat->slice_error, error);
        }
}

int channels_off(void) { return off; }

void channels_tend(int may)
{
    if (!head->channels)
        return;
    uint32_t number = atomic_load(&head->hold);
    int wanted = may && number & 1;
    pthread_mutex_lock(&table);
    slice();
    if (wanted ? seat->hold_done != number : off) {
        uint32_t error = turn_all(wanted);
        off = error ? !wanted || turn_all(0) : wanted; /* all of them or none */
        atomic_store(&seat->hold_error, error);
    }
    if (wanted || !off) /* what could not be let run is tried again */
        atomic_store(&seat->hold_done, wanted ? number : number & ~1u);
    pthread_mutex_unlock(&table);
}

void channels_in_child(void)
{
    used = unknown = off = 0;
    pthread_mutex_init(&table, NULL);
}
