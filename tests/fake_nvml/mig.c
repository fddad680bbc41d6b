/* MIG: mode, GPU instances, compute instances, MIG devices. What exists is in the state that all processes share. */
#include "nvml_fake.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

Profile *profile_by_id(Gpu *gpu, unsigned id) {
    for (unsigned i = 0; i < gpu->profile_count; i++)
        if (gpu->profiles[i].info.id == id) return &gpu->profiles[i];
    return NULL;
}

Instance *instance_by_id(GpuState *mig, unsigned id) {
    for (unsigned i = 0; i < mig->instance_count; i++)
        if (mig->instances[i].id == id) return &mig->instances[i];
    return NULL;
}

unsigned first_compute(const GpuState *mig, unsigned gi) {
    unsigned first = NO_INSTANCE;
    for (unsigned i = 0; i < mig->compute_count; i++)
        if (mig->computes[i].gi == gi && mig->computes[i].id < first) first = mig->computes[i].id;
    return first;
}

/* ---- who uses what ---- */

static int placed_gi(const GpuState *mig, const PlacedProcess *placed) {
    for (unsigned i = 0; i < mig->instance_count; i++) {
        const Instance *instance = &mig->instances[i];
        if ((int)instance->profile_id == placed->profile_id && instance->start == placed->start)
            return (int)instance->id;
    }
    return NO_ID;
}

/* `out` has room for 2 * MAX_PROCESSES; `kind` 0 for all. One that is named by a place where nothing is, is not. */
unsigned processes_of(unsigned gpu, char kind, Process *out) {
    unsigned found = 0;
    const Gpu *described = &node->gpus[gpu];
    for (unsigned i = 0; i < described->process_count; i++)
        if (!kind || described->processes[i].kind == kind) out[found++] = described->processes[i];
    for (unsigned i = 0; i < node->placed_count; i++) {
        const PlacedProcess *placed = &node->placed[i];
        if (placed->gpu != gpu || (kind && placed->process.kind != kind)) continue;
        Process process = placed->process;
        process.gi = placed->profile_id == NO_ID ? NO_ID : placed_gi(&state->gpus[gpu], placed);
        if (placed->profile_id == NO_ID || process.gi != NO_ID) out[found++] = process;
    }
    return found;
}

/* Whether a process is on the GPU, or in this of its instances. */
static int in_use(unsigned gpu, int gi) {
    Process processes[2 * MAX_PROCESSES];
    unsigned count = processes_of(gpu, 0, processes);
    for (unsigned i = 0; i < count; i++)
        if (gi == NO_ID || processes[i].gi == gi) return 1;
    return 0;
}

static int refused(char what, unsigned gpu, unsigned profile_id, unsigned start) {
    for (unsigned i = 0; i < node->refusal_count; i++) {
        const Refusal *r = &node->refusals[i];
        if (r->what == what && r->gpu == gpu && r->profile_id == (int)profile_id && r->start == start &&
            !counted_out(r->id, r->times))
            return r->code;
    }
    return SUCCESS;
}

/* ---- mode ---- */

API nvmlDeviceGetMigMode(uint64_t device, unsigned *current, unsigned *pending) {
    ENTER();
    PHYSICAL();
    WANT(current && pending);
    if (!at.gpu->mig_capable) return NOT_SUPPORTED;
    *current = at.mig->mig_current;
    *pending = at.mig->mig_pending;
    return SUCCESS;
}

/* Hopper and later change at once, and every handle of the GPU ends; Ampere waits for a reset; a GPU in use waits. */
API nvmlDeviceSetMigMode(uint64_t device, unsigned mode, unsigned *status) {
    ENTER();
    PHYSICAL();
    WANT(status && mode <= 1);
    if (!at.gpu->mig_capable) return NOT_SUPPORTED;
    CONFIGURING();
    if (!mode && at.mig->instance_count) return IN_USE;
    int changes = at.mig->mig_current != mode;
    *status = SUCCESS;
    if (changes && in_use(at.index, NO_ID)) *status = IN_USE;
    else if (changes && at.gpu->architecture < HOPPER) *status = RESET_REQUIRED;
    begin_change();
    look_again(&at);
    at.mig->mig_pending = mode;
    if (changes && *status == SUCCESS) {
        at.mig->mig_current = mode;
        at.mig->generation = ++state->next_generation;
        push_event(at.index, EVENT_MIG_CONFIG, mode, NO_INSTANCE, NO_INSTANCE);
    }
    commit();
    return SUCCESS;
}

