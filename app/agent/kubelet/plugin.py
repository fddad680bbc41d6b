"""The device plugins of one node: a socket per resource, registered with the kubelet again and again as it needs it.

```
offer() ─▶ every second, and at each offer ─▶ kubelet.sock is there, and a resource is not connected to it?
                                                ─▶ serve on a fresh socket ─▶ Register ─▶ the kubelet dials back:
              ListAndWatch (an open stream, one message per change) · GetPreferredAllocation · Allocate ─▶ Hands
```

A resource is connected while the kubelet holds a ListAndWatch stream open on the socket that was registered. Whatever
ends that (a kubelet that restarts and deletes all sockets, or one that hangs up) has the same cure: begin again. Each
time the socket has a new name: a kubelet that still knows the last one (1.37) refuses it under that name for ever.
No decisions about devices: those are `Hands`'.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from app.agent.gift import CannotHand, Gift
from app.agent.kubelet import deviceplugin_pb2 as api
from app.agent.kubelet import deviceplugin_pb2_grpc as wire
from app.agent.kubelet.channel import OPTIONS, Inode, inode_of, target, words_of
from app.agent.kubelet.ids import Offered

log = logging.getLogger(__name__)

VERSION = "v1beta1"
KUBELET_SOCKET = "kubelet.sock"
SOCKET_PREFIX = "tangram-"
LONGEST_PATH = 107
"""Bytes of a unix socket's path."""

LOOK_SECONDS = 1.0
"""Between looks at the sockets: some stat calls. A restarted kubelet runs nothing with devices until we register."""
REGISTER_SECONDS = 15.0
"""The kubelet dials us before it answers, and gives that 10 s."""
LISTEN_SECONDS = 5.0
"""How long after it answered its stream may take to come, before we begin again."""
SETTLE_SECONDS = 0.2
"""Between the end of a socket and the next: kubelets that know a resource by its name alone confuse the two."""
LONGEST_PAUSE_SECONDS = 30.0
"""Between attempts that fail, doubled from a second; a new kubelet.sock ends the pause."""
LASTED_SECONDS = 10.0
"""A connection that held for so long was none of the failed attempts."""
GRACE_SECONDS = 0.2
"""For streams to end by themselves: gRPC prints a traceback for each that is broken off."""
CLOSE_SECONDS = 5.0
LONGEST_WORDS = 1000  # of a refusal: they travel in a header

Answer = TypeVar("Answer")
NOTHING: Mapping[str, tuple[Offered, ...]] = MappingProxyType({})


class Hands(Protocol):
    """Who decides which devices a container gets. Called in the plugins' own event loop, several calls at once.

    A call runs to its end even if the kubelet hangs up meanwhile. `CannotHand` reaches the pod's status in its words.
    """

    async def prefer(
        self, resource: str, available: Sequence[str], must_include: Sequence[str], size: int
    ) -> Sequence[str]:
        """The ids that the kubelet should take of those available; it may take others."""
        ...

    async def allocate(self, resource: str, ids: Sequence[str]) -> Gift:
        """What a container is given, for which the kubelet counts these ids."""
        ...


