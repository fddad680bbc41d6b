/* Reads the text that describes a node: one fact a line, a word and its values, what may hold blanks comes last.
 *
 *   driver TEXT            nvml TEXT            cuda NUMBER          privileged 0|1      configures 0|1
 *   delay SYMBOL MS [GPU]  hang SYMBOL          fail SYMBOL CODE [GPU]                  (GPU: its index)
 *   ancestor GPU GPU LEVEL                      (NVML's 0 10 20 30 40 50; 50 where nothing is said)
 *   p2p GPU GPU STATUS                          (NVML's; 0 where nothing is said)
 *   gpu UUID               begins a GPU; the lines below are about the last one begun
 *   name TEXT              serial TEXT          part TEXT            brand NUMBER        device DEVICE_ID
 *   memory MIB RESERVED    pci BUS_ID           numa NODE            gpu_numa NODE       minor NUMBER
 *   cpus FIRST LAST SOCKET_FIRST SOCKET_LAST    architecture NUMBER  capability MAJOR MINOR
 *   lost 1|2               compute_mode NUMBER  persistence 0|1      temperature DEGREES replays COUNT
 *   power LIMIT_MW USED_MW                      clocks REASONS       recovery ACTION
 *   ecc CURRENT PENDING    errors CORRECTED UNCORRECTED AGGREGATE_CORRECTED AGGREGATE_UNCORRECTED
 *   rows CORRECTABLE UNCORRECTABLE PENDING FAILURE                   retired SINGLE DOUBLE PENDING
 *   speed MBPS             nvlink_version NUMBER
 *   link NUMBER ACTIVE REMOTE_TYPE REMOTE_BUS_ID
 *   link_errors NUMBER REPLAYS RECOVERIES CRC_FLIT CRC_DATA ECC_DATA
 *   fabric STATE STATUS CLIQUE MASK SUMMARY CLUSTER_UUID
 *   platform SLOT TRAY HOST PEER MODULE CHASSIS_SERIAL
 *   mig CURRENT PENDING    profiles_need_mig 1
 *   board UNITS SLICES DECODERS ENCODERS JPEG OFA                    (totals; -1: no limit)
 *   profile ENUM ID SLICES MEMORY_MIB SM COPY DECODER ENCODER JPEG OFA INSTANCES P2P NAME
 *   placement PROFILE_ID START SIZE
 *   instance ID PROFILE_ID START SIZE           compute GI ID MIG_INDEX SLICES UUID
 *   process KIND PID GI [USED_MIB]              (KIND c, g or m; GI -1 outside of instances)
 *
 * `describe.py` writes it. `#` begins a comment line. The lines mig, instance and compute say where MIG begins; what
 * becomes of it is in the state, until one of them changes.
 */
#include "nvml_fake.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int read_profile(Gpu *gpu, const char *rest) {
    if (gpu->profile_count == MAX_PROFILES) return 0;
    Profile *p = &gpu->profiles[gpu->profile_count];
    ProfileInfoV2 *i = &p->info;
    int used = 0;
    if (sscanf(rest, "%u %u %u %llu %u %u %u %u %u %u %u %u %n", &p->number, &i->id, &i->slices, &i->memory_mib,
               &i->sm, &i->copy, &i->decoder, &i->encoder, &i->jpeg, &i->ofa, &i->instances, &i->p2p, &used) != 12)
        return 0;
    snprintf(i->name, sizeof i->name, "%s", rest + used);
    gpu->profile_count++;
    return 1;
}

static int read_placement(Gpu *gpu, const char *rest) {
    unsigned id;
    Placement at;
    if (sscanf(rest, "%u %u %u", &id, &at.start, &at.size) != 3) return 0;
    Profile *p = profile_by_id(gpu, id);
    if (!p || p->placement_count == MAX_PLACEMENTS) return 0;
    p->placements[p->placement_count++] = at;
    return 1;
}

