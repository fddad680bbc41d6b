/* libnvidia-ml.so.1 for machines without a GPU: answers NVML calls from a description of a node.
 *
 * The description is the text file named by TANGRAM_FAKE_NVML (description.c); beside it lie the control file, with
 * what goes wrong on the node (control.c), and the state that all processes share (state.c). The files are read again
 * when they change, so a test changes the node under a running agent by replacing one. What is imitated, and from
 * where: hardware.md section 3.2 (version words, two-call patterns, enum and hardware id, handles that end,
 * holes among MIG devices, instances that come and go, privileges, lost GPUs, events, delays and hangs). A symbol that
 * is not here is absent, as in an old driver.
 *
 *   nvml_fake.c  sessions, errors, finding devices        mig.c     mode, GPU and compute instances
 *   device.c     what a device is, how it is              events.c  event sets
 *   links.c      NVLink, PCIe, fabric, field values       call.c    what every call does first; handles
 */
#include "nvml_fake.h"

#include <string.h>
#include <strings.h>

API nvmlInit_v2(void) { LOCKED; return enter_initialise(__func__); }
API nvmlInitWithFlags(unsigned flags) { LOCKED; (void)flags; return enter_initialise(__func__); }
API nvmlShutdown(void) { ENTER(); return leave_session(); }

__attribute__((visibility("default"))) const char *nvmlErrorString(int result) {
    switch (result) {
        case SUCCESS: return "The operation was successful";
        case UNINITIALIZED: return "NVML was not first initialized with nvmlInit()";
        case INVALID_ARGUMENT: return "A supplied argument is invalid";
        case NOT_SUPPORTED: return "The requested operation is not available on target device";
        case NO_PERMISSION: return "The current user does not have permission for operation";
        case NOT_FOUND: return "A query to find an object was unsuccessful";
        case INSUFFICIENT_SIZE: return "An input argument is not large enough";
        case DRIVER_NOT_LOADED: return "NVIDIA driver is not loaded";
        case TIMEOUT: return "User provided timeout passed";
        case GPU_IS_LOST: return "The GPU has fallen off the bus or has otherwise become inaccessible";
        case RESET_REQUIRED: return "The GPU requires a reset before it can be used again";
        case IN_USE: return "An operation cannot be performed because the GPU is currently in use";
        case INSUFFICIENT_RESOURCES: return "Ran out of critical resources, other than memory";
        case ARGUMENT_VERSION_MISMATCH: return "The provided version is invalid/unsupported";
        default: return "An internal driver error occurred";
    }
}

API nvmlSystemGetDriverVersion(char *out, unsigned size) { ENTER(); return put_text(out, size, node->driver); }
API nvmlSystemGetNVMLVersion(char *out, unsigned size) { ENTER(); return put_text(out, size, node->nvml); }
API nvmlSystemGetCudaDriverVersion(int *out) { ENTER(); WANT(out); *out = node->cuda; return SUCCESS; }
API nvmlSystemGetCudaDriverVersion_v2(int *out) { ENTER(); WANT(out); *out = node->cuda; return SUCCESS; }

/* ---- finding devices ---- */

API nvmlDeviceGetCount_v2(unsigned *out) { ENTER(); WANT(out); *out = node->gpu_count; return SUCCESS; }

static int give_gpu(const char *symbol, unsigned index, uint64_t *out) {
    TRY(apply_rules(symbol, (int)index));
    WANT(node && index < node->gpu_count);
    if (node->gpus[index].lost == 2) return GPU_IS_LOST;
    *out = handle_of(KIND_GPU, index, state->gpus[index].generation);
    return SUCCESS;
}

API nvmlDeviceGetHandleByIndex_v2(unsigned index, uint64_t *out) {
    ENTER();
    WANT(out && index < node->gpu_count);
    return give_gpu(__func__, index, out);
}

API nvmlDeviceGetHandleByUUID(const char *uuid, uint64_t *out) {
    ENTER();
    WANT(uuid && out);
    for (unsigned g = 0; g < node->gpu_count; g++) {
        if (!strcmp(node->gpus[g].uuid, uuid)) return give_gpu(__func__, g, out);
        const GpuState *mig = &state->gpus[g];
        for (unsigned i = 0; i < mig->compute_count; i++) {
            if (strcmp(mig->computes[i].uuid, uuid) != 0) continue;
            if (node->gpus[g].lost) return GPU_IS_LOST;
            *out = handle_of(KIND_MIG_DEVICE, g, mig->computes[i].generation);
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

API nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, uint64_t *out) {
    ENTER();
    WANT(bus_id && out);
    for (unsigned g = 0; g < node->gpu_count; g++)
        if (!strcasecmp(node->gpus[g].bus_id, bus_id)) return give_gpu(__func__, g, out);
    return NOT_FOUND;
}

API nvmlDeviceGetHandleBySerial(const char *serial, uint64_t *out) {
    ENTER();
    WANT(serial && out);
    for (unsigned g = 0; g < node->gpu_count; g++)
        if (*serial && !strcmp(node->gpus[g].serial, serial)) return give_gpu(__func__, g, out);
    return NOT_FOUND;
}
