"""Groups of one update -> packed micro-batches with exact weights. Pure numpy.

Rules kept here, each with a test in tests/learner/test_packing.py:
1. A token is trained if and only if its own segment says that it was sampled, and its segment is trainable.
2. Weights (1 / denominator) are counted over the whole optimizer step, all ranks, before anything is packed: the sum of
   weight * token loss over all micro-batches of all ranks is the objective, however it was packed.
3. Segments are packed whole, without padding, into rows of at most `microbatch_tokens`; a longer segment has a row of
   its own.
4. A minibatch is whole groups with all their roles. Every rank gets the same number of micro-batches, if need be empty.
5. The plan depends only on the arguments: each rank makes the whole plan and keeps its share.
6. With `share_prefixes`, segments of a row that begin with the same tokens hold these once: a row is a prefix tree.
   Segments that share much are put into one row.

A row holds a segment up to the last sampled token, which is predicted but never read. Targets are stored as
(row position to predict from, token id), so a segment's first token cannot be predicted from the segment before it, and
several segments can predict different tokens from one shared position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from matpo.episode import Episode, Group, Segment
from matpo.errors import EpisodeError
from matpo.settings import LearnerSettings
from matpo_learner import prefixes
from matpo_learner.balance import fill_rows
from matpo_learner.lineage import NEVER_RESUMED, Lineage

ATTENTION_TOKENS = 8192
"""Cost model of a row: at this length a segment's attention costs half of what its other work does. About right for
hidden sizes of 1024 to 2048; rows are only balanced by it."""
LagsOf = Callable[[NDArray[np.int32]], NDArray[np.int32]]
READS_PER_TOKEN = 4
"""A row may read shared tokens again in attention so many times as it has room for tokens: this bounds its memory."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """One packed row: T tokens of S segments, M sampled tokens to train. Empty: S = M = T = 0.

    A segment that is a prefix of another one of the row (as are equal ones) is not listed in segment_lengths and _rows.

    A token that segments share stands once. Example, planner [5, 91, 7*, 2*] and worker [5, 44, 8*] (* sampled):
    token_ids [5, 44, 91, 7], position_ids [0, 1, 1, 2], segment_lengths [2, 3], segment_rows [0, 1, 0, 2, 3],
    predict_from [2, 3, 1], target_ids [7, 2, 8], target_segments [0, 0, 1].
    Without sharing token_ids is [5, 91, 7, 5, 44], segment_rows 0 to 4.
    """

    token_ids: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T], from 0 in each segment
    segment_lengths: NDArray[np.int64]  # [S], tokens that each segment reads
    segment_rows: NDArray[np.int64]  # [sum of segment_lengths], row positions of each segment's tokens, in order
    predict_from: NDArray[np.int64]  # [M], row position whose hidden state predicts the target
    target_ids: NDArray[np.int64]  # [M], the sampled token
    target_segments: NDArray[np.int64]  # [M], number of its segment in this row; a segment's targets are all in one row
    advantages: NDArray[np.float32]  # [M]
    mu: NDArray[np.float32]  # [M], behaviour log-prob, nats
    weights: NDArray[np.float32]  # [M], 1 / denominator
    lags: NDArray[np.int32]  # [M], updates between the weights that sampled this token and the learner's
    role_ids: NDArray[np.int32]  # [M], index into roles
    roles: tuple[str, ...]  # the same in all micro-batches of an update

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """M."""
        return len(self.target_ids)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Piece:
    """One trainable segment with its numbers."""

    segment: Segment
    targets: NDArray[np.int64]  # positions of sampled tokens in the segment
    advantage: float
    weight: float

    @property
    def read(self) -> NDArray[np.int32]:
        """The tokens that are read: all before the last target."""
        return self.segment.token_ids[: self.targets[-1]]

    @property
    def length(self) -> int:
        return int(self.targets[-1])


def pack_update(
    groups: Sequence[Group],
    advantages: Sequence[NDArray[np.float64]],
    settings: LearnerSettings,
    *,
    version: int,
    lineage: Lineage = NEVER_RESUMED,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of each optimizer step of one update.

    `advantages[g][i]` belongs to `groups[g].episodes[i]`; `version` is the learner's and `lineage` says which
    update each version is of, for the lags.
    Denominator of a token, with G groups in its optimizer step:
        episode    G * K * N_i      N_i = sampled tokens of the whole tree (the paper's objective)
        token      sampled tokens of the step
        constant   G * K * constant_tokens
    Raises EpisodeError(first_token_sampled) for a token that nothing can predict, ValueError for an advantage that is
    not finite: matpo_learner.credit lets none through.
    """
    for group, of_group in zip(groups, advantages, strict=True):
        if not np.isfinite(of_group).all():
            raise ValueError(f"group {group.id}: advantages {of_group.tolist()} are not all finite")
    roles = _roles([episode for group in groups for episode in group.episodes])
    lags_of = partial(lineage.lags, version=version)
    minibatches = []
    for low, high in minibatch_bounds(len(groups), settings):
        pieces = _pieces(groups[low:high], advantages[low:high], settings)
        minibatches.append(_rows(pieces, settings, roles, lags_of, rank, world_size))
    return minibatches


