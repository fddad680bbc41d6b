/* Event sets. The state numbers events; each set remembers up to which number it has given them out. */
#include "nvml_fake.h"

#include <string.h>
#include <time.h>

enum { MAX_SETS = 32, LOOK_EVERY_MS = 50 };

/* id 0: free. `wanted` are the types registered for each GPU, `since` the last event before that. */
typedef struct { unsigned id; uint64_t seen; uint64_t wanted[MAX_GPUS], since[MAX_GPUS]; } EventSet;

static EventSet sets[MAX_SETS];
static unsigned last_id;

void events_forget(void) { memset(sets, 0, sizeof sets); }

static EventSet *set_of(uint64_t handle) {
    unsigned id;
    if (!handle_is(handle, KIND_EVENT_SET, &id) || !id) return NULL;
    for (unsigned i = 0; i < MAX_SETS; i++)
        if (sets[i].id == id) return &sets[i];
    return NULL;
}

API nvmlEventSetCreate(uint64_t *out) {
    ENTER();
    WANT(out);
    for (unsigned i = 0; i < MAX_SETS; i++) {
        if (sets[i].id) continue;
        sets[i] = (EventSet){.id = ++last_id, .seen = state->sequence};
        *out = handle_of(KIND_EVENT_SET, 0, sets[i].id);
        return SUCCESS;
    }
    return INSUFFICIENT_RESOURCES;
}

API nvmlEventSetFree(uint64_t set) {
    ENTER();
    EventSet *found = set_of(set);
    WANT(found);
    found->id = 0;
    return SUCCESS;
}

/* SBE, DBE, P-state, XID, clock; MIG configuration where there is MIG; from Hopper on DRAM retirement and poison,
 * from Blackwell on GPU unavailable and recovery action (which boards have which is a guess). */
static uint64_t supported(const Gpu *gpu) {
    return 0x1F | (gpu->mig_capable ? EVENT_MIG_CONFIG : 0) | (gpu->architecture >= HOPPER ? 0x3C00 : 0) |
           (gpu->architecture >= BLACKWELL ? 0xC000 : 0);
}

API nvmlDeviceGetSupportedEventTypes(uint64_t device, unsigned long long *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    *out = supported(at.gpu);
    return SUCCESS;
}

API nvmlDeviceRegisterEvents(uint64_t device, unsigned long long types, uint64_t set) {
    ENTER();
    PHYSICAL();
    EventSet *found = set_of(set);
    WANT(found && types);
    if (types & ~supported(at.gpu)) return NOT_SUPPORTED;
    if (!found->wanted[at.index]) found->since[at.index] = state->sequence;
    found->wanted[at.index] |= types;
    return SUCCESS;
}

/* The first event that the set waits for and has not given out; what it passes over is gone for it. */
static int next_event(EventSet *set, EventData *out) {
    uint64_t oldest = state->sequence > MAX_EVENTS ? state->sequence - MAX_EVENTS : 0;
    if (set->seen < oldest) set->seen = oldest;
    while (set->seen < state->sequence) {
        const Event *event = &state->events[++set->seen % MAX_EVENTS];
        if (event->gpu >= node->gpu_count || !(set->wanted[event->gpu] & event->type)) continue;
        if (event->sequence <= set->since[event->gpu]) continue;
        *out = (EventData){handle_of(KIND_GPU, event->gpu, state->gpus[event->gpu].generation), event->type, event->data,
                           event->gi, event->ci};
        return 1;
    }
    return 0;
}

static int look(const char *symbol, uint64_t set, EventData *out, int first) {
    LOCKED;
    TRY(enter(first ? symbol : "looking for events")); /* counted, delayed and refused once, not at each look */
    EventSet *found = set_of(set);
    WANT(found && out);
    return next_event(found, out) ? SUCCESS : TIMEOUT;
}

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Holds nothing while it waits. */
API nvmlEventSetWait_v2(uint64_t set, EventData *out, unsigned timeout_ms) {
    long long end = now_ms() + timeout_ms;
    for (int first = 1;; first = 0) {
        int result = look(__func__, set, out, first);
        long long left = end - now_ms();
        if (result != TIMEOUT || left <= 0) return result;
        sleep_ms(left < LOOK_EVERY_MS ? (long)left : LOOK_EVERY_MS);
    }
}
