"""A kubelet for tests: serves Registration as the real device manager does, dials plugins, and lists pods.

Its messages are built and read by hand from the API's field numbers (`Fields`), so that a mistake in our .proto
files does not agree with itself. Everything runs in gRPC's threads; what is waited for is awaited with `until`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc

WAIT_SECONDS = 15.0

Fields = list[tuple[int, Any]]
"""A message: field number and value, in order. Values: int, bool, str, or bytes of a message."""


def until(true: Callable[[], Any], what: str = "") -> Any:
    """Wait for it; what it gave."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        found = true()
        if found:
            return found
        assert time.monotonic() < end, f"waited {WAIT_SECONDS} s in vain for {what or true}"
        time.sleep(0.005)


# ---- messages ----


def encode(fields: Fields) -> bytes:
    """The protocol buffers wire format."""
    written = b""
    for number, value in fields:
        if isinstance(value, int):
            written += _varint(number << 3) + _varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            written += _varint(number << 3 | 2) + _varint(len(data)) + data
    return written


def decode(data: bytes) -> dict[int, list[Any]]:
    """Every value by field number; strings and messages as bytes."""
    found: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        value: Any
        value, at = _read_varint(data, at)
        if key & 7 == 2:
            at, value = at + value, data[at : at + value]
        else:
            assert key & 7 == 0
        found.setdefault(key >> 3, []).append(value)
    return found


def texts(values: Sequence[bytes]) -> tuple[str, ...]:
    return tuple(value.decode() for value in values)


def text(message: dict[int, list[Any]], number: int) -> str:
    """A string field, empty where it is not there."""
    return str(message.get(number, [b""])[0].decode())


