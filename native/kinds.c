/* Kinds of device memory that are the driver's own, another process's, or the job's own mapping:
 * counted, and not evictable. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "memory.h"

struct array { /* CUDA_ARRAY_DESCRIPTOR */
    size_t width, height;
    unsigned format, channels;
};
struct array_3d { /* CUDA_ARRAY3D_DESCRIPTOR */
    size_t width, height, depth;
    unsigned format, channels, flags;
};
struct external { /* CUDA_EXTERNAL_MEMORY_HANDLE_DESC, its beginning */
    unsigned type;
    void *handle[2];
    unsigned long long size;
};
struct ipc_handle {
    char bytes[64];
};

/* --- the driver's own kinds ------------------------------------------------------------------ */

EXPORT int cuMemAllocPitch_v2(uint64_t *at, size_t *pitch, size_t width, size_t height, unsigned element)
{
    int (*real)(uint64_t *, size_t *, size_t, size_t, unsigned) = driver_of(AT_cuMemAllocPitch_v2);
    uint64_t guess = (width + 511) / 512 * 512 * height;
    int entered, result;
    if (!memory_begin(&entered))
        return real(at, pitch, width, height, element);
    if (!pools_claim(guess))
        return memory_done(entered, OUT_OF_MEMORY);
    result = real(at, pitch, width, height, element);
    memory_unclaim(guess);
    if (!result)
        memory_note(AN_ADDRESS, *at, *pitch * height, IS_PLAIN);
    return memory_done(entered, result);
}

EXPORT int cuMemAllocManaged(uint64_t *at, size_t bytes, unsigned flags)
{
    int (*real)(uint64_t *, size_t, unsigned) = driver_of(AT_cuMemAllocManaged), entered, result;
    if (!memory_begin(&entered))
        return real(at, bytes, flags);
    if (!pools_claim(bytes))
        return memory_done(entered, OUT_OF_MEMORY);
    if ((result = real(at, bytes, flags)))
        memory_unclaim(bytes);
    else
        memory_keep(AN_ADDRESS, *at, bytes, IS_MANAGED);
    return memory_done(entered, result);
}

/* About what an array takes; the driver pads it. */
static uint64_t array_bytes(struct array_3d a)
{
    unsigned format = a.format & 0xff;
    uint64_t element = format == 1 || format == 8 ? 1 : format == 2 || format == 9 || format == 16 ? 2 : 4;
    uint64_t area = a.width * (a.height ? a.height : 1);
    return area * (a.depth ? a.depth : 1) * element * (a.channels ? a.channels : 1);
}

#define MAKE_ARRAY(made, bytes, call) \
    int entered, result; \
    if (!memory_begin(&entered)) \
        return call; \
    if (!pools_claim(bytes)) \
        return memory_done(entered, OUT_OF_MEMORY); \
    if ((result = call)) \
        memory_unclaim(bytes); \
    else \
        memory_keep(AN_ARRAY, (uintptr_t)*(made), bytes, IS_ARRAY); \
    return memory_done(entered, result)

EXPORT int cuArrayCreate_v2(void **made, const struct array *a)
{
    int (*real)(void **, const struct array *) = driver_of(AT_cuArrayCreate_v2);
    uint64_t bytes = 0;
    if (a)
        bytes = array_bytes((struct array_3d){a->width, a->height, 0, a->format, a->channels, 0});
    MAKE_ARRAY(made, bytes, real(made, a));
}

EXPORT int cuArray3DCreate_v2(void **made, const struct array_3d *a)
{
    int (*real)(void **, const struct array_3d *) = driver_of(AT_cuArray3DCreate_v2);
    uint64_t bytes = a ? array_bytes(*a) : 0;
    MAKE_ARRAY(made, bytes, real(made, a));
}

EXPORT int cuMipmappedArrayCreate(void **made, const struct array_3d *a, unsigned levels)
{
    int (*real)(void **, const struct array_3d *, unsigned) = driver_of(AT_cuMipmappedArrayCreate);
    uint64_t bytes = a ? array_bytes(*a) : 0;
    if (levels > 1)
        bytes += bytes / 3;
    MAKE_ARRAY(made, bytes, real(made, a, levels));
}

