"""Device plugins against a kubelet that behaves as the real one: registered again and again, whatever happens to it."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from app.agent.gift import CannotHand, DeviceNode, Gift, Mount
from app.agent.kubelet import plugin as plugin_module
from app.agent.kubelet.ids import Offered
from app.agent.kubelet.plugin import DevicePlugins
from tests.agent.kubelet.fake import Kubelet, Plugin, decode, text, texts, until

GPU, MIG = "nvidia.com/gpu", "nvidia.com/mig-1g.10gb.me"


def devices(*ids: str, healthy: bool = True, numa: int | None = None) -> tuple[Offered, ...]:
    return tuple(Offered(id_, healthy, numa) for id_ in ids)


BOTH = {GPU: devices("a", "b"), MIG: devices("c/1g.10gb.me@0", numa=1)}


class OurHands:
    """Hands that say what they were asked, and answer as they are told."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.gift = Gift()
        self.fails: Exception | None = None
        self.preferred: Sequence[str] = ()
        self.together: threading.Barrier | None = None
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.finished = 0

    async def prefer(
        self, resource: str, available: Sequence[str], must_include: Sequence[str], size: int
    ) -> Sequence[str]:
        self.asked.append(("prefer", resource, available, must_include, size))
        if self.fails:
            raise self.fails
        return self.preferred

    async def allocate(self, resource: str, ids: Sequence[str]) -> Gift:
        self.asked.append(("allocate", resource, ids))
        if self.fails:
            raise self.fails
        if self.together:
            await asyncio.to_thread(self.together.wait, 10)
        self.begun.set()
        await asyncio.to_thread(self.go_on.wait, 10)
        self.finished += 1
        return self.gift


@pytest.fixture
def hands() -> OurHands:
    return OurHands()


Serve = Callable[..., DevicePlugins]


@pytest.fixture
def serve(folder: Path, hands: OurHands) -> Iterator[Serve]:
    """Starts plugins in the folder that offer this; closes them afterwards."""
    made: list[DevicePlugins] = []

    def start(
        offer: dict[str, tuple[Offered, ...]] = BOTH, directory: Path = folder, **options: float
    ) -> DevicePlugins:
        plugins = DevicePlugins(directory, hands, **{"look_seconds": 0.02, **options})
        plugins.offer(offer)
        plugins.start()
        made.append(plugins)
        return plugins

    yield start
    for plugins in made:
        plugins.close()


@pytest.fixture
def kubelet(folder: Path) -> Iterator[Kubelet]:
    with Kubelet(folder) as made:
        yield made


@pytest.fixture
def gpus(kubelet: Kubelet, serve: Serve) -> Plugin:
    """The kubelet's end of `nvidia.com/gpu`."""
    serve()
    return kubelet.knows(GPU, MIG)[GPU]


def sockets(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("tangram-"))


# ---- registering ----


def test_every_resource_is_registered_on_a_socket_of_its_own(kubelet: Kubelet, serve: Serve, folder: Path):
    plugins = serve()

    known = kubelet.knows(GPU, MIG)

    assert sorted((version, resource) for version, _, resource in kubelet.registrations) == [
        ("v1beta1", GPU),
        ("v1beta1", MIG),
    ]
    assert sorted(endpoint for _, endpoint, _ in kubelet.registrations) == sockets(folder)
    assert known[GPU].heard == [{"a": ("Healthy", None), "b": ("Healthy", None)}]
    assert known[MIG].heard == [{"c/1g.10gb.me@0": ("Healthy", 1)}]
    until(lambda: plugins.trouble == "")


def test_a_preference_is_available_and_no_start_is_required(gpus: Plugin):
    """Field 2 is get_preferred_allocation_available; field 1, pre_start_required, is false and so not sent."""
    assert gpus.options == {2: [1]}


def test_nothing_offered_registers_nothing_and_is_no_trouble(kubelet: Kubelet, serve: Serve):
    plugins = serve({})

    until(lambda: plugins.trouble == "")
    assert kubelet.registrations == []


