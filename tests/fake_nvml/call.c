/* What every call does first: hold the state, follow the files, apply delays and failures; and what handles are.
 *
 * Handles are numbers, never addresses. What is gone, or was never there, or is of another session, is
 * INVALID_ARGUMENT and cannot crash the caller.
 *
 *      63      56 55    48 47            40 39       32 31                    0
 *     +----------+--------+----------------+-----------+-----------------------+
 *     |   0x5A   |  kind  | index of a GPU |  session  |      generation       |
 *     +----------+--------+----------------+-----------+-----------------------+
 */
#include "nvml_fake.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

Node *node;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static unsigned references; /* nvmlInit and nvmlShutdown are counted */
static unsigned session;
static char description[4000], control[4096];
static struct stat described, controlled; /* the files as last read */
static int dying;                         /* the call that is running is this process's last */

/* ---- counting, for tests ---- */

typedef struct { const char *symbol; unsigned long calls; } Counter;
static Counter counters[256];

static void count(const char *symbol) {
    for (unsigned i = 0; i < sizeof counters / sizeof *counters; i++) {
        if (!counters[i].symbol) counters[i].symbol = symbol;
        if (strcmp(counters[i].symbol, symbol) == 0) {
            counters[i].calls++;
            return;
        }
    }
}

/* Not NVML's: how often a symbol was called in this process. */
__attribute__((visibility("default"))) unsigned long fake_nvml_calls(const char *symbol) {
    for (unsigned i = 0; i < sizeof counters / sizeof *counters && counters[i].symbol; i++)
        if (strcmp(counters[i].symbol, symbol) == 0) return counters[i].calls;
    return 0;
}

/* ---- the lock: this process's threads, then all processes of the node ---- */

int lock(void) {
    pthread_mutex_lock(&mutex);
    state_lock();
    return 1;
}

void unlock(const int *locked) {
    (void)locked;
    if (dying) _exit(137); /* as after SIGKILL: what was committed stays, nothing is answered */
    state_unlock();
    pthread_mutex_unlock(&mutex);
}

void sleep_ms(long ms) {
    struct timespec left = {ms / 1000, (ms % 1000) * 1000000L};
    while (nanosleep(&left, &left) != 0) {}
}

/* ---- following the description and the control file ---- */

