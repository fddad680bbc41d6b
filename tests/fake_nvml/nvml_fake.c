/* libnvidia-ml.so.1 for machines without a GPU: answers NVML calls from a description of a node.
 *
 * The description is the text file named by TANGRAM_FAKE_NVML (see description.c). It is read again when the file
 * changes, so a test changes the node under a running agent by replacing the file. What is imitated, and from
 * where: hardware.md section 3.2 (version words, two-call patterns, enum and hardware id, handles that end,
 * holes among MIG devices, privileges, lost GPUs, delays and hangs). A symbol that is not here is absent, as in
 * an old driver.
 *
 * Handles are numbers, never addresses: kind, place and a generation. What is gone, or was never there, is
 * INVALID_ARGUMENT and cannot crash the caller.
 *
 *      63      56 55    48 47            32 31                    0
 *     +----------+--------+----------------+-----------------------+
 *     |   0x5A   |  kind  | index of a GPU |      generation       |
 *     +----------+--------+----------------+-----------------------+
 */
#include "nvml_fake.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default"))) int

enum { KIND_GPU = 1, KIND_GPU_INSTANCE = 2, KIND_MIG_DEVICE = 4 };
enum { VALUE_TYPE_UNSIGNED_INT = 1, NO_INSTANCE = 0xFFFFFFFFu };
enum { FIELD_SPEED_COMMON = 90, FIELD_SPEED = 164, FIELD_STATE = 165 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Node *node;                 /* NULL while not initialised */
static unsigned references;        /* nvmlInit and nvmlShutdown are counted */
static unsigned generations = 1;   /* the next generation to give */
static struct stat described;      /* the description's file as last read */

/* ---- entering a call: lock, follow the description, count, apply delays and failures ---- */

typedef struct { const char *symbol; unsigned long calls; } Counter;
static Counter counters[128];

static void count(const char *symbol) {
    for (unsigned i = 0; i < sizeof counters / sizeof *counters; i++) {
        if (!counters[i].symbol) counters[i].symbol = symbol;
        if (strcmp(counters[i].symbol, symbol) == 0) {
            counters[i].calls++;
            return;
        }
    }
}

/* Not NVML's: how often a symbol was called in this process, for tests. */
__attribute__((visibility("default"))) unsigned long fake_nvml_calls(const char *symbol) {
    for (unsigned i = 0; i < sizeof counters / sizeof *counters && counters[i].symbol; i++)
        if (strcmp(counters[i].symbol, symbol) == 0) return counters[i].calls;
    return 0;
}

/* What is the same before and after keeps its generation, and so its handle. */
static void give_generations(Node *fresh, const Node *old) {
    for (unsigned g = 0; g < fresh->gpu_count; g++) {
        Gpu *gpu = &fresh->gpus[g];
        const Gpu *was = old && g < old->gpu_count && !strcmp(old->gpus[g].uuid, gpu->uuid) ? &old->gpus[g] : NULL;
        gpu->generation = was ? was->generation : generations++;
        for (unsigned i = 0; i < gpu->instance_count; i++) {
            Instance *instance = &gpu->instances[i];
            for (unsigned j = 0; was && j < was->instance_count; j++)
                if (was->instances[j].id == instance->id && was->instances[j].profile_id == instance->profile_id &&
                    was->instances[j].placement.start == instance->placement.start)
                    instance->generation = was->instances[j].generation;
            if (!instance->generation) instance->generation = generations++;
        }
        for (unsigned i = 0; i < gpu->compute_count; i++) {
            Compute *compute = &gpu->computes[i];
            for (unsigned j = 0; was && j < was->compute_count; j++)
                if (!strcmp(was->computes[j].uuid, compute->uuid)) compute->generation = was->computes[j].generation;
            if (!compute->generation) compute->generation = generations++;
        }
    }
}

/* Read the description if it is new. The old one stays where the new one cannot be understood. */
static int follow_description(void) {
    const char *path = getenv("TANGRAM_FAKE_NVML");
    struct stat now;
    if (!path || stat(path, &now) != 0) return node ? SUCCESS : DRIVER_NOT_LOADED;
    if (node && now.st_ino == described.st_ino && now.st_size == described.st_size &&
        now.st_mtim.tv_sec == described.st_mtim.tv_sec && now.st_mtim.tv_nsec == described.st_mtim.tv_nsec)
        return SUCCESS;
    Node *fresh = node_read(path);
    if (!fresh) return node ? SUCCESS : UNKNOWN;
    give_generations(fresh, node);
    free(node);
    node = fresh;
    described = now;
    return SUCCESS;
}

static void sleep_ms(long ms) {
    struct timespec left = {ms / 1000, (ms % 1000) * 1000000L};
    while (nanosleep(&left, &left) != 0) {}
}

/* Apply the description's rules for this symbol; `gpu` is NO_ID on entering, then the GPU asked about. */
static int apply_rules(const char *symbol, int gpu) {
    for (unsigned i = 0; node && i < node->rule_count; i++) {
        Rule rule = node->rules[i];
        if (strcmp(rule.symbol, symbol) != 0 || rule.gpu != gpu) continue;
        if (rule.what == 'f') return rule.number;
        pthread_mutex_unlock(&mutex); /* other threads' calls go on meanwhile, as in a wedged driver */
        if (rule.what == 'd') sleep_ms(rule.number);
        while (rule.what == 'h') sleep_ms(1000);
        pthread_mutex_lock(&mutex);
    }
    return SUCCESS;
}

static int lock(void) { return pthread_mutex_lock(&mutex); }
static void unlock(const int *locked) { (void)locked; pthread_mutex_unlock(&mutex); }

static int enter(const char *symbol) {
    count(symbol);
    if (!references) return UNINITIALIZED;
    int result = follow_description();
    return result ? result : apply_rules(symbol, NO_ID);
}

#define LOCKED __attribute__((cleanup(unlock), unused)) int locked = lock()
#define TRY(expression) do { int result_ = (expression); if (result_) return result_; } while (0)
#define ENTER() LOCKED; TRY(enter(__func__))
#define WANT(condition) do { if (!(condition)) return INVALID_ARGUMENT; } while (0)

/* ---- handles ---- */

static uint64_t handle_of(unsigned kind, unsigned gpu, unsigned generation) {
    return (0x5AULL << 56) | ((uint64_t)kind << 48) | ((uint64_t)gpu << 32) | generation;
}

/* What a handle stands for. For a GPU only `gpu` is set. */
typedef struct { Gpu *gpu; unsigned index; Instance *instance; Compute *compute; } Target;

static Instance *instance_by_id(Gpu *gpu, unsigned id) {
    for (unsigned i = 0; i < gpu->instance_count; i++)
        if (gpu->instances[i].id == id) return &gpu->instances[i];
    return NULL;
}

static int resolve(const char *symbol, uint64_t handle, Target *target) {
    unsigned kind = (handle >> 48) & 0xFF, index = (handle >> 32) & 0xFFFF, generation = (uint32_t)handle;
    memset(target, 0, sizeof *target);
    WANT(handle >> 56 == 0x5A && index < node->gpu_count);
    int rule = apply_rules(symbol, (int)index); /* first: a delay lets another thread replace the node */
    WANT(index < node->gpu_count);
    Gpu *gpu = &node->gpus[index];
    target->gpu = gpu;
    target->index = index;
    int found = kind == KIND_GPU && gpu->generation == generation;
    for (unsigned i = 0; kind == KIND_GPU_INSTANCE && i < gpu->instance_count; i++)
        if (gpu->instances[i].generation == generation) target->instance = &gpu->instances[i], found = 1;
    for (unsigned i = 0; kind == KIND_MIG_DEVICE && i < gpu->compute_count; i++)
        if (gpu->computes[i].generation == generation) {
            target->compute = &gpu->computes[i];
            target->instance = instance_by_id(gpu, target->compute->gi);
            found = target->instance != NULL;
        }
    WANT(found);
    if (gpu->lost) return GPU_IS_LOST;
    return rule;
}

/* Most calls take a GPU or a MIG device; some only a GPU. */
#define DEVICE() Target at; TRY(resolve(__func__, device, &at)); WANT(!at.instance || at.compute)
#define PHYSICAL() Target at; TRY(resolve(__func__, device, &at)); WANT(!at.instance)
#define PRIVILEGED() do { if (!node->privileged) return NO_PERMISSION; } while (0)

static int put_text(char *out, unsigned size, const char *text) {
    WANT(out);
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

/* ---- library and system ---- */

static int initialise(const char *symbol) {
    count(symbol);
    TRY(follow_description());
    int result = apply_rules(symbol, NO_ID);
    if (result == SUCCESS) references++;
    if (!references) {
        free(node);
        node = NULL;
    }
    return result;
}

API nvmlInit_v2(void) { LOCKED; return initialise(__func__); }
API nvmlInitWithFlags(unsigned flags) { LOCKED; (void)flags; return initialise(__func__); }

API nvmlShutdown(void) {
    ENTER();
    if (--references == 0) { /* every handle is invalid from here on: the next node gets new generations */
        free(node);
        node = NULL;
    }
    return SUCCESS;
}

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
        case GPU_IS_LOST: return "The GPU has fallen off the bus or has otherwise become inaccessible";
        case ARGUMENT_VERSION_MISMATCH: return "The provided version is invalid/unsupported";
        default: return "An internal driver error occurred";
    }
}

