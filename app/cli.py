"""The `tangram` command: thin commands that parse, call and print. Imports are inside the commands, so that each
loads only what it runs on (an agent's memory is not the solver's).
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

DEFAULT_URL = "http://127.0.0.1:8080"
URL_VARIABLE = "TANGRAM_URL"
ANSWER_SECONDS = 10.0
CANNOT = 1  # it could not be done
MISUSE = 2  # it was asked for wrongly

app = typer.Typer(
    name="tangram",
    help="Places GPU and MIG workloads on Kubernetes, as an extender of kube-scheduler.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Url = Annotated[str, typer.Option("--url", envvar=URL_VARIABLE, help="Where the service's public listener is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the service's JSON instead of a table.")]


def main() -> None:
    """Entry point: every expected error is one line on stderr and an exit status."""
    try:
        app()
    except Failed as failure:
        _complain(str(failure), failure.status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CANNOT)


class Failed(Exception):
    """A command that cannot be carried out; says why, in one line."""

    def __init__(self, words: str, status: int = CANNOT) -> None:
        super().__init__(words)
        self.status = status


def _complain(words: str, status: int) -> NoReturn:
    print(f"tangram: {words}", file=sys.stderr)
    sys.exit(status)


# --------------------------------------------------------------------------------------------------------- serving


def _serve(**given: Any) -> None:
    """Run the service. Each option can also be given as TANGRAM_<NAME> in the environment."""
    from pydantic import ValidationError

    from app.errors import TangramError
    from app.serve import run
    from app.settings import Settings

    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as wrong:
        raise Failed("; ".join(_fault(error) for error in wrong.errors(include_url=False)), MISUSE) from None
    try:
        run(settings)
    except* (TangramError, OSError) as problems:
        raise Failed("; ".join(str(problem) for problem in _leaves(problems))) from None


def _fault(error: Mapping[str, Any]) -> str:
    where = ".".join(str(part).replace("_", "-") for part in error["loc"])
    words = str(error["msg"]).removeprefix("Value error, ")
    return f"--{where}: {words}" if where else words


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for e in group.exceptions for leaf in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


def _options_of_settings() -> inspect.Signature:
    """One option per field of Settings, so that a knob is written once. An option not given leaves it to the field."""
    from app.settings import Settings

    parameters = []
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        option = f"--{name.replace('_', '-')}"
        declared = f"{option}/--no-{option[2:]}" if kind is bool else option
        default = None if field.is_required() or field.default_factory else field.default
        note = f" (default {default})" if default not in (None, False) else ""
        option_info = typer.Option(declared, help=f"{field.description}{note}", show_default=False)
        annotation = Annotated[_or_none(kind), option_info]  # type: ignore[valid-type]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return inspect.Signature(parameters)


def _or_none(kind: Any) -> Any:
    return kind | None


def _register_serve() -> None:
    """Only when it is `serve` (or help) that is asked for: reading Settings costs a tenth of a second."""

    def serve(**given: Any) -> None:
        _serve(**given)

    serve.__doc__ = _serve.__doc__
    if "serve" in sys.argv[1:2]:
        serve.__signature__ = _options_of_settings()  # type: ignore[attr-defined]
        serve.__annotations__ = {p.name: p.annotation for p in serve.__signature__.parameters.values()}  # type: ignore[attr-defined]
    else:
        serve.__signature__ = inspect.Signature()  # type: ignore[attr-defined]
        serve.__annotations__ = {}
    app.command("serve")(serve)


_register_serve()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def agent(context: typer.Context) -> None:
    """Read this node's GPUs through NVML and report them to the service."""
    from app.agent.__main__ import main as run

    raise typer.Exit(run(context.args))


# --------------------------------------------------------------------------------------------------- trying things


@app.command()
def nodes(
    sample: Annotated[str, typer.Option(help="Kinds and counts of nodes, for example 8xH100:4,8xA100-mig:2.")],
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
) -> None:
    """Write an inventory file of sample nodes, for `tangram serve --nodes FILE`."""
    from app.simulate import sample_reports

    try:
        reports = sample_reports(sample)
    except ValueError as wrong:
        raise Failed(f"--sample: {wrong}", MISUSE) from None
    body = ",\n".join(report.model_dump_json(by_alias=True) for report in reports)
    text = f"[\n{body}\n]\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text)
    except OSError as problem:
        raise Failed(f"cannot write {out}: {problem.strerror}") from None
    typer.echo(f"{len(reports)} nodes, {sum(len(r.gpus) for r in reports)} GPUs written to {out}")


