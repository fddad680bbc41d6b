/* The part of NVML's interface that this fake answers, and the node it imitates.
 *
 *   description, control ──read──▶ Node (facts and faults; each process has its own copy)
 *   path + ".state"      ──mmap──▶ State (MIG, events; one for all processes that see the node)
 *
 * Layouts follow nvml.h 13.3.29; every size is asserted here, so a slip fails the build. Nothing in this file
 * is NVIDIA's: the declarations are written from the documented layouts.
 */
#ifndef NVML_FAKE_H
#define NVML_FAKE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

#define API __attribute__((visibility("default"))) int

/* ---- return codes we give ---- */
enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15, RESET_REQUIRED = 16, IN_USE = 19,
    INSUFFICIENT_RESOURCES = 23, ARGUMENT_VERSION_MISMATCH = 25, UNKNOWN = 999
};

/* ---- NVML's structs ---- */
typedef struct { char bus_id_legacy[16]; unsigned domain, bus, device, device_id, subsystem_id; char bus_id[32]; } Pci;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } ProcessInfo;
typedef struct { unsigned start, size; } Placement;
typedef struct {
    unsigned id, p2p, slices, instances, sm, copy, decoder, encoder, jpeg, ofa;
    unsigned long long memory_mib;
} ProfileInfoV1;
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
typedef struct { unsigned id, slices, instances, sm, copy, decoder, encoder, jpeg, ofa; } ComputeProfileInfoV1;
typedef struct {
    unsigned version, id, slices, instances, sm, copy, decoder, encoder, jpeg, ofa;
    char name[96];
} ComputeProfileInfoV2;
typedef struct {
    unsigned version, id, slices, instances, sm, copy, decoder, encoder, jpeg, ofa;
    char name[96];
    unsigned capabilities;
} ComputeProfileInfoV3;
typedef struct { uint64_t device, gpu_instance; unsigned id, profile_id; Placement placement; } ComputeInstanceInfo;
typedef struct {
    unsigned sm, copy, decoder, encoder, jpeg, ofa, gi_slices, ci_slices;
    unsigned long long memory_mib;
} Attributes;
typedef struct { uint64_t device; unsigned long long type, data; unsigned gi, ci; } EventData;
typedef struct {
    uint32_t field, scope;
    int64_t timestamp, latency;
    unsigned value_type, result;
    union { double d; unsigned ui; unsigned long ul; unsigned long long ull; } value;
} FieldValue;
typedef struct { uint8_t cluster[16]; unsigned status, clique; uint8_t state; } FabricV1;
typedef struct { unsigned version; uint8_t cluster[16]; unsigned status, clique; uint8_t state; unsigned mask; } FabricV2;
typedef struct {
    unsigned version;
    uint8_t cluster[16];
    unsigned status, clique;
    uint8_t state;
    unsigned mask;
    uint8_t summary;
} FabricV3;
typedef struct { unsigned version, sensor; int degrees; } Temperature;
typedef struct {
    unsigned version;
    char ib_guid[16], chassis[16];
    uint8_t slot, tray, host, peer, module;
} Platform; /* v1 calls the middle one rackGuid; the layout is the same */
typedef struct { unsigned gpu, memory; } Utilization;