class DevicePlugins:
    """Serves and registers everything that is offered, in one thread with an event loop of its own.

    `directory` is the kubelet's folder device-plugins. `trouble` says in words what is not registered just now; it is
    empty when all is well.
    """

    def __init__(
        self,
        directory: Path,
        hands: Hands,
        *,
        look_seconds: float = LOOK_SECONDS,
        listen_seconds: float = LISTEN_SECONDS,
    ) -> None:
        self.trouble = "the device plugins have not been registered yet"
        self._directory = directory
        self._hands = hands
        self._look_seconds = look_seconds
        self._listen_seconds = listen_seconds
        self._offered = NOTHING
        self._plugins: dict[str, _Plugin] = {}
        self._closing = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[None], asyncio.Event] | None = None
        self._thread = threading.Thread(target=self._run, name="device-plugins", daemon=True)

    def start(self) -> None:
        """Begin; once."""
        self._thread.start()

    def offer(self, resources: Mapping[str, tuple[Offered, ...]]) -> None:
        """What the kubelet may count from now on. A resource that is left out stays registered, with nothing."""
        if resources == self._offered:
            return
        self._offered = dict(resources)
        running = self._running
        if running is not None:
            loop, _, wake = running
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                loop.call_soon_threadsafe(wake.set)

    def close(self) -> None:
        """Stop serving and remove the sockets. The kubelet counts the devices as unhealthy then; pods keep theirs."""
        self._closing = True
        running = self._running
        if running is not None:
            loop, task, _ = running
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(task.cancel)
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    # -- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        wake = asyncio.Event()
        task = asyncio.current_task()
        assert task is not None
        self._running = asyncio.get_running_loop(), task, wake
        try:
            self._remove_leftovers()
            while not self._closing:
                wake.clear()
                await self._look_safely()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(wake.wait(), self._look_seconds)
        finally:
            self._running = None
            self.trouble = "the device plugins are closed"
            for plugin in self._plugins.values():
                await plugin.end()

    def _remove_leftovers(self) -> None:
        """Sockets of agents before us, on which nobody listens any more."""
        with contextlib.suppress(OSError):
            for path in self._directory.glob(f"{SOCKET_PREFIX}*.sock"):
                path.unlink(missing_ok=True)

    async def _look_safely(self) -> None:
        try:
            self.trouble = await self._look()
        except Exception as error:
            log.exception("a look at the device plugins failed")
            self.trouble = f"the device plugins failed: {type(error).__name__}: {error}"

    async def _look(self) -> str:
        """Pass on what is offered, and begin again with what is not connected; what is wrong now, in words."""
        self._pass_on()
        now, kubelet = _now(), inode_of(self._directory / KUBELET_SOCKET)
        apart = [each for each in self._plugins.values() if not each.is_connected(kubelet, now, self._listen_seconds)]
        if apart and kubelet is None:
            return f"the kubelet does not listen: there is no {self._directory / KUBELET_SOCKET}"
        due = [plugin for plugin in apart if plugin.is_due(kubelet, now)]
        if due and kubelet is not None:
            await self._begin(due, kubelet)
        return "; ".join(dict.fromkeys(plugin.trouble for plugin in apart if plugin.trouble))

    def _pass_on(self) -> None:
        offered = self._offered
        for resource in offered:
            if resource not in self._plugins:
                self._plugins[resource] = _Plugin(resource, self._directory, self._hands, self._look_seconds)
        for resource, plugin in self._plugins.items():
            plugin.show(offered.get(resource, ()))

    async def _begin(self, plugins: Sequence[_Plugin], kubelet: Inode) -> None:
        """Serve and register these anew; where the kubelet does not answer the first, the rest is not tried."""
        if any([await plugin.end() for plugin in plugins]):
            await asyncio.sleep(SETTLE_SECONDS)
        silence = ""
        for plugin in plugins:
            if silence:
                plugin.put_off(silence, kubelet)
            else:
                silence = await plugin.begin(kubelet)


class NotRegistered(Exception):
    """A resource could not be served or registered, in words. `silent`: the kubelet does not answer at all."""

    def __init__(self, words: str, *, silent: bool = False) -> None:
        super().__init__(words)
        self.silent = silent


