"""Every option of the load tests, for the command line of locust and as LOAD_<NAME> in the environment."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NoReturn, cast

import gevent
from gevent import ssl
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import FastHttpSession, FastHttpUser
from locust.env import Environment
from locust.exception import StopUser

from loadtests.summary import SET_UP

ANSWER_SECONDS = 15.0  # httpTimeout of the shipped configuration: kube-scheduler waits no longer


@dataclass(frozen=True, slots=True)
class Options:
    """What a load tester may vary. `host` is locust's own: the public listener."""

    host: str = ""
    extender: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    mix: str = "mixed"
    trace: str = ""
    sizes: str = "100,500,all"
    think_seconds: float = 0.01
    kept: int = 400
    dry_run: bool = False
    arrivals_per_second: float = 5.0
    holding_seconds: float = 60.0
    agents: str = ""
    agents_file: str = ""
    agents_token: str = ""
    agents_per_user: int = 100
    agents_every_seconds: float = 10.0
    agents_changes: float = 0.05
    agents_hold: bool = False
    echo: str = ""
    summary: str = ""
    seed: int = 1

    @property
    def extender_url(self) -> str:
        """Where filter, prioritize and bind go."""
        return (self.extender or self.host).rstrip("/")

    @property
    def agents_url(self) -> str:
        """Where reports go."""
        return (self.agents or self.host).rstrip("/")


HELP = {
    "extender": "URL of the extender listener (default: --host)",
    "ca_file": "CA that has signed the servers' certificates, for https addresses (PEM; default: the system's)",
    "cert_file": "client certificate for the extender listener (PEM)",
    "key_file": "its private key (PEM)",
    "mix": "kinds of pods: whole, mig, shares, mixed, or RESOURCE=COUNT:WEIGHT,...",
    "trace": "pods of this CSV file in the openb format, one after the other, instead of --mix",
    "sizes": "how many node names a request has, in turns; `all` is every node",
    "think_seconds": "mean pause of a kube-scheduler between two pods: its own work",
    "kept": "pods that a kube-scheduler keeps running; then the oldest leaves for each that comes",
    "dry_run": "only filter and prioritize, marked so that nothing is proposed; always so with Kubernetes",
    "arrivals_per_second": "pods that each Tenant submits in a second, on average",
    "holding_seconds": "how long a Tenant's pod stays once it is bound, on average",
    "agents": "URL of the agents' listener (default: --host)",
    "agents_file": "the nodes' reports: a file as `tangram nodes` writes it; needed by Agents",
    "agents_token": "file with the bearer token that agents show, or folder with one file for each node",
    "agents_per_user": "agents that one user plays",
    "agents_every_seconds": "each agent says something once in this time",
    "agents_changes": "part of an agent's turns that are a full report with a change, the others are beats",
    "agents_hold": "agents beat by held requests for orders, each on a connection of its own, as real ones do",
    "echo": "URL of the echo server (python -m loadtests.echo); needed by Echo",
    "summary": "write the summary to this file (JSON)",
    "seed": "of everything that is drawn",
}


def add_options(parser: LocustArgumentParser) -> None:
    """Each field of Options becomes an option of locust's command line."""
    for field in fields(Options):
        if field.name not in HELP:
            continue
        names: dict[str, Any] = {"dest": field.name, "env_var": f"LOAD_{field.name.upper()}", "help": HELP[field.name]}
        if isinstance(field.default, bool):
            parser.add_argument(_flag(field.name), action="store_true", **names)
        else:
            parser.add_argument(_flag(field.name), type=type(field.default), default=field.default, **names)


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_seconds").replace("_", "-")


def options_of(environment: Environment) -> Options:
    """What was given on the command line or in the environment."""
    given = vars(environment.parsed_options)
    named = {field.name: given[field.name] for field in fields(Options) if field.name in HELP}
    return Options(host=(environment.host or "").rstrip("/"), **named)


def connect(user: FastHttpUser, url: str, options: Options) -> None:
    """Before a user is made: where it goes, and how it trusts and is trusted there."""
    user.host = url
    user.network_timeout = user.connection_timeout = ANSWER_SECONDS
    if url.startswith("https:"):
        user.insecure = False
        user.ssl_context_factory = lambda **_: context_of(options)


def session(user: FastHttpUser, url: str, options: Options) -> FastHttpSession:
    """Another address for the same user."""
    return FastHttpSession(
        base_url=url,
        request_event=user.environment.events.request,
        user=user,
        insecure=False,
        ssl_context_factory=lambda **_: context_of(options),
        network_timeout=ANSWER_SECONDS,
        connection_timeout=ANSWER_SECONDS,
    )


def payload(body: bytes) -> str:
    """A body to send: locust's annotations leave out that bytes go as they are."""
    return cast("str", body)


def context_of(options: Options) -> ssl.SSLContext:
    """For https addresses: whom we trust, and the certificate that we show."""
    context = ssl.create_default_context(cafile=options.ca_file or None)
    if options.cert_file:
        context.load_cert_chain(options.cert_file, options.key_file or None)
    return context


def give_up(environment: Environment, words: str) -> NoReturn:
    """End the whole test: a failure, with these words."""
    environment.events.request.fire(
        request_type="END", name=SET_UP, response_time=0, response_length=0, exception=RuntimeError(words)
    )
    if environment.runner is not None:
        gevent.spawn(environment.runner.quit)
    raise StopUser(words)


def main() -> None:
    """`python -m loadtests.options` lists them: locust's own --help leaves out what a locustfile adds."""
    for field in fields(Options):
        if field.name in HELP:
            default = f" (default {field.default})" if field.default not in ("", False) else ""
            print(f"  {_flag(field.name):24} {HELP[field.name]}{default}")


if __name__ == "__main__":
    main()