/* ---- GPU instance profiles ---- */

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

static int profile_of(const Target *at, unsigned number, Profile **out) {
    WANT(number < PROFILE_ENUMS);
    if (!at->gpu->mig_capable || (!at->mig->mig_current && at->gpu->profiles_need_mig)) return NOT_SUPPORTED;
    for (unsigned i = 0; i < at->gpu->profile_count; i++)
        if (at->gpu->profiles[i].number == number) *out = &at->gpu->profiles[i];
    return *out ? SUCCESS : NOT_SUPPORTED;
}

/* By NVML's enum. Enums the product lacks are NOT_SUPPORTED, past the last enum is INVALID_ARGUMENT. */
API nvmlDeviceGetGpuInstanceProfileInfoV(uint64_t device, unsigned number, void *out) {
    ENTER();
    PHYSICAL();
    Profile *profile = NULL;
    WANT(out);
    TRY(profile_of(&at, number, &profile));
    return put_profile(profile, out);
}

API nvmlDeviceGetGpuInstanceProfileInfo(uint64_t device, unsigned number, ProfileInfoV1 *out) {
    ENTER();
    PHYSICAL();
    Profile *profile = NULL;
    WANT(out);
    TRY(profile_of(&at, number, &profile));
    const ProfileInfoV2 *i = &profile->info;
    *out = (ProfileInfoV1){i->id, i->p2p, i->slices, i->instances, i->sm, i->copy, i->decoder, i->encoder, i->jpeg,
                           i->ofa, i->memory_mib};
    return SUCCESS;
}

