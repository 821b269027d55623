"""Figures of docs/benchmarks.md: each a ratio against a peer in the same run, because machines are noisy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matpo.settings import RunFile


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says to every benchmark."""

    run_file: RunFile
    folder: Path  # on the disk to measure
    keys: bool = True
    gpu: bool = False
    lags: Sequence[int] = ()  # staleness
    runs: Mapping[str, RunFile] = field(default_factory=dict)  # staleness: one run file per loss


def _sampling(options: Options) -> dict[str, Any]:
    from matpo_ops.bench.sampling import sampling  # loads torch: only for who asks

    return sampling(options.run_file)


def _broker(options: Options) -> dict[str, Any]:
    from matpo_ops.bench import broker

    return broker.run(broker.large_and_medium, options.folder, keys=options.keys)


def _broker_small(options: Options) -> dict[str, Any]:
    from matpo_ops.bench import broker

    return broker.run(broker.small, options.folder, keys=options.keys)


def _learner(options: Options) -> dict[str, Any]:
    if options.gpu:
        from matpo_ops.bench.learner_gpu import learner_gpu

        return learner_gpu()
    from matpo_ops.bench.learner import learner

    return learner(options.run_file)


def _staleness(options: Options) -> dict[str, Any]:
    from matpo_ops.bench.staleness import staleness

    return staleness(options.runs, options.folder, lags=options.lags)


BENCHMARKS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "sampling": _sampling,
    "broker": _broker,
    "broker small": _broker_small,
    "learner": _learner,
    "staleness": _staleness,
}
