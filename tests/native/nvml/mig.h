/* MIG: profiles and places, GPU instances, compute instances. */

/* --- what there is ---------------------------------------------------------------------------- */

int nvmlDeviceGetMigMode(void *handle, u32 *current, u32 *pending) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    WANT(current && pending, INVALID_ARGUMENT);
    WANT(gpu->mig != NONE, NOT_SUPPORTED);
    *current = gpu->mig;
    *pending = gpu->pending;
    RETURN(SUCCESS);
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, u32 *number) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    WANT(number, INVALID_ARGUMENT);
    *number = gpu->mig == 1 ? gpu->compute_slices : 0;
    RETURN(SUCCESS);
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, u32 index, void **device) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    WANT(device, INVALID_ARGUMENT);
    MIG_ON(gpu);
    WANT(index < gpu->compute_slices, INVALID_ARGUMENT);
    for (u32 i = 0; i < INSTANCES; i++) {
        if (gpu->instances[i].kind != COMPUTE_INSTANCE || !gpu->instances[i].alive) continue;
        if (index--) continue;
        *device = &gpu->devices[i];
        RETURN(SUCCESS);
    }
    RETURN(NOT_FOUND);
}

int nvmlDeviceIsMigDeviceHandle(void *handle, u32 *is) {
    BEGIN(handle);
    EITHER(handle);
    WANT(is, INVALID_ARGUMENT);
    *is = mig != NULL;
    RETURN(SUCCESS);
}

int nvmlDeviceGetGpuInstanceId(void *handle, u32 *id) {
    BEGIN(handle);
    EITHER(handle);
    WANT(mig, NOT_SUPPORTED);
    *id = mig->parent->id;
    RETURN(SUCCESS);
}

int nvmlDeviceGetComputeInstanceId(void *handle, u32 *id) {
    BEGIN(handle);
    EITHER(handle);
    WANT(mig, NOT_SUPPORTED);
    *id = mig->id;
    RETURN(SUCCESS);
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *handle, void **device) {
    BEGIN(handle);
    EITHER(handle);
    WANT(mig && device, INVALID_ARGUMENT);
    *device = gpu;
    RETURN(SUCCESS);
}

static Profile *profile_at(Gpu *gpu, u32 index) {
    for (u32 i = 0; i < gpu->profiles_count; i++)
        if (gpu->profiles[i].index == index) return &gpu->profiles[i];
    return NULL;
}

int nvmlDeviceGetGpuInstanceProfileInfo(void *handle, u32 index, ProfileInfo *out) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    WANT(out && index < GPU_INSTANCE_PROFILES, INVALID_ARGUMENT);
    Profile *profile = profile_at(gpu, index);
    WANT(profile, NOT_SUPPORTED);
    *out = (ProfileInfo){.id = profile->id,
                         .slices = profile->slices,
                         .instances = profile->instances,
                         .sms = profile->sms,
                         .memory_mib = profile->memory_mib};
    RETURN(SUCCESS);
}

int nvmlDeviceGetGpuInstanceProfileInfoV(void *handle, u32 index, ProfileInfo2 *out) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    WANT(out && index < GPU_INSTANCE_PROFILES, INVALID_ARGUMENT);
    WANT(out->version == (sizeof *out | 2u << 24), ARGUMENT_VERSION_MISMATCH);
    Profile *profile = profile_at(gpu, index);
    WANT(profile, NOT_SUPPORTED);
    *out = (ProfileInfo2){.version = out->version,
                          .id = profile->id,
                          .slices = profile->slices,
                          .instances = profile->instances,
                          .sms = profile->sms,
                          .memory_mib = profile->memory_mib};
    snprintf(out->name, sizeof out->name, "MIG %.80s", profile->name);
    RETURN(SUCCESS);
}