def minibatch_bounds(num_groups: int, settings: LearnerSettings) -> list[tuple[int, int]]:
    """(first, one past the last) group of each minibatch of an update."""
    bounds = np.linspace(0, num_groups, settings.num_minibatches + 1).round().astype(int).tolist()
    return list(pairwise(bounds))


def pack_sft(
    episodes: Sequence[Episode], settings: LearnerSettings, *, version: int = 0, rank: int = 0, world_size: int = 1
) -> list[MicroBatch]:
    """This rank's micro-batches of one supervised step: advantage 1, weight 1 / sampled tokens of the step.

    Also the way to score recorded episodes: LearnerEngine.log_probs of these stands beside their `mu`.
    """
    num_sampled = sum(episode.num_sampled for episode in episodes)
    pieces = [
        piece
        for episode in episodes
        for piece in _episode_pieces(episode, advantage=1.0, weight=1.0 / max(num_sampled, 1))
    ]
    lags_of = partial(NEVER_RESUMED.lags, version=version)
    return _rows(pieces, settings, _roles(episodes), lags_of, rank, world_size)


def _roles(episodes: Sequence[Episode]) -> tuple[str, ...]:
    return tuple(sorted({segment.role for episode in episodes for segment in episode.segments if segment.trainable}))


def _pieces(
    groups: Sequence[Group], advantages: Sequence[NDArray[np.float64]], settings: LearnerSettings
) -> list[_Piece]:
    num_sampled = sum(episode.num_sampled for group in groups for episode in group.episodes)
    pieces = []
    for group, of_group in zip(groups, advantages, strict=True):
        num_episodes = len(groups) * len(group.episodes)
        for episode, advantage in zip(group.episodes, of_group, strict=True):
            denominator = {
                "episode": num_episodes * episode.num_sampled,
                "token": num_sampled,
                "constant": num_episodes * settings.constant_tokens,
            }[settings.denominator]
            pieces += _episode_pieces(episode, advantage=float(advantage), weight=1.0 / max(denominator, 1))
    return pieces


def _episode_pieces(episode: Episode, *, advantage: float, weight: float) -> list[_Piece]:
    pieces = []
    for segment in episode.segments:
        if not segment.trainable or not segment.num_sampled:
            continue
        targets = np.flatnonzero(segment.sampled)
        if targets[0] == 0:
            raise EpisodeError(
                f"episode {episode.id}, segment {segment.index}: its first token is marked as sampled, but nothing "
                "stands before it to predict it from. A segment begins with a prompt.",
                reason="first_token_sampled",
            )
        pieces.append(_Piece(segment=segment, targets=targets, advantage=advantage, weight=weight))
    return pieces