/* By hardware id, as every call below. */
API nvmlDeviceGetGpuInstanceProfileInfoByIdV(uint64_t device, unsigned id, void *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (!at.gpu->mig_capable || (!at.mig->mig_current && at.gpu->profiles_need_mig)) return NOT_SUPPORTED;
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

/* ---- room ---- */

/* What is taken of a board: units as a bit set, compute slices, engines. */
typedef struct { uint64_t units; int slices, engines[4]; } Taken;

static void take(Taken *taken, const ProfileInfoV2 *info, unsigned start, unsigned size) {
    const unsigned uses[4] = {info->decoder, info->encoder, info->jpeg, info->ofa};
    taken->units |= ((1ULL << size) - 1) << start;
    taken->slices += (int)info->slices;
    for (int i = 0; i < 4; i++) taken->engines[i] += (int)uses[i];
}

static Taken taken_on(const Target *at) {
    Taken taken = {0};
    for (unsigned i = 0; i < at->mig->instance_count; i++) {
        const Instance *instance = &at->mig->instances[i];
        const Profile *profile = profile_by_id(at->gpu, instance->profile_id);
        if (profile) take(&taken, &profile->info, instance->start, instance->size);
    }
    return taken;
}

static int has_room(const Gpu *gpu, const Taken *taken, const Profile *profile, Placement place) {
    uint64_t units = ((1ULL << place.size) - 1) << place.start;
    Taken then = *taken;
    take(&then, &profile->info, place.start, place.size);
    if (taken->units & units) return 0;
    if (gpu->board_units >= 0 && place.start + place.size > (unsigned)gpu->board_units) return 0;
    if (gpu->board_slices >= 0 && then.slices > gpu->board_slices) return 0;
    for (int i = 0; i < 4; i++)
        if (gpu->board_engines[i] >= 0 && then.engines[i] > gpu->board_engines[i]) return 0;
    return 1;
}

/* How many more of this profile could be made now. Profiles share the room: the counts do not add up. */
API nvmlDeviceGetGpuInstanceRemainingCapacity(uint64_t device, unsigned id, unsigned *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (!at.mig->mig_current) return NOT_SUPPORTED;
    PRIVILEGED();
    Profile *profile = profile_by_id(at.gpu, id);
    WANT(profile);
    Taken taken = taken_on(&at);
    *out = 0;
    for (unsigned i = 0; i < profile->placement_count; i++) {
        if (!has_room(at.gpu, &taken, profile, profile->placements[i])) continue;
        take(&taken, &profile->info, profile->placements[i].start, profile->placements[i].size);
        ++*out;
    }
    return SUCCESS;
}

/* ---- making and removing GPU instances ---- */

static unsigned free_instance_id(GpuState *mig) {
    unsigned id = 1;
    while (instance_by_id(mig, id)) id++;
    return id;
}

static int make_instance(Target *at, const Profile *profile, Placement place, uint64_t *out) {
    if (at->mig->instance_count == MAX_INSTANCES) return INSUFFICIENT_RESOURCES;
    TRY(refused('m', at->index, profile->info.id, place.start));
    begin_change();
    look_again(at);
    Instance made = {.id = free_instance_id(at->mig), .profile_id = profile->info.id, .start = place.start,
                     .size = place.size, .generation = ++state->next_generation};
    snprintf(made.profile, sizeof made.profile, "%.43s", profile->info.name + 4);
    at->mig->instances[at->mig->instance_count++] = made;
    commit();
    *out = handle_of(KIND_GPU_INSTANCE, at->index, made.generation);
    return SUCCESS;
}

static int may_make(const Target *at, unsigned id, Profile **profile) {
    if (!at->mig->mig_current) return NOT_SUPPORTED;
    CONFIGURING();
    *profile = profile_by_id(at->gpu, id);
    WANT(*profile);
    return SUCCESS;
}

/* The driver chooses the highest place that is free, whatever that leaves for others (hardware.md 1.4). */
API nvmlDeviceCreateGpuInstance(uint64_t device, unsigned id, uint64_t *out) {
    ENTER();
    PHYSICAL();
    Profile *profile;
    WANT(out);
    TRY(may_make(&at, id, &profile));
    Taken taken = taken_on(&at);
    const Placement *best = NULL;
    for (unsigned i = 0; i < profile->placement_count; i++) {
        const Placement *place = &profile->placements[i];
        if (has_room(at.gpu, &taken, profile, *place) && (!best || place->start > best->start)) best = place;
    }
    return best ? make_instance(&at, profile, *best, out) : INSUFFICIENT_RESOURCES;
}

/* A place that the profile does not list is INVALID_ARGUMENT; one that is taken, INSUFFICIENT_RESOURCES. */
API nvmlDeviceCreateGpuInstanceWithPlacement(uint64_t device, unsigned id, const Placement *place, uint64_t *out) {
    ENTER();
    PHYSICAL();
    Profile *profile;
    WANT(out && place);
    TRY(may_make(&at, id, &profile));
    int listed = 0;
    for (unsigned i = 0; i < profile->placement_count; i++)
        listed |= profile->placements[i].start == place->start && profile->placements[i].size == place->size;
    WANT(listed);
    Taken taken = taken_on(&at);
    if (!has_room(at.gpu, &taken, profile, *place)) return INSUFFICIENT_RESOURCES;
    return make_instance(&at, profile, *place, out);
}

API nvmlGpuInstanceDestroy(uint64_t instance) {
    ENTER();
    TARGET(instance, KIND_GPU_INSTANCE);
    CONFIGURING();
    if (first_compute(at.mig, at.instance->id) != NO_INSTANCE || in_use(at.index, (int)at.instance->id)) return IN_USE;
    TRY(refused('r', at.index, at.instance->profile_id, at.instance->start));
    begin_change();
    look_again(&at);
    unsigned place = (unsigned)(at.instance - at.mig->instances), last = --at.mig->instance_count;
    memmove(at.instance, at.instance + 1, (last - place) * sizeof *at.instance);
    commit();
    return SUCCESS;
}

/* ---- looking at GPU instances ---- */

/* Writes the count; the caller's array has room for the profile's `instances`. */
API nvmlDeviceGetGpuInstances(uint64_t device, unsigned id, uint64_t *out, unsigned *count) {
    ENTER();
    PHYSICAL();
    WANT(out && count);
    if (!at.mig->mig_current) return NOT_SUPPORTED;
    PRIVILEGED();
    WANT(profile_by_id(at.gpu, id));
    *count = 0;
    for (unsigned i = 0; i < at.mig->instance_count; i++)
        if (at.mig->instances[i].profile_id == id)
            out[(*count)++] = handle_of(KIND_GPU_INSTANCE, at.index, at.mig->instances[i].generation);
    return SUCCESS;
}

API nvmlDeviceGetGpuInstanceById(uint64_t device, unsigned id, uint64_t *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (!at.mig->mig_current) return NOT_SUPPORTED;
    PRIVILEGED();
    Instance *instance = instance_by_id(at.mig, id);
    if (!instance) return NOT_FOUND;
    *out = handle_of(KIND_GPU_INSTANCE, at.index, instance->generation);
    return SUCCESS;
}

API nvmlGpuInstanceGetInfo(uint64_t instance, GpuInstanceInfo *out) {
    ENTER();
    TARGET(instance, KIND_GPU_INSTANCE);
    WANT(out);
    PRIVILEGED();
    *out = (GpuInstanceInfo){.device = handle_of(KIND_GPU, at.index, at.mig->generation), .id = at.instance->id,
                             .profile_id = at.instance->profile_id,
                             .placement = {at.instance->start, at.instance->size}};
    return SUCCESS;
}

/* ---- compute instance profiles: their ids are NVML's enum (1, 2, 3, 4, 7 slices are 0 to 4) ---- */

static const unsigned COMPUTE_SLICES[] = {1, 2, 3, 4, 7};
enum { COMPUTE_PROFILES = 5 };

/* 3 slices of a 4g are not offered (mig-profiles.json: it differs between tables; A100's is taken). */
static int offers(unsigned slices, unsigned number) {
    return number < COMPUTE_PROFILES && COMPUTE_SLICES[number] <= slices && !(slices == 4 && number == 2);
}

static unsigned compute_profile_of(unsigned slices) {
    unsigned number = 0;
    while (number < COMPUTE_PROFILES - 1 && COMPUTE_SLICES[number] != slices) number++;
    return number;
}

static unsigned slices_of(const Target *at) {
    const Profile *profile = profile_by_id(at->gpu, at->instance->profile_id);
    return profile ? profile->info.slices : 0;
}

static int compute_profile(const Target *at, unsigned number, unsigned engine, ComputeProfileInfoV3 *out) {
    WANT(number < COMPUTE_ENUMS && engine == 0);
    const Profile *profile = profile_by_id(at->gpu, at->instance->profile_id);
    if (!profile || !offers(profile->info.slices, number)) return NOT_SUPPORTED;
    const ProfileInfoV2 *whole = &profile->info;
    unsigned slices = COMPUTE_SLICES[number];
    *out = (ComputeProfileInfoV3){.id = number, .slices = slices, .instances = whole->slices / slices,
                                  .sm = whole->sm / whole->slices * slices, .copy = whole->copy,
                                  .decoder = whole->decoder, .encoder = whole->encoder, .jpeg = whole->jpeg,
                                  .ofa = whole->ofa};
    if (slices == whole->slices) snprintf(out->name, sizeof out->name, "%s", whole->name);
    else snprintf(out->name, sizeof out->name, "MIG %uc.%.80s", slices, whole->name + 4);
    return SUCCESS;
}

API nvmlGpuInstanceGetComputeInstanceProfileInfoV(uint64_t instance, unsigned number, unsigned engine, void *out) {
    ENTER();
    TARGET(instance, KIND_GPU_INSTANCE);
    WANT(out);
    unsigned version = *(unsigned *)out;
    ComputeProfileInfoV3 info;
    if (version != VERSION(ComputeProfileInfoV2, 2) && version != VERSION(ComputeProfileInfoV3, 3))
        return ARGUMENT_VERSION_MISMATCH;
    TRY(compute_profile(&at, number, engine, &info));
    info.version = version;
    memcpy(out, &info, version & 0xFFFFFF); /* v3 is v2 with a field more at the end */
    return SUCCESS;
}

API nvmlGpuInstanceGetComputeInstanceProfileInfo(uint64_t instance, unsigned number, unsigned engine,
                                                 ComputeProfileInfoV1 *out) {
    ENTER();
    TARGET(instance, KIND_GPU_INSTANCE);
    WANT(out);
    ComputeProfileInfoV3 info;
    TRY(compute_profile(&at, number, engine, &info));
    memcpy(out, &info.id, sizeof *out); /* v1 has neither version nor name */
    return SUCCESS;
}

/* ---- room within a GPU instance ---- */

/* The n-th start of so many slices in a GPU instance: any slice, every second, every fourth. */
static int compute_start(unsigned whole, unsigned slices, unsigned n, unsigned *start) {
    *start = n * (slices == 1 ? 1 : slices == 2 ? 2 : 4);
    return *start + slices <= whole;
}

static unsigned slices_taken(const Target *at) {
    unsigned taken = 0;
    for (unsigned i = 0; i < at->mig->compute_count; i++) {
        const Compute *compute = &at->mig->computes[i];
        if (compute->gi == at->instance->id) taken |= ((1u << compute->slices) - 1) << compute->start;
    }
    return taken;
}

API nvmlGpuInstanceGetComputeInstancePossiblePlacements(uint64_t instance, unsigned id, Placement *out,
                                                        unsigned *count) {
    ENTER();
    TARGET(instance, KIND_GPU_INSTANCE);
    WANT(count);
    PRIVILEGED();
    if (!offers(slices_of(&at), id)) return NOT_SUPPORTED;
    unsigned slices = COMPUTE_SLICES[id], found = 0, start;
    while (compute_start(slices_of(&at), slices, found, &start)) found++;
    if (out && *count < found) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; out && i < found; i++) {
        compute_start(slices_of(&at), slices, i, &start);
        out[i] = (Placement){start, slices};
    }
    *count = found;
    return SUCCESS;
}

