"""Which tokens of different segments are one computation: equal tokens after equal tokens. Pure numpy.

Rules kept here, each with a test in tests/learner/test_prefixes.py:
1. Two positions are one if and only if everything up to and including them is equal: a node of the prefix tree.
2. A family is a run of sequences that share a prefix; one that is too large is cut where its members share least.
3. A leaf is a sequence that is no prefix of another (of equal ones, one): to visit the leaves is to visit every node.

In lexicographic order a sequence shares most with its neighbours, so the whole tree is that order and the length of the
prefix that each sequence has in common with the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tree:
    """Sequences in lexicographic order.

    Example, [5, 91, 7], [5, 44], [5, 91, 8]: order [1, 0, 2], shared [0, 1, 2]: six nodes instead of eight tokens.
    """

    order: list[int]  # indices of the sequences
    shared: list[int]  # [i]: tokens that sequence order[i] has in common with sequence order[i - 1]; shared[0] = 0


def tree(sequences: Sequence[Tokens]) -> Tree:
    """The prefix tree of the sequences; equal ones stay in the order given."""
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]  # bytes compare as the tokens do, and fast
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = [0] + [_in_common(sequences[a], sequences[b]) for a, b in pairwise(order)]
    return Tree(order=order, shared=shared[: len(order)])


def _in_common(a: Tokens, b: Tokens) -> int:
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length


def places(of: Tree, lengths: Sequence[int]) -> tuple[int, list[NDArray[np.int64]]]:
    """Number the nodes of a tree. Returns how many there are, and for each sequence the nodes of its tokens, in order.

    `lengths[i]` tokens has sequence i. Sequence i is first to read its last `lengths[i] - shared` nodes: they are new.
    """
    found: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)] * len(lengths)
    before, total = np.zeros(0, dtype=np.int64), 0
    for index, shared in zip(of.order, of.shared, strict=True):
        new = lengths[index] - shared
        before = np.concatenate([before[:shared], np.arange(total, total + new)])
        found[index], total = before, total + new
    return total, found


def leaves(of: Tree, lengths: Sequence[int]) -> list[int]:
    """The sequences that do not end inside another one."""
    return (
        [i for i, shared in zip(of.order, [*of.shared[1:], 0], strict=True) if shared < lengths[i]] if of.order else []
    )


def families(of: Tree, lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Cut a tree into families of at most `limit` nodes; a single sequence may have more.

    Sequences without a common prefix are never one family.
    """
    found = []
    pending = [(0, len(of.order))]
    while pending:
        low, high = pending.pop()
        if high - low > 1 and (min(of.shared[low + 1 : high]) == 0 or _nodes(of, lengths, low, high) > limit):
            pending += reversed(_cut(of, lengths, low, high, limit))
        elif high > low:
            found.append([of.order[i] for i in range(low, high)])
    return found


def _nodes(of: Tree, lengths: Sequence[int], low: int, high: int) -> int:
    """Nodes of the part [low, high) when it stands alone."""
    return sum(lengths[of.order[i]] - of.shared[i] for i in range(low, high)) + of.shared[low]


def _cut(of: Tree, lengths: Sequence[int], low: int, high: int, limit: int) -> list[tuple[int, int]]:
    """Cut where least is shared, then join neighbours again as far as the limit allows."""
    least = min(of.shared[low + 1 : high])
    cuts = [low, *(i for i in range(low + 1, high) if of.shared[i] == least), high]
    parts: list[tuple[int, int]] = []
    room = 0
    for start, end in pairwise(cuts):
        size = _nodes(of, lengths, start, end)
        if least and parts and size - least <= room:
            parts[-1] = (parts[-1][0], end)
            room -= size - least
        else:
            parts.append((start, end))
            room = limit - size
    return parts
