/* The part of NVML's interface that this fake answers, and the node it imitates.
 *
 * Layouts follow nvml.h 13.3.29; every size is asserted here, so a slip fails the build. Nothing in this file
 * is NVIDIA's: the declarations are written from the documented layouts.
 */
#ifndef NVML_FAKE_H
#define NVML_FAKE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

/* ---- return codes we give ---- */
enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, ARGUMENT_VERSION_MISMATCH = 25, UNKNOWN = 999
};

/* ---- NVML's structs ---- */
typedef struct { char bus_id_legacy[16]; unsigned domain, bus, device, device_id, subsystem_id; char bus_id[32]; } Pci;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } ProcessInfo;
typedef struct { unsigned start, size; } Placement;
typedef struct {
    unsigned version, id, p2p, slices, instances, sm, copy, decoder, encoder, jpeg, ofa;
    unsigned long long memory_mib;
    char name[96];
} ProfileInfoV2;
typedef struct {
    unsigned version, id, slices, instances, sm, copy, decoder, encoder, jpeg, ofa;
    unsigned long long memory_mib;
    char name[96];
    unsigned capabilities;
} ProfileInfoV3; /* as large as v2, with another layout: only the version word tells them apart */
typedef struct { uint64_t device; unsigned id, profile_id; Placement placement; } GpuInstanceInfo;
typedef struct {
    unsigned sm, copy, decoder, encoder, jpeg, ofa, gi_slices, ci_slices;
    unsigned long long memory_mib;
} Attributes;
typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency;
    unsigned value_type, result;
    union { double d; unsigned ui; unsigned long ul; unsigned long long ull; } value;
} FieldValue;

_Static_assert(sizeof(Pci) == 68, "nvmlPciInfo_t");
_Static_assert(sizeof(Memory) == 24, "nvmlMemory_t");
_Static_assert(sizeof(MemoryV2) == 40, "nvmlMemory_v2_t");
_Static_assert(sizeof(ProcessInfo) == 24, "nvmlProcessInfo_t");
_Static_assert(sizeof(Placement) == 8, "nvmlGpuInstancePlacement_t");
_Static_assert(sizeof(ProfileInfoV2) == 152, "nvmlGpuInstanceProfileInfo_v2_t");
_Static_assert(sizeof(ProfileInfoV3) == 152, "nvmlGpuInstanceProfileInfo_v3_t");
_Static_assert(sizeof(GpuInstanceInfo) == 24, "nvmlGpuInstanceInfo_t");
_Static_assert(sizeof(Attributes) == 40, "nvmlDeviceAttributes_t");
_Static_assert(sizeof(FieldValue) == 40, "nvmlFieldValue_t");

/* The version word: the size, and the version in the top byte. */
#define VERSION(type, number) ((unsigned)(sizeof(type) | ((unsigned)(number) << 24)))

/* ---- the node ---- */
enum { MAX_GPUS = 64, MAX_LINKS = 36, MAX_PROFILES = 32, MAX_PLACEMENTS = 32, MAX_INSTANCES = 32, MAX_COMPUTES = 64,
       MAX_PROCESSES = 64, MAX_RULES = 32, PROFILE_ENUMS = 18, NO_ID = -1 };

typedef struct { int present, active, remote_type; char remote_bus_id[32]; } LinkEnd;
typedef struct {
    unsigned number; /* NVML's enum, the argument of the profile-info getter; `info.id` is the hardware id */
    ProfileInfoV2 info;
    unsigned placement_count;
    Placement placements[MAX_PLACEMENTS];
} Profile;
typedef struct { unsigned id, profile_id, generation; Placement placement; } Instance;
typedef struct { unsigned gi, id, mig_index, slices, generation; char uuid[96]; } Compute; /* with it, a MIG device */
typedef struct { char kind; unsigned pid; int gi; } Process; /* kind: c(ompute), g(raphics), m(ps) */
typedef struct {
    char uuid[96], name[96], bus_id[32];
    unsigned generation, minor, architecture, capability_major, capability_minor;
    unsigned long long memory_mib, reserved_mib;
    int numa, lost; /* lost 1: every call on its handle fails; 2: no handle either */
    int mig_capable, mig_current, mig_pending, profiles_need_mig;
    unsigned nvlink_mbps; /* MB/s each way, per link, as NVML gives it; 0: the fields are not supported */
    LinkEnd links[MAX_LINKS];
    unsigned profile_count, instance_count, compute_count, process_count;
    Profile profiles[MAX_PROFILES];
    Instance instances[MAX_INSTANCES];
    Compute computes[MAX_COMPUTES];
    Process processes[MAX_PROCESSES];
} Gpu;
typedef struct { char what, symbol[96]; int number, gpu; } Rule; /* what: d(elay ms), h(ang), f(ail with code) */
typedef struct {
    char driver[80], nvml[80];
    int cuda, privileged;
    unsigned gpu_count, rule_count;
    Rule rules[MAX_RULES];
    unsigned char ancestors[MAX_GPUS][MAX_GPUS];
    Gpu gpus[MAX_GPUS];
} Node;

/* Read the description at `path`. NULL, and a line on stderr, where it cannot be read or understood. */
Node *node_read(const char *path);

#endif
