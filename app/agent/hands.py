"""What this agent has to do with devices reaching containers (`--hand`): it is the kubelet's device plugin, or it
observes what another plugin gives.

The agent's loop tells it of each report and asks what to say; nothing here decides about devices (`handing`,
`matching`). Only `hands_of` loads what speaks gRPC, and only where it is used.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from app.agent.cdi import CdiFile
from app.agent.giving import Giving
from app.agent.handing import MOST_HANDED, Handing, Said, listed
from app.agent.kubelet.ids import offered
from app.agent.matching import Held, Listed, by_name, observed
from app.agent.record import RecordFile
from app.agent.service import Service
from app.report import NodeReport, Placements

if TYPE_CHECKING:
    from app.agent.kubelet.plugin import DevicePlugins
    from app.agent.kubelet.pod_resources import PodHas

log = logging.getLogger(__name__)

HandOption = Literal["plugin", "observe", "no"]

AGREE_SECONDS = 5.0
"""Between looks at the kubelet's list where we are the plugin: what it shows of its own accord is seldom news."""

OBSERVE_SECONDS = 0.5
"""Where another plugin hands out: the ledger follows within a second."""

CHECKPOINT = "kubelet_internal_checkpoint"
"""The kubelet's device manager writes it with each allocation (devicemanager/types.go of Kubernetes), so its list need
not be asked for as long as this file is the same: that would cost an agent at rest 0.4 % of a core."""

NVIDIA_PREFIX = "nvidia.com/"


def _nothing() -> None:
    """Where nobody wants to be called."""


class Hands(Protocol):
    """What the agent's loop knows of it."""

    def start(self, changed: Callable[[], None]) -> None:
        """Begin. `changed` is called, from any thread, when there is something to report."""

    def reported(self, report: NodeReport) -> None:
        """What has just been read of the node."""

    def placements(self, placements: Placements) -> None:
        """Who is to have what, as the service says."""

    def said(self) -> Said:
        """For the report; equal while nothing has changed."""

    def close(self) -> None:
        """End."""


class Plugin:
    """The kubelet's device plugin: keeps what is offered as the last report and the service's list want it."""

    def __init__(
        self, handing: Handing, plugins: DevicePlugins, watch: Watch, *, cdi: CdiFile | None, shares: bool
    ) -> None:
        self._handing = handing
        self._cdi = cdi
        self._plugins = plugins
        self._watch = watch
        self._shares = shares
        self._report: NodeReport | None = None
        self._lock = threading.Lock()

    def start(self, changed: Callable[[], None]) -> None:
        """Serve, register, and look at the kubelet's list."""
        self._handing.call_when_changed(changed)
        self._plugins.start()
        self._watch.start()

    def reported(self, report: NodeReport) -> None:
        """Offer what it has."""
        if self._cdi is not None and report.gpus:
            self._cdi.keep(report)
        self._handing.reported(report)
        self._report = report
        self._offer()

    def placements(self, placements: Placements) -> None:
        """Keep them, and offer the GPUs whose mode may be switched in both forms."""
        self._handing.placements(placements)
        self._offer()

    def _offer(self) -> None:
        with self._lock:  # the loop's and the feed's thread: the later offer must be the newer one
            if self._report is not None and self._report.gpus:
                self._plugins.offer(offered(self._report, self._handing.either, share_resources=self._shares))

    def said(self) -> Said:
        """What was handed; what keeps all containers from their devices comes first."""
        said = self._handing.said()
        trouble = self._plugins.trouble or (self._cdi.trouble if self._cdi is not None else "")
        return replace(said, none=trouble[:500]) if trouble else said

    def close(self) -> None:
        """Stop serving; what was handed stays with its containers."""
        self._plugins.close()


