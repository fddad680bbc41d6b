/* How a GPU reaches others: PCIe, NVLink, peer-to-peer, fabric; and field values, most of which are about links. */
#include "nvml_fake.h"

#include <stdio.h>
#include <string.h>

enum { FIELD_SPEED_COMMON = 90, FIELD_LINK_COUNT = 91, FIELD_REPLAYS = 94, FIELD_ROWS = 142, FIELD_SPEED = 164,
       FIELD_STATE = 165, FIELD_VERSION = 166, FIELD_MIG_WITHOUT_RESET = 184, FIELD_RECOVERY = 230 };
enum { VALUE_TYPE_UNSIGNED_INT = 1 };
enum { P2P_READ = 0, P2P_NVLINK = 2, P2P_PCI = 4, P2P_NOT_SUPPORTED = 5 };

/* ---- PCIe ---- */

static int put_pci(const char *bus_id, unsigned device_id, Pci *out) {
    memset(out, 0, sizeof *out);
    if (sscanf(bus_id, "%x:%x:%x", &out->domain, &out->bus, &out->device) != 3) return UNKNOWN;
    snprintf(out->bus_id, sizeof out->bus_id, "%08X:%02X:%02X.0", out->domain & 0xFFFFFFFFu, out->bus & 0xFF,
             out->device & 0xFF);
    snprintf(out->bus_id_legacy, sizeof out->bus_id_legacy, "%04X:%02X:%02X.0", out->domain & 0xFFFF,
             out->bus & 0xFF, out->device & 0xFF);
    out->device_id = device_id ? device_id : 0x10DE;
    return SUCCESS;
}

API nvmlDeviceGetPciInfo_v3(uint64_t device, Pci *out) {
    ENTER();
    DEVICE();
    WANT(out);
    return put_pci(at.gpu->bus_id, at.gpu->device_id, out);
}

API nvmlDeviceGetTopologyCommonAncestor(uint64_t device, uint64_t other, unsigned *out) {
    ENTER();
    PHYSICAL();
    Target peer;
    TRY(resolve(__func__, other, KIND_GPU, &peer));
    WANT(out);
    *out = at.index == peer.index ? 0 : node->ancestors[at.index][peer.index];
    return SUCCESS;
}

/* ---- NVLink ---- */

/* A board without any link is NOT_SUPPORTED; a link past the last is INVALID_ARGUMENT. */
static int link_end(Gpu *gpu, unsigned link, LinkEnd **end) {
    int any = 0;
    for (unsigned i = 0; i < MAX_LINKS; i++) any |= gpu->links[i].present;
    if (!any) return NOT_SUPPORTED;
    WANT(link < MAX_LINKS && gpu->links[link].present);
    *end = &gpu->links[link];
    return SUCCESS;
}

API nvmlDeviceGetNvLinkState(uint64_t device, unsigned link, unsigned *out) {
    ENTER();
    PHYSICAL();
    LinkEnd *end;
    TRY(link_end(at.gpu, link, &end));
    WANT(out);
    *out = (unsigned)end->active;
    return SUCCESS;
}

/* NVML's enum, which is not the generation. */
API nvmlDeviceGetNvLinkVersion(uint64_t device, unsigned link, unsigned *out) {
    ENTER();
    PHYSICAL();
    LinkEnd *end;
    TRY(link_end(at.gpu, link, &end));
    WANT(out);
    *out = at.gpu->nvlink_version;
    return SUCCESS;
}

API nvmlDeviceGetNvLinkRemotePciInfo_v2(uint64_t device, unsigned link, Pci *out) {
    ENTER();
    PHYSICAL();
    LinkEnd *end;
    TRY(link_end(at.gpu, link, &end));
    WANT(out && end->active);
    return put_pci(end->remote_bus_id, 0, out);
}

API nvmlDeviceGetNvLinkRemoteDeviceType(uint64_t device, unsigned link, unsigned *out) {
    ENTER();
    PHYSICAL();
    LinkEnd *end;
    TRY(link_end(at.gpu, link, &end));
    WANT(out && end->active);
    *out = (unsigned)end->remote_type;
    return SUCCESS;
}

API nvmlDeviceGetNvLinkErrorCounter(uint64_t device, unsigned link, unsigned counter, unsigned long long *out) {
    ENTER();
    PHYSICAL();
    LinkEnd *end;
    TRY(link_end(at.gpu, link, &end));
    WANT(out && counter < LINK_COUNTERS);
    *out = end->errors[counter];
    return SUCCESS;
}

/* ---- peer-to-peer ---- */

static int active_links(const Gpu *gpu, const char *to) {
    int count = 0;
    for (unsigned i = 0; i < MAX_LINKS; i++) {
        const LinkEnd *end = &gpu->links[i];
        count += end->active && (end->remote_type != 0 || !strcmp(end->remote_bus_id, to));
    }
    return count;
}

