"""Where a real browser is, and how to start it; `python -m tests.web.browser` gets one where there is none.

TANGRAM_CHROMIUM names one; else chromium or google-chrome on the PATH; else, as root on Debian, apt installs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
APT = ("apt-get", "-qq", "-o", "Dpkg::Use-Pty=0")


def find() -> str | None:
    """The browser's path, or None."""
    named = os.environ.get("TANGRAM_CHROMIUM")
    if named:
        return shutil.which(named)
    return next((path for path in map(shutil.which, NAMES) if path), None)


def install() -> str | None:
    """Why no browser could be installed, or None where there is one now."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return (
            "there is no chromium on the PATH, and only root on Debian can have it installed (or set TANGRAM_CHROMIUM)"
        )
    print("no browser found: installing chromium with apt-get (a minute or two)", flush=True)
    for step in (("update",), ("install", "-y", "--no-install-recommends", "chromium")):
        print(f"  apt-get {' '.join(step)}", flush=True)
        done = subprocess.run(
            [*APT, *step],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return f"apt-get {step[0]} failed: {(done.stderr or done.stdout).strip()[-400:]}"
    return None if find() else "apt-get installed chromium, and it is still not on the PATH"


def main() -> int:
    """Find or install one and say which; without one only CI fails."""
    path = find()
    missing = None if path else install()
    if missing:
        print(f"no browser: {missing}; the browser tests will be skipped", file=sys.stderr)
        return 1 if os.environ.get("CI") == "true" else 0
    print(f"browser: {path or find()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
