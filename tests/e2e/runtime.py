"""Where a real OCI runtime is; `python -m tests.e2e.runtime` gets one where there is none.

TANGRAM_RUNC names one; else runc or crun on the PATH; else Debian's runc, unpacked into the cache and not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.e2e.toolchain import cache

NAMES = ("runc", "crun")
PACKAGE = "runc"
"""Of the two the one that needs nothing but libseccomp2, and that knows every layout of cgroups."""
DOWNLOAD_SECONDS = 300.0


def find() -> Path | None:
    """The runtime's path, or None."""
    named = os.environ.get("TANGRAM_RUNC")
    if named:
        found = shutil.which(named)
        return Path(found) if found else None
    own = next((path for path in map(shutil.which, NAMES) if path), None)
    if own:
        return Path(own)
    unpacked = cache() / PACKAGE / "usr/sbin/runc"
    return unpacked if unpacked.exists() else None


def fetch() -> str | None:
    """Why no runtime could be had, or None where there is one now."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return "no runc or crun on the PATH, and this is no Debian that could have it (or set TANGRAM_RUNC)"
    partial = cache() / f"{PACKAGE}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        return _fetch(partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch(partial: Path) -> str | None:
    print("no container runtime found: unpacking Debian's runc (seconds)", flush=True)
    said = _run(["apt-get", "download", PACKAGE], partial)
    if said and os.geteuid() == 0:  # a fresh machine has no lists
        said = _run(["apt-get", "-qq", "update"], partial) or _run(["apt-get", "download", PACKAGE], partial)
    if said:
        return f"apt-get download {PACKAGE} failed: {said}"
    (package,) = partial.glob("*.deb")
    unpacked = partial / "unpacked"
    said = _run(["dpkg-deb", "-x", str(package), str(unpacked)], partial)
    if said:
        return f"dpkg-deb could not unpack {package.name}: {said}"
    said = _run([str(unpacked / "usr/sbin/runc"), "--version"], partial)
    if said:
        return f"Debian's runc does not start here: {said}"
    if not (cache() / PACKAGE).exists():
        unpacked.rename(cache() / PACKAGE)
    return None


def _run(command: list[str], folder: Path) -> str:
    """What a failed command said, at most its end; empty where it went well."""
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
    )
    return (done.stderr or done.stdout or f"status {done.returncode}").strip()[-400:] if done.returncode else ""


def runtime() -> Path | str:
    """A runtime's path; where none can be had, why."""
    found = find()
    if found:
        return found
    return fetch() or find() or "runc was unpacked, and is not there"


def main() -> int:
    """Find or fetch one and say which; without one only CI fails."""
    got = runtime()
    if isinstance(got, str):
        print(f"no container runtime: {got}; tests that start containers will be skipped", file=sys.stderr)
        return 1 if os.environ.get("CI") == "true" else 0
    print(f"container runtime: {got}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