API nvmlGpuInstanceGetComputeInstanceRemainingCapacity(uint64_t instance, unsigned id, unsigned *out) {
    ENTER();
    TARGET(instance, KIND_GPU_INSTANCE);
    WANT(out);
    PRIVILEGED();
    if (!offers(slices_of(&at), id)) return NOT_SUPPORTED;
    unsigned taken = slices_taken(&at), slices = COMPUTE_SLICES[id], start;
    *out = 0;
    for (unsigned n = 0; compute_start(slices_of(&at), slices, n, &start); n++)
        *out += !(taken & ((1u << slices) - 1) << start);
    return SUCCESS;
}

/* ---- making and removing compute instances ---- */

static unsigned free_number(const GpuState *mig, unsigned gi) {
    for (unsigned number = 0;; number++) {
        int taken = 0;
        for (unsigned i = 0; i < mig->compute_count; i++) {
            const Compute *compute = &mig->computes[i];
            taken |= gi == NO_INSTANCE ? compute->mig_index == number : compute->gi == gi && compute->id == number;
        }
        if (!taken) return number;
    }
}

/* Random, so that an instance made anew at the same place is another MIG device. */
static void fresh_uuid(char *out, unsigned size) {
    unsigned char r[16];
    if (getrandom(r, sizeof r, 0) != sizeof r) abort();
    snprintf(out, size, "MIG-%02x%02x%02x%02x-%02x%02x-4%x%02x-a%x%02x-%02x%02x%02x%02x%02x%02x", r[0], r[1], r[2], r[3],
             r[4], r[5], r[6] & 15, r[7], r[8] & 15, r[9], r[10], r[11], r[12], r[13], r[14], r[15]);
}

