/* The state that all processes share: MIG and events, in a file beside the description. See nvml_fake.h for its form. */
#include "nvml_fake.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

State *state;

static StateFile *file;
static int descriptor = -1;
static pid_t owner; /* a fork shares our open file, and so its lock: it has to open the file itself */
static char path[4096];

static int open_file(void) {
    descriptor = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    owner = getpid();
    return descriptor >= 0;
}

static void hold_file(int operation) {
    while (descriptor >= 0 && flock(descriptor, operation) != 0 && errno == EINTR) {}
}

/* Where the file cannot be written (a read-only directory), this process has a state for itself. */
int state_open(const char *description) {
    snprintf(path, sizeof path, "%s.state", description);
    struct stat there = {0};
    int flags = MAP_SHARED;
    if (open_file()) {
        hold_file(LOCK_EX);
        if (fstat(descriptor, &there) != 0 || (there.st_size != sizeof *file && ftruncate(descriptor, 0) != 0) ||
            ftruncate(descriptor, sizeof *file) != 0)
            fprintf(stderr, "fake NVML: cannot make %s: %s\n", path, strerror(errno));
    } else {
        fprintf(stderr, "fake NVML: %s is not shared: %s\n", path, strerror(errno));
        flags = MAP_PRIVATE | MAP_ANONYMOUS;
    }
    file = mmap(NULL, sizeof *file, PROT_READ | PROT_WRITE, flags, descriptor, 0);
    if (file == MAP_FAILED) {
        file = NULL;
        state_close();
        return 0;
    }
    if (file->magic != STATE_MAGIC || file->size != sizeof *file) {
        memset(&file->copies[0], 0, sizeof file->copies[0]);
        file->turn = 0;
        file->size = sizeof *file;
        __atomic_store_n(&file->magic, STATE_MAGIC, __ATOMIC_RELEASE);
    }
    state = &file->copies[file->turn & 1];
    return 1;
}

void state_close(void) {
    if (file) munmap(file, sizeof *file);
    if (descriptor >= 0) close(descriptor); /* drops the lock */
    file = NULL;
    state = NULL;
    descriptor = -1;
}

void state_lock(void) {
    if (!file) return;
    if (descriptor >= 0 && owner != getpid()) {
        close(descriptor);
        open_file();
    }
    hold_file(LOCK_EX);
    state = &file->copies[file->turn & 1];
}

void state_unlock(void) {
    if (file) hold_file(LOCK_UN);
}

void begin_change(void) {
    State *other = &file->copies[(file->turn + 1) & 1];
    const State *now = &file->copies[file->turn & 1];
    memcpy(other, now, offsetof(State, gpus) + now->gpu_count * sizeof *now->gpus);
    state = other;
}

void commit(void) { __atomic_fetch_add(&file->turn, 1, __ATOMIC_SEQ_CST); }

void push_event(unsigned gpu, unsigned type, uint64_t data, unsigned gi, unsigned ci) {
    state->events[++state->sequence % MAX_EVENTS] = (Event){state->sequence, gpu, type, data, gi, ci};
}

int counted_out(uint64_t rule, uint64_t times) {
    if (!rule || !times) return 0;
    uint64_t slot = rule % MAX_COUNTED;
    uint64_t before = state->counted[slot].rule == rule ? state->counted[slot].times : 0;
    if (before >= times) return 1;
    begin_change();
    state->counted[slot].rule = rule;
    state->counted[slot].times = before + 1;
    commit();
    return 0;
}

/* ---- following the description ---- */

static GpuState *by_uuid(State *among, const char *uuid) {
    for (unsigned i = 0; i < among->gpu_count; i++)
        if (!strcmp(among->gpus[i].uuid, uuid)) return &among->gpus[i];
    return NULL;
}

/* What is the same before and after keeps its generation, and so its handle. */
static void keep_generations(GpuState *fresh, const GpuState *old) {
    fresh->generation = old && old->mig_current == fresh->mig_current ? old->generation : ++state->next_generation;
    for (unsigned i = 0; i < fresh->instance_count; i++) {
        Instance *now = &fresh->instances[i];
        now->generation = 0;
        for (unsigned j = 0; old && j < old->instance_count; j++) {
            const Instance *was = &old->instances[j];
            if (was->id == now->id && was->profile_id == now->profile_id && was->start == now->start)
                now->generation = was->generation;
        }
        if (!now->generation) now->generation = ++state->next_generation;
    }
    for (unsigned i = 0; i < fresh->compute_count; i++) {
        Compute *now = &fresh->computes[i];
        now->generation = 0;
        for (unsigned j = 0; old && j < old->compute_count; j++)
            if (!strcmp(old->computes[j].uuid, now->uuid)) now->generation = old->computes[j].generation;
        if (!now->generation) now->generation = ++state->next_generation;
    }
}

static int follows(const Node *node) {
    if (state->gpu_count != node->gpu_count) return 0;
    for (unsigned i = 0; i < node->gpu_count; i++)
        if (strcmp(state->gpus[i].uuid, node->gpus[i].uuid) || state->gpus[i].described != node->gpus[i].mig_described)
            return 0;
    return 1;
}

/* GPUs keep their state by UUID. Where the lines about MIG are others than before, an operator has been here. */
static void take_described(const Node *node) {
    State *before = malloc(sizeof *before);
    if (!before) abort();
    memcpy(before, state, sizeof *before);
    begin_change();
    state->gpu_count = node->gpu_count;
    for (unsigned i = 0; i < node->gpu_count; i++) {
        const Gpu *gpu = &node->gpus[i];
        const GpuState *old = by_uuid(before, gpu->uuid);
        if (old && old->described == gpu->mig_described) {
            state->gpus[i] = *old;
            continue;
        }
        state->gpus[i] = gpu->described;
        snprintf(state->gpus[i].uuid, sizeof state->gpus[i].uuid, "%s", gpu->uuid);
        state->gpus[i].described = gpu->mig_described;
        keep_generations(&state->gpus[i], old);
    }
    commit();
    free(before);
}

/* ---- carrying out the control file's acts, each once ---- */

/* Ampere keeps the mode over a reboot and takes the pending one; Hopper and later forget it at a reboot. */
static void reset(const Node *node, unsigned index, int reboot) {
    GpuState *mig = &state->gpus[index];
    int forgets = reboot && node->gpus[index].architecture >= HOPPER;
    mig->mig_current = mig->mig_pending = forgets ? 0 : mig->mig_pending;
    mig->instance_count = mig->compute_count = 0;
    mig->generation = ++state->next_generation;
}

static void carry_out(const Node *node, const Act *act) {
    if (act->what == 'e') push_event(act->gpu, act->type, act->data, act->gi, act->ci);
    if (act->what == 'r') reset(node, act->gpu, 0);
    if (act->what == 'b') {
        state->boots++;
        for (unsigned i = 0; i < node->gpu_count; i++) reset(node, i, 1);
    }
}

void state_follow(const Node *node) {
    if (!follows(node)) take_described(node);
    for (unsigned i = 0; i < node->act_count; i++) {
        const Act *act = &node->acts[i];
        if (act->number <= state->acted) continue;
        begin_change();
        state->acted = act->number;
        carry_out(node, act);
        commit();
    }
}
