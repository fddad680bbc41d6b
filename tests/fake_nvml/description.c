/* Reads the text that describes a node: one fact a line, a word and its values, what may hold blanks comes last.
 *
 *   driver TEXT            nvml TEXT            cuda NUMBER          privileged 0|1
 *   delay SYMBOL MS        hang SYMBOL          fail SYMBOL CODE [GPU INDEX]
 *   ancestor GPU GPU LEVEL                      (NVML's 0 10 20 30 40 50; 50 where nothing is said)
 *   gpu UUID               begins a GPU; the lines below are about the last one begun
 *   name TEXT              memory MIB RESERVED  pci BUS_ID           numa NODE       minor NUMBER
 *   architecture NUMBER    capability MAJOR MINOR                    lost 1|2        speed MBPS
 *   link NUMBER ACTIVE REMOTE_TYPE REMOTE_BUS_ID
 *   mig CURRENT PENDING    profiles_need_mig 1
 *   profile ENUM ID SLICES MEMORY_MIB SM COPY DECODER ENCODER JPEG OFA INSTANCES P2P NAME
 *   placement PROFILE_ID START SIZE
 *   instance ID PROFILE_ID START SIZE           compute GI ID MIG_INDEX SLICES UUID
 *   process KIND PID GI                         (KIND c, g or m; GI -1 outside of instances)
 *
 * `describe.py` writes it. `#` begins a comment line.
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
    for (unsigned i = 0; i < gpu->profile_count; i++) {
        Profile *p = &gpu->profiles[i];
        if (p->info.id != id) continue;
        if (p->placement_count == MAX_PLACEMENTS) return 0;
        p->placements[p->placement_count++] = at;
        return 1;
    }
    return 0;
}

static int read_instance(Gpu *gpu, const char *rest) {
    if (gpu->instance_count == MAX_INSTANCES) return 0;
    Instance *i = &gpu->instances[gpu->instance_count++];
    return sscanf(rest, "%u %u %u %u", &i->id, &i->profile_id, &i->placement.start, &i->placement.size) == 4;
}

static int read_compute(Gpu *gpu, const char *rest) {
    if (gpu->compute_count == MAX_COMPUTES) return 0;
    Compute *c = &gpu->computes[gpu->compute_count++];
    return sscanf(rest, "%u %u %u %u %95s", &c->gi, &c->id, &c->mig_index, &c->slices, c->uuid) == 5;
}

static int read_process(Gpu *gpu, const char *rest) {
    if (gpu->process_count == MAX_PROCESSES) return 0;
    Process *p = &gpu->processes[gpu->process_count++];
    return sscanf(rest, "%c %u %d", &p->kind, &p->pid, &p->gi) == 3;
}

static int read_link(Gpu *gpu, const char *rest) {
    unsigned number;
    LinkEnd end = {.present = 1};
    if (sscanf(rest, "%u %d %d %31s", &number, &end.active, &end.remote_type, end.remote_bus_id) != 4) return 0;
    if (number >= MAX_LINKS) return 0;
    gpu->links[number] = end;
    return 1;
}

static int read_rule(Node *node, char what, const char *rest) {
    if (node->rule_count == MAX_RULES) return 0;
    Rule *rule = &node->rules[node->rule_count++];
    rule->what = what;
    rule->gpu = NO_ID;
    int found = sscanf(rest, "%95s %d %d", rule->symbol, &rule->number, &rule->gpu);
    return what == 'h' ? found >= 1 : found >= 2;
}

static int read_ancestor(Node *node, const char *rest) {
    unsigned a, b, level;
    if (sscanf(rest, "%u %u %u", &a, &b, &level) != 3 || a >= MAX_GPUS || b >= MAX_GPUS) return 0;
    node->ancestors[a][b] = node->ancestors[b][a] = (unsigned char)level;
    return 1;
}

static Gpu *begin_gpu(Node *node, const char *uuid) {
    if (node->gpu_count == MAX_GPUS) return NULL;
    Gpu *gpu = &node->gpus[node->gpu_count];
    snprintf(gpu->uuid, sizeof gpu->uuid, "%s", uuid);
    gpu->minor = node->gpu_count++;
    gpu->numa = -1;
    return gpu;
}

static int read_gpu_line(Gpu *gpu, const char *word, const char *rest) {
#define IS(text) (strcmp(word, text) == 0)
    if (IS("name")) return snprintf(gpu->name, sizeof gpu->name, "%s", rest) > 0;
    if (IS("memory")) return sscanf(rest, "%llu %llu", &gpu->memory_mib, &gpu->reserved_mib) == 2;
    if (IS("pci")) return snprintf(gpu->bus_id, sizeof gpu->bus_id, "%s", rest) > 0;
    if (IS("numa")) return sscanf(rest, "%d", &gpu->numa) == 1;
    if (IS("minor")) return sscanf(rest, "%u", &gpu->minor) == 1;
    if (IS("architecture")) return sscanf(rest, "%u", &gpu->architecture) == 1;
    if (IS("capability")) return sscanf(rest, "%u %u", &gpu->capability_major, &gpu->capability_minor) == 2;
    if (IS("lost")) return sscanf(rest, "%d", &gpu->lost) == 1;
    if (IS("speed")) return sscanf(rest, "%u", &gpu->nvlink_mbps) == 1;
    if (IS("link")) return read_link(gpu, rest);
    if (IS("mig")) {
        gpu->mig_capable = 1;
        return sscanf(rest, "%d %d", &gpu->mig_current, &gpu->mig_pending) == 2;
    }
    if (IS("profiles_need_mig")) return sscanf(rest, "%d", &gpu->profiles_need_mig) == 1;
    if (IS("profile")) return read_profile(gpu, rest);
    if (IS("placement")) return read_placement(gpu, rest);
    if (IS("instance")) return read_instance(gpu, rest);
    if (IS("compute")) return read_compute(gpu, rest);
    if (IS("process")) return read_process(gpu, rest);
    return 0;
}

static int read_line(Node *node, Gpu **gpu, const char *word, const char *rest) {
    if (IS("driver")) return snprintf(node->driver, sizeof node->driver, "%s", rest) > 0;
    if (IS("nvml")) return snprintf(node->nvml, sizeof node->nvml, "%s", rest) > 0;
    if (IS("cuda")) return sscanf(rest, "%d", &node->cuda) == 1;
    if (IS("privileged")) return sscanf(rest, "%d", &node->privileged) == 1;
    if (IS("delay")) return read_rule(node, 'd', rest);
    if (IS("hang")) return read_rule(node, 'h', rest);
    if (IS("fail")) return read_rule(node, 'f', rest);
    if (IS("ancestor")) return read_ancestor(node, rest);
    if (IS("gpu")) return (*gpu = begin_gpu(node, rest)) != NULL;
    return *gpu != NULL && read_gpu_line(*gpu, word, rest);
#undef IS
}

Node *node_read(const char *path) {
    FILE *file = fopen(path, "r");
    Node *node = calloc(1, sizeof *node);
    if (!file || !node) {
        fprintf(stderr, "fake NVML: cannot read %s\n", path);
        if (file) fclose(file);
        free(node);
        return NULL;
    }
    node->privileged = 1;
    memset(node->ancestors, 50, sizeof node->ancestors);

    Gpu *gpu = NULL;
    char line[512];
    for (unsigned number = 1; fgets(line, sizeof line, file); number++) {
        line[strcspn(line, "\r\n")] = 0;
        char *word = line + strspn(line, " \t");
        if (!*word || *word == '#') continue;
        char *rest = word + strcspn(word, " \t");
        if (*rest) *rest++ = 0;
        rest += strspn(rest, " \t");
        if (read_line(node, &gpu, word, rest)) continue;
        fprintf(stderr, "fake NVML: %s:%u: cannot understand \"%s %s\"\n", path, number, word, rest);
        fclose(file);
        free(node);
        return NULL;
    }
    fclose(file);
    return node;
}