static int make_compute(Target *at, unsigned slices, unsigned start, uint64_t *out) {
    if (at->mig->compute_count == MAX_COMPUTES) return INSUFFICIENT_RESOURCES;
    begin_change();
    look_again(at);
    Compute made = {.gi = at->instance->id, .id = free_number(at->mig, at->instance->id), .slices = slices, .start = start,
                    .mig_index = free_number(at->mig, NO_INSTANCE), .generation = ++state->next_generation};
    fresh_uuid(made.uuid, sizeof made.uuid);
    at->mig->computes[at->mig->compute_count++] = made;
    commit();
    *out = handle_of(KIND_COMPUTE_INSTANCE, at->index, made.generation);
    return SUCCESS;
}

/* With a place: there or not at all; without: the lowest that is free. */
static int create_compute(const char *symbol, uint64_t handle, unsigned id, const Placement *place, uint64_t *out) {
    Target at;
    TRY(enter(symbol));
    TRY(resolve(symbol, handle, KIND_GPU_INSTANCE, &at));
    WANT(out);
    CONFIGURING();
    if (!offers(slices_of(&at), id)) return NOT_SUPPORTED;
    unsigned taken = slices_taken(&at), slices = COMPUTE_SLICES[id], start;
    int listed = 0;
    for (unsigned n = 0; compute_start(slices_of(&at), slices, n, &start); n++) {
        if (place && (place->start != start || place->size != slices)) continue;
        listed = 1;
        if (!(taken & ((1u << slices) - 1) << start)) return make_compute(&at, slices, start, out);
    }
    return listed ? INSUFFICIENT_RESOURCES : INVALID_ARGUMENT;
}

