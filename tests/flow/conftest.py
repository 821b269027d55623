"""What the flow tests share: processes that start without the seconds that the imports take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.fault.forking import ForkServer


@pytest.fixture(scope="session")
def learners() -> Iterator[ForkServer]:
    """Forks `matpo-learner`; with several ranks that is the command that starts them."""
    with ForkServer("learner") as server:
        yield server


@pytest.fixture(scope="session")
def operators() -> Iterator[ForkServer]:
    """Forks `matpo`."""
    with ForkServer("operator") as server:
        yield server