int nvmlDeviceGetGpuInstancePossiblePlacements_v2(void *handle, u32 id, Placement *out,
                                                  u32 *number) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    PRIVILEGED();
    WANT(number, INVALID_ARGUMENT);
    MIG_ON(gpu);
    Profile *profile = profile_of(gpu, id);
    WANT(profile, NOT_SUPPORTED);
    for (u32 i = 0; out && i < profile->starts_count; i++)
        out[i] = (Placement){profile->starts[i], profile->size};
    *number = profile->starts_count;
    RETURN(SUCCESS);
}

static u32 list(Gpu *gpu, Kind kind, Instance *parent, u32 profile, void **out) {
    u32 found = 0;
    for (u32 i = 0; i < INSTANCES; i++) {
        Instance *instance = &gpu->instances[i];
        if (!instance->alive || instance->kind != kind || instance->parent != parent) continue;
        if (profile != NONE && instance->profile != profile) continue;
        if (out) out[found] = instance;
        found++;
    }
    return found;
}

int nvmlDeviceGetGpuInstances(void *handle, u32 id, void **out, u32 *number) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    PRIVILEGED();
    WANT(out && number, INVALID_ARGUMENT);
    MIG_ON(gpu);
    WANT(profile_of(gpu, id), NOT_SUPPORTED);
    *number = list(gpu, GPU_INSTANCE, NULL, id, out);
    RETURN(SUCCESS);
}

static Instance *by_id(Gpu *gpu, Kind kind, Instance *parent, u32 id) {
    void *all[INSTANCES];
    u32 number = list(gpu, kind, parent, NONE, all);
    for (u32 i = 0; i < number; i++)
        if (((Instance *)all[i])->id == id) return all[i];
    return NULL;
}

int nvmlDeviceGetGpuInstanceById(void *handle, u32 id, void **out) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    PRIVILEGED();
    WANT(out, INVALID_ARGUMENT);
    MIG_ON(gpu);
    *out = by_id(gpu, GPU_INSTANCE, NULL, id);
    RETURN(*out ? SUCCESS : NOT_FOUND);
}

int nvmlGpuInstanceGetInfo(void *handle, GpuInstanceInfo *out) {
    BEGIN(handle);
    HANDLE(Instance, instance, handle, GPU_INSTANCE);
    WANT(out, INVALID_ARGUMENT);
    *out = (GpuInstanceInfo){instance->gpu, instance->id, instance->profile,
                             {instance->start, instance->size}};
    RETURN(SUCCESS);
}

/* --- GPU instances come and go ---------------------------------------------------------------- */

/* Whether an instance of a profile can stand at a start, beside those that are there. */
static int fits(Gpu *gpu, Profile *profile, u32 start) {
    void *all[INSTANCES];
    u32 number = list(gpu, GPU_INSTANCE, NULL, NONE, all), slices = profile->slices, same = 0;
    for (u32 i = 0; i < number; i++) {
        Instance *other = all[i];
        if (other->start < start + profile->size && start < other->start + other->size) return 0;
        slices += profile_of(gpu, other->profile)->slices;
        same += other->profile == profile->id;
    }
    return slices <= gpu->compute_slices && same < profile->instances;
}

int nvmlDeviceGetGpuInstanceRemainingCapacity(void *handle, u32 id, u32 *number) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    PRIVILEGED();
    WANT(number, INVALID_ARGUMENT);
    MIG_ON(gpu);
    Profile *profile = profile_of(gpu, id);
    WANT(profile, NOT_SUPPORTED);
    *number = 0;
    for (u32 i = 0; i < profile->starts_count; i++)
        *number += (u32)fits(gpu, profile, profile->starts[i]);
    RETURN(SUCCESS);
}

