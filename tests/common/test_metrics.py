"""One table of metrics; a typo is not a new metric."""

import socket
import urllib.request

import pytest
from prometheus_client import generate_latest

from matpo.errors import SetupError
from matpo.metrics import TABLE, Metrics


@pytest.mark.parametrize("process", list(TABLE))
def test_every_metric_of_the_table_is_exported(process) -> None:
    text = generate_latest(Metrics(process).registry).decode()
    for name in TABLE[process]:
        assert f"matpo_{process}_{name.removesuffix('_total')}" in text


def test_an_unknown_name_raises() -> None:
    with pytest.raises(KeyError, match=r"matpo/metrics\.py"):
        Metrics("actor").count("episode_total")


def test_metrics_are_served_over_http() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics = Metrics("broker")
    metrics.set("orders_open", 3)
    metrics.serve("127.0.0.1", port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        assert b"matpo_broker_orders_open 3.0" in reply.read()


def test_a_port_that_is_taken_is_a_set_up_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SetupError, match="Free the port"):
            Metrics("broker").serve("127.0.0.1", taken.getsockname()[1])