class _Plugin:
    """One resource: what it has, its socket while it has one, and how often it could not be registered."""

    def __init__(self, resource: str, directory: Path, hands: Hands, first_pause: float) -> None:
        self.trouble = ""
        self.resource = resource
        self.hands = hands
        self.devices: tuple[Offered, ...] = ()
        self.news = asyncio.Event()
        self._directory = directory
        self._first_pause = first_pause
        self._socket: _Socket | None = None
        self._kubelet: Inode | None = None
        self._registered_at = float("-inf")
        self._attempts = 0
        self._pause_until = float("-inf")

    def show(self, devices: tuple[Offered, ...]) -> None:
        """What every stream says from now on."""
        if devices != self.devices:
            self.devices = devices
            self.tell()

    def tell(self) -> None:
        """Wake every stream."""
        told, self.news = self.news, asyncio.Event()
        told.set()

    def is_connected(self, kubelet: Inode | None, now: float, patience: float) -> bool:
        """Whether this kubelet listens, or was told to just now."""
        socket, since = self._socket, now - self._registered_at
        if socket is None or self._kubelet != kubelet or not socket.is_there():
            return False
        if socket.streams and since > LASTED_SECONDS:
            self._attempts = 0
        connected = socket.streams > 0 or since < patience
        self.trouble = "" if connected else f"the kubelet no longer listens to {self.resource}"
        return connected

    def is_due(self, kubelet: Inode | None, now: float) -> bool:
        """Whether to begin now: not in the pause after an attempt, unless this is another kubelet."""
        return now >= self._pause_until or self._kubelet != kubelet

    async def begin(self, kubelet: Inode) -> str:
        """Serve on a fresh socket and register it. Words where the kubelet does not answer at all, else `trouble`."""
        try:
            path = self._fresh_path()
            self._socket = _Socket(self, path)
            await self._socket.serve()
            await self._register(path.name)
        except NotRegistered as error:
            await self.end()
            self.put_off(str(error), kubelet)
            return str(error) if error.silent else ""
        self.put_off("", kubelet)
        self._registered_at = _now()
        log.info("registered %s with the kubelet (%d ids)", self.resource, len(self.devices))
        return ""

    async def end(self) -> bool:
        """Stop serving, if it did: every stream ends, and the socket goes."""
        socket, self._socket = self._socket, None
        if socket is not None:
            await socket.end()
        return socket is not None

    def put_off(self, words: str, kubelet: Inode) -> None:
        """No further attempt with this kubelet for a while; longer each time, until a connection has lasted."""
        if words and words != self.trouble:
            log.warning("%s", words)
        self._attempts = self._attempts + 1 if kubelet == self._kubelet else 1
        self.trouble, self._kubelet = words, kubelet
        self._pause_until = _now() + min(LONGEST_PAUSE_SECONDS, self._first_pause * 2 ** (self._attempts - 1))

    def _fresh_path(self) -> Path:
        """A socket that nobody has seen before, named for people where the path is not too long for that."""
        nonce = secrets.token_hex(4)
        named = f"{SOCKET_PREFIX}{self.resource.replace('/', '_')}-{nonce}.sock"
        for path in (self._directory / named, self._directory / f"{SOCKET_PREFIX}{nonce}.sock"):
            if len(os.fsencode(path)) <= LONGEST_PATH:
                return path
        raise NotRegistered(f"{path} is too long for a socket: a path has {LONGEST_PATH} bytes at most")

    async def _register(self, endpoint: str) -> None:
        kubelet = self._directory / KUBELET_SOCKET
        request = api.RegisterRequest(
            version=VERSION, endpoint=endpoint, resource_name=self.resource, options=_options()
        )
        try:
            async with grpc.aio.insecure_channel(target(kubelet), options=OPTIONS) as channel:
                await wire.RegistrationStub(channel).Register(request, timeout=REGISTER_SECONDS)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                words = f"the kubelet does not answer at {kubelet}: {words_of(error)}"
                raise NotRegistered(words, silent=True) from error
            raise NotRegistered(f"the kubelet refuses {self.resource}: {words_of(error)}") from error


