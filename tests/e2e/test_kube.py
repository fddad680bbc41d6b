"""The real kube-apiserver keeps the contract that the fake one keeps, over our own client."""

from collections.abc import Iterator

import pytest

from app.kube import connect
from tests.e2e.cluster import Cluster, open_cluster
from tests.e2e.nodes import gpu_node, gpu_pod
from tests.kube_contract import CHECKS

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        cluster.add_nodes([gpu_node("contract-node")])
        yield cluster


class MakeForReal:
    node = "contract-node"

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def pod(self, name: str) -> str:
        self._cluster.add_pods([gpu_pod(name, scheduler_name="nobody")])
        return str(self._cluster.pod(name)["metadata"]["uid"])

    def delete_pod(self, name: str) -> None:
        self._cluster.delete_pod(name, grace_seconds=0)

    def token(self, *, audience: str, pod: str = "") -> str:
        return self._cluster.service_account_token("default", audiences=[audience], pod=pod)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_real_api_server_keeps_the_contract(cluster, check):
    kube = await connect(cluster.kubeconfig)
    try:
        await check(kube, MakeForReal(cluster))
    finally:
        await kube.close()
        cluster.delete_all_pods()
