/* Looks at the fake library as a C program sees it; run by tests/agent/test_fake_from_c.py.
 *
 *   probe checks              version words, NULL arguments, handles that have ended, waiting for events
 *   probe walk PROFILE_ID...  makes every set of instances of these profiles on GPU 0: prints how many there are, and
 *                             beside how many of them nothing more fits
 *   probe churn               makes and removes an instance on GPU 0 for ever: to be killed
 *
 * GPU 0 of the node must be in MIG mode, with nothing on it. Ends with 1, and a line for each, where something is not
 * as it should be.
 */
#include "nvml_fake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef uint64_t Handle;

int nvmlInitWithFlags(unsigned flags);
int nvmlShutdown(void);
int nvmlDeviceGetCount_v2(unsigned *out);
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Handle *out);
int nvmlDeviceGetUUID(Handle device, char *out, unsigned size);
int nvmlDeviceGetMemoryInfo_v2(Handle device, void *out);
int nvmlDeviceGetTemperatureV(Handle device, void *out);
int nvmlDeviceGetPlatformInfo(Handle device, void *out);
int nvmlDeviceGetGpuFabricInfoV(Handle device, void *out);
int nvmlDeviceGetGpuInstanceProfileInfoV(Handle device, unsigned number, void *out);
int nvmlDeviceGetGpuInstanceProfileInfoByIdV(Handle device, unsigned id, void *out);
int nvmlDeviceGetGpuInstancePossiblePlacements_v2(Handle device, unsigned id, Placement *out, unsigned *count);
int nvmlDeviceGetGpuInstances(Handle device, unsigned id, Handle *out, unsigned *count);
int nvmlDeviceCreateGpuInstanceWithPlacement(Handle device, unsigned id, const Placement *place, Handle *out);
int nvmlGpuInstanceDestroy(Handle instance);
int nvmlGpuInstanceGetInfo(Handle instance, GpuInstanceInfo *out);
int nvmlGpuInstanceGetComputeInstanceProfileInfoV(Handle instance, unsigned number, unsigned engine, void *out);
int nvmlGpuInstanceCreateComputeInstance(Handle instance, unsigned id, Handle *out);
int nvmlComputeInstanceGetInfo_v2(Handle compute, ComputeInstanceInfo *out);
int nvmlComputeInstanceDestroy(Handle compute);
int nvmlDeviceGetComputeRunningProcesses_v3(Handle device, unsigned *count, ProcessInfo *out);
int nvmlDeviceGetRetiredPages(Handle device, unsigned cause, unsigned *count, unsigned long long *out);
int nvmlEventSetCreate(Handle *out);
int nvmlDeviceRegisterEvents(Handle device, unsigned long long types, Handle set);
int nvmlEventSetWait_v2(Handle set, EventData *out, unsigned timeout_ms);
int nvmlEventSetFree(Handle set);

static int wrong;
static Handle gpu;