@app.command()
def demo(
    once: Annotated[bool, typer.Option(help="End by itself instead of keeping the page up.")] = False,
    seed: Annotated[int, typer.Option(help="Which arrivals; the same seed gives the same pods.")] = 1,
    pods: Annotated[int, typer.Option(min=1, max=20_000, help="How many pods arrive.")] = 480,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="How long the arrivals take.")] = 25.0,
    sample: Annotated[str, typer.Option(help="The fleet, as in `tangram nodes`.", show_default=False)] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The page's port; 0: 8080, or a free one.")] = 0,
    out: Annotated[Path, typer.Option(help="Where demo.json goes.")] = Path("out"),
) -> None:
    """The main job on simulated nodes: pods come and go, placed by Tangram, beside first-fit."""
    from app.demo import Options, run_demo
    from app.simulate import FLEET

    options = Options(once=once, seed=seed, pods=pods, seconds=seconds, samples=sample or FLEET, port=port, out=out)
    try:
        status = run_demo(options, _console())
    except ValueError as wrong:
        raise Failed(str(wrong), MISUSE) from None
    raise typer.Exit(status)


@app.command()
def plan(
    nodes: Annotated[Path, typer.Option(help="Node reports, as `tangram nodes` writes them.")],
    pods: Annotated[Path, typer.Option(help="Pods: `kubectl get pods -A -o json`, or manifests.")],
    policy: Annotated[Path | None, typer.Option(help="A policy file (YAML).")] = None,
    seconds: Annotated[float, typer.Option(min=0, max=3600, help="After so long the best plan so far.")] = 60.0,
    market: Annotated[bool, typer.Option(help="Solve value tables for the MIG boards first (seconds each).")] = False,
    as_json: AsJson = False,
) -> None:
    """A joint plan for all pods of a file that have no node: where, what proof, at what price, and why not."""
    from app.errors import BadInput
    from app.plan_files import plan_as_json, read_files, with_tables
    from app.policy import read_policy
    from solver import DEFAULT_POLICY
    from solver.flow import solve

    try:
        files = read_files(nodes, pods)
        chosen = DEFAULT_POLICY if policy is None else read_policy(policy)
    except BadInput as wrong:
        raise Failed(str(wrong), MISUSE) from None
    if market:
        chosen = with_tables(chosen, files.problem.snapshot.nodes)
    found = plan_as_json(files, solve(files.problem, chosen, time_limit_seconds=seconds), chosen)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from app.show import show_plan

    show_plan(found, console=_console())


@app.command()
def tables(
    geometry: Annotated[list[str] | None, typer.Option(help="A product's key or classic; may be repeated.")] = None,
    mix: Annotated[str, typer.Option(help="uniform, skew-big, or a number for each profile: 5,10,10,20.")] = "uniform",
    as_json: AsJson = False,
) -> None:
    """The values of MIG states: one table for each kind of board, what found it and how long that took."""
    from app.replay.mig import geometry_called, weights_for
    from app.tables import as_json as json_of
    from app.tables import geometries, show, solve

    try:
        wanted = {geometry_called(name): (name,) for name in geometry} if geometry else geometries()
        mixes = [
            dict(zip([profile.name for profile in shape.profiles], weights_for(shape, mix), strict=True))
            for shape in wanted
        ]
    except ValueError as wrong:
        raise Failed(str(wrong), MISUSE) from None
    solved = list(solve(wanted, mixes))
    if as_json:
        typer.echo(json.dumps(json_of(solved), ensure_ascii=False))
        return
    show(solved, _console())


replays = typer.Typer(help="Play a workload against Tangram's decisions, beside other policies.", no_args_is_help=True)
app.add_typer(replays, name="replay")


