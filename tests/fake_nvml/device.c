/* What a device is, how it is, and who uses it: identity, memory, affinity, power, ECC, processes. */
#include "nvml_fake.h"

#include <stdio.h>
#include <string.h>

/* ---- identity ---- */

API nvmlDeviceGetUUID(uint64_t device, char *out, unsigned size) {
    ENTER();
    DEVICE();
    return put_text(out, size, at.compute ? at.compute->uuid : at.gpu->uuid);
}

/* A MIG device is named after its GPU and profile; one that has only a part of its GPU instance says so ("1c."). */
API nvmlDeviceGetName(uint64_t device, char *out, unsigned size) {
    ENTER();
    DEVICE();
    if (!at.compute) return put_text(out, size, at.gpu->name);
    const Profile *profile = profile_by_id(at.gpu, at.instance->profile_id);
    char part[16] = "", name[256];
    if (profile && at.compute->slices < profile->info.slices) snprintf(part, sizeof part, "%uc.", at.compute->slices);
    snprintf(name, sizeof name, "%s MIG %s%s", at.gpu->name, part, at.instance->profile);
    return put_text(out, size, name);
}

API nvmlDeviceGetIndex(uint64_t device, unsigned *out) {
    ENTER();
    DEVICE();
    WANT(out);
    *out = at.compute ? at.compute->mig_index : at.index;
    return SUCCESS;
}

/* Most facts are one number of the GPU: its place in `Gpu`, and what it takes that there is one. */
#define NUMBER(symbol, type, value, available)  \
    API symbol(uint64_t device, type *out) {    \
        ENTER();                                \
        PHYSICAL();                             \
        WANT(out);                              \
        if (!(available)) return NOT_SUPPORTED; \
        *out = (type)(value);                   \
        return SUCCESS;                         \
    }

NUMBER(nvmlDeviceGetMinorNumber, unsigned, at.gpu->minor, 1)
NUMBER(nvmlDeviceGetBrand, unsigned, at.gpu->brand, 1)
NUMBER(nvmlDeviceGetModuleId, unsigned, at.gpu->platform[4], at.gpu->platform[4] != 0xFF)
NUMBER(nvmlDeviceGetNumaNodeId, unsigned, at.gpu->gpu_numa, at.gpu->gpu_numa >= 0)
NUMBER(nvmlDeviceGetComputeMode, unsigned, at.gpu->compute_mode, 1)
NUMBER(nvmlDeviceGetPersistenceMode, unsigned, at.gpu->persistence, 1)
NUMBER(nvmlDeviceGetVirtualizationMode, unsigned, 0, 1)
NUMBER(nvmlDeviceGetPowerUsage, unsigned, at.gpu->power_mw, at.gpu->power_limit_mw)
NUMBER(nvmlDeviceGetEnforcedPowerLimit, unsigned, at.gpu->power_limit_mw, at.gpu->power_limit_mw)
NUMBER(nvmlDeviceGetPowerManagementLimit, unsigned, at.gpu->power_limit_mw, at.gpu->power_limit_mw)
NUMBER(nvmlDeviceGetPowerManagementDefaultLimit, unsigned, at.gpu->power_limit_mw, at.gpu->power_limit_mw)
NUMBER(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, at.gpu->clock_reasons, 1)
NUMBER(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, at.gpu->clock_reasons, 1)
NUMBER(nvmlDeviceGetPcieReplayCounter, unsigned, at.gpu->replays, 1)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, unsigned, 16, 1)
NUMBER(nvmlDeviceGetMaxPcieLinkWidth, unsigned, 16, 1)

API nvmlDeviceGetArchitecture(uint64_t device, unsigned *out) {
    ENTER();
    DEVICE();
    WANT(out);
    *out = at.gpu->architecture;
    return SUCCESS;
}

API nvmlDeviceGetCudaComputeCapability(uint64_t device, int *major, int *minor) {
    ENTER();
    DEVICE();
    WANT(major && minor);
    *major = (int)at.gpu->capability_major;
    *minor = (int)at.gpu->capability_minor;
    return SUCCESS;
}

API nvmlDeviceGetSerial(uint64_t device, char *out, unsigned size) {
    ENTER();
    PHYSICAL();
    return at.gpu->serial[0] ? put_text(out, size, at.gpu->serial) : NOT_SUPPORTED;
}

API nvmlDeviceGetBoardPartNumber(uint64_t device, char *out, unsigned size) {
    ENTER();
    PHYSICAL();
    return at.gpu->part[0] ? put_text(out, size, at.gpu->part) : NOT_SUPPORTED;
}

