"""For all tests: where every tool has to be there, a skip is a failure."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("MATPO_TOOLS_REQUIRED") and "gpu" not in item.keywords:
        report.outcome = "failed"
        report.longrepr = f"MATPO_TOOLS_REQUIRED is set, but this test was skipped: {report.longrepr}"
    return report