def _varint(value: int) -> bytes:
    written = b""
    while value > 127:
        written += bytes([value & 127 | 128])
        value >>= 7
    return written + bytes([value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


# ---- the kubelet ----


class Plugin:
    """The kubelet's end of one registered socket: a stream that is read for ever, and the calls."""

    def __init__(self, resource: str, path: Path) -> None:
        self.resource = resource
        self.path = path
        self.channel = grpc.insecure_channel(f"unix:{path}")
        grpc.channel_ready_future(self.channel).result(timeout=10)
        self.options = decode(self.call("GetDevicePluginOptions", b""))
        self.heard: list[dict[str, tuple[str, int | None]]] = []
        self.hung_up = threading.Event()
        self._stream: Any = None

    def watch(self) -> None:
        """Open the stream, as the kubelet does once it has answered Register."""
        self._stream = self.channel.unary_stream("/v1beta1.DevicePlugin/ListAndWatch")(b"")
        threading.Thread(target=self._listen, args=(self._stream, self.heard), daemon=True).start()

    def another(self) -> list[dict[str, tuple[str, int | None]]]:
        """What a second stream hears."""
        heard: list[dict[str, tuple[str, int | None]]] = []
        stream = self.channel.unary_stream("/v1beta1.DevicePlugin/ListAndWatch")(b"")
        threading.Thread(target=self._listen, args=(stream, heard), daemon=True).start()
        return heard

    def _listen(self, stream: Any, heard: list[dict[str, tuple[str, int | None]]]) -> None:
        try:
            for message in stream:
                heard.append(dict(_device(one) for one in decode(message).get(1, [])))
        except grpc.RpcError:
            pass
        if stream is self._stream:
            self.hung_up.set()

    def stop_listening(self) -> None:
        """End the stream and nothing else."""
        self._stream.cancel()

    def call(self, method: str, request: bytes, seconds: float = 10) -> bytes:
        answer: bytes = self.channel.unary_unary(f"/v1beta1.DevicePlugin/{method}")(request, timeout=seconds)
        return answer

    def prefer(self, available: Sequence[str], must_include: Sequence[str], size: int) -> tuple[str, ...]:
        asked = encode([*[(1, id_) for id_ in available], *[(2, id_) for id_ in must_include], (3, size)])
        answer = decode(self.call("GetPreferredAllocation", encode([(1, asked)])))
        (one,) = answer[1]
        return texts(decode(one).get(1, []))

    def allocate(self, ids: Sequence[str], seconds: float = 10) -> dict[int, list[Any]]:
        asked = encode([(1, id_) for id_ in ids])
        (one,) = decode(self.call("Allocate", encode([(1, asked)]), seconds))[1]
        return decode(one)


def _device(data: bytes) -> tuple[str, tuple[str, int | None]]:
    message = decode(data)
    numa: int | None = None
    if 3 in message:
        (node,) = decode(message[3][0])[1]
        numa = decode(node).get(1, [0])[0]
    return text(message, 1), (text(message, 2), numa)


class Kubelet:
    """A kubelet on a folder. Like the real one it deletes every socket there when it starts.

    `refuses` maps resources to words. A `deaf` one registers and never listens.
    """

    def __init__(self, directory: Path, *, refuses: dict[str, str] | None = None, deaf: bool = False) -> None:
        self.directory = directory
        self.registrations: list[tuple[str, str, str]] = []
        self.plugins: dict[str, Plugin] = {}
        self.refuses = refuses or {}
        self._deaf = deaf
        for path in directory.iterdir():
            if path.is_socket():
                path.unlink()
        self._server = grpc.server(ThreadPoolExecutor(4))
        methods = {"Register": grpc.unary_unary_rpc_method_handler(self._register)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v1beta1.Registration", methods),))
        self._server.add_insecure_port(f"unix:{directory / 'kubelet.sock'}")
        self._server.start()

    def _register(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        message = decode(request)
        version, endpoint, resource = (text(message, number) for number in (1, 2, 3))
        self.registrations.append((version, endpoint, resource))
        if resource in self.refuses:
            context.abort(grpc.StatusCode.UNKNOWN, self.refuses[resource])
        plugin = Plugin(resource, self.directory / endpoint)
        assert plugin.options == decode(message[4][0])
        self.plugins[resource] = plugin
        if not self._deaf:
            plugin.watch()
        return b""

    def knows(self, *resources: str) -> dict[str, Plugin]:
        """Wait until these are registered and their first lists have been heard."""
        for resource in resources:
            until(partial(self._has_heard, resource), resource)
        return self.plugins

    def _has_heard(self, resource: str) -> bool:
        return resource in self.plugins and bool(self.plugins[resource].heard)

    def die(self) -> None:
        """As a killed process: no more sockets, the files stay."""
        path = self.directory / "kubelet.sock"
        left = path.with_suffix(".left")
        path.rename(left)  # gRPC would remove it
        for plugin in self.plugins.values():
            plugin.channel.close()
        self._server.stop(0).wait()
        left.rename(path)

    def close(self) -> None:
        for plugin in self.plugins.values():
            plugin.channel.close()
        self._server.stop(0).wait()

    def __enter__(self) -> Kubelet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pods:
    """A PodResources server that answers with these pods: (namespace, name, {container: [(resource, ids), …]})."""

    def __init__(self, socket: Path) -> None:
        self.pods: list[tuple[str, str, dict[str, list[tuple[str, list[str]]]]]] = []
        self.answers: Iterator[str] = iter(())
        self._server = grpc.server(ThreadPoolExecutor(2))
        methods = {"List": grpc.unary_unary_rpc_method_handler(self._list)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v1.PodResourcesLister", methods),))
        self._server.add_insecure_port(f"unix:{socket}")
        self._server.start()

    def _list(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        for words in self.answers:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, words)
        return encode([(1, self._pod(*pod)) for pod in self.pods])

    def _pod(self, namespace: str, name: str, containers: dict[str, list[tuple[str, list[str]]]]) -> bytes:
        """With fields that we do not read: CPUs of pod and container, and the topology of devices."""
        node = encode([(1, encode([(1, encode([(1, 1)]))]))])
        written: Fields = [(1, name), (2, namespace)]
        for container, devices in containers.items():
            listed: Fields = [
                (2, encode([(1, resource), *[(2, id_) for id_ in ids], (3, node)])) for resource, ids in devices
            ]
            written.append((3, encode([(1, container), *listed, (3, b"\x01\x02")])))
        return encode([*written, (4, b"\x03")])

    def close(self) -> None:
        self._server.stop(0).wait()