#define EXPECT(expected, found)                                                                        \
    do {                                                                                               \
        long long expected_ = (expected), found_ = (found);                                            \
        if (expected_ == found_) break;                                                                \
        printf("line %d: %s is %lld, not %lld\n", __LINE__, #found, found_, expected_);                \
        wrong = 1;                                                                                     \
    } while (0)

static void words_are_checked(void) {
    union { unsigned version; MemoryV2 memory; Temperature heat; Platform platform; FabricV3 fabric; ProfileInfoV3 p; } it;
    for (unsigned version = 0; version < 5; version++) {
        memset(&it, 0, sizeof it);
        it.version = VERSION(MemoryV2, version);
        EXPECT(version == 2 ? SUCCESS : ARGUMENT_VERSION_MISMATCH, nvmlDeviceGetMemoryInfo_v2(gpu, &it));
        memset(&it, 0, sizeof it);
        it.version = VERSION(Temperature, version);
        EXPECT(version == 1 ? SUCCESS : ARGUMENT_VERSION_MISMATCH, nvmlDeviceGetTemperatureV(gpu, &it));
        it.version = VERSION(Platform, version);
        EXPECT(version == 1 || version == 2 ? NOT_SUPPORTED : ARGUMENT_VERSION_MISMATCH,
               nvmlDeviceGetPlatformInfo(gpu, &it));
        it.version = version == 2 ? VERSION(FabricV2, 2) : VERSION(FabricV3, version);
        EXPECT(version == 2 || version == 3 ? NOT_SUPPORTED : ARGUMENT_VERSION_MISMATCH,
               nvmlDeviceGetGpuFabricInfoV(gpu, &it)); /* the board is an A100 */
        it.version = VERSION(ProfileInfoV3, version);
        EXPECT(version == 2 || version == 3 ? SUCCESS : ARGUMENT_VERSION_MISMATCH,
               nvmlDeviceGetGpuInstanceProfileInfoV(gpu, 0, &it));
        it.version = VERSION(ProfileInfoV3, version);
        EXPECT(version == 2 || version == 3 ? SUCCESS : ARGUMENT_VERSION_MISMATCH,
               nvmlDeviceGetGpuInstanceProfileInfoByIdV(gpu, 19, &it));
    }
}

static void compute_words_are_checked(Handle instance) {
    struct { ComputeProfileInfoV3 info; unsigned guard; } it = {.guard = 0x600D};
    it.info.version = VERSION(ComputeProfileInfoV2, 2);
    it.info.capabilities = 0x600D;
    EXPECT(SUCCESS, nvmlGpuInstanceGetComputeInstanceProfileInfoV(instance, 0, 0, &it));
    EXPECT(0x600D, it.info.capabilities); /* not a byte more than v2 has */
    it.info.version = VERSION(ComputeProfileInfoV3, 3);
    EXPECT(SUCCESS, nvmlGpuInstanceGetComputeInstanceProfileInfoV(instance, 0, 0, &it));
    EXPECT(0, it.info.capabilities);
    EXPECT(0x600D, it.guard);
    it.info.version = VERSION(ComputeProfileInfoV3, 2);
    EXPECT(ARGUMENT_VERSION_MISMATCH, nvmlGpuInstanceGetComputeInstanceProfileInfoV(instance, 0, 0, &it));
}

static void null_is_no_crash(void) {
    unsigned count = 0;
    Placement place = {0, 4};
    EXPECT(INVALID_ARGUMENT, nvmlDeviceGetUUID(gpu, NULL, 96));
    EXPECT(INVALID_ARGUMENT, nvmlDeviceGetUUID(0, NULL, 96));
    EXPECT(INVALID_ARGUMENT, nvmlDeviceGetMemoryInfo_v2(gpu, NULL));
    EXPECT(INVALID_ARGUMENT, nvmlDeviceGetGpuInstanceProfileInfoV(gpu, 0, NULL));
    EXPECT(INVALID_ARGUMENT, nvmlDeviceGetGpuInstances(gpu, 9, NULL, &count));
    EXPECT(INVALID_ARGUMENT, nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 9, NULL, &gpu));
    EXPECT(INVALID_ARGUMENT, nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 9, &place, NULL));
    EXPECT(INVALID_ARGUMENT, nvmlEventSetCreate(NULL));
    EXPECT(INVALID_ARGUMENT, nvmlGpuInstanceDestroy(0));
    EXPECT(INVALID_ARGUMENT, nvmlComputeInstanceDestroy(gpu));
    EXPECT(SUCCESS, nvmlDeviceGetGpuInstancePossiblePlacements_v2(gpu, 9, NULL, &count));
    EXPECT(2, count);
    count = 0;
    EXPECT(SUCCESS, nvmlDeviceGetComputeRunningProcesses_v3(gpu, &count, NULL)); /* none: NULL is enough */
    EXPECT(0, count);
    EXPECT(NOT_SUPPORTED, nvmlDeviceGetRetiredPages(gpu, 0, &count, NULL)); /* Ampere remaps rows */
}

static void handles_end(void) {
    Placement place = {4, 4};
    Handle instance, compute, again;
    GpuInstanceInfo info;
    ComputeInstanceInfo part;
    char uuid[96];
    EXPECT(SUCCESS, nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 9, &place, &instance));
    compute_words_are_checked(instance);
    EXPECT(SUCCESS, nvmlGpuInstanceCreateComputeInstance(instance, 2, &compute));
    EXPECT(SUCCESS, nvmlComputeInstanceGetInfo_v2(compute, &part));
    EXPECT(SUCCESS, nvmlDeviceGetUUID(part.device, uuid, sizeof uuid));
    EXPECT(instance, part.gpu_instance);
    EXPECT(IN_USE, nvmlGpuInstanceDestroy(instance));
    EXPECT(SUCCESS, nvmlComputeInstanceDestroy(compute));
    EXPECT(INVALID_ARGUMENT, nvmlComputeInstanceDestroy(compute));
    EXPECT(INVALID_ARGUMENT, nvmlDeviceGetUUID(part.device, uuid, sizeof uuid));
    EXPECT(SUCCESS, nvmlGpuInstanceDestroy(instance));
    EXPECT(INVALID_ARGUMENT, nvmlGpuInstanceGetInfo(instance, &info));
    EXPECT(SUCCESS, nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 9, &place, &again));
    EXPECT(INVALID_ARGUMENT, nvmlGpuInstanceGetInfo(instance, &info)); /* the same place is not the same instance */
    EXPECT(SUCCESS, nvmlGpuInstanceDestroy(again));
}

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