_Static_assert(sizeof(Pci) == 68, "nvmlPciInfo_t");
_Static_assert(sizeof(Memory) == 24, "nvmlMemory_t");
_Static_assert(sizeof(MemoryV2) == 40, "nvmlMemory_v2_t");
_Static_assert(sizeof(ProcessInfo) == 24, "nvmlProcessInfo_t");
_Static_assert(sizeof(Placement) == 8, "nvmlGpuInstancePlacement_t");
_Static_assert(sizeof(ProfileInfoV1) == 48, "nvmlGpuInstanceProfileInfo_t");
_Static_assert(sizeof(ProfileInfoV2) == 152, "nvmlGpuInstanceProfileInfo_v2_t");
_Static_assert(sizeof(ProfileInfoV3) == 152, "nvmlGpuInstanceProfileInfo_v3_t");
_Static_assert(sizeof(GpuInstanceInfo) == 24, "nvmlGpuInstanceInfo_t");
_Static_assert(sizeof(ComputeProfileInfoV1) == 36, "nvmlComputeInstanceProfileInfo_t");
_Static_assert(sizeof(ComputeProfileInfoV2) == 136, "nvmlComputeInstanceProfileInfo_v2_t");
_Static_assert(sizeof(ComputeProfileInfoV3) == 140, "nvmlComputeInstanceProfileInfo_v3_t");
_Static_assert(sizeof(ComputeInstanceInfo) == 32, "nvmlComputeInstanceInfo_t");
_Static_assert(sizeof(Attributes) == 40, "nvmlDeviceAttributes_t");
_Static_assert(sizeof(EventData) == 32, "nvmlEventData_t");
_Static_assert(sizeof(FieldValue) == 40, "nvmlFieldValue_t");
_Static_assert(sizeof(FabricV1) == 28, "nvmlGpuFabricInfo_t");
_Static_assert(sizeof(FabricV2) == 36, "nvmlGpuFabricInfo_v2_t");
_Static_assert(sizeof(FabricV3) == 40, "nvmlGpuFabricInfo_v3_t");
_Static_assert(sizeof(Temperature) == 12, "nvmlTemperature_v1_t");
_Static_assert(sizeof(Platform) == 44, "nvmlPlatformInfo_v1_t, nvmlPlatformInfo_v2_t");

/* The version word: the size, and the version in the top byte. */
#define VERSION(type, number) ((unsigned)(sizeof(type) | ((unsigned)(number) << 24)))

enum { AMPERE = 7, HOPPER = 9, BLACKWELL = 10 }; /* NVML's architecture numbers */
enum { EVENT_XID = 0x8, EVENT_MIG_CONFIG = 0x100 };

enum { MAX_GPUS = 64, MAX_LINKS = 36, MAX_PROFILES = 32, MAX_PLACEMENTS = 32, MAX_INSTANCES = 32, MAX_COMPUTES = 64,
       MAX_PROCESSES = 64, MAX_RULES = 64, MAX_EVENTS = 64, MAX_COUNTED = 64, MAX_ACTS = 256, PROFILE_ENUMS = 18,
       COMPUTE_ENUMS = 9, LINK_COUNTERS = 5, NO_ID = -1 };

/* ---- the state: MIG and events, in a file that all processes map (tests/fake_nvml/state.py reads it, too) ----
 *
 * Two copies; `turn` says which one is true (the last bit). A change is made on the other copy and becomes true when
 * `turn` is increased, so a process that is killed half-way has changed nothing. Changing needs the file's flock,
 * which the kernel drops with its owner. A reader without the lock reads `turn`, copies, and begins anew if `turn`
 * has moved meanwhile.
 */
typedef struct { unsigned id, profile_id, start, size, generation; char profile[44]; } Instance;
typedef struct {
    unsigned gi, id, mig_index, slices, start, generation;
    char uuid[64];
} Compute; /* with it, a MIG device */
typedef struct { uint64_t sequence; unsigned gpu, type; uint64_t data; unsigned gi, ci; } Event;
typedef struct {
    char uuid[96];
    uint64_t described; /* the lines about MIG that this state was taken from, as one number */
    unsigned generation, mig_current, mig_pending, instance_count, compute_count, unused;
    Instance instances[MAX_INSTANCES];
    Compute computes[MAX_COMPUTES];
} GpuState;
typedef struct {
    unsigned boots, gpu_count, next_generation, unused;
    uint64_t acted;     /* the number of the last one-shot act of the control file that was carried out */
    uint64_t sequence;  /* the number of the last event */
    Event events[MAX_EVENTS];
    struct { uint64_t rule, times; } counted[MAX_COUNTED]; /* how often a rule of the control file was applied */
    GpuState gpus[MAX_GPUS];
} State;
typedef struct {
    uint32_t magic, size; /* of the whole file */
    uint64_t turn;
    uint64_t unused[6];
    State copies[2];
} StateFile;