static int read_instance(Gpu *gpu, const char *rest) {
    GpuState *mig = &gpu->described;
    if (mig->instance_count == MAX_INSTANCES) return 0;
    Instance *i = &mig->instances[mig->instance_count++];
    if (sscanf(rest, "%u %u %u %u", &i->id, &i->profile_id, &i->start, &i->size) != 4) return 0;
    const Profile *profile = profile_by_id(gpu, i->profile_id);
    snprintf(i->profile, sizeof i->profile, "%.43s", profile ? profile->info.name + 4 : "unknown");
    return 1;
}

/* A GPU instance is filled from its first slice on, in the order of the lines. */
static int read_compute(Gpu *gpu, const char *rest) {
    GpuState *mig = &gpu->described;
    if (mig->compute_count == MAX_COMPUTES) return 0;
    Compute *c = &mig->computes[mig->compute_count];
    if (sscanf(rest, "%u %u %u %u %63s", &c->gi, &c->id, &c->mig_index, &c->slices, c->uuid) != 5) return 0;
    for (unsigned i = 0; i < mig->compute_count; i++)
        if (mig->computes[i].gi == c->gi) c->start += mig->computes[i].slices;
    mig->compute_count++;
    return 1;
}

static int read_process(Gpu *gpu, const char *rest) {
    if (gpu->process_count == MAX_PROCESSES) return 0;
    Process *p = &gpu->processes[gpu->process_count++];
    p->used_mib = 1024;
    return sscanf(rest, "%c %u %d %u", &p->kind, &p->pid, &p->gi, &p->used_mib) >= 3;
}

static int read_link(Gpu *gpu, const char *rest) {
    unsigned number;
    LinkEnd end = {.present = 1};
    if (sscanf(rest, "%u %d %d %31s", &number, &end.active, &end.remote_type, end.remote_bus_id) != 4) return 0;
    if (number >= MAX_LINKS) return 0;
    gpu->links[number] = end;
    return 1;
}

static int read_link_errors(Gpu *gpu, const char *rest) {
    unsigned number;
    unsigned long long found[LINK_COUNTERS] = {0};
    if (sscanf(rest, "%u %llu %llu %llu %llu %llu", &number, &found[0], &found[1], &found[2], &found[3], &found[4]) < 2)
        return 0;
    if (number >= MAX_LINKS) return 0;
    memcpy(gpu->links[number].errors, found, sizeof found);
    return 1;
}

static int read_uuid(const char *text, uint8_t out[16]) {
    unsigned at = 0;
    for (; *text && at < 32; text++) {
        if (*text == '-') continue;
        unsigned digit;
        if (sscanf(text, "%1x", &digit) != 1) return 0;
        out[at / 2] = (uint8_t)(at % 2 ? out[at / 2] | digit : digit << 4);
        at++;
    }
    return at == 32;
}

static int read_fabric(Gpu *gpu, const char *rest) {
    Fabric *f = &gpu->fabric;
    char uuid[40];
    f->on = 1;
    return sscanf(rest, "%u %u %u %u %u %39s", &f->state, &f->status, &f->clique, &f->mask, &f->summary, uuid) == 6 &&
           read_uuid(uuid, f->cluster);
}

static int read_platform(Gpu *gpu, const char *rest) {
    uint8_t *p = gpu->platform;
    return sscanf(rest, "%hhu %hhu %hhu %hhu %hhu %15s", &p[0], &p[1], &p[2], &p[3], &p[4], gpu->chassis) == 6;
}

static int read_rule(Node *node, char what, const char *rest) {
    if (node->rule_count == MAX_RULES) return 0;
    Rule *rule = &node->rules[node->rule_count++];
    rule->what = what;
    rule->gpu = NO_ID;
    int found = sscanf(rest, "%95s %d %d", rule->symbol, &rule->number, &rule->gpu);
    return what == 'h' ? found >= 1 : found >= 2;
}