static int same_file(const struct stat *a, const struct stat *b) {
    return a->st_ino == b->st_ino && a->st_size == b->st_size && a->st_mtim.tv_sec == b->st_mtim.tv_sec &&
           a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

static Node *read_both(int with_control) {
    Node *fresh = node_read(description);
    if (fresh && with_control && !control_read(fresh, control)) {
        free(fresh);
        return NULL;
    }
    return fresh;
}

/* Read the files if one is new. What was read before stays where the new one cannot be understood. */
static int follow(void) {
    struct stat now, faults;
    if (stat(description, &now) != 0) return node ? SUCCESS : DRIVER_NOT_LOADED;
    if (stat(control, &faults) != 0) memset(&faults, 0, sizeof faults);
    if (node && same_file(&now, &described) && same_file(&faults, &controlled)) return SUCCESS;
    Node *fresh = read_both(faults.st_ino != 0);
    if (!fresh) return node ? SUCCESS : UNKNOWN;
    free(node);
    node = fresh;
    described = now;
    controlled = faults;
    state_follow(node);
    return SUCCESS;
}

/* Apply the rules for this symbol; `gpu` is NO_ID on entering, then the GPU asked about. */
int apply_rules(const char *symbol, int gpu) {
    for (unsigned i = 0; node && i < node->rule_count; i++) {
        Rule rule = node->rules[i];
        if (strcmp(rule.symbol, symbol) != 0 || rule.gpu != gpu || counted_out(rule.id, rule.times)) continue;
        if (rule.what == 'f') return rule.number;
        if (rule.what == 'x') {
            dying = 1;
            continue;
        }
        state_unlock(); /* others' calls go on meanwhile, as in a wedged driver */
        pthread_mutex_unlock(&mutex);
        if (rule.what == 'd') sleep_ms(rule.number);
        while (rule.what == 'h') sleep_ms(1000);
        pthread_mutex_lock(&mutex);
        state_lock();
    }
    return SUCCESS;
}

int enter(const char *symbol) {
    count(symbol);
    if (!references) return UNINITIALIZED;
    TRY(follow());
    TRY(apply_rules(symbol, NO_ID));
    return references ? SUCCESS : UNINITIALIZED; /* another thread may have shut down during a delay */
}

/* ---- sessions ---- */

static void end_session(void) {
    free(node);
    node = NULL;
    events_forget();
    state_close();
}

static int begin_session(void) {
    const char *path = getenv("TANGRAM_FAKE_NVML");
    struct stat there;
    if (!path || stat(path, &there) != 0) return DRIVER_NOT_LOADED;
    snprintf(description, sizeof description, "%s", path);
    snprintf(control, sizeof control, "%s.control", description);
    session = (session + 1) & 0xFF;
    return state_open(description) ? SUCCESS : UNKNOWN;
}

int enter_initialise(const char *symbol) {
    count(symbol);
    if (!references) TRY(begin_session());
    int result = follow();
    if (result == SUCCESS) result = apply_rules(symbol, NO_ID);
    if (result == SUCCESS) references++;
    if (!references) end_session();
    return result;
}

int leave_session(void) {
    if (--references == 0) end_session(); /* every handle is invalid from here on */
    return SUCCESS;
}

/* ---- handles ---- */

uint64_t handle_of(unsigned kind, unsigned gpu, unsigned generation) {
    return (0x5AULL << 56) | ((uint64_t)kind << 48) | ((uint64_t)gpu << 40) | ((uint64_t)session << 32) | generation;
}

static int of_this_session(uint64_t handle) { return handle >> 56 == 0x5A && ((handle >> 32) & 0xFF) == session; }

int handle_is(uint64_t handle, unsigned kind, unsigned *generation) {
    *generation = (uint32_t)handle;
    return of_this_session(handle) && ((handle >> 48) & 0xFF) == kind;
}

static int find_instance(Target *at, unsigned generation) {
    for (unsigned i = 0; i < at->mig->instance_count; i++)
        if (at->mig->instances[i].generation == generation) at->instance = &at->mig->instances[i];
    return at->instance != NULL;
}

static int find_compute(Target *at, unsigned generation) {
    for (unsigned i = 0; i < at->mig->compute_count; i++)
        if (at->mig->computes[i].generation == generation) at->compute = &at->mig->computes[i];
    if (at->compute) at->instance = instance_by_id(at->mig, at->compute->gi);
    return at->instance != NULL;
}

/* What a handle stands for. For a GPU `instance` and `compute` are NULL. */
int resolve(const char *symbol, uint64_t handle, unsigned kinds, Target *target) {
    unsigned kind = (handle >> 48) & 0xFF, index = (handle >> 40) & 0xFF, generation = (uint32_t)handle;
    memset(target, 0, sizeof *target);
    WANT(of_this_session(handle) && index < node->gpu_count);
    int rule = apply_rules(symbol, (int)index); /* first: a delay lets others change the node */
    WANT(node && index < node->gpu_count && (kind & kinds));
    *target = (Target){.gpu = &node->gpus[index], .mig = &state->gpus[index], .index = index};
    int found = kind == KIND_GPU            ? target->mig->generation == generation
                : kind == KIND_GPU_INSTANCE ? find_instance(target, generation)
                                            : find_compute(target, generation);
    WANT(found);
    return target->gpu->lost ? GPU_IS_LOST : rule;
}

void look_again(Target *at) {
    GpuState *mig = &state->gpus[at->index];
    if (at->instance) at->instance = &mig->instances[at->instance - at->mig->instances];
    if (at->compute) at->compute = &mig->computes[at->compute - at->mig->computes];
    at->mig = mig;
}

int put_text(char *out, unsigned size, const char *text) {
    WANT(out);
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}