@pytest.mark.parametrize(("room", "start"), [(60, "tangram-nvidia.com_"), (30, "tangram-")])
def test_socket_names_say_their_resource_where_the_path_has_room(folder: Path, serve: Serve, room: int, start: str):
    deep = folder / ("d" * (plugin_module.LONGEST_PATH - room - len(os.fsencode(folder)) - 1))
    deep.mkdir()
    with Kubelet(deep) as kubelet:
        serve(directory=deep)
        kubelet.knows(GPU, MIG)

        assert all(name.startswith(start) for name in sockets(deep))
        assert all(len(os.fsencode(deep / name)) <= plugin_module.LONGEST_PATH for name in sockets(deep))


def test_a_folder_that_is_too_deep_for_sockets_is_said_in_words(folder: Path, serve: Serve):
    deep = folder / ("d" * (plugin_module.LONGEST_PATH - 15 - len(os.fsencode(folder)) - 1))
    deep.mkdir()
    with Kubelet(deep):
        plugins = serve(directory=deep)

        until(lambda: "too long for a socket: a path has 107 bytes at most" in plugins.trouble)


def test_a_kubelet_that_is_not_there_yet_is_said_and_found_when_it_comes(folder: Path, serve: Serve):
    plugins = serve()
    until(lambda: plugins.trouble == f"the kubelet does not listen: there is no {folder}/kubelet.sock")

    with Kubelet(folder) as kubelet:
        kubelet.knows(GPU, MIG)
        until(lambda: plugins.trouble == "")


def test_a_folder_that_is_not_there_is_said_and_found_when_it_comes(folder: Path, serve: Serve):
    plugins = serve(directory=folder / "device-plugins")
    until(lambda: "the kubelet does not listen" in plugins.trouble)

    (folder / "device-plugins").mkdir()
    with Kubelet(folder / "device-plugins") as kubelet:
        kubelet.knows(GPU, MIG)