static int destroy(enum kind kind, void *handle, int index)
{
    int (*real)(void *) = driver_of(index);
    if (!memory_begin_free())
        return real(handle);
    struct known was = memory_freeing(kind, (uintptr_t)handle);
    return memory_freed(memory_was_freed(was, real(handle)));
}

EXPORT int cuArrayDestroy(void *array) { return destroy(AN_ARRAY, array, AT_cuArrayDestroy); }
EXPORT int cuMipmappedArrayDestroy(void *array)
{
    return destroy(AN_ARRAY, array, AT_cuMipmappedArrayDestroy);
}
EXPORT int cuDestroyExternalMemory(void *m) { return destroy(AN_IMPORT, m, AT_cuDestroyExternalMemory); }

EXPORT int cuImportExternalMemory(void **made, const struct external *what)
{
    int (*real)(void **, const struct external *) = driver_of(AT_cuImportExternalMemory), entered, result;
    if (!memory_begin(&entered))
        return real(made, what);
    if (!(result = real(made, what)))
        memory_note(AN_IMPORT, (uintptr_t)*made, what->size, IS_IMPORTED);
    return memory_done(entered, result);
}

/* --- between processes ------------------------------------------------------------------------ */

/* The driver exports no memory of our kind. So a job that asks for it once gets, from then on, the
 * driver's own kind. */
EXPORT int cuIpcGetMemHandle(struct ipc_handle *handle, uint64_t at)
{
    int (*real)(struct ipc_handle *, uint64_t) = driver_of(AT_cuIpcGetMemHandle), entered, result;
    if (!memory_begin(&entered))
        return real(handle, at);
    memory_plain = 1;
    if (!(result = real(handle, at)))
        memory_pin(at, IS_EXPORTED);
    return memory_done(entered, result);
}

EXPORT int cuIpcOpenMemHandle_v2(uint64_t *at, struct ipc_handle handle, unsigned flags)
{
    int (*real)(uint64_t *, struct ipc_handle, unsigned) = driver_of(AT_cuIpcOpenMemHandle_v2);
    int entered, result;
    size_t bytes = 0;
    if (!memory_begin(&entered))
        return real(at, handle, flags);
    if (!(result = real(at, handle, flags))) {
        REAL(cuMemGetAddressRange_v2, uint64_t *, size_t *, uint64_t)(NULL, &bytes, *at);
        memory_note(AN_IMPORT, *at, bytes, IS_IMPORTED);
    }
    return memory_done(entered, result);
}

EXPORT int cuIpcCloseMemHandle(uint64_t at)
{
    int (*real)(uint64_t) = driver_of(AT_cuIpcCloseMemHandle);
    if (!memory_begin_free())
        return real(at);
    struct known was = memory_freeing(AN_IMPORT, at);
    return memory_freed(memory_was_freed(was, real(at)));
}

/* --- physical memory of the job's own ---------------------------------------------------------- */

static void refer(uint64_t handle, struct physical *physical)
{
    struct known *k = memory_note(A_HANDLE, handle, 0, IS_SMALL);
    k->under = physical;
    physical->handles++;
}

static void let_go(struct physical *physical)
{
    if (physical->handles || physical->mappings)
        return;
    if (physical->counted)
        memory_forget(physical->counted);
    free(physical);
}