/* MIG ends peer-to-peer on its GPU (hardware.md 1.5). */
API nvmlDeviceGetP2PStatus(uint64_t device, uint64_t other, unsigned kind, unsigned *out) {
    ENTER();
    PHYSICAL();
    Target peer;
    TRY(resolve(__func__, other, KIND_GPU, &peer));
    WANT(out && kind <= P2P_PCI && at.index != peer.index);
    *out = node->p2p[at.index][peer.index];
    if (at.mig->mig_current || peer.mig->mig_current) *out = P2P_NOT_SUPPORTED;
    int linked = active_links(at.gpu, peer.gpu->bus_id) && active_links(peer.gpu, at.gpu->bus_id);
    if (kind == P2P_NVLINK && !linked) *out = P2P_NOT_SUPPORTED;
    return SUCCESS;
}

/* ---- fabric: Hopper and later ---- */

API nvmlDeviceGetGpuFabricInfo(uint64_t device, FabricV1 *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    const Fabric *f = &at.gpu->fabric;
    if (at.gpu->architecture < HOPPER) return NOT_SUPPORTED;
    *out = (FabricV1){.status = f->status, .clique = f->clique, .state = (uint8_t)f->state};
    memcpy(out->cluster, f->cluster, sizeof out->cluster);
    return SUCCESS;
}

API nvmlDeviceGetGpuFabricInfoV(uint64_t device, FabricV3 *out) {
    ENTER();
    PHYSICAL();
    WANT(out);
    unsigned version = out->version;
    if (version != VERSION(FabricV2, 2) && version != VERSION(FabricV3, 3)) return ARGUMENT_VERSION_MISMATCH;
    const Fabric *f = &at.gpu->fabric;
    if (at.gpu->architecture < HOPPER) return NOT_SUPPORTED;
    FabricV3 found = {.version = version, .status = f->status, .clique = f->clique, .state = (uint8_t)f->state,
                      .mask = f->mask, .summary = (uint8_t)f->summary};
    memcpy(found.cluster, f->cluster, sizeof found.cluster);
    memcpy(out, &found, version & 0xFFFFFF); /* v3 is v2 with a field more at the end */
    return SUCCESS;
}

/* ---- field values: the call succeeds as a whole; each field has a result of its own ---- */

static unsigned of_link(Gpu *gpu, FieldValue *v) {
    LinkEnd *end = NULL;
    if (!gpu->nvlink_mbps) return NOT_SUPPORTED;
    unsigned result = (unsigned)link_end(gpu, v->scope, &end);
    if (result != SUCCESS) return result;
    v->value.ui = v->field == FIELD_STATE     ? (unsigned)end->active
                  : v->field == FIELD_VERSION ? gpu->nvlink_version
                                              : gpu->nvlink_mbps;
    return SUCCESS;
}

static unsigned link_count(const Gpu *gpu) {
    unsigned count = 0;
    for (unsigned i = 0; i < MAX_LINKS; i++) count += (unsigned)gpu->links[i].present;
    return count;
}

static unsigned field_value(const Target *at, FieldValue *v) {
    Gpu *gpu = at->gpu;
    unsigned row = v->field - FIELD_ROWS;
    switch (v->field) {
        case FIELD_SPEED_COMMON: v->value.ui = gpu->nvlink_mbps; return gpu->nvlink_mbps ? SUCCESS : NOT_SUPPORTED;
        case FIELD_LINK_COUNT: v->value.ui = link_count(gpu); return v->value.ui ? SUCCESS : NOT_SUPPORTED;
        case FIELD_REPLAYS: v->value.ui = gpu->replays; return SUCCESS;
        case FIELD_SPEED: case FIELD_STATE: case FIELD_VERSION: return of_link(gpu, v);
        case FIELD_ROWS: case FIELD_ROWS + 1: case FIELD_ROWS + 2: case FIELD_ROWS + 3:
            if (gpu->architecture < AMPERE || gpu->ecc < 0 || at->mig->instance_count) return NOT_SUPPORTED;
            v->value.ui = gpu->rows[row];
            return SUCCESS;
        case FIELD_MIG_WITHOUT_RESET:
            if (!gpu->mig_capable) return NOT_SUPPORTED;
            v->value.ui = gpu->architecture >= HOPPER;
            return SUCCESS;
        case FIELD_RECOVERY:
            if (gpu->recovery < 0) return NOT_SUPPORTED;
            v->value.ui = (unsigned)gpu->recovery;
            return SUCCESS;
        default: return NOT_SUPPORTED;
    }
}

API nvmlDeviceGetFieldValues(uint64_t device, int count, FieldValue *values) {
    ENTER();
    PHYSICAL();
    WANT(values && count > 0);
    for (int i = 0; i < count; i++) {
        values[i].value_type = VALUE_TYPE_UNSIGNED_INT;
        values[i].result = field_value(&at, &values[i]);
    }
    return SUCCESS;
}
