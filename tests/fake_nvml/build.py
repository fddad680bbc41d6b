"""Builds the fake `libnvidia-ml.so.1` at test time: with `cc` where there is one, else with PyPI's ziglang.

    python -m tests.fake_nvml.build [--without SYMBOL ...]     prints the directory for LD_LIBRARY_PATH

The result is kept in ~/.cache/tangram (TANGRAM_CACHE overrides) under a name made from the sources, the compiler
and what was left out, so it takes a second once and nothing afterwards.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = tuple(
    HERE / name
    for name in (
        "nvml_fake.h",
        "nvml_fake.c",
        "device.c",
        "links.c",
        "mig.c",
        "events.c",
        "call.c",
        "state.c",
        "description.c",
        "control.c",
    )
)
PROBE = HERE / "probe.c"
TOOLCHAIN_LOCK = HERE.parents[1] / "requirements-toolchain.lock"
SONAME = "libnvidia-ml.so.1"  # what pynvml asks the loader for
WARNINGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror")
FLAGS = (*WARNINGS, "-shared", "-fPIC", "-fvisibility=hidden", "-pthread")


def cache_directory() -> Path:
    """Where built things are kept over runs and checkouts."""
    return Path(os.environ.get("TANGRAM_CACHE") or Path.home() / ".cache" / "tangram")


def build(without: tuple[str, ...] = ()) -> Path:
    """Build the library unless it is there, and return its directory; `without` leaves symbols out (old driver).

    Raises `RuntimeError` with the compiler's words when it does not compile.
    """
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "nvml.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel tests: one builds, the others find it
        compiler = _compiler(zig=cache / "ziglang")
        target = cache / f"nvml-{_fingerprint(compiler, without)}"
        if not (target / SONAME).exists():
            _compile(compiler, target, without)
    return target


def build_probe() -> Path:
    """The C program that looks at the library (probe.c), linked with it by soname; cached like the library."""
    library = build()
    target = library.parent / f"probe-{library.name}-{hashlib.sha256(PROBE.read_bytes()).hexdigest()[:16]}"
    with (library.parent / "nvml.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compiler = _compiler(zig=library.parent / "ziglang")
            made = target.with_name(f".{target.name}")
            _run([*compiler, *WARNINGS, "-o", str(made), str(PROBE), str(library / SONAME)])
            made.rename(target)
    return target


def _compiler(*, zig: Path) -> tuple[str, ...]:
    """The command of a C compiler. Installs the pinned ziglang for this Python only where there is none at all."""
    chosen = os.environ.get("TANGRAM_CC") or shutil.which("cc")
    if chosen == "zig":
        chosen = None
    if chosen:
        return (chosen,)
    if importlib.util.find_spec("ziglang") is None:
        _install_ziglang()
    os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", str(zig))
    os.environ.setdefault("ZIG_LOCAL_CACHE_DIR", str(zig))
    return (sys.executable, "-m", "ziglang", "cc")


def _install_ziglang() -> None:
    """Only ziglang's own lines of the lock file: the other tools in it are not needed for C."""
    print("no C compiler here: installing the pinned ziglang (about 100 MB, once)", file=sys.stderr, flush=True)
    entries = TOOLCHAIN_LOCK.read_text().replace("\\\n", " ").splitlines()
    pinned = [entry for entry in entries if entry.startswith("ziglang==")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as lock:
        lock.write("\n".join(pinned) + "\n")
        lock.flush()
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes")
        subprocess.run([*pip, "-r", lock.name], check=True, stdout=sys.stderr)
    importlib.invalidate_caches()


def _fingerprint(compiler: tuple[str, ...], without: tuple[str, ...]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    seen = hashlib.sha256("\0".join([*compiler, version, *FLAGS, *sorted(without)]).encode())
    for source in (*SOURCES, Path(__file__)):
        seen.update(source.read_bytes())
    return seen.hexdigest()[:16]


def _compile(compiler: tuple[str, ...], target: Path, without: tuple[str, ...]) -> None:
    """Into a directory of its own, renamed at the end: an interrupted build leaves nothing half done behind."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch_name:
        scratch = Path(scratch_name)
        exports = scratch / "exports.map"
        hidden = "".join(f"{symbol}; " for symbol in without)
        exports.write_text(f"{{ global: nvml*; fake_nvml_*; local: {hidden}*; }};\n")
        made = scratch / "made"
        made.mkdir()
        linking = (f"-Wl,-soname,{SONAME}", f"-Wl,--version-script,{exports}", "-o", str(made / SONAME))
        sources = [str(source) for source in SOURCES if source.suffix == ".c"]
        _run([*compiler, *FLAGS, *linking, *sources])
        made.rename(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the fake NVML library does not compile:\n{done.stderr}")


def main() -> None:
    """Build from the command line."""
    parser = argparse.ArgumentParser(description="Build the fake NVML library; prints its directory.")
    parser.add_argument("--without", action="append", default=[], metavar="SYMBOL", help="leave a symbol out")
    print(build(tuple(parser.parse_args().without)))


if __name__ == "__main__":
    main()
