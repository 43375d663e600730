/* A GPU, or a MIG device: calls that take either handle or one of them. */

static void mig_uuid(Instance *device, char *out, size_t size) {
    snprintf(out, size, "MIG-%02x%02x%s", device->parent->id & 255, device->id & 255,
             strlen(device->gpu->uuid) > 8 ? device->gpu->uuid + 8 : "");
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    BEGIN(NULL);
    WANT(uuid && device, INVALID_ARGUMENT);
    for (u32 i = 0; i < box.gpus_count; i++) {
        Gpu *gpu = &box.gpus[i];
        if (!strcmp(gpu->uuid, uuid)) {
            *device = gpu;
            RETURN(SUCCESS);
        }
        for (u32 j = 0; j < INSTANCES; j++) {
            char other[TEXT];
            if (gpu->instances[j].kind != COMPUTE_INSTANCE || !gpu->instances[j].alive) continue;
            mig_uuid(&gpu->devices[j], other, sizeof other);
            if (!strcmp(other, uuid)) {
                *device = &gpu->devices[j];
                RETURN(SUCCESS);
            }
        }
    }
    RETURN(NOT_FOUND);
}

/* The GPU of a handle, and the MIG device that it is, if it is one; NULL for anything else. */
static Gpu *either(void *handle, Instance **mig) {
    *mig = NULL;
    if (!handle) return NULL;
    if (*(Kind *)handle == GPU) return handle;
    if (*(Kind *)handle != MIG_DEVICE) return NULL;
    *mig = handle;
    Gpu *gpu = (*mig)->gpu;
    return gpu->instances[*mig - gpu->devices].alive ? gpu : NULL;
}

#define EITHER(handle)                                                                             \
    Instance *mig;                                                                                 \
    Gpu *gpu = either(handle, &mig);                                                               \
    WANT(gpu, INVALID_ARGUMENT)

int nvmlDeviceGetName(void *handle, char *name, u32 length) {
    BEGIN(handle);
    EITHER(handle);
    char whole[TEXT * 3];
    snprintf(whole, sizeof whole, mig ? "%s MIG %s" : "%s", gpu->name,
             mig ? profile_of(gpu, mig->parent->profile)->name : "");
    RETURN(say(whole, name, length));
}

int nvmlDeviceGetUUID(void *handle, char *uuid, u32 length) {
    BEGIN(handle);
    EITHER(handle);
    char other[TEXT];
    if (mig) mig_uuid(mig, other, sizeof other);
    RETURN(say(mig ? other : gpu->uuid, uuid, length));
}

static u64 used_of(Gpu *gpu, Instance *mig) {
    u64 used = mig ? 0 : gpu->used;
    for (u32 i = 0; mig && i < gpu->processes_count; i++)
        if (gpu->processes[i].gpu_instance == mig->parent->id) used += gpu->processes[i].memory;
    return used;
}

static u64 total_of(Gpu *gpu, Instance *mig) {
    return mig ? profile_of(gpu, mig->parent->profile)->memory_mib << 20 : gpu->memory;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *out) {
    BEGIN(handle);
    EITHER(handle);
    WANT(out, INVALID_ARGUMENT);
    out->total = total_of(gpu, mig);
    out->used = used_of(gpu, mig) + (mig ? 0 : gpu->reserved); /* version 1 counts it as used */
    out->free = out->total - out->used;
    RETURN(SUCCESS);
}

int nvmlDeviceGetMemoryInfo_v2(void *handle, Memory2 *out) {
    BEGIN(handle);
    EITHER(handle);
    WANT(out, INVALID_ARGUMENT);
    WANT(out->version == (sizeof *out | 2u << 24), ARGUMENT_VERSION_MISMATCH);
    out->total = total_of(gpu, mig);
    out->reserved = mig ? 0 : gpu->reserved;
    out->used = used_of(gpu, mig);
    out->free = out->total - out->reserved - out->used;
    RETURN(SUCCESS);
}

int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    BEGIN(handle);
    EITHER(handle);
    WANT(major && minor, INVALID_ARGUMENT);
    *major = (int)gpu->major;
    *minor = (int)gpu->minor;
    RETURN(SUCCESS);
}

int nvmlDeviceGetNumGpuCores(void *handle, u32 *cores) {
    BEGIN(handle);
    EITHER(handle);
    WANT(cores, INVALID_ARGUMENT);
    WANT(!mig && gpu->cores, NOT_SUPPORTED);
    *cores = gpu->cores;
    RETURN(SUCCESS);
}

static u32 sms_of(Profile *profile, u32 slices) {
    return slices == profile->slices ? profile->sms : profile->sms / profile->slices * slices;
}

/* As the library: of MIG devices only. */
int nvmlDeviceGetAttributes_v2(void *handle, Attributes *out) {
    BEGIN(handle);
    EITHER(handle);
    WANT(out, INVALID_ARGUMENT);
    WANT(mig, NOT_SUPPORTED);
    Profile *profile = profile_of(gpu, mig->parent->profile);
    Instance *made = &gpu->instances[mig - gpu->devices];
    *out = (Attributes){.sms = sms_of(profile, made->size),
                        .gpu_slices = profile->slices,
                        .compute_slices = made->size,
                        .memory_mib = profile->memory_mib};
    RETURN(SUCCESS);
}

int nvmlDeviceGetPciInfo_v3(void *handle, Pci *out) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    WANT(out, INVALID_ARGUMENT);
    memset(out, 0, sizeof *out);
    sscanf(gpu->pci, "%x:%x:%x", &out->domain, &out->bus, &out->device);
    snprintf(out->legacy, sizeof out->legacy, "%04X:%02X:%02X.0", out->domain, out->bus & 255,
             out->device & 255);
    snprintf(out->id, sizeof out->id, "%s", gpu->pci);
    RETURN(SUCCESS);
}

int nvmlDeviceGetNvLinkState(void *handle, u32 link, u32 *active) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    WANT(active, INVALID_ARGUMENT);
    WANT(gpu->links, NOT_SUPPORTED);
    WANT(link < gpu->links, INVALID_ARGUMENT);
    *active = link < gpu->links_up;
    RETURN(SUCCESS);
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, u32 *number, Process *out) {
    BEGIN(handle);
    EITHER(handle);
    WANT(number, INVALID_ARGUMENT);
    u32 room = *number, found = 0;
    for (u32 i = 0; i < gpu->processes_count; i++) {
        Process *process = &gpu->processes[i];
        if (mig && process->gpu_instance != mig->parent->id) continue;
        if (mig && process->compute_instance != mig->id) continue;
        if (found < room && out) out[found] = *process;
        found++;
    }
    *number = found;
    RETURN(found > room ? INSUFFICIENT_SIZE : SUCCESS);
}
