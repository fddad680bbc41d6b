"""What the kubelet says its pods have: PodResources v1. Reading only.

It lists the pods that the node runs or is about to, by name (not by UID), and of each container the device ids that it
counts for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from app.agent.kubelet import podresources_pb2 as api
from app.agent.kubelet import podresources_pb2_grpc as wire
from app.agent.kubelet.channel import OPTIONS, Inode, inode_of, target, words_of

TIMEOUT_SECONDS = 2.0
"""The kubelet answers from memory."""

AGAIN = {
    "maxAttempts": 5,  # gRPC's most
    "initialBackoff": "0.05s",
    "maxBackoff": "0.4s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
}
"""How gRPC asks again by itself, within the time: everybody on the node shares a hundred answers a second."""

CHANNEL = (
    *OPTIONS,
    (
        "grpc.service_config",
        json.dumps({"methodConfig": [{"name": [{"service": "v1.PodResourcesLister"}], "retryPolicy": AGAIN}]}),
    ),
)


class KubeletSilent(Exception):
    """The kubelet did not say what its pods have, in words."""


@dataclass(frozen=True, slots=True)
class ContainerHas:
    """The device ids that the kubelet counts for a container, by resource."""

    name: str
    devices: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class PodHas:
    """A pod that the kubelet has admitted or is admitting; its containers may have nothing yet."""

    namespace: str
    name: str
    containers: tuple[ContainerHas, ...]


class PodResources:
    """The kubelet's PodResources at `socket` (`…/pod-resources/kubelet.sock`)."""

    def __init__(self, socket: Path, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._socket = socket
        self._timeout = timeout_seconds
        self._kept: tuple[Inode | None, Any, Any] | None = None

    async def list(self) -> tuple[PodHas, ...]:
        """Every pod. Raises `KubeletSilent`. A connection of its own each time: this is asked seldom."""
        with self._in_words():
            async with grpc.aio.insecure_channel(target(self._socket), options=CHANNEL) as channel:
                lister = wire.PodResourcesListerStub(channel)
                return _read(await lister.List(api.ListPodResourcesRequest(), timeout=self._timeout))

    def read(self) -> tuple[PodHas, ...]:
        """The same for one thread without an event loop; it waits. Raises `KubeletSilent`.

        The connection is kept (a new one costs 2 ms of CPU), unless it fails or the socket is another kubelet's.
        """
        now = inode_of(self._socket)
        if self._kept is None or self._kept[0] != now:
            self.close()
            channel = grpc.insecure_channel(target(self._socket), options=CHANNEL)
            self._kept = now, channel, wire.PodResourcesListerStub(channel)
        try:
            with self._in_words():
                return _read(self._kept[2].List(api.ListPodResourcesRequest(), timeout=self._timeout))
        except KubeletSilent:
            self.close()
            raise

    def close(self) -> None:
        """Close the kept connection; the next `read` opens another."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept[1].close()

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise KubeletSilent(
                f"the kubelet does not say what its pods have ({self._socket}): {words_of(error)}"
            ) from error


def _read(answer: api.ListPodResourcesResponse) -> tuple[PodHas, ...]:
    return tuple(
        PodHas(pod.namespace, pod.name, tuple(_container(each) for each in pod.containers))
        for pod in answer.pod_resources
    )


def _container(container: api.ContainerResources) -> ContainerHas:
    """A resource is listed once for each of its NUMA nodes."""
    devices: dict[str, tuple[str, ...]] = {}
    for each in container.devices:
        devices[each.resource_name] = devices.get(each.resource_name, ()) + tuple(each.device_ids)
    return ContainerHas(container.name, devices)