class Observed:
    """Another plugin's handing, read from the kubelet."""

    def __init__(
        self,
        read: Callable[[], Iterable[PodHas]],
        *,
        checkpoint: Path | None = None,
        close: Callable[[], None] | None = None,
        seconds: float = OBSERVE_SECONDS,
    ) -> None:
        self._watch = Watch(read, self._seen, seconds=seconds, checkpoint=checkpoint, close=close or _nothing)
        self._changed: Callable[[], None] = _nothing
        self._report: NodeReport | None = None
        self._listed: Listed | None = None
        self._silent = "the kubelet has not been asked yet"
        self._count = 0
        self._said = Said("observe", self._silent, (), {})

    def start(self, changed: Callable[[], None]) -> None:
        """Read it again and again."""
        self._changed = changed
        self._watch.start()

    def reported(self, report: NodeReport) -> None:
        """UUIDs of slices come with the report."""
        if report is not self._report:
            self._report = report
            self._say()

    def placements(self, placements: Placements) -> None:
        """A placement is advice here."""

    def said(self) -> Said:
        """What the kubelet counts, translated."""
        return self._said

    def close(self) -> None:
        """The thread ends with the process."""

    def _seen(self, kubelet: Listed | None, _asked_at: float, silent: str) -> None:
        if (kubelet, silent) == (self._listed, self._silent):
            return
        if kubelet is not None:  # while it is silent containers keep what they have
            self._listed = kubelet
        self._silent = silent
        self._say()

    def _say(self) -> None:
        if self._report is None:
            return
        handed = tuple(one.said() for one in what_others_handed(self._listed, self._report))[:MOST_HANDED]
        self._count += len([one for one in handed if one not in self._said.handed])
        said = Said("observe", self._silent, handed, {"observed": self._count} if self._count else {})
        if said != self._said:
            self._said = said
            self._changed()


def what_others_handed(kubelet: Listed | None, report: NodeReport) -> tuple[Held, ...]:
    """What the kubelet lists of NVIDIA's resources, in the report's order."""
    found = [
        Held(
            namespace=place.namespace,
            name=place.name,
            container=place.container,
            resource=place.resource,
            devices=observed(ids, report),
            ids=ids,
            how="observed",
        )
        for place, ids in (kubelet.places() if kubelet is not None else ())
        if place.resource.startswith(NVIDIA_PREFIX)
    ]
    return tuple(sorted(found, key=by_name))


class Watch:
    """Reads the kubelet's list again and again, in a thread of its own that ends with the process.

    `seen` gets the list and the clock before it was asked for, or the words of a kubelet that is silent.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[PodHas]],
        seen: Callable[[Listed | None, float, str], object],
        *,
        seconds: float,
        checkpoint: Path | None = None,
        close: Callable[[], None] = _nothing,
    ) -> None:
        """With `checkpoint` only when that file has changed, and now and then.

        `close` closes the connection before a long rest: an open one that is not used costs 0.1 % of a core.
        """
        self._read = read
        self._seen = seen
        self._seconds = seconds
        self._checkpoint = checkpoint
        self._close = close

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._run, name="pod-resources", daemon=True).start()

    def _run(self) -> None:
        while True:
            asked_at, file = time.monotonic(), self._file()
            try:
                kubelet, silent = listed(self._read()), ""
            except Exception as error:  # KubeletSilent; and nothing else may end it
                kubelet, silent = None, str(error)[:500] or type(error).__name__
            try:
                self._seen(kubelet, asked_at, silent)
            except Exception:
                log.exception("the kubelet's list")
            told = None if silent else file
            if told is not None or self._seconds >= AGREE_SECONDS:
                self._close()
            time.sleep(self._seconds)
            while told is not None and self._file() == told and time.monotonic() - asked_at < AGREE_SECONDS:
                time.sleep(self._seconds)

    def _file(self) -> tuple[int, int] | None:
        """What tells one checkpoint from another; None where there is none to be seen."""
        try:
            found = self._checkpoint.stat() if self._checkpoint is not None else None
        except OSError:
            return None
        return (found.st_ino, found.st_mtime_ns) if found is not None else None


def hands_of(
    option: HandOption,
    *,
    node: str,
    service: Service,
    giving: Giving,
    shares: bool,
    kubelet_dir: Path,
    state_dir: Path | None,
    proc: Path,
) -> Hands | None:
    """What `--hand` asks for; `service` is where exchanges are asked for. Raises ValueError for what does not fit."""
    if option == "no":
        return None
    from app.agent.kubelet.pod_resources import PodResources

    kubelet = PodResources(kubelet_dir / "pod-resources" / "kubelet.sock")
    if option == "observe":
        return Observed(kubelet.read, checkpoint=kubelet_dir / "device-plugins" / CHECKPOINT, close=kubelet.close)
    if state_dir is None:
        raise ValueError("handing out devices needs --state-dir: a restarted agent must know what it has handed out")
    from app.agent.kubelet.plugin import DevicePlugins

    giver, cdi = giving.build(proc)
    handing = Handing(
        report=NodeReport(node=node, version=0),
        kubelet=kubelet,
        giver=giver,
        exchange=service.exchange,
        record=RecordFile(state_dir, node=node),
    )
    plugins = DevicePlugins(kubelet_dir / "device-plugins", handing)
    watch = Watch(kubelet.read, handing.agree, seconds=AGREE_SECONDS, close=kubelet.close)
    return Plugin(handing, plugins, watch, cdi=cdi, shares=shares)
