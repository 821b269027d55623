"""Items of known size and cost -> rows, as few as fit and as even as can be. Pure Python, the same on every rank.

Rules kept here, each with a test in tests/learner/test_balance.py:
1. Every item is in one row. No row is larger than the capacity, unless it is one item.
2. Every rank gets the same number of rows, at least one, if need be empty.
3. The plan depends only on the arguments.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

MORE_ROWS = 2
"""So many more rows (times the ranks) are tried when as few as possible cannot be even."""


def fill_rows(sizes: Sequence[int], costs: Sequence[float], capacity: int, world_size: int) -> list[list[int]]:
    """Indices of the items in rows of at most `capacity` in size and of even cost. Rank r takes rows[r::world_size].

    First-fit decreasing says how few rows do; largest differencing spreads the items evenly over as many. Where that
    does not keep the capacity, a few more rows are tried before evenness is given up.
    """
    fewest = first_fit(sizes, capacity)
    num_rows = max(-(-len(fewest) // world_size), 1) * world_size
    for attempt in range(1 + MORE_ROWS):
        rows = spread(costs, num_rows + attempt * world_size)
        if all(len(members) <= 1 or sum(sizes[i] for i in members) <= capacity for members in rows):
            return rows
    return fewest + [[] for _ in range(num_rows - len(fewest))]


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: each item, largest first, into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        spot = next((row for row, free in enumerate(room) if free >= sizes[i]), None)
        if spot is None:
            rows.append([])
            room.append(capacity)
            spot = len(rows) - 1
        rows[spot].append(i)
        room[spot] -= sizes[i]
    return rows


def spread(costs: Sequence[float], num_rows: int) -> list[list[int]]:
    """Indices in exactly `num_rows` rows with nearly the same sum of costs.

    Source: largest differencing, Karmarkar and Karp (1982), "The differencing method of set partitioning". A partial
    solution is num_rows sums; the two with the widest spread are joined, the largest sum of one with the smallest of
    the other, until one solution is left.
    """
    # (-spread, number, sums from the largest down with their members); the number makes ties decided.
    empty: list[tuple[float, list[int]]] = [(0.0, [])] * (num_rows - 1)
    heap = [(-float(cost), i, [(float(cost), [i]), *empty]) for i, cost in enumerate(costs)]
    heapq.heapify(heap)
    for number in range(len(costs), 2 * len(costs) - 1):
        (_, _, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        pairs = zip(one, reversed(other), strict=True)
        joined = sorted(((a + b, left + right) for (a, left), (b, right) in pairs), key=lambda x: (-x[0], x[1]))
        heapq.heappush(heap, (joined[-1][0] - joined[0][0], number, joined))
    return [sorted(members) for _, members in heap[0][2]] if heap else [[] for _ in range(num_rows)]
