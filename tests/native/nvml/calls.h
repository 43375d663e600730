/* What every call does first. */

/* The failure that is to happen to this call, after the delay that it is to take: before it has
 * done anything, or (late) when it is done. */
static int injected(const char *call, u32 gpu, u32 late) {
    int code = SUCCESS;
    u32 ms = 0;
    int used = 0;
    for (u32 i = 0; i < box.rules_count; i++) {
        Rule *rule = &box.rules[i];
        if (strcmp(rule->call, call) || !rule->times || rule->late != late) continue;
        if (rule->gpu != NONE && rule->gpu != gpu) continue;
        if (rule->skip) {
            rule->skip--, used = 1;
            continue;
        }
        if (rule->times != NONE) rule->times--, used = 1;
        if (rule->ms > ms) ms = rule->ms;
        if (rule->code && !code) code = (int)rule->code;
    }
    if (used) save();
    if (ms) {
        struct timespec wait = {ms / 1000, (long)(ms % 1000) * 1000000L};
        pthread_mutex_unlock(&lock);
        nanosleep(&wait, NULL);
        pthread_mutex_lock(&lock);
    }
    return code;
}

static u32 gpu_of(void *handle) {
    if (!handle) return NONE;
    Kind kind = *(Kind *)handle;
    if (!kind) return NONE; /* a handle from before the last shutdown */
    return kind == GPU ? ((Gpu *)handle)->index : ((Instance *)handle)->gpu->index;
}

static int release(int code) {
    pthread_mutex_unlock(&lock);
    return code;
}

/* BEGIN holds the lock, which every way out of the function gives back by RETURN. */
#define RETURN(code) return release(code)
#define BEGIN(handle)                                                                              \
    pthread_mutex_lock(&lock);                                                                     \
    if (!box.started) RETURN(UNINITIALIZED);                                                       \
    look_again();                                                                                  \
    do {                                                                                           \
        int failed = injected(__func__, gpu_of(handle), 0);                                           \
        if (failed) RETURN(failed);                                                                \
    } while (0)
#define RETURN_LATE(gpu) RETURN(injected(__func__, (gpu)->index, 1))
#define WANT(condition, code)                                                                      \
    do {                                                                                           \
        if (!(condition)) RETURN(code);                                                            \
    } while (0)
#define HANDLE(type, name, value, wanted)                                                          \
    type *name = value;                                                                            \
    WANT(name && name->kind == (wanted) && name->alive, INVALID_ARGUMENT)
#define PRIVILEGED() WANT(box.privileged, NO_PERMISSION)
#define MIG_ON(gpu) WANT((gpu)->mig == 1, NOT_SUPPORTED)

static int say(const char *value, char *out, u32 size) {
    if (!out) return INVALID_ARGUMENT;
    if (strlen(value) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, value);
    return SUCCESS;
}

static Profile *profile_of(Gpu *gpu, u32 id) {
    for (u32 i = 0; i < gpu->profiles_count; i++)
        if (gpu->profiles[i].id == id) return &gpu->profiles[i];
    return NULL;
}
