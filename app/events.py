"""What pods' owners shall read in `kubectl describe`: Kubernetes Events, a few at a time.

Fed from anywhere, written by one background task. Events are a courtesy: where there are too many, or the API server
does not take them, they are dropped and counted, never waited for.
"""

import logging
import secrets
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime

from app.errors import KubeError, Unknown
from app.kube import Json, Kube
from app.translate import PodRef

log = logging.getLogger(__name__)

MOST_WAITING = 200
MOST_AT_ONCE = 10  # in each turn; the turns are `wake_seconds` apart
TRIES = 3
LONGEST_NOTE = 1000  # bytes
CONTROLLER = "tangram.gpu/tangram"


@dataclass(frozen=True, slots=True)
class Note:
    """One event to be: about which pod, its reason (one word) and the words."""

    pod: PodRef
    reason: str
    words: str
    action: str
    tries: int = 0


class Events:
    """Events that wait to be written."""

    def __init__(self, *, instance: str) -> None:
        self._instance = instance
        self._waiting: deque[Note] = deque()
        self.dropped = 0

    def tell(self, pod: PodRef, *, reason: str, action: str, words: str) -> None:
        """Have it written soon; the oldest give way where too many wait."""
        self._waiting.append(Note(pod, reason, words, action))
        while len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self.dropped += 1

    async def write(self, kube: Kube) -> None:
        """Write a few of those that wait."""
        for _ in range(min(MOST_AT_ONCE, len(self._waiting))):
            note = self._waiting.popleft()
            try:
                await kube.create_event(note.pod.namespace, event_of(note, instance=self._instance))
            except Unknown as error:
                log.warning("the event %s of %s could not be written: %s", note.reason, note.pod, error)
                if note.tries + 1 < TRIES:
                    again = Note(note.pod, note.reason, note.words, note.action, note.tries + 1)
                    self._waiting.appendleft(again)
                else:
                    self.dropped += 1
                return  # the API server has other troubles now
            except KubeError as error:
                log.warning("the event %s of %s was refused: %s", note.reason, note.pod, error)
                self.dropped += 1


def event_of(note: Note, *, instance: str) -> Json:
    """An Event as the API server takes it (its limits: 1024 bytes of words, 128 of who says so)."""
    pod = note.pod
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{pod.name[:230]}.{secrets.token_hex(8)}", "namespace": pod.namespace},
        "eventTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": CONTROLLER,
        "reportingInstance": instance[:128],
        "action": note.action,
        "reason": note.reason,
        "type": "Warning",
        "regarding": {
            "apiVersion": "v1",
            "kind": "Pod",
            "namespace": pod.namespace,
            "name": pod.name,
            "uid": pod.uid,
        },
        "note": note.words.encode()[:LONGEST_NOTE].decode(errors="ignore"),
    }
