"""The page in a real browser, over canned answers: the states that are hard to reach with a real service."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.web.conftest import Open
from tests.web.stub import Canned, Stub, gpu, lively, node, pod

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="document.title=1">&amp;"\'</td><script>alert(1)</script>'


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub(lively()) as running:
        yield running


def test_shows_every_node_with_its_gpus_and_slices_in_place(stub: Stub, open_page: Open) -> None:
    """A slice is drawn where it is: its start and size are the placement."""
    page = open_page(stub.url)
    expect(page.locator(".node")).to_have_count(40)

    piece = next(s for n in stub.canned.nodes for g in n["gpus"] for s in g["slices"])
    drawn = page.locator(f'.slice[data-uid="{piece["pod"]["uid"]}"]')
    box, board = drawn.bounding_box(), drawn.locator("..").bounding_box()

    assert box is not None
    assert board is not None
    assert (box["x"] - board["x"]) / board["width"] == pytest.approx(piece["start"] / 8, abs=0.03)
    assert box["width"] / board["width"] == pytest.approx(piece["size"] / 8, abs=0.04)


def test_shares_are_drawn_as_wide_as_they_are_and_told_in_words(stub: Stub, open_page: Open) -> None:
    page = open_page(stub.url)
    share = next(s for n in stub.canned.nodes for g in n["gpus"] for s in g["shares"])
    drawn = page.locator(f'.slice[data-uid="{share["pod"]["uid"]}"]')
    expect(drawn).to_be_visible()
    box, board = drawn.bounding_box(), drawn.locator("..").bounding_box()

    assert box is not None
    assert board is not None
    assert box["width"] / board["width"] == pytest.approx(share["milli"] / 1000, abs=0.03)
    assert "250 milli of GPU" in (drawn.get_attribute("title") or "")
    page.locator(f'.node:has(.slice[data-uid="{share["pod"]["uid"]}"]) a').first.click()
    expect(page.locator("#detail")).to_contain_text("250 milli held")
    expect(page.locator("#detail")).to_contain_text("250 milli free on 1 shared GPU")


def test_a_node_says_how_its_devices_are_handed_out_and_where_that_went_wrong(stub: Stub, open_page: Open) -> None:
    node = stub.canned.nodes[0]
    pod = {"uid": "u", "namespace": "default", "name": "aside"}
    node["handing"] = {
        "by": "plugin",
        "none": "the kubelet's socket is gone",
        "shares": "not enforced",
        "differ": [{"pod": pod, "container": "main", "resource": "r", "devices": ["GPU-1"], "kubelet": ["GPU-2"]}],
        "overlaps": ["GPU-3 is one pod's whole, and others have some of it: default/a, default/b"],
    }
    page = open_page(f"{stub.url}#node={node['name']}")
    detail = page.locator("#detail")
    expect(detail).to_contain_text("by Tangram's agent; not now: the kubelet's socket is gone; shares: not enforced")
    expect(detail).to_contain_text("default/aside main: has GPU-1, counted: GPU-2")
    expect(detail).to_contain_text("GPU-3 is one pod's whole")


def test_a_node_says_what_its_agent_is_told_to_do_and_how_its_gpus_are(stub: Stub, open_page: Open) -> None:
    node = stub.canned.nodes[0]
    node["orders"] = {"make": ["GPU-1/3g.40gb@4"], "remove": ["GPU-1/1g.10gb@0"], "switch": ["GPU-2: MIG on"]}
    node["slices"] = "it can see and cannot change"
    node["versions"] = {"kernel": "6.8.0", "kubelet": "v1.37.1"}
    node["gpus"][0] |= {"signals": ["xid: suspect: 74"], "note": "drain the node first"}
    page = open_page(stub.url)
    page.locator(f'.node:has-text("{node["name"]}") a').first.click()

    detail = page.locator("#detail")
    for words in (
        "make GPU-1/3g.40gb@4",
        "remove GPU-1/1g.10gb@0",
        "GPU-2: MIG on",
        "Only slices that exist are given out: it can see and cannot change.",
        "v1.37.1",
        "xid: suspect: 74",
        "drain the node first",
    ):
        expect(detail).to_contain_text(words)


def test_every_phase_is_told_by_more_than_colour(stub: Stub, open_page: Open) -> None:
    page = open_page(stub.url)
    expect(page.locator(".node").first).to_be_visible()

    looks = page.evaluate(
        """() => Object.fromEntries(["free", "proposed", "assumed", "held", "leaving", "withheld"].map((phase) => {
            const style = getComputedStyle(document.querySelector(`.legend .key.${phase}`));
            const pattern = style.backgroundImage.replace(/(rgba?|color)\\([^)]*\\)/g, "");
            return [phase, `${style.borderTopStyle} ${pattern}`];
        }))"""
    )
    told = {looks[phase] for phase in ("proposed", "assumed", "held", "leaving", "withheld")}

    assert len(told) == 5, looks


def test_keyboard_alone_reaches_a_pod_and_comes_back(stub: Stub, open_page: Open) -> None:
    """Tab to the nodes, arrows among them, Enter opens, Escape closes and gives the focus back."""
    page = open_page(stub.url)
    expect(page.locator(".node")).to_have_count(40)
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('.node') !== null"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    name = page.evaluate("document.activeElement.textContent")
    assert name not in ("", "a100-00")

    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_be_visible()
    expect(page.locator("#detail-title")).to_have_text(name)
    page.locator("#detail .board a").first.press("Enter")
    expect(page.locator("#detail-title")).to_have_text(re.compile("default/"))

    page.keyboard.press("Escape")
    expect(page.locator("#detail")).to_be_hidden()
    assert page.evaluate("document.activeElement.textContent") == name


def test_focus_and_elements_stay_while_the_page_is_renewed(stub: Stub, open_page: Open) -> None:
    """No flicker: what did not change is the same element; what changed keeps the focus."""
    page = open_page(stub.url)
    link = page.locator(".node a", has_text="a100-02")
    link.focus()
    page.evaluate("document.querySelectorAll('.node').forEach((el) => { el.old = true; })")

    changed = next(n for n in stub.canned.nodes if n["name"] == "a100-02")
    changed["gpus"][0].update(slices=[], phase="free")
    left = sum(len(g["slices"]) for g in changed["gpus"])
    expect(page.locator('.node[data-key="a100-02"] .slice')).to_have_count(left)

    assert page.evaluate("[...document.querySelectorAll('.node')].filter((el) => !el.old).length") == 1
    assert page.evaluate("document.activeElement.textContent") == "a100-02"


def test_filter_narrows_nodes_and_pods_and_says_so(stub: Stub, open_page: Open) -> None:
    page = open_page(stub.url)
    expect(page.locator(".node")).to_have_count(40)

    page.keyboard.press("/")
    page.keyboard.type("train-xl")
    expect(page.locator("#pod-table tbody tr")).to_have_count(5)
    expect(page.locator("#no-nodes")).to_have_text("No node matches the filter.")

    page.keyboard.press("Escape")
    expect(page.locator(".node")).to_have_count(40)


def test_tables_sort_both_ways(stub: Stub, open_page: Open) -> None:
    page = open_page(stub.url)
    page.locator("#views label", has_text="Table").click()
    head = page.locator("#node-table th", has_text="MIG units free")

    head.locator("button").click()
    expect(head).to_have_attribute("aria-sort", "descending")
    most = page.locator("#node-table tbody tr td:nth-child(5)").first.text_content()
    head.locator("button").click()
    expect(head).to_have_attribute("aria-sort", "ascending")

    assert page.locator("#node-table tbody tr td:nth-child(5)").first.text_content() != most


def test_a_pod_said_twice_is_one_row(stub: Stub, open_page: Open) -> None:
    """A pod refused before and promised something now may still stand on the waiting list."""
    stub.canned.pods.append(pod("w1", "train-xl-1", "proposed", "8 GPUs", "h100-01", []))
    page = open_page(stub.url)

    expect(page.locator('#pod-table tr[data-key="w1"]')).to_have_count(1)
    expect(page.locator('#pod-table tr[data-key="w1"]')).to_contain_text("proposed")
    expect(page.locator("#waiting")).to_contain_text("4 pods ask for 8 GPUs")


def test_hostile_names_are_only_text(open_page: Open) -> None:
    """Pod names are the users'; a service in the middle must not be a way into the platform team's browser."""
    canned = Canned(warnings=[HOSTILE])
    who = {"uid": HOSTILE, "namespace": HOSTILE, "name": HOSTILE}
    canned.nodes = [
        node(HOSTILE, [gpu(0, phase="held", pod=who), gpu(1, phase="withheld", reason=HOSTILE)], reason=HOSTILE)
    ]
    canned.pods = [
        {**pod(HOSTILE, HOSTILE, "held", HOSTILE, HOSTILE, [HOSTILE], HOSTILE), "namespace": HOSTILE},
        pod("w", HOSTILE, "waiting", HOSTILE, None, [], HOSTILE),
    ]
    with Stub(canned) as stub:
        page = open_page(stub.url)
        expect(page.locator(".node")).to_have_count(1)
        page.locator(".node .gpu").first.click()
        expect(page.locator("#detail-title")).to_have_text(f"{HOSTILE}/{HOSTILE}")
        page.locator("#detail a", has_text=HOSTILE).first.click()
        expect(page.locator("#detail-title")).to_have_text(HOSTILE)

        assert page.locator("main img, dialog img, main script, dialog script").count() == 0
        assert page.title() == "Tangram"
        page.close()


def test_an_unreachable_service_is_said_and_its_last_word_kept(open_page: Open) -> None:
    with Stub(lively()) as stub:
        page = open_page(stub.url, quiet=False)
        expect(page.locator(".node")).to_have_count(40)
    expect(page.locator("#banner")).to_contain_text("does not answer", timeout=15_000)
    expect(page.locator("#state")).to_contain_text("unreachable")
    expect(page.locator(".node")).to_have_count(40)


def test_a_service_that_is_not_ready_says_what_it_waits_for(stub: Stub, open_page: Open) -> None:
    stub.canned.ready = False
    page = open_page(stub.url)
    expect(page.locator("#banner")).to_contain_text("Waiting for: the pods of the API server")


def test_five_thousand_nodes_are_paged_and_searched(open_page: Open) -> None:
    """A page of 200 is drawn; the filter looks at all."""
    canned = Canned(nodes=[node(f"node-{i:05d}", [gpu(j) for j in range(8)]) for i in range(5000)])
    with Stub(canned) as stub:
        page = open_page(stub.url)
        expect(page.locator(".node")).to_have_count(200)
        page.get_by_role("button", name="Next").click()
        expect(page.locator("#page-words")).to_have_text("nodes 201 to 400 of 5,000")
        page.fill("#filter", "node-04987")
        expect(page.locator(".node")).to_have_count(1, timeout=20_000)
        page.locator(".node a").click()
        expect(page.locator("#detail-title")).to_have_text("node-04987")
        expect(page.locator("#detail .board")).to_have_count(8)
        page.close()


@pytest.mark.parametrize("width", [400, 768, 1440, 2560])
def test_nothing_runs_out_of_the_window(stub: Stub, open_page: Open, width: int) -> None:
    page = open_page(stub.url, viewport={"width": width, "height": 800})
    expect(page.locator(".node").first).to_be_visible()

    for view in ("Map", "Table", "Pods", "Costs"):
        page.locator("#views label", has_text=view).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view


def test_what_the_service_costs_is_told_and_drawn_over_time(stub: Stub, open_page: Open, shots: Path) -> None:
    """Reached by keyboard; each look of the page adds a point to the lines, and what is not known is no line at all."""
    page = open_page(stub.url)
    expect(page.locator(".node").first).to_be_visible()
    expect(page.locator("#costs")).to_be_hidden()
    page.locator("#views input:checked").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")

    expect(page.locator("#costs")).to_be_visible()
    expect(page.locator("#nodes")).to_be_hidden()
    expect(page.locator('#cost-table tr[data-key="filter"]')).to_contain_text("1.4 ms")
    expect(page.locator('#cost-table tr[data-key="bind"]')).to_contain_text("–")
    for words in (
        "Longest block",
        "31 ms since its start, 4.1 ms lately",
        "3 looks of 720,000",
        "312 MiB",
        "process–",
    ):
        expect(page.locator("#cost-machine")).to_contain_text(words)
    for words in ("12,345", "298", "31 (nodes without", "96", "lately 13 per second"):
        expect(page.locator("#cost-sizes")).to_contain_text(words)

    for line in ("#plot-filter .box .line-0", "#plot-memory .box .line-0"):
        expect(page.locator(line)).to_have_attribute("d", re.compile("L.*L.*L"), timeout=20_000)
    assert page.locator("#plot-memory .box .line-1").get_attribute("d") == "", "nobody plans, so there is no line"
    expect(page.locator("#plot-filter .box")).to_have_attribute("aria-label", re.compile("p99 8.7 ms; 0 to 8.7 ms"))
    page.screenshot(path=shots / "costs.png", full_page=True)


CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data]; };
    const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
    const ground = (el) => { for (; el; el = el.parentElement) { const c = rgb(getComputedStyle(el).backgroundColor);
        if (c[3] > 250) return c; } return [255, 255, 255]; };
    const poor = [];
    for (const el of document.querySelectorAll("body *")) {
        if (![...el.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !el.checkVisibility()) continue;
        if (el.closest(".hidden, .skip, noscript, script")) continue;
        const [a, b] = [light(rgb(getComputedStyle(el).color)), light(ground(el))].sort((x, y) => y - x);
        const ratio = (a + .05) / (b + .05);
        if (ratio < 4.5) poor.push(`${el.className || el.tagName} ${el.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
    }
    return [...new Set(poor)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(stub: Stub, open_page: Open, scheme: str) -> None:
    """WCAG AA: 4.5 to 1 for every text."""
    page = open_page(stub.url, color_scheme=scheme)
    expect(page.locator(".node").first).to_be_visible()

    assert page.evaluate(CONTRAST) == []
    page.locator("#views label", has_text="Costs").click()
    expect(page.locator("#costs-body")).to_be_visible()
    assert page.evaluate(CONTRAST) == []
    page.goto(f"{stub.url}#node=a100-02")
    expect(page.locator("#detail")).to_be_visible()
    assert page.evaluate(CONTRAST) == []


def test_every_control_has_a_name(stub: Stub, open_page: Open) -> None:
    page = open_page(stub.url)
    expect(page.locator(".node").first).to_be_visible()

    assert _nameless(page) == []


def _nameless(page: Page) -> list[str]:
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll("button, a, input")].filter((el) => !(el.ariaLabel
            || el.textContent.trim() || el.closest("label")?.textContent.trim() || el.title))
            .map((el) => el.outerHTML)"""
    )
    return found
