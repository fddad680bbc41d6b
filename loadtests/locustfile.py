"""One user is one kube-scheduler: filter, prioritize, bind, and later the pod is gone. For a standalone service.

    tangram serve --nodes nodes.json           # in one terminal
    locust -f loadtests/locustfile.py --host http://127.0.0.1:8080 --headless -u 1 -r 1 -t 30s

A real kube-scheduler asks one thing at a time, so one user is the truth and more users are a stress.
"""

from __future__ import annotations

import random
import uuid
from collections import deque

from locust import FastHttpUser, constant, events, task
from locust.env import Environment

from app.driver import PodSpec, args_body, binding_body, choose, pod_object

ASKS = (
    ("nvidia.com/gpu", 1),
    ("nvidia.com/gpu", 2),
    ("nvidia.com/gpu", 4),
    ("nvidia.com/gpu", 8),
    ("nvidia.com/mig-1g.10gb", 1),
    ("nvidia.com/mig-2g.20gb", 1),
    ("nvidia.com/mig-3g.40gb", 1),
)
KEPT = 400  # pods that a user keeps running; then the oldest leaves for each that comes
HEADERS = {"Content-Type": "application/json"}


class KubeScheduler(FastHttpUser):
    """Pods come one after another; each takes the whole way."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Learn the nodes' names, as kube-scheduler knows them from its own cache."""
        self.rng = random.Random(1)
        self.running: deque[str] = deque()
        nodes = self.client.get("/v1/cluster?limit=10000", name="(set up)").json()["nodes"]
        self.names = [node["name"] for node in nodes]
        if not self.names:
            raise SystemExit("the service has no nodes: start it with `tangram serve --nodes FILE`")

    @task
    def place_a_pod(self) -> None:
        """Filter; prioritize if more than one node fits; bind; let the oldest pod go."""
        spec = PodSpec(name=f"load-{uuid.uuid4().hex[:12]}", uid=str(uuid.uuid4()), resources=(self.rng.choice(ASKS),))
        pod = pod_object(spec)
        fits = self.post("/filter", args_body(pod, self.names))["NodeNames"]
        if fits:
            node = fits[0] if len(fits) == 1 else self.best(pod, fits)
            if not self.post("/bind", binding_body(spec, node))["Error"]:
                self.running.append(spec.uid)
        if self.running and (not fits or len(self.running) > KEPT):
            self.client.delete(f"/v1/pods/{self.running.popleft()}", name="DELETE /v1/pods/UID")

    def best(self, pod: dict[str, object], fits: list[str]) -> str:
        """The node that kube-scheduler would take: the highest score, ties at random."""
        scores = self.post("/prioritize", args_body(pod, fits))
        return choose(fits, {each["Host"]: each["Score"] for each in scores}, self.rng)

    def post(self, path: str, body: bytes):  # type: ignore[no-untyped-def]  # JSON of three shapes
        """One call; anything but a 200 without `Error` counts as a failure, except a bind refused for want of room."""
        with self.client.post(path, data=body.decode(), headers=HEADERS, catch_response=True) as answer:
            value = answer.json()
            if path == "/filter" and value["Error"]:
                answer.failure(value["Error"])
            return value


@events.quitting.add_listener  # type: ignore[untyped-decorator]  # locust's
def fail_on_errors(environment: Environment, **_: object) -> None:
    """The exit status tells whether anything failed."""
    broken = environment.stats.total.num_failures or (environment.runner and environment.runner.exceptions)
    environment.process_exit_code = 1 if broken else 0
