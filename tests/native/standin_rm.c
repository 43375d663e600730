/* A stand-in for NVIDIA's kernel driver, as far as channels go: it answers the ioctls by which
 * tests/native/standin.c makes them, and those that take them off the device. Preloaded behind the
 * shim, it plays the system.
 *
 * STANDIN_RM, words that may stand together: "refuse": no control is allowed. "inert": all are
 * accepted and have no effect. "nodisable": channels cannot be disabled by themselves. "old": orders
 * of later drivers are refused. "noslice": nor can the time slice be changed. "stubborn": the first
 * three orders to go on are refused.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

enum { FREE = 0x29, CONTROL = 0x2a, ALLOC = 0x2b, WRAPPED = 211, OBJECTS = 1024 };
enum { REFUSED = 0x1b, INVALID = 0x1f, UNKNOWN = 0x57, UNSUPPORTED = 0x56 };

struct object { uint32_t client, parent, handle, class; int off, unscheduled; };
static struct object objects[OBJECTS];
static int used, stubborn;
static uint32_t last = 0x5c000000;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

static int word(const char *wanted)
{
    const char *words = getenv("STANDIN_RM");
    return words && strstr(words, wanted) != NULL;
}

/* Whether what this process has on the device stands still. */
__attribute__((visibility("default"))) int standin_rm_stopped(void)
{
    int stopped = 0;
    pthread_mutex_lock(&guard);
    for (int i = 0; i < used; i++)
        stopped |= objects[i].off && !word("inert");
    pthread_mutex_unlock(&guard);
    return stopped;
}

static struct object *find(uint32_t client, uint32_t handle)
{
    for (int i = 0; i < used; i++)
        if (objects[i].client == client && objects[i].handle == handle)
            return &objects[i];
    return NULL;
}

static void drop(uint32_t client, uint32_t handle)
{
    for (int i = 0; i < used; i++)
        if (objects[i].client == client &&
            (objects[i].handle == handle || objects[i].parent == handle || client == handle)) {
            uint32_t below = objects[i].handle;
            objects[i] = objects[--used];
            if (below != handle)
                drop(client, below);
            i = -1;
        }
}

static uint32_t made(uint32_t *words)
{
    if (used == OBJECTS)
        return INVALID;
    words[2] = ++last;
    if (words[3] == 0x41)
        words[0] = words[2];
    else if (!find(words[0], words[1]))
        return UNKNOWN;
    objects[used++] = (struct object){words[0], words[1], words[2], words[3], 0, 0};
    return 0;
}

static uint32_t controlled(uint32_t client, uint32_t handle, uint32_t command, void *at, uint32_t size)
{
    struct object *o = find(client, handle);
    const uint8_t *bytes = at;
    const uint32_t *words = at;
    if (!o)
        return UNKNOWN;
    if (word("refuse"))
        return REFUSED;
    if (command == 0xa06c0103)
        return o->class != 0xa06c || size != 8 || word("noslice") ? UNSUPPORTED : 0;
    int enables = command == 0x2080110b ? !bytes[0] : command == 0xa06c0101 && bytes[0];
    if (enables && word("stubborn") && stubborn++ < 3)
        return INVALID;
    if (command == 0x2080110b) {
        if (o->class != 0x2080 || size != 536 || word("nodisable"))
            return UNSUPPORTED;
        for (uint32_t i = 0; i < words[1] && i < 64; i++) {
            struct object *channel = find(words[6 + i], words[70 + i]);
            if (!channel || (channel->class & 0xff) != 0x6f)
                return UNKNOWN;
            channel->off = bytes[0];
        }
        return 0;
    }
    if (command == 0xa06c0101) {
        if (o->class != 0xa06c || size != (word("old") ? 2 : 3))
            return INVALID;
        o->unscheduled = !bytes[0];
        if (!o->unscheduled)
            o->off = 0;
        return 0;
    }
    if (command == 0xa06c0105) { /* only what is not scheduled stays away */
        if (o->class != 0xa06c || size != 8 || !bytes[0])
            return INVALID;
        o->off = o->unscheduled;
        return 0;
    }
    return UNSUPPORTED;
}

__attribute__((visibility("default"))) int ioctl(int fd, unsigned long request, ...)
{
    static int (*system_ioctl)(int, unsigned long, ...);
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (!system_ioctl)
        system_ioctl = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    if (_IOC_TYPE(request) != 'F')
        return system_ioctl(fd, request, argument);
    uint32_t number = _IOC_NR(request), size = _IOC_SIZE(request), *words = argument;
    if (number == WRAPPED) {
        number = words[0], size = words[1];
        memcpy(&words, (char *)argument + 8, sizeof words);
    }
    pthread_mutex_lock(&guard);
    if (number == ALLOC)
        words[size == 48 ? 10 : size / 4 - 1] = made(words);
    else if (number == FREE) {
        drop(words[0], words[2]);
        words[3] = 0;
    } else if (number == CONTROL) {
        void *at;
        memcpy(&at, words + 4, sizeof at);
        words[7] = controlled(words[0], words[1], words[2], at, words[6]);
    }
    pthread_mutex_unlock(&guard);
    return 0;
}
