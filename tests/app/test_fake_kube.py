"""The fake API server keeps the contract that the real one keeps (tests/e2e/test_kube.py)."""

import pytest

from tests.fakes import FakeKube, pod_json
from tests.kube_contract import CHECKS


class MakeInMemory:
    node = "n1"

    def __init__(self, kube: FakeKube) -> None:
        self._kube = kube
        kube.add_node(self.node)

    def pod(self, name: str) -> str:
        return str(self._kube.add_pod(pod_json(name))["metadata"]["uid"])

    def delete_pod(self, name: str) -> None:
        self._kube.remove_pod(name)

    def token(self, *, audience: str, pod: str = "") -> str:
        node = self._kube.pod(pod)["spec"]["nodeName"] if pod else ""
        token = f"token-{len(self._kube.tokens)}"
        self._kube.add_token(token, "default:default", node=node, audience=audience)
        return token


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_fake_keeps_the_contract(check):
    kube = FakeKube()
    await check(kube, MakeInMemory(kube))