def test_a_socket_on_which_no_kubelet_listens_is_said_and_tried_again(
    folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
):
    """What a kubelet that died leaves behind."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "kubelet.sock"))
    plugins = serve()
    until(lambda: plugins.trouble == f"the kubelet does not answer at {folder}/kubelet.sock: Connection refused")

    attempts: list[str] = []

    def nonce(_: int) -> str:
        attempts.append(f"{len(attempts):08}")
        return attempts[-1]

    monkeypatch.setattr("app.agent.kubelet.plugin.secrets.token_hex", nonce)
    until(lambda: len(attempts) >= 2)
    until(lambda: sockets(folder) == [])
    with Kubelet(folder) as kubelet:  # another socket: no pause is waited out
        kubelet.knows(GPU, MIG)
        until(lambda: plugins.trouble == "")


def test_a_refusal_is_said_in_the_kubelets_words_and_hinders_no_other_resource(folder: Path, serve: Serve):
    with Kubelet(folder, refuses={GPU: "no such names here"}) as kubelet:
        plugins = serve()
        kubelet.knows(MIG)
        until(lambda: plugins.trouble == f"the kubelet refuses {GPU}: no such names here")

        kubelet.refuses.clear()
        kubelet.knows(GPU)
        until(lambda: plugins.trouble == "")


def test_pauses_grow_and_end(folder: Path, hands: OurHands):
    """The same kubelet is asked ever less often, another one at once."""

    async def pauses() -> list[int]:
        plugin = plugin_module._Plugin(GPU, folder, hands, first_pause=1.0)
        now = asyncio.get_running_loop().time()
        found = []
        for _ in range(8):
            plugin.put_off("refused", (1, 1, 1))
            found.append(next(s for s in range(100) if plugin.is_due((1, 1, 1), now + s + 0.5)))
            assert plugin.is_due((1, 2, 1), now)
        return found

    assert asyncio.run(pauses()) == [1, 2, 4, 8, 16, 30, 30, 30]


# ---- what is offered ----


def test_every_stream_says_the_devices_at_once_and_after_each_change(kubelet: Kubelet, serve: Serve):
    plugins = serve()
    known = kubelet.knows(GPU, MIG)
    other = known[GPU].another()
    until(lambda: other)

    plugins.offer({**BOTH, GPU: devices("a") + devices("b", healthy=False, numa=0)})
    changed = {"a": ("Healthy", None), "b": ("Unhealthy", 0)}
    until(lambda: known[GPU].heard[-1] == changed)
    until(lambda: other[-1] == changed)

    plugins.offer(BOTH)
    until(lambda: len(known[GPU].heard) == 3)
    assert known[GPU].heard[0] == known[GPU].heard[2]
    assert len(known[MIG].heard) == 1


def test_the_same_offer_again_says_nothing(kubelet: Kubelet, serve: Serve):
    plugins = serve()
    known = kubelet.knows(GPU, MIG)

    for _ in range(20):
        plugins.offer({name: tuple(Offered(d.id, d.healthy, d.numa) for d in many) for name, many in BOTH.items()})
    plugins.offer({**BOTH, MIG: devices("d")})

    until(lambda: len(known[MIG].heard) == 2)
    assert len(known[GPU].heard) == 1


def test_a_resource_that_is_gone_says_so_and_stays_registered(kubelet: Kubelet, serve: Serve):
    plugins = serve()
    known = kubelet.knows(GPU, MIG)

    plugins.offer({MIG: BOTH[MIG]})
    until(lambda: known[GPU].heard[-1] == {})
    plugins.offer(BOTH)
    until(lambda: set(known[GPU].heard[-1]) == {"a", "b"})

    assert len(kubelet.registrations) == 2
    assert not known[GPU].hung_up.is_set()


def test_a_resource_that_appears_is_registered_then(kubelet: Kubelet, serve: Serve):
    plugins = serve({GPU: BOTH[GPU]})
    kubelet.knows(GPU)

    plugins.offer(BOTH)

    kubelet.knows(MIG)
    assert not kubelet.plugins[GPU].hung_up.is_set()


def test_many_devices_are_said_in_one_message(kubelet: Kubelet, serve: Serve):
    """The thousandths of 16 GPUs: the kubelet takes at most 4 MiB."""
    ids = [f"GPU-12345678-1234-1234-1234-1234567890{gpu:02}::{n}" for gpu in range(16) for n in range(1000)]
    serve({"tangram.gpu/share-milli": devices(*ids, numa=1)})

    kubelet.knows("tangram.gpu/share-milli")
    assert len(kubelet.plugins["tangram.gpu/share-milli"].heard[0]) == 16_000


# ---- what the kubelet calls ----


def test_the_kubelets_question_reaches_the_hands_whole(gpus: Plugin, hands: OurHands):
    hands.preferred = ("b", "a")

    assert gpus.prefer(["a", "b", "c"], ["a"], 2) == ("b", "a")
    gpus.allocate(["a", "c"])

    assert hands.asked == [("prefer", GPU, ("a", "b", "c"), ("a",), 2), ("allocate", GPU, ("a", "c"))]


def test_the_kubelet_gets_the_gift_whole(gpus: Plugin, hands: OurHands):
    hands.gift = Gift(
        envs={"NVIDIA_VISIBLE_DEVICES": "a"},
        annotations={"cdi.k8s.io/tangram": "x"},
        cdi_names=("nvidia.com/gpu=a", "nvidia.com/gpu=b"),
        device_nodes=(DeviceNode("/dev/nvidia0", "/host/dev/nvidia0", "rw"),),
        mounts=(Mount("/in", "/out", read_only=True), Mount("/in2", "/out2", read_only=False)),
    )

    given = gpus.allocate(["a"])

    (env,), (annotation,), (node,) = given[1], given[4], given[3]
    assert (text(decode(env), 1), text(decode(env), 2)) == ("NVIDIA_VISIBLE_DEVICES", "a")
    assert (text(decode(annotation), 1), text(decode(annotation), 2)) == ("cdi.k8s.io/tangram", "x")
    assert [texts(decode(name)[1]) for name in given[5]] == [("nvidia.com/gpu=a",), ("nvidia.com/gpu=b",)]
    assert [text(decode(node), number) for number in (1, 2, 3)] == ["/dev/nvidia0", "/host/dev/nvidia0", "rw"]
    assert [decode(mount).get(3) for mount in given[2]] == [[1], None]


@pytest.mark.parametrize(
    ("fails", "code", "words"),
    [
        (CannotHand("the slice 1g.10gb at 3 is not there yet"), "FAILED_PRECONDITION", "the slice 1g.10gb at 3 is not"),
        (KeyError("uid"), "INTERNAL", "the agent failed: KeyError: 'uid'"),
        (CannotHand("long " * 10_000), "FAILED_PRECONDITION", "long long"),
    ],
)
def test_what_goes_wrong_in_the_hands_is_an_error_in_words_and_the_next_call_is_answered(
    gpus: Plugin, hands: OurHands, fails: Exception, code: str, words: str
):
    hands.fails = fails
    for call in (lambda: gpus.allocate(["a"]), lambda: gpus.prefer(["a"], [], 1)):
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert (raised.value.code().name, raised.value.details()[: len(words)]) == (code, words)

    hands.fails = None
    hands.preferred = ["a"]
    assert gpus.prefer(["a"], [], 1) == ("a",)
    assert not gpus.hung_up.is_set()


def test_several_calls_are_answered_at_once(kubelet: Kubelet, gpus: Plugin, hands: OurHands):
    """None of them returns before all of them are in the hands."""
    hands.together = threading.Barrier(4)
    hands.gift = Gift(envs={"A": "1"})
    mig = kubelet.plugins[MIG]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda plugin: plugin.allocate(["a"]), [gpus, mig, gpus, mig]))

    assert all(answer == answers[0] for answer in answers)


def test_a_call_that_the_kubelet_no_longer_waits_for_runs_to_its_end(gpus: Plugin, hands: OurHands):
    """Half an exchange with the service would be worse than one that nobody needs."""
    hands.go_on.clear()
    with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
        gpus.allocate(["a"], seconds=0.1)
    until(hands.begun.is_set)
    assert hands.finished == 0

    hands.go_on.set()

    until(lambda: hands.finished == 1)


# ---- restarts ----


def test_a_restarted_kubelet_gets_everything_registered_again(folder: Path, serve: Serve):
    """It has deleted our sockets, and has another kubelet.sock."""
    plugins = serve()
    with Kubelet(folder) as first:
        first.knows(GPU, MIG)
        first.die()
        until(lambda: plugins.trouble)
        with Kubelet(folder) as second:
            plugins.offer({**BOTH, GPU: devices("z")})
            known = second.knows(GPU, MIG)
            until(lambda: set(known[GPU].heard[-1]) == {"z"})
            until(lambda: plugins.trouble == "")

            assert sorted(endpoint for _, endpoint, _ in second.registrations) == sockets(folder)
            assert not {endpoint for _, endpoint, _ in first.registrations} & set(sockets(folder))


def test_a_kubelet_that_restarts_ten_times_is_found_every_time(folder: Path, serve: Serve):
    plugins = serve()
    for _ in range(10):
        with Kubelet(folder) as kubelet:
            kubelet.knows(GPU, MIG)
            kubelet.die()
    until(lambda: plugins.trouble)


def test_a_kubelet_of_which_the_old_one_still_hangs_is_registered_with(folder: Path, serve: Serve):
    """The old process still holds its streams; only kubelet.sock shows that it does not count any more."""
    serve()
    with Kubelet(folder) as old:
        old.knows(GPU, MIG)
        (folder / "kubelet.sock").rename(folder / "old.sock")
        with Kubelet(folder) as new:
            new.knows(GPU, MIG)


def test_a_deleted_socket_is_made_and_registered_again(kubelet: Kubelet, serve: Serve, folder: Path):
    serve()
    before = kubelet.knows(GPU, MIG)[GPU]
    (folder / before.path.name).unlink()

    until(lambda: kubelet.plugins[GPU] is not before and kubelet.plugins[GPU].heard)

    assert [resource for _, _, resource in kubelet.registrations].count(MIG) == 1


def test_a_kubelet_that_hangs_up_is_registered_with_again(kubelet: Kubelet, serve: Serve):
    """It takes the end of the stream for the end of the plugin, and does not dial again by itself."""
    serve(listen_seconds=0.05)
    before = kubelet.knows(GPU, MIG)[GPU]

    before.stop_listening()

    until(lambda: kubelet.plugins[GPU] is not before and kubelet.plugins[GPU].heard)
    assert kubelet.plugins[GPU].path != before.path


def test_a_kubelet_that_registers_and_never_listens_is_trouble(folder: Path, serve: Serve):
    with Kubelet(folder, deaf=True) as kubelet:
        plugins = serve({GPU: BOTH[GPU]}, listen_seconds=0.05)

        until(lambda: plugins.trouble == f"the kubelet no longer listens to {GPU}")
        until(lambda: len(kubelet.registrations) >= 3)


def test_a_new_agent_removes_what_the_last_one_left_and_nothing_else(kubelet: Kubelet, serve: Serve, folder: Path):
    for name in ("tangram-nvidia.com_gpu-0badcafe.sock", "nvidia.sock"):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(folder / name))
    (folder / "kubelet_internal_checkpoint").write_text("{}")

    serve()
    kubelet.knows(GPU, MIG)

    assert "tangram-nvidia.com_gpu-0badcafe.sock" not in sockets(folder)
    assert len(sockets(folder)) == 2
    assert {"nvidia.sock", "kubelet_internal_checkpoint", "kubelet.sock"} <= set(os.listdir(folder))


def test_a_restarted_agent_is_known_to_the_same_kubelet_again(kubelet: Kubelet, serve: Serve):
    first = serve()
    before = kubelet.knows(GPU, MIG)[GPU]
    first.close()
    until(before.hung_up.is_set)

    serve()

    until(lambda: kubelet.plugins[GPU] is not before and kubelet.plugins[GPU].heard)


# ---- the end ----


def test_close_ends_streams_and_removes_sockets(kubelet: Kubelet, serve: Serve, folder: Path):
    plugins = serve()
    known = kubelet.knows(GPU, MIG)

    plugins.close()

    until(known[GPU].hung_up.is_set)
    assert sockets(folder) == []
    assert plugins.trouble == "the device plugins are closed"
    plugins.offer({})
    plugins.close()


def test_close_waits_for_nobody(folder: Path, serve: Serve):
    """Neither for a kubelet that never answers, nor for a call that never ends."""
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(folder / "kubelet.sock"))
        hanging.listen()
        plugins = serve()
        until(lambda: sockets(folder))
        plugins.close()

        assert not plugins._thread.is_alive()


def test_closed_before_it_was_started_it_serves_nothing(folder: Path, hands: OurHands):
    plugins = DevicePlugins(folder, hands)
    plugins.close()
    plugins.start()
    plugins._thread.join(10)

    assert not plugins._thread.is_alive()
    assert sockets(folder) == []


def test_what_fails_in_a_look_is_said_and_the_next_look_goes_on(
    kubelet: Kubelet, serve: Serve, monkeypatch: pytest.MonkeyPatch
):
    look = DevicePlugins._look

    async def broken(self: DevicePlugins) -> str:
        raise RuntimeError("no luck")

    monkeypatch.setattr(DevicePlugins, "_look", broken)
    plugins = serve()
    until(lambda: plugins.trouble == "the device plugins failed: RuntimeError: no luck")

    monkeypatch.setattr(DevicePlugins, "_look", look)
    kubelet.knows(GPU, MIG)
