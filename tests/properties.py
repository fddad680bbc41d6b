"""`make properties MINUTES=60`: the property tests again and again, each round with a new seed, until the time is up.

Ends at the first failure, with the seed that shows it. A round is every test that Hypothesis drives.
"""

import argparse
import random
import re
import subprocess
import sys
import time


def main() -> int:
    """Rounds until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--paths", nargs="*", default=["tests/solver", "tests/app", "tests/agent"])
    given = parser.parse_args()
    began, rounds, tests = time.monotonic(), 0, 0
    while time.monotonic() - began < 60 * given.minutes:
        seed = random.SystemRandom().getrandbits(32)
        command = [sys.executable, "-m", "pytest", *given.paths, "-m", "hypothesis and not e2e", "-q", "-x"]
        command += [f"--hypothesis-seed={seed}", "-p", "no:cacheprovider", "--no-header", "--timeout=600"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout[-20_000:], done.stderr[-5_000:], sep="\n")
            print(f"failed in round {rounds + 1} with --hypothesis-seed={seed}")
            return 1
        rounds += 1
        passed = re.search(r"(\d+) passed", done.stdout)
        tests += int(passed.group(1)) if passed else 0
        print(f"round {rounds}: {time.monotonic() - began:.0f} s, {tests} property tests passed so far", flush=True)
    print(f"{rounds} rounds, {tests} property tests, {time.monotonic() - began:.0f} s, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main())
