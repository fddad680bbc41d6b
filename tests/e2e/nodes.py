"""Small builders for the objects that end-to-end tests send to the API server. No I/O, no decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KubernetesObject = dict[str, Any]

KWOK_NODE = "kwok.x-k8s.io/node"  # KWOK plays the kubelet of nodes that say "fake" here
FINISH_AFTER = "tangram.test/finish-after"  # see kwok/stages.yaml
STOP_AFTER = "tangram.test/stop-after"

NODE_BASICS = {"cpu": 128, "memory": "1024Gi", "ephemeral-storage": "1024Gi", "pods": 250}


def gpu_node(
    name: str,
    product: str = "NVIDIA-H100-80GB-HBM3",
    allocatable: Mapping[str, int | str] | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    taints: list[dict[str, str]] | None = None,
) -> KubernetesObject:
    """A node as its kubelet would register it, Ready from the start; `allocatable` adds to the basics."""
    resources = {key: str(value) for key, value in {**NODE_BASICS, **(allocatable or {})}.items()}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {
                "kubernetes.io/hostname": name,
                "kubernetes.io/os": "linux",
                "kubernetes.io/arch": "amd64",
                "nvidia.com/gpu.product": product,
                **(labels or {}),
            },
            "annotations": {KWOK_NODE: "fake", **(annotations or {})},
        },
        "spec": {"taints": taints} if taints else {},
        "status": {
            "allocatable": resources,
            "capacity": resources,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
            "addresses": [{"type": "Hostname", "address": name}],
            "nodeInfo": _node_info(),
        },
    }


def kubelet_node(
    name: str, product: str = "NVIDIA-H100-80GB-HBM3", *, labels: Mapping[str, str] | None = None
) -> KubernetesObject:
    """A node that KWOK leaves alone: the test starts its kubelet, and that kubelet's plugins bring its GPUs."""
    node = gpu_node(name, product, labels=labels)
    del node["metadata"]["annotations"][KWOK_NODE]
    return node


def _node_info() -> dict[str, str]:
    unknown = ("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "kubeProxyVersion")
    known = {"architecture": "amd64", "operatingSystem": "linux", "kubeletVersion": "v1.37.1"}
    return {**dict.fromkeys(unknown, ""), "containerRuntimeVersion": "kwok://0.8.0", **known}


def gpu_pod(
    name: str,
    requests: Mapping[str, int | str] | None = None,
    *,
    namespace: str = "default",
    scheduler_name: str = "default-scheduler",
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    finish_after: str | None = None,
    node_selector: Mapping[str, str] | None = None,
    priority_class: str | None = None,
) -> KubernetesObject:
    """A pod with one container that asks for `requests` (limits equal, as extended resources demand)."""
    resources = {key: str(value) for key, value in (requests or {}).items()}
    notes = dict(annotations or {})
    if finish_after is not None:
        notes[FINISH_AFTER] = finish_after
    spec: KubernetesObject = {
        "schedulerName": scheduler_name,
        "restartPolicy": "Always" if finish_after is None else "Never",
        "terminationGracePeriodSeconds": 0,
        "containers": [
            {
                "name": "main",
                "image": "registry.test/workload:1",
                "resources": {"requests": resources, "limits": resources},
            }
        ],
    }
    if node_selector:
        spec["nodeSelector"] = dict(node_selector)
    if priority_class:
        spec["priorityClassName"] = priority_class
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": dict(labels or {}),
            "annotations": notes,
        },
        "spec": spec,
    }
