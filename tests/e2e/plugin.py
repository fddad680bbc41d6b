"""A device plugin of the simplest kind: it gives what the kubelet takes, as NVIDIA's own does (ids are UUIDs)."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import grpc

from app.agent.kubelet import deviceplugin_pb2 as api
from app.agent.kubelet import deviceplugin_pb2_grpc as service
from app.agent.kubelet import podresources_pb2 as resources_api
from app.agent.kubelet import podresources_pb2_grpc as resources_service
from tests.e2e.kubelet import Kubelet

GPU = "nvidia.com/gpu"
CALL_SECONDS = 20.0


class Plugin(service.DevicePluginServicer):
    """A device plugin of the simplest kind, that remembers what it was asked and does as the test says."""

    def __init__(self, kubelet: Kubelet, numa_of: Mapping[str, int]) -> None:
        self.prefers: list[str] = []
        self.refuses = ""
        self.preferences_asked = 0
        self.allocated: list[set[str]] = []
        self.listed_meanwhile: list[dict[str, set[str]]] = []
        """What PodResources said while each Allocate was being answered."""
        self._kubelet = kubelet
        self._numa_of = numa_of
        self._ill: set[str] = set()
        self._changed = threading.Condition()
        self._version = 0
        self._sockets = itertools.count()
        self._closing = ExitStack()

    def register(self) -> None:
        """Listen at a new socket and tell the kubelet, which afterwards lists our devices."""
        server = grpc.server(ThreadPoolExecutor(8))
        service.add_DevicePluginServicer_to_server(self, server)
        name = f"test-{next(self._sockets)}.sock"
        server.add_insecure_port(f"unix:{self._kubelet.plugin_dir / name}")
        server.start()
        self._closing.callback(lambda: server.stop(None).wait())
        with grpc.insecure_channel(f"unix:{self._kubelet.plugin_dir / 'kubelet.sock'}") as channel:
            options = api.DevicePluginOptions(get_preferred_allocation_available=True)
            request = api.RegisterRequest(version="v1beta1", endpoint=name, resource_name=GPU, options=options)
            service.RegistrationStub(channel).Register(request, timeout=CALL_SECONDS)

    def fall_ill(self, device: str) -> None:
        """From now on the device is listed as unhealthy."""
        with self._changed:
            self._ill.add(device)
            self._version += 1
            self._changed.notify_all()

    def close(self) -> None:
        """End every stream and server."""
        with self._changed:
            self._version = -1
            self._changed.notify_all()
        self._closing.close()

    def GetDevicePluginOptions(self, request: Any, context: Any) -> api.DevicePluginOptions:
        return api.DevicePluginOptions(get_preferred_allocation_available=True)

    def ListAndWatch(self, request: Any, context: Any) -> Iterator[api.ListAndWatchResponse]:
        sent = -1
        while True:
            with self._changed:
                self._changed.wait_for(lambda sent=sent: self._version != sent)  # type: ignore[misc]
                sent = self._version
            if sent < 0:
                return
            yield api.ListAndWatchResponse(devices=[self._device(name) for name in self._numa_of])

    def GetPreferredAllocation(self, request: Any, context: Any) -> api.PreferredAllocationResponse:
        self.preferences_asked += 1
        wanted = api.ContainerPreferredAllocationResponse(deviceIDs=self.prefers)
        return api.PreferredAllocationResponse(container_responses=[wanted])

    def Allocate(self, request: Any, context: Any) -> api.AllocateResponse:
        self.listed_meanwhile.append(listed(self._kubelet))
        if self.refuses:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refuses)
        ids = sorted(request.container_requests[0].devices_ids)
        self.allocated.append(set(ids))
        given = api.ContainerAllocateResponse(
            envs={"NVIDIA_VISIBLE_DEVICES": ",".join(ids)},
            annotations={"tangram.gpu/given": ",".join(ids)},
            cdi_devices=[api.CDIDevice(name=f"{GPU}={device}") for device in ids],
            devices=[api.DeviceSpec(container_path="/dev/null", host_path="/dev/null", permissions="rw")],
        )
        return api.AllocateResponse(container_responses=[given])

    def _device(self, name: str) -> api.Device:
        topology = api.TopologyInfo(nodes=[api.NUMANode(ID=self._numa_of[name])])
        return api.Device(ID=name, health="Unhealthy" if name in self._ill else "Healthy", topology=topology)


def listed(kubelet: Kubelet) -> dict[str, set[str]]:
    """What PodResources says: each pod's device ids, by name."""
    with grpc.insecure_channel(f"unix:{kubelet.pod_resources_socket}") as channel:
        stub = resources_service.PodResourcesListerStub(channel)
        reply = stub.List(resources_api.ListPodResourcesRequest(), timeout=CALL_SECONDS)
    return {
        pod.name: {device for each in pod.containers for devices in each.devices for device in devices.device_ids}
        for pod in reply.pod_resources
    }
