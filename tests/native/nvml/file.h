/* The machine is read from its file, and what changes is written back. */

static const char *field(char *line, const char *key) {
    size_t length = strlen(key);
    for (char *at = strchr(line, '\t'); at; at = strchr(at, '\t')) {
        at++;
        if (!strncmp(at, key, length) && at[length] == '=') {
            static char value[TEXT * 2];
            size_t size = strcspn(at + length + 1, "\t\n");
            if (size >= sizeof value) size = sizeof value - 1;
            memcpy(value, at + length + 1, size);
            value[size] = 0;
            return value;
        }
    }
    return "";
}

static u64 count(char *line, const char *key, u64 otherwise) {
    const char *value = field(line, key);
    return *value ? strtoull(value, NULL, 0) : otherwise;
}

static void text(char *line, const char *key, char *out, size_t size) {
    snprintf(out, size, "%s", field(line, key));
}

static Instance *put(Gpu *gpu, Kind kind, Instance *parent, u32 id) {
    for (u32 i = 0; i < INSTANCES; i++) {
        Instance *found = &gpu->instances[i];
        if (found->kind) continue; /* the place of a destroyed one is not used again */
        *found = (Instance){.kind = kind, .alive = 1, .gpu = gpu, .parent = parent, .id = id};
        gpu->devices[i] = *found;
        gpu->devices[i].kind = MIG_DEVICE;
        return found;
    }
    fprintf(stderr, "nvml stand-in: more than %d instances were made\n", INSTANCES);
    abort();
}

static void read_gpu(char *line, Gpu *gpu) {
    *gpu = (Gpu){.kind = GPU, .alive = 1};
    gpu->index = (u32)(gpu - box.gpus);
    text(line, "name", gpu->name, sizeof gpu->name);
    text(line, "uuid", gpu->uuid, sizeof gpu->uuid);
    text(line, "pci", gpu->pci, sizeof gpu->pci);
    gpu->memory = count(line, "memory", 0);
    gpu->reserved = count(line, "reserved", 0);
    gpu->used = count(line, "used", 0);
    gpu->major = (u32)count(line, "major", 0);
    gpu->minor = (u32)count(line, "minor", 0);
    gpu->cores = (u32)count(line, "cores", 0);
    gpu->mig = (u32)count(line, "mig", NONE);
    gpu->pending = (u32)count(line, "pending", gpu->mig);
    gpu->links = (u32)count(line, "links", 0);
    gpu->links_up = (u32)count(line, "links_up", gpu->links);
    gpu->compute_slices = (u32)count(line, "compute_slices", 0);
}

static void read_profile(char *line, Gpu *gpu) {
    Profile *profile = &gpu->profiles[gpu->profiles_count++];
    text(line, "name", profile->name, sizeof profile->name);
    profile->index = (u32)count(line, "index", 0);
    profile->id = (u32)count(line, "id", 0);
    profile->slices = (u32)count(line, "slices", 0);
    profile->instances = (u32)count(line, "instances", 0);
    profile->sms = (u32)count(line, "sms", 0);
    profile->memory_mib = count(line, "memory", 0);
    profile->size = (u32)count(line, "size", 0);
    char starts[TEXT * 2], *rest = starts, *word;
    text(line, "starts", starts, sizeof starts);
    while ((word = strsep(&rest, ","))) profile->starts[profile->starts_count++] = (u32)atoi(word);
}

static void read_line(char *line) {
    static Instance *last;
    Gpu *gpu = box.gpus_count ? &box.gpus[box.gpus_count - 1] : NULL;
    char *tab = strpbrk(line, "\t\n");
    size_t size = tab ? (size_t)(tab - line) : strlen(line);
#define IS(word) (size == sizeof word - 1 && !strncmp(line, word, size))
    if (IS("box")) {
        text(line, "driver", box.driver, sizeof box.driver);
        box.cuda = (int)count(line, "cuda", 0);
        box.privileged = (int)count(line, "privileged", 1);
    } else if (IS("fail") || IS("delay")) {
        Rule *rule = &box.rules[box.rules_count++];
        text(line, "call", rule->call, sizeof rule->call);
        rule->code = (u32)count(line, "code", 0);
        rule->ms = (u32)count(line, "ms", 0);
        rule->skip = (u32)count(line, "skip", 0);
        rule->times = (u32)count(line, "times", NONE);
        rule->late = (u32)count(line, "late", 0);
        rule->gpu = (u32)count(line, "gpu", NONE);
    } else if (IS("gpu")) {
        read_gpu(line, &box.gpus[box.gpus_count++]);
    } else if (IS("profile")) {
        read_profile(line, gpu);
    } else if (IS("gi")) {
        last = put(gpu, GPU_INSTANCE, NULL, (u32)count(line, "id", 0));
        last->profile = (u32)count(line, "profile", 0);
        last->start = (u32)count(line, "start", 0);
        last->size = (u32)count(line, "size", 0);
    } else if (IS("ci")) {
        Instance *made = put(gpu, COMPUTE_INSTANCE, last, (u32)count(line, "id", 0));
        made->profile = (u32)count(line, "profile", 0);
        made->start = (u32)count(line, "start", 0);
        made->size = (u32)count(line, "size", 0);
    } else if (IS("process")) {
        Process *process = &gpu->processes[gpu->processes_count++];
        process->pid = (u32)count(line, "pid", 0);
        process->memory = count(line, "memory", 0);
        process->gpu_instance = (u32)count(line, "gi", NONE);
        process->compute_instance = (u32)count(line, "ci", NONE);
    }
#undef IS
}