static int create(Gpu *gpu, u32 id, const Placement *placement, void **out) {
    Profile *profile = profile_of(gpu, id);
    if (!profile) return NOT_SUPPORTED;
    int known = !placement, start = -1;
    for (u32 i = 0; i < profile->starts_count; i++) {
        if (placement && placement->start != profile->starts[i]) continue;
        if (placement && placement->size != profile->size) continue;
        known = 1;
        if (start < 0 && fits(gpu, profile, profile->starts[i])) start = (int)profile->starts[i];
    }
    if (!known) return INVALID_ARGUMENT;
    if (start < 0) return INSUFFICIENT_RESOURCES;
    u32 number = 1;
    while (by_id(gpu, GPU_INSTANCE, NULL, number)) number++;
    Instance *made = put(gpu, GPU_INSTANCE, NULL, number);
    made->profile = id;
    made->start = (u32)start;
    made->size = profile->size;
    *out = made;
    save();
    return SUCCESS;
}

int nvmlDeviceCreateGpuInstanceWithPlacement(void *handle, u32 id, const Placement *placement,
                                             void **out) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    PRIVILEGED();
    WANT(out && placement, INVALID_ARGUMENT);
    MIG_ON(gpu);
    int code = create(gpu, id, placement, out);
    WANT(!code, code);
    RETURN_LATE(gpu);
}

int nvmlDeviceCreateGpuInstance(void *handle, u32 id, void **out) {
    BEGIN(handle);
    HANDLE(Gpu, gpu, handle, GPU);
    PRIVILEGED();
    WANT(out, INVALID_ARGUMENT);
    MIG_ON(gpu);
    RETURN(create(gpu, id, NULL, out));
}

static int busy(Gpu *gpu, u32 gpu_instance, u32 compute_instance) {
    for (u32 i = 0; i < gpu->processes_count; i++) {
        Process *process = &gpu->processes[i];
        if (process->gpu_instance != gpu_instance) continue;
        if (compute_instance == NONE || process->compute_instance == compute_instance) return 1;
    }
    return 0;
}

int nvmlGpuInstanceDestroy(void *handle) {
    BEGIN(handle);
    HANDLE(Instance, instance, handle, GPU_INSTANCE);
    PRIVILEGED();
    Gpu *gpu = instance->gpu;
    WANT(!list(gpu, COMPUTE_INSTANCE, instance, NONE, NULL), IN_USE);
    WANT(!busy(gpu, instance->id, NONE), IN_USE);
    instance->alive = 0;
    save();
    RETURN_LATE(instance->gpu);
}

/* --- compute instances ------------------------------------------------------------------------ */

/* Compute slices of the profiles by number; the last two are variants that no table here has. */
static const u32 SLICES[COMPUTE_PROFILES] = {1, 2, 3, 4, 7, 8, 6, 0, 0};

static u32 compute_slices(Profile *profile, u32 index) {
    u32 slices = index < COMPUTE_PROFILES ? SLICES[index] : 0;
    if (slices == profile->slices) return slices;
    if (slices > profile->slices) return 0;
    return slices <= 2 || profile->slices == 7 ? slices : 0;
}

int nvmlGpuInstanceGetComputeInstanceProfileInfo(void *handle, u32 index, u32 engines,
                                                 ComputeProfileInfo *out) {
    BEGIN(handle);
    HANDLE(Instance, instance, handle, GPU_INSTANCE);
    WANT(out && index < COMPUTE_PROFILES && !engines, INVALID_ARGUMENT);
    Profile *profile = profile_of(instance->gpu, instance->profile);
    u32 slices = compute_slices(profile, index);
    WANT(slices, NOT_SUPPORTED);
    *out = (ComputeProfileInfo){.id = index,
                                .slices = slices,
                                .instances = profile->slices / slices,
                                .sms = sms_of(profile, slices)};
    RETURN(SUCCESS);
}