enum { STATE_MAGIC = 0x3147494D };
_Static_assert(sizeof(Instance) == 64 && sizeof(Compute) == 88 && sizeof(Event) == 32, "state.py knows these");
_Static_assert(offsetof(GpuState, instances) == 128 && sizeof(GpuState) == 128 + 32 * 64 + 64 * 88, "so does it this");
_Static_assert(offsetof(State, gpus) == 32 + 64 * 32 + 64 * 16 && offsetof(StateFile, copies) == 64, "and this");

/* ---- the node: what the description says, with the control file's changes ---- */
typedef struct { int present, active, remote_type; char remote_bus_id[32]; unsigned long long errors[LINK_COUNTERS]; } LinkEnd;
typedef struct {
    unsigned number; /* NVML's enum, the argument of the profile-info getter; `info.id` is the hardware id */
    ProfileInfoV2 info;
    unsigned placement_count;
    Placement placements[MAX_PLACEMENTS];
} Profile;
typedef struct { char kind; unsigned pid; int gi; unsigned used_mib; } Process; /* kind: c(ompute), g(raphics), m(ps) */
typedef struct { unsigned gpu; int profile_id; unsigned start; Process process; } PlacedProcess; /* -1: on the GPU */
typedef struct { int on; unsigned state, status, clique, mask, summary; uint8_t cluster[16]; } Fabric;
typedef struct {
    char uuid[96], name[96], bus_id[32], serial[30], part[80], chassis[16];
    unsigned minor, architecture, capability_major, capability_minor, device_id;
    unsigned long long memory_mib, reserved_mib;
    int numa, gpu_numa, lost; /* lost 1: every call on its handle fails; 2: no handle either */
    int cpus[4];              /* first and last CPU of its NUMA node, then of its socket */
    int mig_capable, profiles_need_mig;
    uint64_t mig_described;
    int board_units, board_slices, board_engines[4]; /* totals; -1: no limit */
    unsigned nvlink_mbps; /* MB/s each way, per link, as NVML gives it; 0: the fields are not supported */
    unsigned nvlink_version, brand, compute_mode, persistence, degrees, replays;
    int ecc, ecc_pending, recovery; /* -1: the board has none, the driver does not say */
    unsigned long long errors[4];   /* ECC: corrected and uncorrected, volatile; the same, aggregate */
    unsigned rows[4];               /* remapped: correctable, uncorrectable, pending, failure */
    unsigned retired[2], retired_pending;
    unsigned power_limit_mw, power_mw;
    unsigned long long clock_reasons;
    uint8_t platform[5];            /* slot, tray, host, peer, module; all 0xFF: not on a tray */
    Fabric fabric;
    LinkEnd links[MAX_LINKS];
    unsigned profile_count, process_count;
    Profile profiles[MAX_PROFILES];
    Process processes[MAX_PROCESSES];
    GpuState described; /* MIG as the description has it */
} Gpu;
/* what: d(elay ms), h(ang), f(ail with code), x (die after the call). `id` 0: not counted; `times` 0: always. */
typedef struct { char what, symbol[96]; int number, gpu; uint64_t id, times; } Rule;
/* Making (m) or removing (r) at a place is answered with `code`. */
typedef struct { char what; int code; unsigned gpu; int profile_id; unsigned start; uint64_t id, times; } Refusal;
/* One-shot: e(vent of a type), r(eset a GPU), b(oot). */
typedef struct { char what; uint64_t number; unsigned gpu, type, data, gi, ci; } Act;
typedef struct {
    char driver[80], nvml[80];
    int cuda, privileged, configures; /* configures: may also change MIG, not only list it */
    unsigned gpu_count, rule_count, refusal_count, act_count, placed_count;
    Rule rules[MAX_RULES];
    Refusal refusals[MAX_RULES];
    Act acts[MAX_ACTS];
    PlacedProcess placed[MAX_PROCESSES];
    unsigned char ancestors[MAX_GPUS][MAX_GPUS], p2p[MAX_GPUS][MAX_GPUS];
    Gpu gpus[MAX_GPUS];
} Node;