API nvmlSystemGetDriverVersion(char *out, unsigned size) { ENTER(); return put_text(out, size, node->driver); }
API nvmlSystemGetNVMLVersion(char *out, unsigned size) { ENTER(); return put_text(out, size, node->nvml); }
API nvmlSystemGetCudaDriverVersion_v2(int *out) { ENTER(); WANT(out); *out = node->cuda; return SUCCESS; }

/* ---- finding devices ---- */

API nvmlDeviceGetCount_v2(unsigned *out) { ENTER(); WANT(out); *out = node->gpu_count; return SUCCESS; }

static int give_gpu(const char *symbol, unsigned index, uint64_t *out) {
    TRY(apply_rules(symbol, (int)index));
    WANT(index < node->gpu_count);
    if (node->gpus[index].lost == 2) return GPU_IS_LOST;
    *out = handle_of(KIND_GPU, index, node->gpus[index].generation);
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
        Gpu *gpu = &node->gpus[g];
        if (!strcmp(gpu->uuid, uuid)) return give_gpu(__func__, g, out);
        for (unsigned i = 0; i < gpu->compute_count; i++) {
            if (strcmp(gpu->computes[i].uuid, uuid) != 0) continue;
            if (gpu->lost) return GPU_IS_LOST;
            *out = handle_of(KIND_MIG_DEVICE, g, gpu->computes[i].generation);
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

/* ---- what a device is ---- */

API nvmlDeviceGetUUID(uint64_t device, char *out, unsigned size) {
    ENTER();
    DEVICE();
    return put_text(out, size, at.compute ? at.compute->uuid : at.gpu->uuid);
}

static Profile *profile_by_id(Gpu *gpu, unsigned id) {
    for (unsigned i = 0; i < gpu->profile_count; i++)
        if (gpu->profiles[i].info.id == id) return &gpu->profiles[i];
    return NULL;
}

/* A MIG device is named after its GPU and profile; one that has only a part of its GPU instance says so ("1c."). */
API nvmlDeviceGetName(uint64_t device, char *out, unsigned size) {
    ENTER();
    DEVICE();
    if (!at.compute) return put_text(out, size, at.gpu->name);
    Profile *profile = profile_by_id(at.gpu, at.instance->profile_id);
    const char *label = profile && !strncmp(profile->info.name, "MIG ", 4) ? profile->info.name + 4 : "unknown";
    char part[16] = "", name[256];
    if (profile && at.compute->slices < profile->info.slices) snprintf(part, sizeof part, "%uc.", at.compute->slices);
    snprintf(name, sizeof name, "%s MIG %s%s", at.gpu->name, part, label);
    return put_text(out, size, name);
}

API nvmlDeviceGetIndex(uint64_t device, unsigned *out) {
    ENTER();
    DEVICE();
    WANT(out);
    *out = at.compute ? at.compute->mig_index : at.index;
    return SUCCESS;
}

API nvmlDeviceGetMinorNumber(uint64_t device, unsigned *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    *out = at.gpu->minor;
    return SUCCESS;
}

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

/* NVML counts bytes; everything it calls MB is MiB. A MIG device has its instance's share. */
static unsigned long long total_mib(const Target *at) {
    Profile *profile = at->compute ? profile_by_id(at->gpu, at->instance->profile_id) : NULL;
    return profile ? profile->info.memory_mib : at->gpu->memory_mib;
}

API nvmlDeviceGetMemoryInfo(uint64_t device, Memory *out) {
    ENTER();
    DEVICE();
    WANT(out);
    unsigned long long total = total_mib(&at) << 20, used = at.compute ? 0 : at.gpu->reserved_mib << 20;
    *out = (Memory){.total = total, .free = total - used, .used = used};
    return SUCCESS;
}

API nvmlDeviceGetMemoryInfo_v2(uint64_t device, MemoryV2 *out) {
    ENTER();
    DEVICE();
    WANT(out);
    if (out->version != VERSION(MemoryV2, 2)) return ARGUMENT_VERSION_MISMATCH;
    unsigned long long total = total_mib(&at) << 20, reserved = at.compute ? 0 : at.gpu->reserved_mib << 20;
    out->total = total;
    out->reserved = reserved;
    out->free = total - reserved;
    out->used = 0;
    return SUCCESS;
}

static int put_pci(const char *bus_id, Pci *out) {
    memset(out, 0, sizeof *out);
    if (sscanf(bus_id, "%x:%x:%x", &out->domain, &out->bus, &out->device) != 3) return UNKNOWN;
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:%02X.0", out->domain & 0xFFFFFFFFu, out->bus & 0xFF,
             out->device & 0xFF);
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "%04X:%02X:%02X.0", out->domain & 0xFFFF,
             out->bus & 0xFF, out->device & 0xFF);
    out->device_id = 0x10DE;
    return SUCCESS;
}

