"""Every error that MATPO raises on purpose, as one tree.

Each says what happened (with values), what was wanted, and what to do. The exit code tells scripts who has to act:

    MatpoError
    +-- ConfigError        2   the run file or the command line
    +-- SetupError         3   this machine: a library, a folder, a port
    +-- DataError          4   bytes that are not what they claim to be
    |   +-- EpisodeError       an episode's content breaks a rule (see matpo.schema)
    |   +-- SnapshotError      published weights are torn, foreign or older (see matpo.snapshot)
    |   +-- CheckpointError    a learner checkpoint is torn or of another run
    |   +-- JournalError       the broker's store
    +-- PeerError          5   another process, or its credentials
    |   +-- ProtocolError      a message that breaks the wire protocol
    |   +-- RefusedError       a peer answered no, with a reason
    +-- TryAgainError      75  nothing is wrong that time will not mend
    +-- InfraError             a rollout failed for a reason that is not the model's: retried on another actor
"""

from __future__ import annotations


class MatpoError(Exception):
    """Base of the tree. `reason` is a short stable word for counters and logs; `exit_code` for scripts."""

    exit_code = 1

    def __init__(self, message: str, *, reason: str = "error") -> None:
        super().__init__(message)
        self.reason = reason


class ConfigError(MatpoError):
    """The run file or the command line asks for something that cannot be."""

    exit_code = 2


class SetupError(MatpoError):
    """This machine lacks something: a library, a folder, a free port, space."""

    exit_code = 3


class DataError(MatpoError):
    """Bytes that are not what they claim to be."""

    exit_code = 4


class EpisodeError(DataError):
    """An episode's content breaks a rule of schema v1."""


class SnapshotError(DataError):
    """Published weights are torn, foreign, or older than what is loaded."""


class CheckpointError(DataError):
    """A learner checkpoint is torn, or belongs to another run or model."""


class JournalError(DataError):
    """The broker's durable store is damaged, locked or of another format."""


class PeerError(MatpoError):
    """Another process did something that the protocol does not allow, or is not there."""

    exit_code = 5


class ProtocolError(PeerError):
    """A message that breaks the wire protocol."""


class RefusedError(PeerError):
    """A peer answered no. `retry_after_s` is None when asking again is pointless."""

    def __init__(self, message: str, *, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_s = retry_after_s


class TryAgainError(MatpoError):
    """Nothing is wrong that time will not mend."""

    exit_code = 75


class InfraError(MatpoError):
    """A rollout failed for a reason that is not the model's (engine, tool server, judge). Retried as attempt + 1."""