/* description.c, control.c. NULL or 0, and a line on stderr, where something cannot be read or understood. */
Node *node_read(const char *path);
int control_read(Node *node, const char *path);
int read_gpu_line(Gpu *gpu, const char *word, const char *rest);
int read_lines(const char *path, int (*line)(void *context, const char *word, const char *rest), void *context);

/* ---- state.c: the shared state, held while a call runs ---- */
extern State *state; /* the true copy, or the one being changed; valid while locked */
int state_open(const char *description);
void state_close(void);
void state_lock(void);
void state_unlock(void);
void begin_change(void);  /* `state` is the other copy from here on: look up what pointed into it again */
void commit(void);
void state_follow(const Node *node); /* take MIG from the description where that changed; carry out new acts */
void push_event(unsigned gpu, unsigned type, uint64_t data, unsigned gi, unsigned ci);
int counted_out(uint64_t rule, uint64_t times); /* whether this rule was applied often enough; else counts */

/* ---- call.c: entering a call, handles ---- */
typedef struct { Gpu *gpu; GpuState *mig; unsigned index; Instance *instance; Compute *compute; } Target;
enum { KIND_GPU = 1, KIND_GPU_INSTANCE = 2, KIND_MIG_DEVICE = 4, KIND_COMPUTE_INSTANCE = 8, KIND_EVENT_SET = 16 };
#define NO_INSTANCE 0xFFFFFFFFu

extern Node *node; /* NULL while not initialised */
int lock(void);
void unlock(const int *locked);
int enter(const char *symbol);
int enter_initialise(const char *symbol);
int leave_session(void);
int apply_rules(const char *symbol, int gpu);
uint64_t handle_of(unsigned kind, unsigned gpu, unsigned generation);
int handle_is(uint64_t handle, unsigned kind, unsigned *generation);
int resolve(const char *symbol, uint64_t handle, unsigned kinds, Target *target);
void look_again(Target *at); /* after begin_change: the same things in the copy that is being changed */
void sleep_ms(long ms);
int put_text(char *out, unsigned size, const char *text);
void events_forget(void); /* events.c: the session is over */

#define LOCKED __attribute__((cleanup(unlock), unused)) int locked = lock()
#define TRY(expression) do { int result_ = (expression); if (result_) return result_; } while (0)
#define ENTER() LOCKED; TRY(enter(__func__))
#define WANT(condition) do { if (!(condition)) return INVALID_ARGUMENT; } while (0)
#define PRIVILEGED() do { if (!node->privileged) return NO_PERMISSION; } while (0)
#define CONFIGURING() do { if (!node->privileged || !node->configures) return NO_PERMISSION; } while (0)

/* Most calls take a GPU or a MIG device; some only a GPU; some one kind of instance. */
#define TARGET(handle, kinds) Target at; TRY(resolve(__func__, handle, kinds, &at))
#define DEVICE() TARGET(device, KIND_GPU | KIND_MIG_DEVICE)
#define PHYSICAL() TARGET(device, KIND_GPU)
#define MIG_DEVICE() TARGET(device, KIND_MIG_DEVICE)

/* ---- mig.c, used by the others ---- */
Profile *profile_by_id(Gpu *gpu, unsigned id);
Instance *instance_by_id(GpuState *mig, unsigned id);
unsigned processes_of(unsigned gpu, char kind, Process *out); /* with `gi` filled in for those named by place */
unsigned first_compute(const GpuState *mig, unsigned gi);

#endif
