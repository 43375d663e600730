/* Layouts of NVML, and the machine in memory. */

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NO_PERMISSION = 4,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    LIB_RM_VERSION_MISMATCH = 18,
    IN_USE = 19,
    INSUFFICIENT_RESOURCES = 23,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999,
};
enum { GPUS = 16, PROFILES = 24, STARTS = 16, INSTANCES = 1024, PROCESSES = 64, RULES = 64 };
enum { TEXT = 96, LINE = 4096, NONE = 0xFFFFFFFF };
enum { COMPUTE_PROFILES = 9, GPU_INSTANCE_PROFILES = 18 };

typedef unsigned int u32;
typedef unsigned long long u64;

typedef struct { u64 total, free, used; } Memory;
typedef struct { u32 version; u64 total, reserved, free, used; } Memory2;
typedef struct {
    u32 sms, copies, decoders, encoders, jpegs, ofas, gpu_slices, compute_slices;
    u64 memory_mib;
} Attributes;
typedef struct {
    char legacy[16];
    u32 domain, bus, device, device_id, subsystem;
    char id[32];
} Pci;
typedef struct { u32 pid; u64 memory; u32 gpu_instance, compute_instance; } Process;
typedef struct {
    u32 id, p2p, slices, instances, sms, copies, decoders, encoders, jpegs, ofas;
    u64 memory_mib;
} ProfileInfo;
typedef struct {
    u32 version, id, p2p, slices, instances, sms, copies, decoders, encoders, jpegs, ofas;
    u64 memory_mib;
    char name[TEXT];
} ProfileInfo2;
typedef struct { u32 id, slices, instances, sms, copies, decoders, encoders, jpegs, ofas; }
    ComputeProfileInfo;
typedef struct {
    u32 version, id, slices, instances, sms, copies, decoders, encoders, jpegs, ofas;
    char name[TEXT];
} ComputeProfileInfo2;
typedef struct { u32 start, size; } Placement;
typedef struct { void *device; u32 id, profile; Placement placement; } GpuInstanceInfo;
typedef struct { void *device, *gpu_instance; u32 id, profile; Placement placement; }
    ComputeInstanceInfo;

typedef struct {
    u32 index, id, slices, instances, sms, size, starts[STARTS], starts_count;
    u64 memory_mib;
    char name[TEXT];
} Profile;

/* Every handle points at one of these; kind says what it is, alive whether it still is. */
typedef enum { GPU = 1, MIG_DEVICE, GPU_INSTANCE, COMPUTE_INSTANCE } Kind;
struct Gpu;
typedef struct Instance {
    Kind kind;
    int alive;
    struct Gpu *gpu;
    struct Instance *parent; /* the GPU instance of a compute instance, and of a MIG device */
    u32 id, profile, start, size;
} Instance;
typedef struct Gpu {
    Kind kind;
    int alive;
    char name[TEXT], uuid[TEXT], pci[32];
    u64 memory, reserved, used;
    u32 index, major, minor, cores, mig, pending, links, links_up, compute_slices;
    Profile profiles[PROFILES];
    Process processes[PROCESSES];
    u32 profiles_count, processes_count;
    Instance instances[INSTANCES], devices[INSTANCES]; /* devices: MIG devices, by the instance */
} Gpu;
typedef struct { char call[TEXT]; u32 code, skip, times, gpu, ms, late; } Rule; /* gpu, times: or NONE */

static struct {
    int started;
    char driver[TEXT];
    int cuda, privileged, mapped;
    u32 gpus_count, rules_count;
    Gpu gpus[GPUS];
    Rule rules[RULES];
} box;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
