"""What end-to-end tests share: the end of the services' logs beside a failure."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

LOG_LINES = 40
LINE_LENGTH = 300


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """A failure in a test on a Stack shows what its services and kube-schedulers wrote last."""
    outcome = yield
    report = outcome.get_result()
    if not report.failed or item.get_closest_marker("e2e") is None:
        return
    from tests.e2e.stack import Stack

    for stack in Stack.live:
        for name, text in stack.logs().items():
            tail = "\n".join(line[:LINE_LENGTH] for line in text.splitlines()[-LOG_LINES:])
            report.sections.append((f"the end of {name}'s log", tail))