int nvmlGpuInstanceGetComputeInstanceProfileInfoV(void *handle, u32 index, u32 engines,
                                                  ComputeProfileInfo2 *out) {
    BEGIN(handle);
    HANDLE(Instance, instance, handle, GPU_INSTANCE);
    WANT(out && index < COMPUTE_PROFILES && !engines, INVALID_ARGUMENT);
    WANT(out->version == (sizeof *out | 2u << 24), ARGUMENT_VERSION_MISMATCH);
    Profile *profile = profile_of(instance->gpu, instance->profile);
    u32 slices = compute_slices(profile, index);
    WANT(slices, NOT_SUPPORTED);
    *out = (ComputeProfileInfo2){.version = out->version,
                                 .id = index,
                                 .slices = slices,
                                 .instances = profile->slices / slices,
                                 .sms = sms_of(profile, slices)};
    snprintf(out->name, sizeof out->name, "MIG %uc.%.64s", slices, profile->name);
    RETURN(SUCCESS);
}

static u32 free_slice(Instance *parent, u32 slices, u32 total) {
    void *all[INSTANCES];
    u32 number = list(parent->gpu, COMPUTE_INSTANCE, parent, NONE, all);
    for (u32 start = 0; start + slices <= total; start++) {
        int clear = 1;
        for (u32 i = 0; i < number; i++) {
            Instance *other = all[i];
            if (other->start < start + slices && start < other->start + other->size) clear = 0;
        }
        if (clear) return start;
    }
    return NONE;
}

int nvmlGpuInstanceCreateComputeInstance(void *handle, u32 index, void **out) {
    BEGIN(handle);
    HANDLE(Instance, instance, handle, GPU_INSTANCE);
    PRIVILEGED();
    WANT(out, INVALID_ARGUMENT);
    Profile *profile = profile_of(instance->gpu, instance->profile);
    u32 slices = compute_slices(profile, index);
    WANT(slices, NOT_SUPPORTED);
    u32 start = free_slice(instance, slices, profile->slices);
    WANT(start != NONE, INSUFFICIENT_RESOURCES);
    u32 number = 0;
    while (by_id(instance->gpu, COMPUTE_INSTANCE, instance, number)) number++;
    Instance *made = put(instance->gpu, COMPUTE_INSTANCE, instance, number);
    made->profile = index;
    made->start = start;
    made->size = slices;
    *out = made;
    save();
    RETURN_LATE(instance->gpu);
}

int nvmlGpuInstanceGetComputeInstances(void *handle, u32 index, void **out, u32 *number) {
    BEGIN(handle);
    HANDLE(Instance, instance, handle, GPU_INSTANCE);
    PRIVILEGED();
    WANT(out && number, INVALID_ARGUMENT);
    WANT(compute_slices(profile_of(instance->gpu, instance->profile), index), NOT_SUPPORTED);
    *number = list(instance->gpu, COMPUTE_INSTANCE, instance, index, out);
    RETURN(SUCCESS);
}

int nvmlGpuInstanceGetComputeInstanceById(void *handle, u32 id, void **out) {
    BEGIN(handle);
    HANDLE(Instance, instance, handle, GPU_INSTANCE);
    PRIVILEGED();
    WANT(out, INVALID_ARGUMENT);
    *out = by_id(instance->gpu, COMPUTE_INSTANCE, instance, id);
    RETURN(*out ? SUCCESS : NOT_FOUND);
}

int nvmlComputeInstanceGetInfo_v2(void *handle, ComputeInstanceInfo *out) {
    BEGIN(handle);
    HANDLE(Instance, instance, handle, COMPUTE_INSTANCE);
    WANT(out, INVALID_ARGUMENT);
    *out = (ComputeInstanceInfo){instance->gpu, instance->parent, instance->id, instance->profile,
                                 {instance->start, instance->size}};
    RETURN(SUCCESS);
}

int nvmlComputeInstanceDestroy(void *handle) {
    BEGIN(handle);
    HANDLE(Instance, instance, handle, COMPUTE_INSTANCE);
    PRIVILEGED();
    WANT(!busy(instance->gpu, instance->parent->id, instance->id), IN_USE);
    instance->alive = 0;
    save();
    RETURN_LATE(instance->gpu);
}