API nvmlGpuInstanceCreateComputeInstance(uint64_t instance, unsigned id, uint64_t *out) {
    LOCKED;
    return create_compute(__func__, instance, id, NULL, out);
}

API nvmlGpuInstanceCreateComputeInstanceWithPlacement(uint64_t instance, unsigned id, const Placement *place,
                                                      uint64_t *out) {
    LOCKED;
    WANT(place);
    return create_compute(__func__, instance, id, place, out);
}

/* Processes are in the first compute instance of their GPU instance. */
API nvmlComputeInstanceDestroy(uint64_t compute) {
    ENTER();
    TARGET(compute, KIND_COMPUTE_INSTANCE);
    CONFIGURING();
    unsigned gi = at.instance->id;
    if (first_compute(at.mig, gi) == at.compute->id && in_use(at.index, (int)gi)) return IN_USE;
    TRY(refused('r', at.index, at.instance->profile_id, at.instance->start));
    begin_change();
    look_again(&at);
    unsigned place = (unsigned)(at.compute - at.mig->computes), last = --at.mig->compute_count;
    memmove(at.compute, at.compute + 1, (last - place) * sizeof *at.compute);
    commit();
    return SUCCESS;
}

/* ---- looking at compute instances ---- */

API nvmlGpuInstanceGetComputeInstances(uint64_t instance, unsigned id, uint64_t *out, unsigned *count) {
    ENTER();
    TARGET(instance, KIND_GPU_INSTANCE);
    WANT(out && count);
    PRIVILEGED();
    if (!offers(slices_of(&at), id)) return NOT_SUPPORTED;
    *count = 0;
    for (unsigned i = 0; i < at.mig->compute_count; i++) {
        const Compute *compute = &at.mig->computes[i];
        if (compute->gi == at.instance->id && compute->slices == COMPUTE_SLICES[id])
            out[(*count)++] = handle_of(KIND_COMPUTE_INSTANCE, at.index, compute->generation);
    }
    return SUCCESS;
}

API nvmlGpuInstanceGetComputeInstanceById(uint64_t instance, unsigned id, uint64_t *out) {
    ENTER();
    TARGET(instance, KIND_GPU_INSTANCE);
    WANT(out);
    PRIVILEGED();
    for (unsigned i = 0; i < at.mig->compute_count; i++) {
        const Compute *compute = &at.mig->computes[i];
        if (compute->gi != at.instance->id || compute->id != id) continue;
        *out = handle_of(KIND_COMPUTE_INSTANCE, at.index, compute->generation);
        return SUCCESS;
    }
    return NOT_FOUND;
}

API nvmlComputeInstanceGetInfo_v2(uint64_t compute, ComputeInstanceInfo *out) {
    ENTER();
    TARGET(compute, KIND_COMPUTE_INSTANCE);
    WANT(out);
    PRIVILEGED();
    *out = (ComputeInstanceInfo){.device = handle_of(KIND_MIG_DEVICE, at.index, at.compute->generation),
                                 .gpu_instance = handle_of(KIND_GPU_INSTANCE, at.index, at.instance->generation),
                                 .id = at.compute->id, .profile_id = compute_profile_of(at.compute->slices),
                                 .placement = {at.compute->start, at.compute->slices}};
    return SUCCESS;
}

/* ---- MIG devices: one per compute instance, for everyone to see ---- */

API nvmlDeviceGetMaxMigDeviceCount(uint64_t device, unsigned *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (!at.gpu->mig_capable) return NOT_SUPPORTED;
    *out = 0;
    for (unsigned i = 0; at.mig->mig_current && i < at.gpu->profile_count; i++)
        if (at.gpu->profiles[i].info.instances > *out) *out = at.gpu->profiles[i].info.instances;
    return SUCCESS;
}

/* Indices may have holes: NOT_FOUND, and the next may be there. */
API nvmlDeviceGetMigDeviceHandleByIndex(uint64_t device, unsigned index, uint64_t *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    if (!at.mig->mig_current) return NOT_SUPPORTED;
    for (unsigned i = 0; i < at.mig->compute_count; i++)
        if (at.mig->computes[i].mig_index == index) {
            *out = handle_of(KIND_MIG_DEVICE, at.index, at.mig->computes[i].generation);
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
    *out = handle_of(KIND_GPU, at.index, at.mig->generation);
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