class _Socket(wire.DevicePluginServicer):
    """What the kubelet calls, on one socket; registered once at most. The methods' names are the API's."""

    def __init__(self, plugin: _Plugin, path: Path) -> None:
        self.streams = 0
        self._plugin = plugin
        self._path = path
        self._ending = False
        self._server = grpc.aio.server(options=OPTIONS)
        self._work: set[asyncio.Future[Any]] = set()

    async def serve(self) -> None:
        """Begin to listen. Raises `NotRegistered`."""
        wire.add_DevicePluginServicer_to_server(self, self._server)
        try:
            self._server.add_insecure_port(target(self._path))
        except RuntimeError as error:
            raise NotRegistered(f"cannot listen at {self._path}: {error}") from error
        await self._server.start()

    def is_there(self) -> bool:
        """Whether the kubelet could still find it."""
        return inode_of(self._path) is not None

    async def end(self) -> None:
        """End the streams, then stop listening; gRPC removes the file. Calls that last are broken off."""
        self._ending = True
        self._plugin.tell()
        await self._server.stop(grace=GRACE_SECONDS)

    async def GetDevicePluginOptions(self, request: api.Empty, context: Any) -> api.DevicePluginOptions:  # noqa: N802
        """The same options as are registered."""
        return _options()

    async def ListAndWatch(  # noqa: N802
        self, request: api.Empty, context: Any
    ) -> AsyncIterator[api.ListAndWatchResponse]:
        """Every device now, and again after each change."""
        self.streams += 1
        try:
            while not self._ending:
                news = self._plugin.news
                yield _listed(self._plugin.devices)
                await news.wait()
        finally:
            self.streams -= 1

    async def GetPreferredAllocation(  # noqa: N802
        self, request: api.PreferredAllocationRequest, context: Any
    ) -> api.PreferredAllocationResponse:
        """What `Hands` prefers, for each container; the kubelet asks for one at a time."""
        answer = api.PreferredAllocationResponse()
        for asked in request.container_requests:
            available, needed = tuple(asked.available_deviceIDs), tuple(asked.must_include_deviceIDs)
            preferred = self._plugin.hands.prefer(self._plugin.resource, available, needed, asked.allocation_size)
            answer.container_responses.add(deviceIDs=await self._finish(preferred, context))
        return answer

    async def Allocate(self, request: api.AllocateRequest, context: Any) -> api.AllocateResponse:  # noqa: N802
        """What `Hands` gives, for each container; the kubelet asks for one at a time."""
        answer = api.AllocateResponse()
        for asked in request.container_requests:
            allocated = self._plugin.hands.allocate(self._plugin.resource, tuple(asked.devices_ids))
            answer.container_responses.append(_given(await self._finish(allocated, context)))
        return answer

    async def _finish(self, work: Coroutine[Any, Any, Answer], context: Any) -> Answer:
        """Its answer, or its words as the call's error; it is not stopped where the kubelet stops waiting."""
        task = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._done)
        try:
            return await asyncio.shield(task)
        except CannotHand as error:
            code, words = grpc.StatusCode.FAILED_PRECONDITION, str(error)
        except Exception as error:
            log.exception("handing out %s failed", self._plugin.resource)
            code, words = grpc.StatusCode.INTERNAL, f"the agent failed: {type(error).__name__}: {error}"
        await context.abort(code, words[:LONGEST_WORDS])
        raise AssertionError("abort raises")

    def _done(self, task: asyncio.Future[Any]) -> None:
        self._work.discard(task)
        if not task.cancelled():
            task.exception()  # said to the kubelet, if it still waits


def _now() -> float:
    return asyncio.get_running_loop().time()


def _options() -> api.DevicePluginOptions:
    return api.DevicePluginOptions(pre_start_required=False, get_preferred_allocation_available=True)


def _listed(devices: Sequence[Offered]) -> api.ListAndWatchResponse:
    said = api.ListAndWatchResponse()
    for device in devices:
        one = said.devices.add(ID=device.id, health="Healthy" if device.healthy else "Unhealthy")
        if device.numa is not None:
            one.topology.nodes.add(ID=device.numa)
    return said


def _given(gift: Gift) -> api.ContainerAllocateResponse:
    return api.ContainerAllocateResponse(
        envs=gift.envs,
        annotations=gift.annotations,
        cdi_devices=[api.CDIDevice(name=name) for name in gift.cdi_names],
        devices=[
            api.DeviceSpec(container_path=node.path, host_path=node.host_path, permissions=node.permissions)
            for node in gift.device_nodes
        ],
        mounts=[
            api.Mount(container_path=mount.container_path, host_path=mount.host_path, read_only=mount.read_only)
            for mount in gift.mounts
        ],
    )
