/* A stand-in for libnvidia-ml.so.1: what Cotenant asks of NVML, answered from a file.
 *
 * The file that COTENANT_NVML_STANDIN names describes a machine, a line a thing, its fields
 * separated by tabs. tests/nvml_standin.py writes it and says what the fields mean. A change of MIG
 * instances, and a failure that was used up, are written back: so the next process that starts
 * finds the machine as this one left it. A second file may change it while a process runs
 * (look_again in file.h). One translation unit, so that nothing but NVML is exported.
 *
 * Signatures, layouts and error codes are those of pynvml (nvidia-ml-py 13). What a call answers
 * follows NVIDIA's description of it. Guessed, and not to be relied on: the numbers that new
 * instances get, the profile's place that is taken where the caller names none, and that a handle
 * of a destroyed instance is an invalid argument.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "types.h"

#include "file.h"

#include "calls.h"

/* --- the system ------------------------------------------------------------------------------- */

int nvmlInitWithFlags(u32 flags) {
    (void)flags;
    pthread_mutex_lock(&lock);
    if (!box.started) {
        int code = load();
        if (!code) code = injected("nvmlInitWithFlags", NONE, 0);
        if (code) RETURN(code);
    }
    box.started++;
    RETURN(SUCCESS);
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    BEGIN(NULL);
    box.started--;
    RETURN(SUCCESS);
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case LIB_RM_VERSION_MISMATCH: return "Driver/library version mismatch";
    case IN_USE: return "In use by another client";
    case INSUFFICIENT_RESOURCES: return "Insufficient Resources";
    case ARGUMENT_VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, u32 length) {
    BEGIN(NULL);
    RETURN(say(box.driver, version, length));
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    BEGIN(NULL);
    WANT(version, INVALID_ARGUMENT);
    *version = box.cuda;
    RETURN(SUCCESS);
}
int nvmlSystemGetCudaDriverVersion(int *version) {
    return nvmlSystemGetCudaDriverVersion_v2(version);
}

int nvmlDeviceGetCount_v2(u32 *number) {
    BEGIN(NULL);
    WANT(number, INVALID_ARGUMENT);
    *number = box.gpus_count;
    RETURN(SUCCESS);
}

int nvmlDeviceGetHandleByIndex_v2(u32 index, void **device) {
    BEGIN(index < box.gpus_count ? &box.gpus[index] : NULL);
    WANT(index < box.gpus_count && device, INVALID_ARGUMENT);
    *device = &box.gpus[index];
    RETURN(SUCCESS);
}

#include "devices.h"

#include "mig.h"
