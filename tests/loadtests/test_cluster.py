"""What a load test learns of a deployment before it begins."""

import pytest

from app.verbs import TRIAL_HEADER
from loadtests.cluster import DRY_RUN, Cluster, NoCluster, learn
from tests.loadtests.deployment import NAMES, Call, Deployment, serving


class Paged(Deployment):
    """Four nodes on a page."""

    def answer(self, call: Call) -> tuple[int, object]:
        after = NAMES.index(call.query["after"]) + 1 if call.query["after"] else 0
        page = NAMES[after : after + 4]
        last = page[-1] if page[-1] != NAMES[-1] else None
        return 200, {"mode": self.mode, "next": last, "nodes": [{"name": name} for name in page]}


def test_the_mark_is_the_one_that_tangram_reads():
    assert {name.lower().encode(): value for name, value in DRY_RUN.items()} == {TRIAL_HEADER: "true"}


@pytest.mark.parametrize(("mode", "live"), [("standalone", False), ("kubernetes", True), ("", True)])
def test_all_pages_of_nodes_are_read_and_what_is_not_standalone_is_live(mode, live):
    deployment = Paged(mode=mode)
    with serving(deployment.app()) as port:
        assert learn(f"http://127.0.0.1:{port}") == Cluster(live, tuple(NAMES))
    assert len(deployment.calls) == 3


def test_a_service_without_nodes_and_no_service_are_said_in_words():
    deployment = Deployment(names=())
    with serving(deployment.app()) as port, pytest.raises(NoCluster, match="has no nodes"):
        learn(f"http://127.0.0.1:{port}")
    with pytest.raises(NoCluster, match="does not tell its nodes"):
        learn("http://127.0.0.1:9")