/* Where it is in a rack; only for what is built into trays. */
API nvmlDeviceGetPlatformInfo(uint64_t device, Platform *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    const uint8_t *p = at.gpu->platform;
    unsigned version = out->version;
    if (version != VERSION(Platform, 1) && version != VERSION(Platform, 2)) return ARGUMENT_VERSION_MISMATCH;
    if (p[4] == 0xFF) return NOT_SUPPORTED;
    *out = (Platform){.version = version, .slot = p[0], .tray = p[1], .host = p[2], .peer = p[3], .module = p[4]};
    memcpy(out->chassis, at.gpu->chassis, sizeof out->chassis);
    return SUCCESS;
}

/* ---- memory: NVML counts bytes; everything it calls MB is MiB. A MIG device has its instance's share. ---- */

static MemoryV2 memory_of(const Target *at) {
    Process processes[2 * MAX_PROCESSES];
    const Profile *profile = at->compute ? profile_by_id(at->gpu, at->instance->profile_id) : NULL;
    unsigned long long total = profile ? profile->info.memory_mib : at->gpu->memory_mib, used = 0;
    unsigned long long reserved = at->compute ? 0 : at->gpu->reserved_mib;
    unsigned count = processes_of(at->index, 0, processes);
    for (unsigned i = 0; i < count; i++)
        if (!at->compute || processes[i].gi == (int)at->instance->id) used += processes[i].used_mib;
    if (used > total - reserved) used = total - reserved;
    return (MemoryV2){.total = total << 20, .reserved = reserved << 20, .used = used << 20,
                      .free = (total - reserved - used) << 20};
}

API nvmlDeviceGetMemoryInfo(uint64_t device, Memory *out) {
    ENTER();
    DEVICE();
    WANT(out);
    MemoryV2 memory = memory_of(&at);
    *out = (Memory){.total = memory.total, .free = memory.free, .used = memory.reserved + memory.used};
    return SUCCESS;
}

API nvmlDeviceGetMemoryInfo_v2(uint64_t device, MemoryV2 *out) {
    ENTER();
    DEVICE();
    WANT(out);
    unsigned version = out->version;
    if (version != VERSION(MemoryV2, 2)) return ARGUMENT_VERSION_MISMATCH;
    *out = memory_of(&at);
    out->version = version;
    return SUCCESS;
}

/* ---- affinity: bit masks in words of 64 ---- */

API nvmlDeviceGetMemoryAffinity(uint64_t device, unsigned words, unsigned long *out, unsigned scope) {
    ENTER();
    DEVICE();
    WANT(out && words && scope <= 1);
    if (at.gpu->numa < 0) return NOT_SUPPORTED;
    memset(out, 0, words * sizeof *out);
    unsigned word = (unsigned)at.gpu->numa / 64;
    if (word >= words) return INSUFFICIENT_SIZE;
    out[word] = 1UL << (at.gpu->numa % 64);
    return SUCCESS;
}

API nvmlDeviceGetCpuAffinityWithinScope(uint64_t device, unsigned words, unsigned long *out, unsigned scope) {
    ENTER();
    DEVICE();
    WANT(out && words && scope <= 1);
    const int *range = &at.gpu->cpus[2 * scope];
    if (at.gpu->cpus[0] < 0) return NOT_SUPPORTED;
    memset(out, 0, words * sizeof *out);
    if ((unsigned)range[1] / 64 >= words) return INSUFFICIENT_SIZE;
    for (int cpu = range[0]; cpu <= range[1]; cpu++) out[cpu / 64] |= 1UL << (cpu % 64);
    return SUCCESS;
}

API nvmlDeviceGetCpuAffinity(uint64_t device, unsigned words, unsigned long *out) {
    return nvmlDeviceGetCpuAffinityWithinScope(device, words, out, 0);
}

/* ---- heat, power, use ---- */

API nvmlDeviceGetTemperature(uint64_t device, unsigned sensor, unsigned *out) {
    ENTER();
    PHYSICAL();
    WANT(out && sensor == 0);
    *out = at.gpu->degrees;
    return SUCCESS;
}

API nvmlDeviceGetTemperatureV(uint64_t device, Temperature *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (out->version != VERSION(Temperature, 1)) return ARGUMENT_VERSION_MISMATCH;
    WANT(out->sensor == 0);
    out->degrees = (int)at.gpu->degrees;
    return SUCCESS;
}

API nvmlDeviceGetPowerManagementLimitConstraints(uint64_t device, unsigned *least, unsigned *most) {
    ENTER();
    PHYSICAL();
    WANT(least && most);
    if (!at.gpu->power_limit_mw) return NOT_SUPPORTED;
    *least = at.gpu->power_limit_mw / 3;
    *most = at.gpu->power_limit_mw;
    return SUCCESS;
}

API nvmlDeviceGetUtilizationRates(uint64_t device, Utilization *out) {
    ENTER();
    DEVICE();
    WANT(out);
    if (at.mig->mig_current) return NOT_SUPPORTED;
    *out = (Utilization){0};
    return SUCCESS;
}

/* ---- health of memory ---- */