def _rows(
    pieces: list[_Piece], settings: LearnerSettings, roles: tuple[str, ...], lags_of: LagsOf, rank: int, world_size: int
) -> list[MicroBatch]:
    units = _units(pieces, settings, world_size)
    sizes = [max(unit.num_tokens, sum(unit.reads) // READS_PER_TOKEN) for unit in units]
    rows = fill_rows(sizes, [unit.cost for unit in units], settings.microbatch_tokens, world_size)
    role_ids = {role: index for index, role in enumerate(roles)}
    return [
        _row([piece for i in members for piece in units[i].pieces], settings.share_prefixes, roles, role_ids, lags_of)
        for members in rows[rank::world_size]
    ]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Unit:
    """Pieces that go into one row together."""

    pieces: list[_Piece]
    num_tokens: int  # shared ones once
    reads: list[int]  # lengths of the segments that attention runs over

    @property
    def cost(self) -> float:
        return self.num_tokens + sum(length**2 for length in self.reads) / (2 * ATTENTION_TOKENS)


def _units(pieces: list[_Piece], settings: LearnerSettings, world_size: int) -> list[_Unit]:
    """Single pieces, or families of those that share a prefix, small enough for rows to be full and even."""
    if not settings.share_prefixes:
        return [_Unit(pieces=[piece], num_tokens=piece.length, reads=[piece.length]) for piece in pieces]
    lengths = [piece.length for piece in pieces]
    whole = prefixes.tree([piece.read for piece in pieces])
    limit = min(settings.microbatch_tokens // 2, (sum(lengths) - sum(whole.shared)) // (4 * world_size))
    units = []
    for family in prefixes.families(whole, lengths, limit):
        members = [pieces[i] for i in family]
        own = [piece.length for piece in members]
        tree = prefixes.tree([piece.read for piece in members])
        reads = [own[i] for i in prefixes.leaves(tree, own)]
        units.append(_Unit(pieces=members, num_tokens=sum(own) - sum(tree.shared), reads=reads))
    return units


def _row(
    pieces: list[_Piece], share: bool, roles: tuple[str, ...], role_ids: dict[str, int], lags_of: LagsOf
) -> MicroBatch:
    lengths = [piece.length for piece in pieces]
    reads = [piece.read for piece in pieces]
    order = prefixes.tree(reads) if share else prefixes.Tree(order=list(range(len(pieces))), shared=[0] * len(pieces))
    num_tokens, places = prefixes.places(order, lengths)
    token_ids, position_ids = np.zeros(num_tokens, dtype=np.int64), np.zeros(num_tokens, dtype=np.int64)
    for place, read in zip(places, reads, strict=True):
        token_ids[place], position_ids[place] = read, np.arange(len(read))
    listed = prefixes.leaves(order, lengths) if share else range(len(pieces))
    counts = [len(piece.targets) for piece in pieces]

    def at_targets(name: str) -> list[NDArray[np.generic]]:
        return [getattr(piece.segment, name)[piece.targets] for piece in pieces]

    return MicroBatch(
        token_ids=token_ids,
        position_ids=position_ids,
        segment_lengths=np.array([lengths[i] for i in listed], dtype=np.int64),
        segment_rows=_join([places[i] for i in listed], np.int64),
        predict_from=_join([place[p.targets - 1] for p, place in zip(pieces, places, strict=True)], np.int64),
        target_ids=_join(at_targets("token_ids"), np.int64),
        target_segments=np.repeat(np.arange(len(pieces)), counts).astype(np.int64),
        advantages=np.repeat([p.advantage for p in pieces], counts).astype(np.float32),
        mu=_join(at_targets("logprobs"), np.float32),
        weights=np.repeat([p.weight for p in pieces], counts).astype(np.float32),
        lags=lags_of(_join(at_targets("versions"), np.int32)),
        role_ids=np.repeat([role_ids[p.segment.role] for p in pieces], counts).astype(np.int32),
        roles=roles,
    )


def _join(parts: Sequence[NDArray[np.generic]], dtype: type) -> NDArray:  # type: ignore[type-arg]
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)