EXPORT int cuMemCreate(uint64_t *handle, size_t bytes, const void *properties, unsigned long long flags)
{
    int (*real)(uint64_t *, size_t, const void *, unsigned long long) = driver_of(AT_cuMemCreate);
    int entered, result;
    if (!memory_begin(&entered))
        return real(handle, bytes, properties, flags);
    int counts = properties && ((const struct location *)properties)[1].type == ON_DEVICE;
    if (counts && !pools_claim(bytes))
        return memory_done(entered, OUT_OF_MEMORY);
    result = real(handle, bytes, properties, flags);
    if (counts && result)
        memory_unclaim(bytes);
    struct physical *physical = counts && !result ? calloc(1, sizeof *physical) : NULL;
    if (physical) {
        pthread_mutex_lock(&table);
        static uint64_t number;
        physical->counted = memory_keep(A_PHYSICAL, ++number, bytes, IS_OWN);
        refer(*handle, physical);
        pthread_mutex_unlock(&table);
    }
    return memory_done(entered, result);
}

/* A handle of what another process exported: counted where it was made. */
EXPORT int cuMemImportFromShareableHandle(uint64_t *handle, void *from, int type)
{
    int (*real)(uint64_t *, void *, int) = driver_of(AT_cuMemImportFromShareableHandle), entered;
    if (!memory_begin(&entered))
        return real(handle, from, type);
    int result = real(handle, from, type);
    struct physical *physical = result ? NULL : calloc(1, sizeof *physical);
    if (physical) {
        pthread_mutex_lock(&table);
        refer(*handle, physical);
        pthread_mutex_unlock(&table);
    }
    return memory_done(entered, result);
}

EXPORT int cuMemRelease(uint64_t handle)
{
    int (*real)(uint64_t) = driver_of(AT_cuMemRelease);
    if (!memory_begin_free())
        return real(handle);
    pthread_mutex_lock(&table);
    int result = real(handle);
    struct known *k = result ? NULL : memory_find(A_HANDLE, handle);
    if (k) {
        struct physical *physical = k->under;
        memory_forget(k);
        physical->handles--;
        let_go(physical);
    }
    pthread_mutex_unlock(&table);
    return memory_freed(result);
}

EXPORT int cuMemMap(uint64_t at, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags)
{
    int (*real)(uint64_t, size_t, size_t, uint64_t, unsigned long long) = driver_of(AT_cuMemMap);
    int entered;
    if (!memory_begin(&entered))
        return real(at, bytes, offset, handle, flags);
    pthread_mutex_lock(&table);
    int result = real(at, bytes, offset, handle, flags);
    struct known *k = result ? NULL : memory_find(A_HANDLE, handle);
    if (k) {
        struct physical *physical = k->under;
        int imported = !physical->counted;
        struct known *mapping = memory_note(A_MAPPING, at, imported ? bytes : 0,
                                            imported ? IS_IMPORTED : IS_SMALL);
        mapping->under = physical;
        mapping->bytes_mapped = bytes;
        physical->mappings++;
    }
    pthread_mutex_unlock(&table);
    return memory_done(entered, result);
}

EXPORT int cuMemUnmap(uint64_t at, size_t bytes)
{
    int (*real)(uint64_t, size_t) = driver_of(AT_cuMemUnmap);
    if (!memory_begin_free())
        return real(at, bytes);
    pthread_mutex_lock(&table);
    int result = real(at, bytes);
    for (uint64_t from = at; !result && from < at + bytes;) {
        struct known *k = memory_find(A_MAPPING, from);
        if (!k) {
            from += 64 << 10; /* no kind of memory is mapped by less */
            continue;
        }
        struct physical *physical = k->under;
        from += k->bytes_mapped;
        memory_forget(k);
        physical->mappings--;
        let_go(physical);
    }
    pthread_mutex_unlock(&table);
    return memory_freed(result);
}

EXPORT int cuMemRetainAllocationHandle(uint64_t *handle, void *at)
{
    int (*real)(uint64_t *, void *) = driver_of(AT_cuMemRetainAllocationHandle), entered, result;
    if (!memory_begin(&entered))
        return real(handle, at);
    memory_pin((uintptr_t)at, IS_REGISTERED);
    pthread_mutex_lock(&table);
    if (!(result = real(handle, at))) {
        struct known *k = memory_find(A_HANDLE, *handle);
        if (k && k->under)
            refer(*handle, k->under);
    }
    pthread_mutex_unlock(&table);
    return memory_done(entered, result);
}
