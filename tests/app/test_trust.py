"""Whom the service believes: an agent's token names the one node that it may speak for."""

import asyncio
import logging

import pytest

from app import trust as module
from app.errors import KubeError, Unknown
from app.kube import Reviewed
from app.trust import REFUSED_SECONDS, Distrust, Trust
from tests.fakes import Clock, FakeKube

AGENT = "tangram-system:tangram-agent"
SECONDS = 300.0


class Door:
    """A Trust on a fake API server that knows one good token."""

    def __init__(self, **options: bool) -> None:
        self.clock = Clock()
        self.kube = FakeKube()
        self.kube.add_token("good", AGENT, node="n1")
        self.trust = Trust(
            self.kube, namespace="tangram-system", account="tangram-agent", seconds=SECONDS, clock=self.clock, **options
        )

    async def ask(self, token: str) -> str | Distrust:
        return await self.trust.node_of(f"Bearer {token}")

    @property
    def reviews(self) -> int:
        return self.kube.calls.count("review_token")


@pytest.fixture
def door() -> Door:
    return Door()


async def test_an_agents_token_speaks_for_the_node_of_its_pod(door):
    assert await door.ask("good") == "n1"


@pytest.mark.parametrize(
    ("account", "node", "audience", "words"),
    [
        ("tangram-system:tangram", "n1", "tangram", "agents are system:serviceaccount:tangram-system:tangram-agent"),
        ("default:tangram-agent", "n1", "tangram", "agents are system:serviceaccount:tangram-system:tangram-agent"),
        (AGENT, "", "tangram", "bound to no pod"),
        (AGENT, "n1", "https://kubernetes.default.svc", "does not accept"),
    ],
)
async def test_other_tokens_are_refused_in_words(door, account, node, audience, words):
    door.kube.add_token("other", account, node=node, audience=audience)
    said = await door.ask("other")
    assert isinstance(said, Distrust)
    assert words in said.reason


async def test_an_api_server_that_knows_no_audiences_proves_nothing(door):
    """It would accept any token that is good for the API server itself, and then leaves `audiences` out."""

    async def unaware(token: str, *, audience: str) -> Reviewed:
        return Reviewed(True, f"system:serviceaccount:{AGENT}", (), "n1")

    door.kube.review_token = unaware
    assert isinstance(await door.ask("good"), Distrust)


@pytest.mark.parametrize(
    "header", ["", "good", "Basic good", "Bearer", "Bearer  ", "Bearer " + "x" * 10_000, "Bearer ü"]
)
async def test_what_is_no_token_is_refused_without_asking(door, header):
    assert isinstance(await door.trust.node_of(header), Distrust)
    assert door.reviews == 0


async def test_a_token_is_reviewed_once_for_all_who_come_with_it_meanwhile(door):
    door.kube.hold["review_token"] = asyncio.Event()
    asked = [asyncio.create_task(door.ask("good")) for _ in range(5)]
    await asyncio.sleep(0.01)
    asked[0].cancel()
    door.kube.hold["review_token"].set()
    assert await asyncio.gather(*asked[1:]) == ["n1"] * 4
    assert door.reviews == 1


async def test_an_accepted_token_is_remembered_and_not_for_longer_than_said(door):
    """A deleted agent's token counts until then; reviews of many agents drift apart by up to a quarter."""
    await door.ask("good")
    door.kube.tokens.clear()
    door.clock.advance(SECONDS * 0.74)
    assert await door.ask("good") == "n1"
    assert door.reviews == 1

    door.clock.advance(SECONDS * 0.26)
    assert isinstance(await door.ask("good"), Distrust)


async def test_a_refused_token_is_remembered_for_a_few_seconds_only(door):
    """An agent's token that comes too early (its pod is not known everywhere yet) must not wait for long."""
    for _ in range(10):
        assert isinstance(await door.ask("new"), Distrust)
    assert door.reviews == 1

    door.kube.add_token("new", AGENT, node="n2")
    door.clock.advance(REFUSED_SECONDS)
    assert await door.ask("new") == "n2"


async def test_nobody_is_believed_while_the_api_server_cannot_be_asked(door, caplog):
    """And a node whose token is remembered goes on."""
    caplog.set_level(logging.INFO)
    await door.ask("good")
    door.kube.add_token("second", AGENT, node="n2")

    def away() -> None:
        raise Unknown("POST tokenreviews: TimeoutError")

    door.kube.before["review_token"] = away
    for _ in range(3):
        with pytest.raises(KubeError):
            await door.ask("second")
    assert await door.ask("good") == "n1"
    assert "cannot be checked" in door.trust.warnings()[0]
    assert caplog.text.count("cannot be checked") == 1

    door.kube.before.clear()
    assert await door.ask("second") == "n2"
    assert door.trust.warnings() == []


async def test_made_up_tokens_do_not_drive_out_good_ones_and_are_forgotten(door, monkeypatch):
    monkeypatch.setattr(module, "MOST_REFUSED", 10)
    door = Door()
    await door.ask("good")
    for number in range(50):
        await door.ask(f"made-up-{number}")
    before = door.reviews
    assert await door.ask("good") == "n1"
    await door.ask("made-up-49")
    assert door.reviews == before
    await door.ask("made-up-0")
    assert door.reviews == before + 1


async def test_a_slow_api_server_is_asked_a_few_things_at_once_only(door, monkeypatch):
    """Binds need it too; and those who wait are bounded."""
    monkeypatch.setattr(module, "MOST_WAITING", 30)
    door.kube.hold["review_token"] = asyncio.Event()
    asked = [asyncio.create_task(door.ask(f"t{number}")) for number in range(40)]
    await asyncio.sleep(0.01)
    assert door.reviews == module.REVIEWS_AT_ONCE
    door.kube.hold["review_token"].set()
    said = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(each, KubeError) for each in said) == 10


async def test_no_token_is_ever_logged_or_said(door, caplog):
    caplog.set_level(logging.DEBUG)

    def away() -> None:
        raise Unknown("POST tokenreviews: TimeoutError")

    said = [await door.ask("s3cret"), await door.ask("good")]
    door.kube.before["review_token"] = away
    with pytest.raises(KubeError) as raised:
        await door.ask("s3cret2")
    assert "s3cret" not in f"{said} {raised.value} {caplog.text} {door.trust.warnings()}"


async def test_believing_everybody_is_said_aloud():
    believing = Door(believe_all=True).trust
    assert not believing.checks
    assert "believed without a token" in believing.warnings()[0]
