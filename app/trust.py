"""Which node a caller may speak for: its bearer token, reviewed by the API server, and for a while remembered.

    Authorization: Bearer … ──▶ Trust.node_of() ── remembered? ──▶ the node's name, or Distrust in words
                                      │ no                            ▲
                                      └── TokenReview ── checks ──────┘      API server away: KubeError

A token counts if it is for us (the audience), of the agents' service account, and bound to a pod: kube-apiserver has
signed the name of that pod's node into it. Tokens are kept only as SHA-256 and are never logged. Decision 0008.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from app.errors import Unknown
from app.kube import Kube, Reviewed

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

AUDIENCE = "tangram"
"""What the agents' projected tokens are for; a token for the API server itself is none of ours."""

REFUSED_SECONDS = 5.0
"""How long a refused token stays refused unseen: an agent that tries again costs a review in this time, not more."""

EARLIER_PART = 0.25
"""Reviews are done again up to this part earlier, by token, so that agents that came together drift apart."""

LARGEST_TOKEN = 8192
"""Characters. A bound token has about 1,200."""

MOST_ACCEPTED, MOST_REFUSED = 50_000, 1_000
"""Tokens remembered, apart, so that made-up tokens cannot drive out good ones. 50,000: ten of each of 5,000 nodes."""

REVIEWS_AT_ONCE = 20
"""So many reviews are in flight at most: binds must find the API server, and connections to it, free."""

MOST_WAITING = 10_000
"""Tokens that wait for their review at most, while the API server is slow; twice the agents of the largest cluster."""


@dataclass(frozen=True, slots=True)
class Distrust:
    """Why a caller is not believed."""

    reason: str


class Trust:
    """Turns tokens into node names. Without `kube`, or where we shall `believe_all`, nobody is asked for one."""

    def __init__(
        self,
        kube: Kube | None,
        *,
        namespace: str,
        account: str,
        seconds: float,
        clock: Callable[[], float],
        believe_all: bool = False,
    ) -> None:
        self._kube = None if believe_all else kube
        self._believes_all = believe_all and kube is not None
        self._username = f"system:serviceaccount:{namespace}:{account}"
        self._seconds = seconds
        self._clock = clock
        self._accepted = _Remembered[str](MOST_ACCEPTED)
        self._refused = _Remembered[Distrust](MOST_REFUSED)
        self._in_flight: dict[bytes, asyncio.Task[str | Distrust]] = {}
        self._slots = asyncio.Semaphore(REVIEWS_AT_ONCE)
        self._failing = ""

    @property
    def checks(self) -> bool:
        """Whether callers must show a token at all."""
        return self._kube is not None

    def warnings(self) -> list[str]:
        """What an operator should know: nobody is checked, or nobody can be."""
        if self._believes_all:
            return ["agents are believed without a token (--unauthenticated-agents)"]
        if self._failing:
            return [f"agents' tokens cannot be checked, so new reports are not taken: {self._failing}"]
        return []

    async def node_of(self, authorization: str) -> str | Distrust:
        """The node that the bearer of this header speaks for. Raises KubeError where nobody can say."""
        assert self._kube is not None
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            return Distrust("an agent shows its service account's token: Authorization: Bearer TOKEN")
        if len(token) > LARGEST_TOKEN or not token.isascii() or not token.isprintable():
            return Distrust(f"this is no token: more than {LARGEST_TOKEN} characters, or others than tokens have")
        digest = hashlib.sha256(token.encode()).digest()
        now = self._clock()
        known = self._accepted.get(digest, now) or self._refused.get(digest, now)
        return known or await self._shared_review(self._kube, digest, token)

    async def _shared_review(self, kube: Kube, digest: bytes, token: str) -> str | Distrust:
        """One review for all who come with this token meanwhile; it goes on if one of them leaves."""
        review = self._in_flight.get(digest)
        if review is None:
            if len(self._in_flight) >= MOST_WAITING:
                raise Unknown(f"{MOST_WAITING} other tokens wait for their review")
            review = self._in_flight[digest] = asyncio.create_task(self._review(kube, digest, token))
            review.add_done_callback(lambda done: self._landed(digest, done))
        return await asyncio.shield(review)

    def _landed(self, digest: bytes, review: asyncio.Task[str | Distrust]) -> None:
        del self._in_flight[digest]
        failed = "" if review.cancelled() else str(review.exception() or "")
        if failed and not self._failing:
            log.warning("agents' tokens cannot be checked: %s", failed)
        elif self._failing and not failed:
            log.info("agents' tokens can be checked again")
        self._failing = failed

    async def _review(self, kube: Kube, digest: bytes, token: str) -> str | Distrust:
        async with self._slots:
            found = self._judge(await kube.review_token(token, audience=AUDIENCE))
        now = self._clock()
        if isinstance(found, Distrust):
            self._refused.put(digest, found, until=now + min(REFUSED_SECONDS, self._seconds), now=now)
        else:
            seconds = self._seconds * (1 - EARLIER_PART * digest[0] / 255)
            self._accepted.put(digest, found, until=now + seconds, now=now)
        return found

    def _judge(self, reviewed: Reviewed) -> str | Distrust:
        if not reviewed.authenticated:
            return Distrust(f"the API server does not accept this token: {reviewed.error[:300] or 'it says no more'}")
        if AUDIENCE not in reviewed.audiences:  # an API server that knows no audiences says so by leaving them out
            return Distrust(f"this token is not for the audience {AUDIENCE!r}")
        if reviewed.username != self._username:
            return Distrust(f"this is a token of {reviewed.username}; agents are {self._username}")
        if not reviewed.node:
            return Distrust("this token is bound to no pod on a node; mount a projected token into the agent's pod")
        return reviewed.node


class _Remembered(Generic[Answer]):
    """Answers by digest, each until its time; the oldest are forgotten first where there are too many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._answers: dict[bytes, tuple[float, Answer]] = {}

    def get(self, digest: bytes, now: float) -> Answer | None:
        until, answer = self._answers.get(digest, (now, None))
        return answer if now < until else None

    def put(self, digest: bytes, answer: Answer, *, until: float, now: float) -> None:
        self._answers.pop(digest, None)
        self._answers[digest] = until, answer
        while len(self._answers) > self._most or self._oldest_until() <= now:
            del self._answers[next(iter(self._answers))]

    def _oldest_until(self) -> float:
        until, _ = next(iter(self._answers.values()))
        return until