@replays.command()
def mig(
    mix: Annotated[str, typer.Option(help="uniform, skew-big, or a number for each profile.")] = "uniform",
    load: Annotated[float, typer.Option(min=0.01, max=10, help="Units offered against the units there are.")] = 1.0,
    gpus: Annotated[int, typer.Option(min=1, max=10_000, help="GPUs of the fleet, all in MIG mode.")] = 100,
    arrivals: Annotated[int, typer.Option(min=4, max=1_000_000, help="A quarter of them is dropped.")] = 12_000,
    seeds: Annotated[str, typer.Option(help="Which arrivals: 7-16, or 1,4,9.")] = "7-16",
    policy: Annotated[list[str] | None, typer.Option(help="A policy, or all; may be repeated.")] = None,
    geometry: Annotated[str, typer.Option(help="classic (eight units, six profiles), or a product's key.")] = "classic",
    as_json: AsJson = False,
) -> None:
    """MIG slices come and go on a fleet that loses what does not fit: what each policy accepts."""
    from app.replay.mig import POLICIES, Workload, geometry_called, replay, seeds_from, show, weights_for
    from app.replay.mig import as_json as json_of

    names = list(POLICIES) if policy and "all" in policy else policy or ["market"]
    try:
        shape = geometry_called(geometry)
        workload = Workload(shape, weights_for(shape, mix), load, gpus, arrivals)
        results = [replay(workload, name, seeds_from(seeds)) for name in names]
    except ValueError as wrong:
        raise Failed(str(wrong), MISUSE) from None
    if as_json:
        typer.echo(json.dumps(json_of(workload, results), indent=1, ensure_ascii=False))
        return
    show(workload, results, _console())


@replays.command()
def openb(
    nodes: Annotated[Path, typer.Option(help="CSV of nodes: sn, cpu_milli, memory_mib, gpu, model.")],
    pods: Annotated[Path, typer.Option(help="CSV of pods: cpu_milli, memory_mib, num_gpu, gpu_milli, gpu_spec.")],
    policy: Annotated[list[str] | None, typer.Option(help="A policy, or all; may be repeated.")] = None,
    seeds: Annotated[str, typer.Option(help="Which arrivals: 42-51, or 1,4,9.")] = "42-51",
    ties: Annotated[str, typer.Option(help="fixed or random; if not given, as the policy's authors do.")] = "",
    as_json: AsJson = False,
) -> None:
    """A trace of shared and whole GPUs fills a cluster: how much of it each policy can use."""
    from app.errors import BadInput
    from app.replay.mig import seeds_from
    from app.replay.openb import POLICIES, Trace, replay, show
    from app.replay.openb import as_json as json_of

    names = list(POLICIES) if policy and "all" in policy else policy or ["potential"]
    if ties not in ("", "fixed", "random"):
        raise Failed(f"--ties {ties}: fixed or random", MISUSE)
    try:
        trace, chosen = Trace.read(nodes, pods), seeds_from(seeds)
        results = [replay(trace, name, chosen, fixed_ties=ties == "fixed" if ties else None) for name in names]
    except (BadInput, ValueError) as wrong:
        raise Failed(str(wrong), MISUSE) from None
    if as_json:
        typer.echo(json.dumps(json_of(results), indent=1, ensure_ascii=False))
        return
    show(trace, results, _console())


# ------------------------------------------------------------------------------------------------------ installing


@app.command()
def certs(
    out: Annotated[Path, typer.Option(help="Folder for the PEM files.")] = Path("certs"),
    dns: Annotated[list[str] | None, typer.Option(help="One more name of the service; may be repeated.")] = None,
    ip: Annotated[list[str] | None, typer.Option(help="One more address of the service; may be repeated.")] = None,
    days: Annotated[int | None, typer.Option(help="How long the certificates are good for (default 365).")] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace of the service (default tangram-system).")] = None,
    secret: Annotated[str | None, typer.Option(help="Also write two Secrets with names that begin like this.")] = None,
    force: Annotated[bool, typer.Option(help="Replace certificates that are there, under the same CA.")] = False,
) -> None:
    """Make a CA, the service's certificate and kube-scheduler's client certificate."""
    from app.certs import CERTIFICATE_DAYS, NAMESPACE, create_certificates
    from app.errors import TangramError

    try:
        written = create_certificates(
            out,
            dns=dns or (),
            ips=ip or (),
            days=CERTIFICATE_DAYS if days is None else days,
            namespace=namespace or NAMESPACE,
            secret=secret,
            force=force,
        )
    except TangramError as problem:
        raise Failed(str(problem)) from None
    typer.echo("\n".join(str(file) for file in written))