static int load(void) {
    const char *path = getenv("COTENANT_NVML_STANDIN");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[LINE];
    if (!file) return DRIVER_NOT_LOADED;
    memset(&box, 0, sizeof box);
    while (fgets(line, sizeof line, file)) read_line(line);
    fclose(file);
    return SUCCESS;
}

/* What came to pass since: where a file beside the first, called as it with ".now" after it, is
 * another than it was, its processes and failures are those of the machine's first GPU now. */
static void look_again(void) {
    static ino_t seen;
    const char *path = getenv("COTENANT_NVML_STANDIN");
    char name[LINE], line[LINE];
    struct stat about;
    snprintf(name, sizeof name, "%s.now", path ? path : "");
    if (stat(name, &about) || about.st_ino == seen) return;
    FILE *file = fopen(name, "r");
    if (!file) return;
    u32 gpus = box.gpus_count;
    seen = about.st_ino;
    box.gpus_count = gpus ? 1 : 0; /* lines are of the last GPU that was read */
    box.rules_count = box.gpus[0].processes_count = 0;
    while (fgets(line, sizeof line, file)) read_line(line);
    box.gpus_count = gpus;
    fclose(file);
}

static void save_instances(FILE *file, Gpu *gpu) {
    for (u32 i = 0; i < INSTANCES; i++) {
        Instance *gi = &gpu->instances[i];
        if (!gi->alive || gi->kind != GPU_INSTANCE) continue;
        fprintf(file, "gi\tid=%u\tprofile=%u\tstart=%u\tsize=%u\n", gi->id, gi->profile, gi->start,
                gi->size);
        for (u32 j = 0; j < INSTANCES; j++) {
            Instance *ci = &gpu->instances[j];
            if (ci->alive && ci->kind == COMPUTE_INSTANCE && ci->parent == gi)
                fprintf(file, "ci\tid=%u\tprofile=%u\tstart=%u\tsize=%u\n", ci->id, ci->profile,
                        ci->start, ci->size);
        }
    }
}

/* The file as it was, with the instances and the rules as they are now. */
static void save(void) {
    const char *path = getenv("COTENANT_NVML_STANDIN");
    char line[LINE], fresh[LINE];
    snprintf(fresh, sizeof fresh, "%s.new", path);
    FILE *old = fopen(path, "r"), *file = fopen(fresh, "w");
    if (!old || !file) abort();
    Gpu *gpu = NULL;
    while (fgets(line, sizeof line, old)) {
        if (!strncmp(line, "gi\t", 3) || !strncmp(line, "ci\t", 3)) continue;
        if (!strncmp(line, "fail\t", 5) || !strncmp(line, "delay\t", 6)) continue;
        if (!strncmp(line, "gpu\t", 4)) {
            if (gpu) save_instances(file, gpu);
            gpu = gpu ? gpu + 1 : box.gpus;
        }
        fputs(line, file);
    }
    if (gpu) save_instances(file, gpu);
    for (u32 i = 0; i < box.rules_count; i++) {
        Rule *rule = &box.rules[i];
        fprintf(file, "fail\tcall=%s\tcode=%u\tskip=%u\ttimes=%u\tgpu=%u\tms=%u\tlate=%u\n",
                rule->call, rule->code, rule->skip, rule->times, rule->gpu, rule->ms, rule->late);
    }
    fclose(old);
    fclose(file);
    rename(fresh, path);
}
