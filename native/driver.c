/* The driver's own library: found, opened at first use, and looked up by name.
 *
 * Ours has the same SONAME, so whoever asks for libcuda.so.1 gets ours, and the real one must be
 * opened by a path. Its own calls of public functions may come back to us (they are in the global
 * scope); gate.c lets calls pass that are made inside one.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "shim.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "the trampolines are written for Linux on x86-64"
#endif

enum { NO_DEVICE = 100, NOT_FOUND = 500, PER_THREAD_FLAG = 2 };

EXPORT const int cotenant_gate_shim = PAGE_VERSION; /* by this we know ourselves */

__attribute__((visibility("hidden"))) void *_Atomic driver_function[FUNCTIONS];

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static void *library;
static int searched;

static int missing(void) { return NOT_FOUND; }
static int absent(void) { return NO_DEVICE; }

/* Open the library at this path unless it is one of ours. */
static void *open_other(const char *path)
{
    struct stat self, other;
    Dl_info info;

    if (stat(path, &other))
        return NULL;
    if (dladdr((const void *)&cotenant_gate_shim, &info) && !stat(info.dli_fname, &self) &&
        self.st_dev == other.st_dev && self.st_ino == other.st_ino)
        return NULL;
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle && dlsym(handle, "cotenant_gate_shim")) {
        dlclose(handle);
        return NULL;
    }
    return handle;
}

static void *open_in(const char *folder)
{
    char path[PATH_MAX];
    if (!folder || !*folder || snprintf(path, sizeof path, "%s/libcuda.so.1", folder) >= PATH_MAX)
        return NULL;
    return open_other(path);
}

/* Where the loader would look, and where distributions and containers keep drivers. */
static void *search(void)
{
    static const char *const known[] = {
        "/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/lib64", "/usr/lib",
        "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib", "/run/opengl-driver/lib",
    };
    Dl_info info;
    struct link_map *map = NULL;
    Dl_serinfo size, *paths;
    void *found = NULL;

    if (dladdr1((const void *)&cotenant_gate_shim, &info, (void **)&map, RTLD_DL_LINKMAP) && map &&
        !dlinfo(map, RTLD_DI_SERINFOSIZE, &size) && (paths = malloc(size.dls_size))) {
        if (!dlinfo(map, RTLD_DI_SERINFOSIZE, paths) && !dlinfo(map, RTLD_DI_SERINFO, paths))
            for (unsigned i = 0; i < paths->dls_cnt && !found; i++)
                found = open_in(paths->dls_serpath[i].dls_name);
        free(paths);
    }
    for (size_t i = 0; i < sizeof known / sizeof *known && !found; i++)
        found = open_in(known[i]);
    return found;
}

static void *driver(void)
{
    if (!__atomic_load_n(&searched, __ATOMIC_ACQUIRE)) {
        pthread_mutex_lock(&opening);
        if (!searched) {
            const char *path = getenv(DRIVER_VARIABLE);
            library = path && *path == '/' ? open_other(path) : NULL;
            if (!library)
                library = search();
            __atomic_store_n(&searched, 1, __ATOMIC_RELEASE);
        }
        pthread_mutex_unlock(&opening);
    }
    return library;
}

void *driver_of(int index)
{
    void *found = atomic_load_explicit(&driver_function[index], memory_order_acquire);
    if (found)
        return found;
    if (!driver())
        found = (void *)absent;
    else if (!(found = dlsym(library, driver_name[index])))
        found = (void *)missing;
    atomic_store_explicit(&driver_function[index], found, memory_order_release);
    return found;
}

int driver_has(int index)
{
    void *found = driver_of(index);
    return found != (void *)missing && found != (void *)absent;
}

/* Called by trampolines whose function was not looked up yet: number in r11, arguments untouched. */
__asm__(".text\n.type driver_lazy,@function\n.globl driver_lazy\n.hidden driver_lazy\n"
        "driver_lazy:\n"
        "    pushq %rax\n    pushq %rdi\n    pushq %rsi\n    pushq %rdx\n    pushq %rcx\n"
        "    pushq %r8\n    pushq %r9\n    subq $128, %rsp\n"
        "    movups %xmm0, (%rsp)\n    movups %xmm1, 16(%rsp)\n    movups %xmm2, 32(%rsp)\n"
        "    movups %xmm3, 48(%rsp)\n    movups %xmm4, 64(%rsp)\n    movups %xmm5, 80(%rsp)\n"
        "    movups %xmm6, 96(%rsp)\n    movups %xmm7, 112(%rsp)\n"
        "    movl %r11d, %edi\n    call driver_of\n    movq %rax, %r11\n"
        "    movups (%rsp), %xmm0\n    movups 16(%rsp), %xmm1\n    movups 32(%rsp), %xmm2\n"
        "    movups 48(%rsp), %xmm3\n    movups 64(%rsp), %xmm4\n    movups 80(%rsp), %xmm5\n"
        "    movups 96(%rsp), %xmm6\n    movups 112(%rsp), %xmm7\n"
        "    addq $128, %rsp\n    popq %r9\n    popq %r8\n    popq %rcx\n    popq %rdx\n"
        "    popq %rsi\n    popq %rdi\n    popq %rax\n    jmp *%r11\n"
        ".size driver_lazy, .-driver_lazy\n");

EXPORT int cuInit(unsigned flags)
{
    int (*real)(unsigned) = driver_of(AT_cuInit);
    gate_attach();
    return real(flags);
}

/* Ours in place of what the driver answered, if it is gated.
 *
 * By address first, which is certain. A driver may answer with an address that it does not export;
 * then by name: the newest form that is not newer than what was asked for.
 */
static void *gated(const char *name, void *theirs, int version, uint64_t flags)
{
    const struct form *best = NULL;
    for (const struct form *form = gated_form; form->name; form++) {
        if (strcmp(form->name, name))
            continue;
        if (driver_of(form->index) == theirs)
            return form->ours ? form->ours : theirs;
        int wanted = (flags & PER_THREAD_FLAG) != 0;
        if (form->since > version || form->per_thread > wanted)
            continue;
        if (!best || form->since > best->since ||
            (form->since == best->since && form->per_thread > best->per_thread))
            best = form;
    }
    if (!best || !best->ours)
        return theirs;
    if (!driver_has(best->index)) /* answered, though not exported */
        atomic_store(&driver_function[best->index], theirs);
    return best->ours;
}

EXPORT int cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags,
                               int *status)
{
    int (*real)(const char *, void **, int, uint64_t, int *) = driver_of(AT_cuGetProcAddress_v2);
    int result = real(name, found, version, flags, status);
    gate_attach();
    if (!result && name && found && *found)
        *found = gated(name, *found, version, flags);
    return result;
}

EXPORT int cuGetProcAddress(const char *name, void **found, int version, uint64_t flags)
{
    int (*real)(const char *, void **, int, uint64_t) = driver_of(AT_cuGetProcAddress);
    int result = real(name, found, version, flags);
    gate_attach();
    if (!result && name && found && *found)
        *found = gated(name, *found, version, flags);
    return result;
}
