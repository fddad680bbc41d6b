"""The binds that are declared before their Bindings are sent, in one ConfigMap on the API server.

    declare ─▶ waiting ─▶ one write names all that wait ─▶ the Binding may be sent ─▶ outcome known: a later write
                  │                   │                                               leaves it out
                  │          Conflict, and it is another's now: refused in words, nothing was sent
                  └─ at most one write each 50 ms, at once where none was made lately

Whoever becomes the holder of the Lease first *takes* the journal by writing its own name into it: from then on every
write of a former holder conflicts, so what is read then names every Binding that may still arrive. Nothing is left
out before that has been adopted: is in the ledger, or fenced. Decision 0011.
No decisions about pods here; what has ended is asked of the caller (`is_open`).
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import orjson

from app.errors import Conflict, KubeError, NotFound, Refused, Unknown
from app.kube import Json, Kube
from app.translate import PodRef, device_of
from solver import Device

log = logging.getLogger(__name__)

SUFFIX = "-binds"  # after the Lease's name
HOLDER = "tangram.gpu/journal-of"
VERSION = "1"
LOST = "unknown"  # in place of the entries: somebody must fence what is pending before they are known again

BATCH_SECONDS = 0.05  # between two writes; at 150 binds a second 0.02 costs the API server 0.5 ms more for each
WRITE_SECONDS = 3.0
RETRY_SECONDS = 0.2
TIDY_SECONDS = 5.0  # a journal at rest names what has ended for so long
LIMIT_BYTES = 900_000  # kube-apiserver takes a ConfigMap of 1 MiB; what does not fit waits for others to end


@dataclass(frozen=True, slots=True)
class Intent:
    """A Binding that may be sent: which pod, to which node, with which devices."""

    pod: PodRef
    node: str
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Nobody knows which Bindings may still arrive."""

    reason: str


@dataclass(slots=True)
class Waiting:
    """An intent that no write names yet, and whoever waits for it."""

    uid: str
    line: str
    named: asyncio.Future[None]


