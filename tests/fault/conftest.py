"""What the tests of faults share: places for brokers, a fork server, and a way to print a figure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.fault.harness import Forks, Place


@pytest.fixture
def make_place(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """make_place(credit_bytes=...): a folder, a run file and ports, with these [broker] settings."""
    places: list[Place] = []

    def make(**broker: object) -> Place:
        places.append(Place(tmp_path / f"place-{len(places)}", **broker))
        return places[-1]

    yield make
    for place in places:
        place.close()


@pytest.fixture
def place(make_place: Callable[..., Place]) -> Place:
    return make_place()


@pytest.fixture
def forks() -> Iterator[Forks]:
    parent = Forks()
    yield parent
    parent.close()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """report("R1", kills=200, lost=0) prints "R1: kills=200 lost=0" past pytest's capture, and appends it to the file
    that MATPO_FIGURES names, if it is set."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None

    def write(promise: str, **figures: object) -> None:
        values = (f"{name}={round(v, 3) if isinstance(v, float) else v}" for name, v in figures.items())
        line = f"{promise}: {' '.join(values)}"
        with capture.global_and_fixture_disabled():
            print(f"\n{line}", flush=True)
        if path := os.environ.get("MATPO_FIGURES"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    return write
