"""The page in a real browser over the real service, with pods placed as kube-scheduler would."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlparse

import httpx
import pytest
from playwright.sync_api import expect

from app.driver import Extender, Filtered, PodSpec, find_node
from tests.app.service import serving
from tests.web.conftest import Open

pytestmark = pytest.mark.browser

HOSTILE = "<b onmouseover=alert(1)>pod"
SAMPLES = "8xA100-mig:3,8xH100:2,4xA30-mig:1"
NODES = ["4xa30-mig-0", *(f"8xa100-mig-{i}" for i in range(3)), "8xh100-0", "8xh100-1"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("live"), SAMPLES) as url:
        yield url


def _pod(name: str, resource: str, count: int = 1) -> PodSpec:
    return PodSpec(name=name, uid=f"uid-{name}", resources=((f"nvidia.com/{resource}", count),))


def _place(url: str, pods: Sequence[PodSpec]) -> list[str | None]:
    """Each pod through filter, prioritize and bind; the node it got."""

    async def place() -> list[str | None]:
        where = urlparse(url)
        extender = Extender(where.hostname or "", where.port or 0)
        placed: list[str | None] = []
        for pod in pods:
            found = await find_node(extender, pod, NODES, random.Random(1))
            if isinstance(found, str):
                await extender.bind(pod, found)
            placed.append(None if isinstance(found, Filtered) else found)
        await extender.close()
        return placed

    with ThreadPoolExecutor(1) as apart:  # playwright's own loop runs in this thread
        return apart.submit(asyncio.run, place()).result()


def test_what_the_service_placed_is_on_the_page(service: str, open_page: Open) -> None:
    """Slices on the grid, GPUs with their pod's name, the waiting pod with its reason; a release frees it."""
    placed = _place(service, [_pod("slice", "mig-3g.40gb"), _pod("train", "gpu", 4), _pod("too-much", "gpu", 9)])
    page = open_page(service)

    assert placed[2] is None
    expect(page.locator(".node")).to_have_count(len(NODES))
    expect(page.locator('.slice[data-uid="uid-slice"]')).to_have_text("3")
    expect(page.locator('.gpu[data-uid="uid-train"]')).to_have_count(4)
    expect(page.locator("#waiting")).to_contain_text("too-much")

    page.locator("#pod-table a", has_text="train").click()
    expect(page.locator("#detail")).to_contain_text("Why here")
    expect(page.locator("#detail .mono a")).to_have_count(4)
    page.keyboard.press("Escape")

    httpx.delete(f"{service}/v1/pods/uid-train", trust_env=False).raise_for_status()
    expect(page.locator('.gpu[data-uid="uid-train"]')).to_have_count(0)


def test_what_it_costs_comes_from_the_service_itself(service: str, open_page: Open) -> None:
    """Real answers, real memory, and lines that grow while the page is open."""
    _place(service, [_pod("costly", "mig-1g.10gb")])
    page = open_page(service)
    page.locator("#views label", has_text="Costs").click()

    expect(page.locator('#cost-table tr[data-key="bind"]')).to_contain_text(" ms")
    expect(page.locator("#cost-machine")).to_contain_text("MiB")
    expect(page.locator("#cost-sizes")).to_contain_text(f"{len(NODES)}, {len(NODES)} of them offered")
    for line in ("#plot-filter .box .line-1", "#plot-memory .box .line-0", "#plot-memory .box .line-1"):
        expect(page.locator(line)).to_have_attribute("d", re.compile("L.*L.*L"), timeout=20_000)


def test_a_hostile_pod_name_is_only_text(service: str, open_page: Open) -> None:
    """The API server lets no such name in, but nobody has promised us that it was the API server who asked."""
    _place(service, [PodSpec(HOSTILE, "uid-hostile", (("nvidia.com/gpu", 9),))])
    page = open_page(service)

    page.locator("#pod-table a", has_text=HOSTILE).click()
    expect(page.locator("#detail-title")).to_have_text(f"default/{HOSTILE}")
    assert page.locator("b[onmouseover]").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks_right_in_both_schemes(service: str, open_page: Open, shots: Path, scheme: str) -> None:
    """The pictures are for people; here only that they differ and are not empty."""
    page = open_page(service, color_scheme=scheme)
    expect(page.locator(".node")).to_have_count(len(NODES))

    page.screenshot(path=shots / f"page-{scheme}.png")

    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark")
