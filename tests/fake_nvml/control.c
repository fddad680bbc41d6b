/* Reads the control file (the description's path and ".control"): what goes wrong, and what else happens on the node.
 *
 *   privileged 0|1         configures 0|1
 *   set GPU WORD VALUES    a fact of the description anew: `set 3 lost 1`, `set 3 rows 0 1 1 0`
 *   process KIND PID GPU PROFILE START USED_MIB      (PROFILE - on the GPU itself; only while an instance is there)
 *   hang NUMBER TIMES GPU SYMBOL                     (GPU - for any)
 *   delay NUMBER TIMES GPU SYMBOL MS
 *   fail NUMBER TIMES GPU SYMBOL CODE
 *   die NUMBER TIMES GPU SYMBOL                      the process ends after the call, as if killed
 *   refuse NUMBER TIMES make|remove CODE GPU PROFILE START
 *   event NUMBER GPU TYPE DATA GI CI                 once (NVML's types: 8 is an XID; GI and CI: - for none)
 *   reset NUMBER GPU       reboot NUMBER             once
 *
 * A GPU is an index or a UUID, a PROFILE an id or a name. NUMBERs grow from line to line: what happens once, or so many
 * TIMES (0: always), is known by it, in all processes together. `control.py` writes it.
 */
#include "nvml_fake.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define IS(text) (strcmp(word, text) == 0)

static int only_digits(const char *text) { return *text && strspn(text, "0123456789") == strlen(text); }

static int gpu_named(const Node *node, const char *text, unsigned *out) {
    for (*out = 0; *out < node->gpu_count; ++*out)
        if (!strcmp(node->gpus[*out].uuid, text)) return 1;
    return only_digits(text) && (*out = (unsigned)atoi(text)) < node->gpu_count;
}

static int profile_named(const Gpu *gpu, const char *text, int *out) {
    if (!strcmp(text, "-")) return (*out = NO_ID), 1;
    for (unsigned i = 0; i < gpu->profile_count; i++) {
        const ProfileInfoV2 *info = &gpu->profiles[i].info;
        *out = (int)info->id;
        if (!strcmp(info->name + 4, text) || (only_digits(text) && info->id == (unsigned)atoi(text))) return 1;
    }
    return 0;
}

static int read_set(Node *node, const char *rest) {
    char gpu[96], word[32];
    unsigned index;
    int used = 0;
    return sscanf(rest, "%95s %31s %n", gpu, word, &used) == 2 && gpu_named(node, gpu, &index) &&
           read_gpu_line(&node->gpus[index], word, rest + used);
}

static int read_placed(Node *node, const char *rest) {
    if (node->placed_count == MAX_PROCESSES) return 0;
    PlacedProcess *p = &node->placed[node->placed_count++];
    char gpu[96], profile[44];
    p->process.gi = NO_ID;
    return sscanf(rest, "%c %u %95s %43s %u %u", &p->process.kind, &p->process.pid, gpu, profile, &p->start,
                  &p->process.used_mib) == 6 &&
           gpu_named(node, gpu, &p->gpu) && profile_named(&node->gpus[p->gpu], profile, &p->profile_id);
}

static int read_rule(Node *node, char what, const char *rest) {
    if (node->rule_count == MAX_RULES) return 0;
    Rule *rule = &node->rules[node->rule_count++];
    char gpu[96];
    unsigned index;
    unsigned long long id, times;
    int wanted = what == 'd' || what == 'f' ? 5 : 4;
    if (sscanf(rest, "%llu %llu %95s %95s %d", &id, &times, gpu, rule->symbol, &rule->number) < wanted) return 0;
    rule->what = what;
    rule->id = id;
    rule->times = times;
    rule->gpu = NO_ID;
    if (!strcmp(gpu, "-")) return 1;
    if (!gpu_named(node, gpu, &index)) return 0;
    rule->gpu = (int)index;
    return 1;
}

static int read_refusal(Node *node, const char *rest) {
    if (node->refusal_count == MAX_RULES) return 0;
    Refusal *r = &node->refusals[node->refusal_count++];
    char act[16], gpu[96], profile[44];
    unsigned long long id, times;
    if (sscanf(rest, "%llu %llu %15s %d %95s %43s %u", &id, &times, act, &r->code, gpu, profile, &r->start) != 7)
        return 0;
    r->id = id;
    r->times = times;
    r->what = act[0];
    return gpu_named(node, gpu, &r->gpu) && profile_named(&node->gpus[r->gpu], profile, &r->profile_id);
}

static int read_id(const char *text, unsigned *out) {
    *out = only_digits(text) ? (unsigned)atoi(text) : NO_INSTANCE;
    return only_digits(text) || !strcmp(text, "-");
}

static int read_act(Node *node, char what, const char *rest) {
    if (node->act_count == MAX_ACTS) return 0;
    Act *act = &node->acts[node->act_count++];
    char gpu[96] = "0", gi[16] = "-", ci[16] = "-";
    unsigned long long number;
    int found = sscanf(rest, "%llu %95s %u %u %15s %15s", &number, gpu, &act->type, &act->data, gi, ci);
    act->what = what;
    act->number = number;
    return found >= (what == 'e' ? 4 : what == 'r' ? 2 : 1) && gpu_named(node, gpu, &act->gpu) &&
           read_id(gi, &act->gi) && read_id(ci, &act->ci);
}

static int read_line(void *context, const char *word, const char *rest) {
    Node *node = context;
    if (IS("privileged")) return sscanf(rest, "%d", &node->privileged) == 1;
    if (IS("configures")) return sscanf(rest, "%d", &node->configures) == 1;
    if (IS("set")) return read_set(node, rest);
    if (IS("process")) return read_placed(node, rest);
    if (IS("hang")) return read_rule(node, 'h', rest);
    if (IS("delay")) return read_rule(node, 'd', rest);
    if (IS("fail")) return read_rule(node, 'f', rest);
    if (IS("die")) return read_rule(node, 'x', rest);
    if (IS("refuse")) return read_refusal(node, rest);
    if (IS("event")) return read_act(node, 'e', rest);
    if (IS("reset")) return read_act(node, 'r', rest);
    if (IS("reboot")) return read_act(node, 'b', rest);
    return 0;
}

int control_read(Node *node, const char *path) { return read_lines(path, read_line, node); }
