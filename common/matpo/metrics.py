"""Prometheus metrics of all processes, in one table. A name that is not in it raises: a typo is not a new metric.

    metrics = Metrics("broker")
    metrics.count("episodes_total", result="stored")
    metrics.set("orders_open", 12)
    metrics.observe("commit_seconds", 0.003)
    metrics.serve("127.0.0.1", 9100)          # /metrics

Full names are matpo_{process}_{name}. Labels are bounded: roles, tools and reasons come from the run file or our code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from matpo.errors import SetupError

Process = Literal["actor", "broker", "learner"]
Kind = TypeVar("Kind", Counter, Gauge, Histogram)
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
LAGS = (0, 1, 2, 4, 8, 16)
RATIOS = (0.1, 0.5, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 2, 10)


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric: its kind, help text, labels and (histograms) buckets."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = SECONDS


TABLE: dict[Process, dict[str, Spec]] = {
    "broker": {
        "episodes_total": Spec(Counter, "Episodes received, by result: stored, duplicate, refused", ("result",)),
        "refusals_total": Spec(Counter, "Messages refused, by reason", ("reason",)),
        "bytes_total": Spec(Counter, "Payload bytes, by direction: in, out", ("direction",)),
        "commit_seconds": Spec(Histogram, "One group commit: append, fsync, ledger"),
        "fsync_seconds": Spec(Histogram, "One fdatasync of a payload file"),
        "journal_bytes": Spec(Gauge, "Bytes in payload files"),
        "groups_ready": Spec(Gauge, "Whole groups that wait for the learner"),
        "orders_open": Spec(Gauge, "Orders whose group is not whole yet"),
        "leases": Spec(Gauge, "Members that actors hold"),
        "lease_losses_total": Spec(Counter, "Leases lost, by reason", ("reason",)),
        "groups_dropped_total": Spec(
            Counter, "Groups given up, by reason and mean tokens per episode", ("reason", "tokens")
        ),
        "groups_quarantined_total": Spec(Counter, "Groups set aside, by reason: deliveries, invalid", ("reason",)),
        "actors": Spec(Gauge, "Actors that are connected"),
        "durability": Spec(Gauge, "1 for the policy that acknowledgements follow", ("policy",)),
        "disk_full": Spec(Gauge, "1 while episodes are refused because the disk is full"),
        "disk_free_bytes": Spec(Gauge, "Bytes free where the journal lies"),
        "journal_errors_total": Spec(Counter, "Damage found in payload files, by reason", ("reason",)),
        "replies_undeliverable_total": Spec(Counter, "Replies to peers that went or do not read; they ask again"),
        "connections_total": Spec(Counter, "Connections, by event: accepted, handshake_succeeded, ...", ("event",)),
    },
    "actor": {
        "episodes_total": Spec(Counter, "Episodes played, by outcome", ("outcome",)),
        "segments_total": Spec(Counter, "Segments played", ("role",)),
        "tokens_generated_total": Spec(Counter, "Tokens sampled", ("role",)),
        "episode_seconds": Spec(Histogram, "One episode"),
        "turn_seconds": Spec(Histogram, "One LLM call", ("role",)),
        "tool_calls_total": Spec(Counter, "Tool calls, by outcome: ok, error, timeout, refused", ("tool", "outcome")),
        "tool_seconds": Spec(Histogram, "One tool call", ("tool",)),
        "policy_version": Spec(Gauge, "Version of the weights that are loaded"),
        "snapshot_load_seconds": Spec(Histogram, "Verify and load one snapshot"),
        "snapshot_errors_total": Spec(Counter, "Snapshots refused, by reason", ("reason",)),
        "pause_seconds": Spec(Histogram, "Generation paused for one weight update"),
        "credit_wait_seconds_total": Spec(Counter, "Time without leases"),
        "unacked_episodes": Spec(Gauge, "Finished episodes that the broker has not stored yet"),
        "draining": Spec(Gauge, "1 while the actor drains"),
    },
    "learner": {
        "policy_version": Spec(Gauge, "Version of the weights in training"),
        "step_seconds": Spec(Histogram, "Where an update's time goes", ("phase",)),
        "waiting_seconds": Spec(Gauge, "How long the wait in progress has lasted, by who is waited for", ("who",)),
        "waited_seconds_total": Spec(Counter, "Time of waits that are over, by who was waited for", ("who",)),
        "wait_ratio": Spec(Gauge, "Share of the last updates' time in which groups were waited for"),
        "hint": Spec(Gauge, "1 for what would help: unknown, add_actors, learner, balanced", ("verdict",)),
        "groups_trained_total": Spec(Counter, "Groups that moved the weights"),
        "groups_dropped_total": Spec(Counter, "Groups that did not, by reason", ("reason",)),
        "zero_signal_groups_total": Spec(Counter, "Groups with equal rewards: no signal, replaced"),
        "bad_updates_total": Spec(Counter, "Updates of which a loss or gradient was not finite: left out, batch saved"),
        "tokens_trained_total": Spec(Counter, "Sampled tokens in the loss"),
        "batch_lag_versions": Spec(Histogram, "Lag of each trained episode", buckets=LAGS),
        "importance_ratio": Spec(Histogram, "Mean ratio pi/mu of each update", buckets=RATIOS),
        "ess_ratio": Spec(Gauge, "Effective sample size / tokens", ("role", "lag")),
        "role_tokens": Spec(Gauge, "Trained tokens of the last update", ("role", "lag")),
        "role_log_ratio_nats": Spec(Gauge, "Mean log pi/mu", ("role", "lag")),
        "role_kl_nats": Spec(Gauge, "k3 estimate of KL(mu || pi)", ("role", "lag")),
        "role_truncated_ratio": Spec(Gauge, "Share of tokens whose weight hit its cap", ("role", "lag")),
        "role_masked_ratio": Spec(Gauge, "Share of tokens left out by the loss", ("role", "lag")),
        "role_entropy_nats": Spec(Gauge, "Mean entropy of the policy at sampled positions", ("role", "lag")),
        "role_advantage_mean": Spec(Gauge, "Mean advantage over tokens", ("role", "lag")),
        "role_advantage_std": Spec(Gauge, "Standard deviation of the advantage over tokens", ("role", "lag")),
        "role_advantage_abs": Spec(Gauge, "Mean size of the advantage over tokens", ("role", "lag")),
        "engine_gap_nats": Spec(Gauge, "|log pi - mu| at lag 0: actor's engine against the learner", ("stat",)),
        "truncated_ratio": Spec(Gauge, "Share of tokens whose weight hit its cap"),
        "masked_ratio": Spec(Gauge, "Share of tokens left out by the loss"),
        "kl_nats": Spec(Gauge, "k3 estimate of KL(mu || pi)"),
        "reference_kl_nats": Spec(Gauge, "k3 estimate of KL(pi || reference); 0 without one"),
        "entropy_nats": Spec(Gauge, "Mean entropy of the policy at sampled positions"),
        "grad_norm": Spec(Gauge, "Gradient norm before clipping"),
        "reward": Spec(Gauge, "Mean reward of the last batch", ("environment", "component")),
        "published_version": Spec(Gauge, "Newest snapshot"),
        "checkpoint_timestamp_seconds": Spec(Gauge, "When the last checkpoint was committed (unix time)"),
    },
}


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self, process: Process) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        self._counters: dict[tuple[str, ...], Counter] = {}  # with their labels: the busiest are counted per message
        for name, spec in TABLE[process].items():
            full = f"matpo_{process}_{name}"
            if spec.kind is Histogram:
                self._metrics[name] = Histogram(
                    full, spec.help, spec.labels, registry=self.registry, buckets=spec.buckets
                )
            else:
                self._metrics[name] = spec.kind(full, spec.help, spec.labels, registry=self.registry)

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = (name, *labels.values())
        if key not in self._counters:
            self._counters[key] = _labelled(self._find(name, Counter), labels)
        self._counters[key].inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        _labelled(self._find(name, Gauge), labels).set(value)

    def clear(self, name: str) -> None:
        """Forget all series of a gauge with labels."""
        self._find(name, Gauge).clear()

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        _labelled(self._find(name, Histogram), labels).observe(value)

    def serve(self, host: str, port: int) -> None:
        """Serve /metrics on a daemon thread. Raises SetupError when the port is taken."""
        try:
            start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise SetupError(
                f"cannot serve metrics on {host}:{port}: {error.strerror}. "
                "Free the port, or set [metrics] to another (0 = off).",
                reason="port_in_use",
            ) from error

    def _find(self, name: str, kind: type[Kind]) -> Kind:
        metric = self._metrics.get(name)
        if not isinstance(metric, kind):
            raise KeyError(f"{name} is no {kind.__name__} of this process; the names are in matpo/metrics.py")
        return metric


def _labelled(metric: Kind, labels: dict[str, str]) -> Kind:
    return metric.labels(**labels) if labels else metric