static void waiting_waits(void) {
    Handle set;
    EventData event;
    EXPECT(SUCCESS, nvmlEventSetCreate(&set));
    EXPECT(SUCCESS, nvmlDeviceRegisterEvents(gpu, EVENT_XID, set));
    EXPECT(NOT_SUPPORTED, nvmlDeviceRegisterEvents(gpu, 1ULL << 60, set));
    long long before = now_ms();
    EXPECT(TIMEOUT, nvmlEventSetWait_v2(set, &event, 120));
    EXPECT(1, now_ms() - before >= 118);
    EXPECT(TIMEOUT, nvmlEventSetWait_v2(set, &event, 0));
    EXPECT(SUCCESS, nvmlEventSetFree(set));
    EXPECT(INVALID_ARGUMENT, nvmlEventSetWait_v2(set, &event, 10));
    EXPECT(INVALID_ARGUMENT, nvmlEventSetFree(set));
}

static void sessions_end(void) {
    Handle old = gpu;
    char uuid[96];
    EXPECT(SUCCESS, nvmlShutdown());
    EXPECT(UNINITIALIZED, nvmlDeviceGetUUID(gpu, uuid, sizeof uuid));
    EXPECT(SUCCESS, nvmlInitWithFlags(0));
    EXPECT(SUCCESS, nvmlDeviceGetHandleByIndex_v2(0, &gpu));
    EXPECT(INVALID_ARGUMENT, nvmlDeviceGetUUID(old, uuid, sizeof uuid));
    EXPECT(SUCCESS, nvmlDeviceGetUUID(gpu, uuid, sizeof uuid));
}

/* ---- the walk: every set once, by making instances in the order of the list ---- */

typedef struct { unsigned id; Placement place; } Choice;
static Choice choices[512];
static unsigned choice_count, states, maximal;

static void grow(unsigned first) {
    int full = 1;
    states++;
    for (unsigned i = 0; i < choice_count; i++) {
        Handle made;
        int result = nvmlDeviceCreateGpuInstanceWithPlacement(gpu, choices[i].id, &choices[i].place, &made);
        if (result == INSUFFICIENT_RESOURCES) continue;
        EXPECT(SUCCESS, result);
        if (result != SUCCESS) return;
        full = 0;
        if (i >= first) grow(i + 1);
        EXPECT(SUCCESS, nvmlGpuInstanceDestroy(made));
    }
    maximal += (unsigned)full;
}

static void walk(char **ids) {
    for (; *ids; ids++) {
        Placement places[64];
        unsigned count = 64, id = (unsigned)atoi(*ids);
        EXPECT(SUCCESS, nvmlDeviceGetGpuInstancePossiblePlacements_v2(gpu, id, places, &count));
        for (unsigned i = 0; i < count; i++) choices[choice_count++] = (Choice){id, places[i]};
    }
    grow(0);
    printf("%u %u\n", states, maximal);
}

static void churn(void) {
    Placement place = {4, 4};
    Handle instance, compute;
    printf("churning\n");
    fflush(stdout);
    for (;;) {
        if (nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 9, &place, &instance) != SUCCESS) continue;
        if (nvmlGpuInstanceCreateComputeInstance(instance, 2, &compute) == SUCCESS) nvmlComputeInstanceDestroy(compute);
        nvmlGpuInstanceDestroy(instance);
    }
}

int main(int count, char **words) {
    EXPECT(SUCCESS, nvmlInitWithFlags(0));
    EXPECT(SUCCESS, nvmlDeviceGetHandleByIndex_v2(0, &gpu));
    if (wrong || count < 2) return 1;
    if (!strcmp(words[1], "walk")) walk(words + 2);
    if (!strcmp(words[1], "churn")) churn();
    if (!strcmp(words[1], "checks")) {
        words_are_checked();
        null_is_no_crash();
        handles_end();
        waiting_waits();
        sessions_end();
    }
    return wrong;
}