static int read_pair(unsigned char table[MAX_GPUS][MAX_GPUS], const char *rest) {
    unsigned a, b, value;
    if (sscanf(rest, "%u %u %u", &a, &b, &value) != 3 || a >= MAX_GPUS || b >= MAX_GPUS) return 0;
    table[a][b] = table[b][a] = (unsigned char)value;
    return 1;
}

static Gpu *begin_gpu(Node *node, const char *uuid) {
    if (node->gpu_count == MAX_GPUS) return NULL;
    Gpu *gpu = &node->gpus[node->gpu_count];
    snprintf(gpu->uuid, sizeof gpu->uuid, "%.95s", uuid);
    gpu->minor = node->gpu_count++;
    gpu->numa = gpu->gpu_numa = gpu->cpus[0] = -1;
    gpu->ecc = gpu->ecc_pending = gpu->recovery = -1;
    gpu->board_units = gpu->board_slices = -1;
    gpu->degrees = 40;
    gpu->clock_reasons = 1; /* idle */
    gpu->mig_described = 14695981039346656037u; /* FNV-1a from here */
    memset(gpu->board_engines, -1, sizeof gpu->board_engines);
    memset(gpu->platform, 0xFF, sizeof gpu->platform);
    return gpu;
}

#define IS(text) (strcmp(word, text) == 0)
#define TEXT(field) (snprintf(field, sizeof field, "%.*s", (int)sizeof field - 1, rest) > 0)
#define ONE(format, a) (sscanf(rest, format, &(a)) == 1)
#define TWO(format, a, b) (sscanf(rest, format " " format, &(a), &(b)) == 2)
#define FOUR(format, a) (sscanf(rest, format " " format " " format " " format, &a[0], &a[1], &a[2], &a[3]) == 4)

/* Facts of the hardware and its health: the control file may set them anew. */
int read_gpu_line(Gpu *gpu, const char *word, const char *rest) {
    if (IS("name")) return TEXT(gpu->name);
    if (IS("serial")) return TEXT(gpu->serial);
    if (IS("part")) return TEXT(gpu->part);
    if (IS("brand")) return ONE("%u", gpu->brand);
    if (IS("device")) return ONE("%x", gpu->device_id);
    if (IS("memory")) return TWO("%llu", gpu->memory_mib, gpu->reserved_mib);
    if (IS("pci")) return TEXT(gpu->bus_id);
    if (IS("numa")) return ONE("%d", gpu->numa);
    if (IS("gpu_numa")) return ONE("%d", gpu->gpu_numa);
    if (IS("cpus")) return FOUR("%d", gpu->cpus);
    if (IS("minor")) return ONE("%u", gpu->minor);
    if (IS("architecture")) return ONE("%u", gpu->architecture);
    if (IS("capability")) return TWO("%u", gpu->capability_major, gpu->capability_minor);
    if (IS("lost")) return ONE("%d", gpu->lost);
    if (IS("compute_mode")) return ONE("%u", gpu->compute_mode);
    if (IS("persistence")) return ONE("%u", gpu->persistence);
    if (IS("temperature")) return ONE("%u", gpu->degrees);
    if (IS("replays")) return ONE("%u", gpu->replays);
    if (IS("power")) return TWO("%u", gpu->power_limit_mw, gpu->power_mw);
    if (IS("clocks")) return ONE("%lli", gpu->clock_reasons);
    if (IS("recovery")) return ONE("%d", gpu->recovery);
    if (IS("ecc")) return TWO("%d", gpu->ecc, gpu->ecc_pending);
    if (IS("errors")) return FOUR("%llu", gpu->errors);
    if (IS("rows")) return FOUR("%u", gpu->rows);
    if (IS("retired"))
        return sscanf(rest, "%u %u %u", &gpu->retired[0], &gpu->retired[1], &gpu->retired_pending) == 3;
    if (IS("speed")) return ONE("%u", gpu->nvlink_mbps);
    if (IS("nvlink_version")) return ONE("%u", gpu->nvlink_version);
    if (IS("link")) return read_link(gpu, rest);
    if (IS("link_errors")) return read_link_errors(gpu, rest);
    if (IS("fabric")) return read_fabric(gpu, rest);
    if (IS("platform")) return read_platform(gpu, rest);
    return 0;
}