class Journal:
    """Ours from `take` on, until a write finds another's name in it; open for declarations once `adopted`."""

    def __init__(
        self,
        kube: Kube,
        *,
        namespace: str,
        name: str,
        is_open: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._is_open = is_open
        self._clock = clock
        self._mark = ""
        self._version = ""
        self._named: dict[str, str] = {}
        """By pod UID: the lines that the journal on the API server has for sure."""
        self._waiting: dict[str, Waiting] = {}
        self._asked = asyncio.Event()
        self._writing = asyncio.Lock()
        self._wrote_at = clock()
        self.taken = False
        """Whether it is ours, as far as we know."""
        self._adopted = False
        self.takes = 0
        self.writes = 0
        self.declared = 0

    # -- a new holder ---------------------------------------------------------------------------------

    async def take(self, *, first: bool) -> tuple[Intent, ...] | Unreadable:
        """Write our name into it; what it names. Raises KubeError: try again.

        `first`: nobody has served before us, so that a missing journal is an empty one (unless we have had one).
        """
        async with self._writing:
            first = first and not self._version
            self.takes += 1
            self._lose("the journal of binds is being taken")
            self._mark = secrets.token_hex(8)
            try:
                found = await self._kube.get_config_map(self._namespace, self._name)
            except NotFound:
                made = await self._kube.create_config_map(self._namespace, self._body("" if first else LOST))
                return self._begin(made, () if first else Unreadable("there is none"))
            text = str((found.get("data") or {}).get("binds", LOST))
            version = found["metadata"]["resourceVersion"]
            body = self._body(text, version, (found.get("data") or {}).get("v", VERSION))
            ours = await self._kube.replace_config_map(self._namespace, self._name, body, timeout=WRITE_SECONDS)
            return self._begin(ours, _read(found.get("data") or {}))

    def _begin(self, journal: Json, entries: tuple[Intent, ...] | Unreadable) -> tuple[Intent, ...] | Unreadable:
        self._version = journal["metadata"]["resourceVersion"]
        known = () if isinstance(entries, Unreadable) else entries
        self._named = {each.pod.uid: line_of(each) for each in known}
        self.taken = True
        return entries

    def adopted(self) -> None:
        """What was found in it is in the ledger, or can no longer arrive: entries may be left out from now on."""
        self._adopted = self.taken

    @property
    def ready(self) -> bool:
        """Whether binds can be declared."""
        return self.taken and self._adopted

    def _lose(self, why: str) -> None:
        self.taken = self._adopted = False
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            _end(each.named, Conflict(why))

    # -- declaring ------------------------------------------------------------------------------------

    async def declare(self, intent: Intent) -> None:
        """Returns once a write made from now on names it. Raises Conflict where the journal is not ours: do not send.

        That it is named already does not count: somebody may have taken the journal since, and given the devices away.
        """
        if not self.ready:
            raise Conflict("the journal of binds is not ours")
        uid = intent.pod.uid
        before = self._waiting.pop(uid, None)
        if before is not None:
            _end(before.named, Conflict("something else was declared for this pod"))
        named: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[uid] = Waiting(uid, line_of(intent), named)
        self._asked.set()
        try:
            await named
        finally:
            del named  # it has the error, which has this frame: a circle that nobody would collect (decision 0012)

    def tidy(self) -> None:
        """Have what has ended left out, if nothing was written for some time: called now and then."""
        if self.ready and self._clock() - self._wrote_at > TIDY_SECONDS and self._has_ended():
            self._asked.set()

    def _has_ended(self) -> bool:
        return any(not self._is_open(uid) for uid in self._named)

    async def run(self) -> None:
        """Write for ever whatever is declared, many at once."""
        loop = asyncio.get_running_loop()
        while True:
            await self._asked.wait()
            self._asked.clear()
            began = loop.time()
            await self._write()
            await asyncio.sleep(max(0.0, began + BATCH_SECONDS - loop.time()))

    async def close(self) -> None:
        """A last write, so that a successor finds only what may really still arrive."""
        if self.ready and self._has_ended():
            try:
                async with asyncio.timeout(WRITE_SECONDS):
                    await self._write()
            except TimeoutError:
                log.info("the journal of binds was left as it was")
        self._lose("the service is stopping")

    # -- writing --------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """One write: what is named and still open, and all that waits."""
        async with self._writing:
            if not self.ready:
                return
            batch = self._compose()
            lines = [*self._named.values(), *(each.line for each in batch)]
            self._wrote_at = self._clock()
            try:
                await self._put("\n".join(lines))
            except Refused as error:
                log.warning("the journal of binds is not ours any more: %s", error)
                self._lose(f"the journal of binds is not ours any more: {error}")
                for each in batch:
                    _end(each.named, Conflict(f"the journal of binds could not be written: {error}"))
                return
            self.writes += 1
            self.declared += len(batch)
            for each in batch:
                self._named[each.uid] = each.line
                _end(each.named, None)

    def _compose(self) -> list[Waiting]:
        """Those who wait, as many as fit. What is left out or changed by this write is not named for sure any more."""
        self._named = {uid: line for uid, line in self._named.items() if self._is_open(uid)}
        size = sum(len(line) for line in self._named.values())
        batch = []
        for uid, each in list(self._waiting.items()):
            size += len(each.line)
            if each.named.done():
                del self._waiting[uid]
            elif size < LIMIT_BYTES:
                batch.append(self._waiting.pop(uid))
                self._named.pop(uid, None)
        if self._waiting:
            self._asked.set()
        return batch

    async def _put(self, text: str) -> None:
        """Replace the entries. An unknown outcome, and a conflict with a late write of our own, is looked up.

        Raises Refused where the journal has another's name, is gone, or cannot be written whatever its version.
        """
        while True:
            pause, sent, conflict = 0.0, self._version, ""
            try:
                body = self._body(text, sent)
                made = await self._kube.replace_config_map(self._namespace, self._name, body, timeout=WRITE_SECONDS)
                self._version = made["metadata"]["resourceVersion"]
                return
            except Conflict as error:
                log.info("writing the journal of binds: %s", error)
                conflict = str(error)
            except Unknown as error:
                log.info("writing the journal of binds: %s", error)
                pause = RETRY_SECONDS
            if await self._says(text):
                return
            if conflict and self._version == sent:
                raise Refused(conflict)  # whatever it is, it is not the version
            await asyncio.sleep(pause)

    async def _says(self, text: str) -> bool:
        """Whether it says so now, under our name. Waits until the API server answers."""
        while True:
            try:
                now = await self._kube.get_config_map(self._namespace, self._name)
                break
            except Unknown as error:
                log.info("reading the journal of binds: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
        if (now["metadata"].get("annotations") or {}).get(HOLDER) != self._mark:
            raise Conflict("somebody else has taken it")
        self._version = now["metadata"]["resourceVersion"]
        return bool((now.get("data") or {}).get("binds") == text)

    def _body(self, text: str, version: str = "", format_: str = VERSION) -> Json:
        metadata: Json = {"name": self._name, "namespace": self._namespace, "annotations": {HOLDER: self._mark}}
        if version:
            metadata["resourceVersion"] = version
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"v": format_, "binds": text}}


def _end(named: asyncio.Future[None], error: KubeError | None) -> None:
    """Tell whoever waits, if somebody still does."""
    if named.done():
        return
    if error is None:
        named.set_result(None)
    else:
        named.set_exception(error)


def line_of(intent: Intent) -> str:
    """As the journal names it."""
    pod = intent.pod
    said = {
        "uid": pod.uid,
        "namespace": pod.namespace,
        "name": pod.name,
        "node": intent.node,
        "devices": [str(device) for device in intent.devices],
    }
    return orjson.dumps(said).decode()


def _read(data: Mapping[str, object]) -> tuple[Intent, ...] | Unreadable:
    """Every entry, or that they cannot be read: one that is missing may be a device that is given away twice."""
    if data.get("v") != VERSION:
        return Unreadable("it is not of a version that we know")
    text = data.get("binds")
    if not isinstance(text, str) or text == LOST:
        return Unreadable("its entries are lost")
    try:
        return tuple(_intents(line for line in text.split("\n") if line))
    except (ValueError, KeyError, TypeError) as error:
        return Unreadable(f"its entries cannot be read: {error}")


def _intents(lines: Iterable[str]) -> Iterable[Intent]:
    for line in lines:
        said = orjson.loads(line)
        names = [said[field] for field in ("uid", "namespace", "name", "node")]
        devices = tuple(device_of(device) for device in said["devices"])
        if not all(isinstance(name, str) and name for name in names) or not devices:
            raise ValueError(f"{line[:100]} names no pod, node or devices")
        yield Intent(PodRef(*names[:3]), names[3], devices)