API nvmlDeviceGetEccMode(uint64_t device, unsigned *current, unsigned *pending) {
    ENTER();
    PHYSICAL();
    WANT(current && pending);
    if (at.gpu->ecc < 0) return NOT_SUPPORTED;
    *current = (unsigned)at.gpu->ecc;
    *pending = (unsigned)at.gpu->ecc_pending;
    return SUCCESS;
}

/* Type 0 corrected, 1 uncorrected; counter 0 volatile, 1 aggregate. */
API nvmlDeviceGetTotalEccErrors(uint64_t device, unsigned type, unsigned counter, unsigned long long *out) {
    ENTER();
    PHYSICAL();
    WANT(out && type <= 1 && counter <= 1);
    if (at.gpu->ecc <= 0) return NOT_SUPPORTED;
    *out = at.gpu->errors[2 * counter + type];
    return SUCCESS;
}

API nvmlDeviceGetRemappedRows(uint64_t device, unsigned *correctable, unsigned *uncorrectable, unsigned *pending,
                              unsigned *failure) {
    ENTER();
    PHYSICAL();
    WANT(correctable && uncorrectable && pending && failure);
    if (at.gpu->architecture < AMPERE || at.gpu->ecc < 0 || at.mig->instance_count) return NOT_SUPPORTED;
    *correctable = at.gpu->rows[0];
    *uncorrectable = at.gpu->rows[1];
    *pending = at.gpu->rows[2];
    *failure = at.gpu->rows[3];
    return SUCCESS;
}

/* Before Ampere. NULL asks for the count. */
static int put_retired(const char *symbol, uint64_t device, unsigned cause, unsigned *count, unsigned long long *out) {
    Target at;
    TRY(enter(symbol));
    TRY(resolve(symbol, device, KIND_GPU, &at));
    WANT(count && cause <= 1);
    if (at.gpu->architecture >= AMPERE || at.gpu->ecc < 0) return NOT_SUPPORTED;
    unsigned pages = at.gpu->retired[cause], room = *count;
    *count = pages;
    if (!out) return SUCCESS;
    if (room < pages) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < pages; i++) out[i] = 0x10000ULL * (i + 1);
    return SUCCESS;
}

API nvmlDeviceGetRetiredPages(uint64_t device, unsigned cause, unsigned *count, unsigned long long *out) {
    LOCKED;
    return put_retired(__func__, device, cause, count, out);
}

API nvmlDeviceGetRetiredPages_v2(uint64_t device, unsigned cause, unsigned *count, unsigned long long *out,
                                 unsigned long long *when) {
    LOCKED;
    TRY(put_retired(__func__, device, cause, count, out));
    for (unsigned i = 0; out && when && i < *count; i++) when[i] = 0;
    return SUCCESS;
}

NUMBER(nvmlDeviceGetRetiredPagesPendingStatus, unsigned, at.gpu->retired_pending,
       at.gpu->architecture < AMPERE && at.gpu->ecc >= 0)

/* ---- processes: SUCCESS where there is none, INSUFFICIENT_SIZE with the count where the array is too small ---- */

static int put_processes(const char *symbol, uint64_t device, char kind, unsigned *count_inout, ProcessInfo *out) {
    Target at;
    Process processes[2 * MAX_PROCESSES];
    TRY(enter(symbol));
    TRY(resolve(symbol, device, KIND_GPU | KIND_MIG_DEVICE, &at));
    WANT(count_inout);
    if (!at.compute && at.mig->mig_current) PRIVILEGED(); /* the sum over instances is not for everyone */
    unsigned room = out ? *count_inout : 0, found = 0, all = processes_of(at.index, kind, processes);
    for (unsigned i = 0; i < all; i++) {
        const Process *p = &processes[i];
        unsigned gi = p->gi < 0 ? NO_INSTANCE : (unsigned)p->gi;
        unsigned ci = p->gi < 0 ? NO_INSTANCE : first_compute(at.mig, gi);
        if (at.compute && (gi != at.compute->gi || ci != at.compute->id)) continue;
        if (found < room)
            out[found] = (ProcessInfo){.pid = p->pid, .used = (unsigned long long)p->used_mib << 20, .gi = gi, .ci = ci};
        found++;
    }
    *count_inout = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

API nvmlDeviceGetComputeRunningProcesses_v3(uint64_t device, unsigned *count, ProcessInfo *out) {
    LOCKED;
    return put_processes(__func__, device, 'c', count, out);
}
API nvmlDeviceGetGraphicsRunningProcesses_v3(uint64_t device, unsigned *count, ProcessInfo *out) {
    LOCKED;
    return put_processes(__func__, device, 'g', count, out);
}
API nvmlDeviceGetMPSComputeRunningProcesses_v3(uint64_t device, unsigned *count, ProcessInfo *out) {
    LOCKED;
    return put_processes(__func__, device, 'm', count, out);
}