static void remember(Gpu *gpu, const char *text) {
    for (; *text; text++) gpu->mig_described = (gpu->mig_described ^ (unsigned char)*text) * 1099511628211u;
    gpu->mig_described = (gpu->mig_described ^ '\n') * 1099511628211u;
}

static int read_mig_line(Gpu *gpu, const char *word, const char *rest) {
    if (IS("mig") || IS("instance") || IS("compute")) {
        remember(gpu, word);
        remember(gpu, rest);
    }
    if (IS("mig")) {
        gpu->mig_capable = 1;
        return TWO("%u", gpu->described.mig_current, gpu->described.mig_pending);
    }
    if (IS("profiles_need_mig")) return ONE("%d", gpu->profiles_need_mig);
    if (IS("board"))
        return sscanf(rest, "%d %d %d %d %d %d", &gpu->board_units, &gpu->board_slices, &gpu->board_engines[0],
                      &gpu->board_engines[1], &gpu->board_engines[2], &gpu->board_engines[3]) == 6;
    if (IS("profile")) return read_profile(gpu, rest);
    if (IS("placement")) return read_placement(gpu, rest);
    if (IS("instance")) return read_instance(gpu, rest);
    if (IS("compute")) return read_compute(gpu, rest);
    return 0;
}

typedef struct { Node *node; Gpu *gpu; } Reading;

static int read_line(void *context, const char *word, const char *rest) {
    Reading *reading = context;
    Node *node = reading->node;
    if (IS("driver")) return TEXT(node->driver);
    if (IS("nvml")) return TEXT(node->nvml);
    if (IS("cuda")) return ONE("%d", node->cuda);
    if (IS("privileged")) return ONE("%d", node->privileged);
    if (IS("configures")) return ONE("%d", node->configures);
    if (IS("delay")) return read_rule(node, 'd', rest);
    if (IS("hang")) return read_rule(node, 'h', rest);
    if (IS("fail")) return read_rule(node, 'f', rest);
    if (IS("ancestor")) return read_pair(node->ancestors, rest);
    if (IS("p2p")) return read_pair(node->p2p, rest);
    if (IS("gpu")) return (reading->gpu = begin_gpu(node, rest)) != NULL;
    if (!reading->gpu) return 0;
    if (IS("process")) return read_process(reading->gpu, rest);
    return read_gpu_line(reading->gpu, word, rest) || read_mig_line(reading->gpu, word, rest);
}

int read_lines(const char *path, int (*read)(void *context, const char *word, const char *rest), void *context) {
    FILE *file = fopen(path, "re");
    if (!file) {
        fprintf(stderr, "fake NVML: cannot read %s\n", path);
        return 0;
    }
    char line[512];
    for (unsigned number = 1; fgets(line, sizeof line, file); number++) {
        line[strcspn(line, "\r\n")] = 0;
        char *word = line + strspn(line, " \t");
        if (!*word || *word == '#') continue;
        char *rest = word + strcspn(word, " \t");
        if (*rest) *rest++ = 0;
        rest += strspn(rest, " \t");
        if (read(context, word, rest)) continue;
        fprintf(stderr, "fake NVML: %s:%u: cannot understand \"%s %s\"\n", path, number, word, rest);
        fclose(file);
        return 0;
    }
    fclose(file);
    return 1;
}

Node *node_read(const char *path) {
    Reading reading = {calloc(1, sizeof(Node)), NULL};
    if (!reading.node) return NULL;
    reading.node->privileged = reading.node->configures = 1;
    memset(reading.node->ancestors, 50, sizeof reading.node->ancestors);
    if (read_lines(path, read_line, &reading)) return reading.node;
    free(reading.node);
    return NULL;
}
