"""Which task comes next, which groups are done, and how many orders to place. Pure: no broker, no clock.

Rules kept here, each with a test in tests/learner/test_orders.py:
1. Order i of a run is always the same task: a shuffle of the train split per pass, seeded by the run. So an order
   that is placed again after a crash is the same order.
2. An index is consumed once, whatever became of its group; a second time is an error of ours.
3. Never more than (1 + max_lag_versions) batches are open: ordered and not consumed. A group that is dropped or carries
   no signal is consumed without filling the batch, so its replacement comes out of the same count.
4. Nothing is ordered that the remaining updates cannot use.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from matpo.episode import Task
from matpo.errors import ConfigError
from matpo.settings import LearnerSettings
from matpo.wire import Order, OrderedTask


def group_id(index: int) -> str:
    """The group of order `index`, for example "g-00000007"."""
    return f"g-{index:08d}"


class OrderStream:
    """The endless sequence of orders of one run."""

    def __init__(self, tasks: Sequence[Task], *, seed: int, group_size: int) -> None:
        if not tasks:
            raise ConfigError("the environment has no task in its train split. Check [environment.options].")
        self._tasks = tasks
        self._seed = seed
        self._group_size = group_size
        self._shuffled: tuple[int, list[int]] = (-1, [])  # (pass, order of tasks): the last one used

    def task(self, index: int) -> Task:
        """The task of order `index`. From any thread: the inbox looks a task up while the leader places orders."""
        number, place = divmod(index, len(self._tasks))
        known, order = self._shuffled  # read once: another thread may put another pass there at any time
        if known != number:
            order = list(range(len(self._tasks)))
            random.Random(f"{self._seed}/{number}").shuffle(order)
            self._shuffled = (number, order)
        return self._tasks[order[place]]

    def order(self, index: int) -> Order:
        """Order `index` as it travels."""
        task = self.task(index)
        ordered = OrderedTask(id=task.id, environment=task.environment, question=task.question, data=dict(task.data))
        return Order(group=group_id(index), index=index, group_size=self._group_size, task=ordered)


@dataclass(kw_only=True)
class Book:
    """What is ordered and what is consumed. Part of every checkpoint.

    Every index below `consumed_below` is consumed, and those in `consumed`; indices below `cursor` have been ordered.
    """

    cursor: int = 0
    consumed_below: int = 0
    consumed: set[int] = field(default_factory=set)

    @property
    def num_open(self) -> int:
        """Orders that are placed and whose group is not consumed."""
        return self.cursor - self.consumed_below - len(self.consumed)

    @property
    def num_consumed(self) -> int:
        """Groups that are done."""
        return self.consumed_below + len(self.consumed)

    def is_consumed(self, index: int) -> bool:
        """Whether the group of order `index` is done."""
        return index < self.consumed_below or index in self.consumed

    def open(self) -> list[int]:
        """The open orders, oldest first. Placed again after a resume, should the broker not know them."""
        return [index for index in range(self.consumed_below, self.cursor) if index not in self.consumed]

    def consume(self, index: int) -> None:
        """Mark a group as done: trained, or dropped for a counted reason."""
        if self.is_consumed(index) or index >= self.cursor:
            raise ValueError(f"order {index} is consumed already or was never placed")
        self.consumed.add(index)
        while self.consumed_below in self.consumed:
            self.consumed.remove(self.consumed_below)
            self.consumed_below += 1

    def place(self, settings: LearnerSettings, *, updates_left: int) -> list[int]:
        """Indices to order now. Moves the cursor."""
        batches = min(1 + settings.max_lag_versions, updates_left)
        missing = max(0, batches * settings.groups_per_update - self.num_open)
        placed = list(range(self.cursor, self.cursor + missing))
        self.cursor += missing
        return placed