@app.command()
def manifests(
    out: Annotated[Path, typer.Option(help="The project's manifests folder, or a copy of it.")] = Path("manifests"),
    image: Annotated[str | None, typer.Option(help="The image to run.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Where the service runs (default tangram-system).")] = None,
    url: Annotated[str, typer.Option(help="Where kube-scheduler finds the extender, if not at its Service.")] = "",
) -> None:
    """Write the generated manifests: kube-scheduler's configurations, the admission policy, the kustomization."""
    from app.certs import NAMESPACE
    from app.errors import TangramError
    from app.manifests import IMAGE, write_manifests

    try:
        written = write_manifests(out, image=image or IMAGE, namespace=namespace or NAMESPACE, url=url)
    except TangramError as problem:
        raise Failed(str(problem)) from None
    typer.echo("\n".join(str(file) for file in written))


# ------------------------------------------------------------------------------------------------- asking a service


@app.command()
def cluster(
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
    match: Annotated[str, typer.Option("--filter", help="Only nodes whose name or product has this in it.")] = "",
) -> None:
    """What the service knows: totals, warnings and nodes."""
    whole = _whole_cluster(url)
    if as_json:
        typer.echo(json.dumps(whole, indent=1, ensure_ascii=False))
        return
    from app.show import show_cluster

    show_cluster(whole, match=match, console=_console())


@app.command("pods")
def pods_(
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
    phase: Annotated[str, typer.Option(help="Only waiting, proposed, assumed, held or leaving pods.")] = "",
) -> None:
    """Every pod that holds devices, is promised some, or waits."""
    found = _get(url, "v1/pods", phase=phase)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from app.show import show_pods

    show_pods(found["pods"], console=_console())


@app.command()
def explain(
    pod: Annotated[str, typer.Argument(help="UID, or namespace/name (a bare name means default/name).")],
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Why a pod is where it is, or why it waits."""
    found = _get(url, f"v1/pods/{_uid_of(pod, url)}")
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    from app.show import show_pod

    show_pod(found, console=_console())


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        typer.echo(f"tangram {installed('tangram-gpu')}")
    except PackageNotFoundError:
        typer.echo("tangram (not installed as a package)")


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _get(url: str, path: str, **query: str | int) -> Any:
    """One read of the public API; what goes wrong is said in one line."""
    import httpx

    where = f"{url.rstrip('/')}/{path}"
    try:
        answer = httpx.get(where, params={k: v for k, v in query.items() if v != ""}, timeout=ANSWER_SECONDS)
    except httpx.InvalidURL as wrong:
        raise Failed(f"--url {url}: {wrong}", MISUSE) from None
    except (httpx.HTTPError, ValueError) as problem:
        raise Failed(
            f"no answer from {where}: {problem} (is `tangram serve` running? --url or {URL_VARIABLE})"
        ) from None
    try:
        said = answer.json()
    except ValueError:
        raise Failed(f"{where} answered {answer.status_code}, and not in JSON: is this Tangram?") from None
    if answer.status_code != 200:
        words = said.get("detail", said) if isinstance(said, dict) else said
        raise Failed(f"{words}" if answer.status_code == 404 else f"{where} answered {answer.status_code}: {words}")
    return said


def _whole_cluster(url: str) -> dict[str, Any]:
    whole: dict[str, Any] = _get(url, "v1/cluster", limit=1000)
    while whole["next"]:
        page = _get(url, "v1/cluster", limit=1000, after=whole["next"])
        whole["nodes"] += page["nodes"]
        whole["next"] = page["next"]
    return whole


def _uid_of(pod: str, url: str) -> str:
    """Names become UIDs; of pods with the same name the one that holds or waits most recently comes first."""
    from urllib.parse import quote

    known: list[Mapping[str, Any]] = _get(url, "v1/pods")["pods"]
    namespace, slash, name = pod.partition("/")
    wanted = (namespace, name) if slash else ("default", pod)
    named = [one for one in known if (one["namespace"], one["name"]) == wanted]
    if named:
        youngest: Callable[[Mapping[str, Any]], float] = lambda one: one["since_seconds"] or 0.0  # noqa: E731
        return str(min(named, key=youngest)["uid"])
    if slash:
        raise Failed(
            f"Tangram knows no pod {pod}: it asks for no GPU, is gone, or kube-scheduler itself found no node for it "
            "and so never asked (kubectl describe pod tells)"
        )
    return quote(pod, safe="")


if __name__ == "__main__":
    main()
