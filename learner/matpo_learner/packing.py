"""Groups of one update -> packed micro-batches with exact weights. Pure numpy.

Rules kept here, each with a test in tests/learner/test_packing.py:
1. A token is trained if and only if its own segment says that it was sampled, and its segment is trainable.
2. Weights (1 / denominator) are counted over the whole optimizer step, all ranks, before anything is packed: the sum of
   weight * token loss over all micro-batches of all ranks is the objective, however it was packed.
3. Segments are packed whole, without padding, into rows of at most `microbatch_tokens`; a longer segment has a row of
   its own.
4. A minibatch is whole groups with all their roles. Every rank gets the same number of micro-batches, if need be empty.
5. The plan depends only on the arguments: each rank makes the whole plan and keeps its share.

A row holds a segment up to the last sampled token, which is predicted but never read. Targets are stored as
(row position to predict from, token id), so a segment's first token cannot be predicted from the segment before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from matpo.episode import Episode, Group, Segment
from matpo.errors import EpisodeError
from matpo.settings import LearnerSettings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """One packed row: T tokens of S segments, M sampled tokens to train. Empty: S = M = T = 0.

    Example, planner [5, 91, 7*, 2*] and worker [5, 44, 8*] (* sampled): token_ids [5, 91, 7, 5, 44],
    position_ids [0, 1, 2, 0, 1], segment_lengths [3, 2], predict_from [1, 2, 4], target_ids [7, 2, 8],
    target_segments [0, 0, 1].
    """

    token_ids: NDArray[np.int64]  # [T]
    position_ids: NDArray[np.int64]  # [T], from 0 in each segment
    segment_lengths: NDArray[np.int64]  # [S], sum = T
    predict_from: NDArray[np.int64]  # [M], row position whose hidden state predicts the target
    target_ids: NDArray[np.int64]  # [M], the sampled token
    target_segments: NDArray[np.int64]  # [M], which of the S segments; a segment's targets are all in one micro-batch
    advantages: NDArray[np.float32]  # [M]
    mu: NDArray[np.float32]  # [M], behaviour log-prob, nats
    weights: NDArray[np.float32]  # [M], 1 / denominator
    lags: NDArray[np.int32]  # [M], learner version - version that sampled this token
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

    @property
    def segment_ids(self) -> NDArray[np.int64]:
        """Which of the row's S segments each of the T tokens belongs to."""
        return np.repeat(np.arange(len(self.segment_lengths)), self.segment_lengths)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Piece:
    """One trainable segment with its numbers."""

    segment: Segment
    targets: NDArray[np.int64]  # positions of sampled tokens in the segment
    advantage: float
    weight: float

    @property
    def length(self) -> int:
        return int(self.targets[-1])


def pack_update(
    groups: Sequence[Group],
    advantages: Sequence[NDArray[np.float64]],
    settings: LearnerSettings,
    *,
    version: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of each optimizer step of one update.

    `advantages[g][i]` belongs to `groups[g].episodes[i]`; `version` is the learner's, for the lags.
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
    minibatches = []
    bounds = np.linspace(0, len(groups), settings.num_minibatches + 1).round().astype(int)
    for low, high in pairwise(bounds):
        pieces = _pieces(groups[low:high], advantages[low:high], settings)
        minibatches.append(_rows(pieces, settings, roles, version, rank, world_size))
    return minibatches


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
    return _rows(pieces, settings, _roles(episodes), version, rank, world_size)


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
    pieces: list[_Piece], settings: LearnerSettings, roles: tuple[str, ...], version: int, rank: int, world_size: int
) -> list[MicroBatch]:
    bins = fill_bins([piece.length for piece in pieces], settings.microbatch_tokens, world_size)
    role_ids = {role: index for index, role in enumerate(roles)}
    return [_row([pieces[i] for i in members], roles, role_ids, version) for members in bins[rank::world_size]]


def fill_bins(lengths: Sequence[int], capacity: int, world_size: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`, the same number of bins (at least one) for each rank.

    Rank r takes bins[r::world_size]. First-fit decreasing says how few bins do; then, if it can be done within
    `capacity`, the same items are spread evenly (longest first into the emptiest), so that no rank waits for another.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        spot = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if spot is None:
            bins.append([])
            room.append(capacity)
            spot = len(bins) - 1
        bins[spot].append(i)
        room[spot] -= lengths[i]
    num_bins = max(-(-len(bins) // world_size), 1) * world_size
    even: list[list[int]] = [[] for _ in range(num_bins)]
    load = [0] * num_bins
    for i in order:
        spot = min(range(num_bins), key=load.__getitem__)
        even[spot].append(i)
        load[spot] += lengths[i]
    if all(total <= capacity or len(members) == 1 for total, members in zip(load, even, strict=True)):
        return even
    return bins + [[] for _ in range(num_bins - len(bins))]


def _row(pieces: list[_Piece], roles: tuple[str, ...], role_ids: dict[str, int], version: int) -> MicroBatch:
    lengths = np.array([piece.length for piece in pieces], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    counts = [len(piece.targets) for piece in pieces]

    def at_targets(name: str) -> list[NDArray[np.generic]]:
        return [getattr(piece.segment, name)[piece.targets] for piece in pieces]

    return MicroBatch(
        token_ids=_join([p.segment.token_ids[: p.length] for p in pieces], np.int64),
        position_ids=_join([np.arange(length) for length in lengths], np.int64),
        segment_lengths=lengths,
        predict_from=_join([p.targets - 1 + start for p, start in zip(pieces, starts, strict=True)], np.int64),
        target_ids=_join(at_targets("token_ids"), np.int64),
        target_segments=np.repeat(np.arange(len(pieces)), counts).astype(np.int64),
        advantages=np.repeat([p.advantage for p in pieces], counts).astype(np.float32),
        mu=_join(at_targets("logprobs"), np.float32),
        weights=np.repeat([p.weight for p in pieces], counts).astype(np.float32),
        lags=version - _join(at_targets("versions"), np.int32),
        role_ids=np.repeat([role_ids[p.segment.role] for p in pieces], counts).astype(np.int32),
        roles=roles,
    )


def _join(parts: Sequence[NDArray[np.generic]], dtype: type) -> NDArray:  # type: ignore[type-arg]
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype=dtype)