API nvmlDeviceGetPciInfo_v3(uint64_t device, Pci *out) {
    ENTER();
    DEVICE();
    WANT(out);
    return put_pci(at.gpu->bus_id, out);
}

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

/* ---- processes: SUCCESS where there is none, INSUFFICIENT_SIZE with the count where the array is too small ---- */

static int put_processes(const char *symbol, uint64_t device, char kind, unsigned *count_inout, ProcessInfo *out) {
    Target at;
    TRY(enter(symbol));
    TRY(resolve(symbol, device, &at));
    WANT((!at.instance || at.compute) && count_inout);
    if (!at.compute && at.gpu->mig_current) PRIVILEGED(); /* the sum over instances is not for everyone */
    unsigned room = out ? *count_inout : 0, found = 0;
    for (unsigned i = 0; i < at.gpu->process_count; i++) {
        const Process *p = &at.gpu->processes[i];
        if (p->kind != kind || (at.compute && p->gi != (int)at.compute->gi)) continue;
        if (found < room)
            out[found] = (ProcessInfo){.pid = p->pid, .used = 1ULL << 30, .gi = p->gi < 0 ? NO_INSTANCE : (unsigned)p->gi,
                                       .ci = p->gi < 0 ? NO_INSTANCE : 0};
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

/* ---- links ---- */

API nvmlDeviceGetTopologyCommonAncestor(uint64_t device, uint64_t other, unsigned *out) {
    ENTER();
    PHYSICAL();
    Target peer;
    TRY(resolve(__func__, other, &peer));
    WANT(out && !peer.instance);
    *out = at.index == peer.index ? 0 : node->ancestors[at.index][peer.index];
    return SUCCESS;
}

/* A board without any link is NOT_SUPPORTED; a link past the last is INVALID_ARGUMENT. */
static int link_end(Gpu *gpu, unsigned link, LinkEnd **end) {
    int any = 0;
    for (unsigned i = 0; i < MAX_LINKS; i++) any |= gpu->links[i].present;
    if (!any) return NOT_SUPPORTED;
    WANT(link < MAX_LINKS && gpu->links[link].present);
    *end = &gpu->links[link];
    return SUCCESS;
}

API nvmlDeviceGetNvLinkState(uint64_t device, unsigned link, unsigned *out) {
    ENTER();
    PHYSICAL();
    LinkEnd *end;
    TRY(link_end(at.gpu, link, &end));
    WANT(out);
    *out = (unsigned)end->active;
    return SUCCESS;
}

API nvmlDeviceGetNvLinkRemotePciInfo_v2(uint64_t device, unsigned link, Pci *out) {
    ENTER();
    PHYSICAL();
    LinkEnd *end;
    TRY(link_end(at.gpu, link, &end));
    WANT(out && end->active);
    return put_pci(end->remote_bus_id, out);
}

API nvmlDeviceGetNvLinkRemoteDeviceType(uint64_t device, unsigned link, unsigned *out) {
    ENTER();
    PHYSICAL();
    LinkEnd *end;
    TRY(link_end(at.gpu, link, &end));
    WANT(out && end->active);
    *out = (unsigned)end->remote_type;
    return SUCCESS;
}

/* The call succeeds as a whole; each field has a result of its own. */
API nvmlDeviceGetFieldValues(uint64_t device, int count, FieldValue *values) {
    ENTER();
    PHYSICAL();
    WANT(values && count > 0);
    for (int i = 0; i < count; i++) {
        FieldValue *v = &values[i];
        LinkEnd *end = NULL;
        v->value_type = VALUE_TYPE_UNSIGNED_INT;
        v->result = NOT_SUPPORTED;
        if (!at.gpu->nvlink_mbps) continue;
        if (v->field == FIELD_SPEED_COMMON) {
            v->result = SUCCESS;
            v->value.ui = at.gpu->nvlink_mbps;
        } else if (v->field == FIELD_SPEED || v->field == FIELD_STATE) {
            v->result = (unsigned)link_end(at.gpu, v->scope, &end);
            if (v->result == SUCCESS) v->value.ui = v->field == FIELD_STATE ? (unsigned)end->active : at.gpu->nvlink_mbps;
        }
    }
    return SUCCESS;
}

/* ---- MIG ---- */

API nvmlDeviceGetMigMode(uint64_t device, unsigned *current, unsigned *pending) {
    ENTER();
    PHYSICAL();
    WANT(current && pending);
    if (!at.gpu->mig_capable) return NOT_SUPPORTED;
    *current = (unsigned)at.gpu->mig_current;
    *pending = (unsigned)at.gpu->mig_pending;
    return SUCCESS;
}

static int put_profile(const Profile *profile, void *out) {
    const ProfileInfoV2 *i = &profile->info;
    unsigned version = *(unsigned *)out;
    if (version == VERSION(ProfileInfoV2, 2)) {
        memcpy(out, i, sizeof *i);
        ((ProfileInfoV2 *)out)->version = version;
        return SUCCESS;
    }
    if (version == VERSION(ProfileInfoV3, 3)) {
        ProfileInfoV3 v3 = {version, i->id, i->slices, i->instances, i->sm, i->copy, i->decoder, i->encoder, i->jpeg,
                            i->ofa, i->memory_mib, "", i->p2p};
        memcpy(v3.name, i->name, sizeof v3.name);
        memcpy(out, &v3, sizeof v3);
        return SUCCESS;
    }
    return ARGUMENT_VERSION_MISMATCH;
}

static int profiles_shown(const Gpu *gpu) { return gpu->mig_capable && (gpu->mig_current || !gpu->profiles_need_mig); }

/* By NVML's enum. Enums the product lacks are NOT_SUPPORTED, past the last enum is INVALID_ARGUMENT. */
API nvmlDeviceGetGpuInstanceProfileInfoV(uint64_t device, unsigned number, void *out) {
    ENTER();
    PHYSICAL();
    WANT(out && number < PROFILE_ENUMS);
    if (!profiles_shown(at.gpu)) return NOT_SUPPORTED;
    for (unsigned i = 0; i < at.gpu->profile_count; i++)
        if (at.gpu->profiles[i].number == number) return put_profile(&at.gpu->profiles[i], out);
    return NOT_SUPPORTED;
}

/* By hardware id, as every call below. */
API nvmlDeviceGetGpuInstanceProfileInfoByIdV(uint64_t device, unsigned id, void *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (!profiles_shown(at.gpu)) return NOT_SUPPORTED;
    Profile *profile = profile_by_id(at.gpu, id);
    WANT(profile);
    return put_profile(profile, out);
}

/* Every placement the profile ever allows, free or not, also with MIG off. */
API nvmlDeviceGetGpuInstancePossiblePlacements_v2(uint64_t device, unsigned id, Placement *out, unsigned *count) {
    ENTER();
    PHYSICAL();
    WANT(count);
    if (!at.gpu->mig_capable) return NOT_SUPPORTED;
    PRIVILEGED();
    Profile *profile = profile_by_id(at.gpu, id);
    if (!profile) return NOT_SUPPORTED;
    if (out && *count < profile->placement_count) return INSUFFICIENT_SIZE;
    if (out) memcpy(out, profile->placements, profile->placement_count * sizeof *out);
    *count = profile->placement_count;
    return SUCCESS;
}

/* Writes the count; the caller's array has room for the profile's `instances`. */
API nvmlDeviceGetGpuInstances(uint64_t device, unsigned id, uint64_t *out, unsigned *count) {
    ENTER();
    PHYSICAL();
    WANT(out && count);
    if (!at.gpu->mig_current) return NOT_SUPPORTED;
    PRIVILEGED();
    WANT(profile_by_id(at.gpu, id));
    *count = 0;
    for (unsigned i = 0; i < at.gpu->instance_count; i++)
        if (at.gpu->instances[i].profile_id == id)
            out[(*count)++] = handle_of(KIND_GPU_INSTANCE, at.index, at.gpu->instances[i].generation);
    return SUCCESS;
}

API nvmlDeviceGetGpuInstanceById(uint64_t device, unsigned id, uint64_t *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (!at.gpu->mig_current) return NOT_SUPPORTED;
    PRIVILEGED();
    Instance *instance = instance_by_id(at.gpu, id);
    if (!instance) return NOT_FOUND;
    *out = handle_of(KIND_GPU_INSTANCE, at.index, instance->generation);
    return SUCCESS;
}

API nvmlGpuInstanceGetInfo(uint64_t instance, GpuInstanceInfo *out) {
    ENTER();
    Target at;
    TRY(resolve(__func__, instance, &at));
    WANT(out && at.instance && !at.compute);
    PRIVILEGED();
    *out = (GpuInstanceInfo){.device = handle_of(KIND_GPU, at.index, at.gpu->generation), .id = at.instance->id,
                             .profile_id = at.instance->profile_id, .placement = at.instance->placement};
    return SUCCESS;
}

/* ---- MIG devices: one per compute instance, for everyone to see ---- */

API nvmlDeviceGetMaxMigDeviceCount(uint64_t device, unsigned *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (!at.gpu->mig_capable) return NOT_SUPPORTED;
    *out = 0;
    for (unsigned i = 0; at.gpu->mig_current && i < at.gpu->profile_count; i++)
        if (at.gpu->profiles[i].info.instances > *out) *out = at.gpu->profiles[i].info.instances;
    return SUCCESS;
}

/* Indices may have holes: NOT_FOUND, and the next may be there. */
API nvmlDeviceGetMigDeviceHandleByIndex(uint64_t device, unsigned index, uint64_t *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (!at.gpu->mig_current) return NOT_SUPPORTED;
    for (unsigned i = 0; i < at.gpu->compute_count; i++)
        if (at.gpu->computes[i].mig_index == index) {
            *out = handle_of(KIND_MIG_DEVICE, at.index, at.gpu->computes[i].generation);
            return SUCCESS;
        }
    return NOT_FOUND;
}

API nvmlDeviceIsMigDeviceHandle(uint64_t device, unsigned *out) {
    ENTER();
    DEVICE();
    WANT(out);
    *out = at.compute != NULL;
    return SUCCESS;
}

#define MIG_DEVICE() Target at; TRY(resolve(__func__, device, &at)); WANT(at.compute)

API nvmlDeviceGetGpuInstanceId(uint64_t device, unsigned *out) {
    ENTER();
    MIG_DEVICE();
    WANT(out);
    *out = at.compute->gi;
    return SUCCESS;
}

API nvmlDeviceGetComputeInstanceId(uint64_t device, unsigned *out) {
    ENTER();
    MIG_DEVICE();
    WANT(out);
    *out = at.compute->id;
    return SUCCESS;
}

API nvmlDeviceGetDeviceHandleFromMigDeviceHandle(uint64_t device, uint64_t *out) {
    ENTER();
    MIG_DEVICE();
    WANT(out);
    *out = handle_of(KIND_GPU, at.index, at.gpu->generation);
    return SUCCESS;
}

API nvmlDeviceGetAttributes_v2(uint64_t device, Attributes *out) {
    ENTER();
    DEVICE();
    WANT(out);
    if (!at.compute) return NOT_SUPPORTED; /* of MIG devices only */
    Profile *profile = profile_by_id(at.gpu, at.instance->profile_id);
    if (!profile) return UNKNOWN;
    const ProfileInfoV2 *i = &profile->info;
    *out = (Attributes){i->sm, i->copy, i->decoder, i->encoder, i->jpeg, i->ofa, i->slices, at.compute->slices,
                        i->memory_mib};
    return SUCCESS;
}
