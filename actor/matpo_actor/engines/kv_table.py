"""Keys and values of the transformers engine: one table, a row per context, each row written at its own position.

Rows [0, n) are in the batch. The rows behind them keep contexts that are finished, for later prompts to begin with.
The table says nothing about when to compute; it remembers which tokens' keys and values a row holds, and moves rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

BLOCK_TOKENS = 128  # the table's length grows by this


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention. query [rows, heads, tokens, size]; key, value [rows, shared heads, reach, size].

    In the decode loop the queries of a shared head become its rows: repeating keys and values, as transformers does
    under a mask, took 80 % of a step.
    """
    rows, heads, tokens, size = query.shape
    if tokens == 1:
        query = query.view(rows, key.shape[1], -1, size)
    else:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


class TableLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [rows, heads, tokens, size]; each row is written at its own position."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate, once the model has shown its shapes."""
        t = self.table
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(t.num_rows, key_states.shape[1], t.num_tokens, key_states.shape[3])
        self.values = value_states.new_zeros(t.num_rows, value_states.shape[1], t.num_tokens, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values at the positions of this forward; return all that it attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        t = self.table
        self.keys[t.row_index, :, t.position] = key_states.transpose(1, 2)
        self.values[t.row_index, :, t.position] = value_states.transpose(1, 2)
        return self.keys[t.rows, :, : t.reach], self.values[t.rows, :, : t.reach]

    def get_seq_length(self) -> int:
        """Longest context of this forward."""
        return self.table.reach

    def resize(self, num_rows: int, num_tokens: int) -> None:
        """Grow, contents kept."""
        if self.is_initialized:
            self.keys, self.values = (_grown(old, num_rows, num_tokens) for old in (self.keys, self.values))


class Table:
    """Which tokens' keys and values each row holds, and under which weights; moves rows about."""

    def __init__(self, num_layers: int) -> None:
        self.num_rows, self.num_tokens = 16, 2 * BLOCK_TOKENS
        self.layers = [TableLayer(self) for _ in range(num_layers)]
        self.cache = Cache(layers=self.layers)
        self.ids = np.full((self.num_rows, self.num_tokens), -1, np.int32)
        self.used = np.zeros(self.num_rows, np.int64)  # when a row was last of use
        self.clock = 0
        self.rows, self.reach = slice(0, 0), 0
        self.row_index = self.position = torch.empty(0)

    def aim(self, first: int, position: torch.Tensor, reach: int) -> None:
        """The next forward writes rows from `first` at `position` [rows, tokens] and attends to [0, reach)."""
        self.rows, self.reach, self.position = slice(first, first + len(position)), reach, position
        self.row_index = torch.arange(first, first + len(position), device=position.device)[:, None]

    def reserve(self, num_rows: int, num_tokens: int) -> None:
        """Make room."""
        rows = self.num_rows if num_rows <= self.num_rows else max(num_rows, 2 * self.num_rows)
        tokens = max(self.num_tokens, -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS)
        if (rows, tokens) == (self.num_rows, self.num_tokens):
            return
        for layer in self.layers:
            layer.resize(rows, tokens)
        ids = np.full((rows, tokens), -1, np.int32)
        ids[: self.num_rows, : self.num_tokens] = self.ids
        self.ids, self.used = ids, np.concatenate([self.used, np.zeros(rows - self.num_rows, np.int64)])
        self.num_rows, self.num_tokens = rows, tokens

    def forget(self, rows: slice = slice(None)) -> None:
        """Nothing in these rows may be reused: the weights are other ones now."""
        self.ids[rows] = -1

    def swap(self, a: int, b: int) -> None:
        """Exchange two rows."""
        if a != b:
            both, other, n = [a, b], [b, a], int((self.ids[[a, b]] >= 0).sum(1).max())
            for layer in self.layers:
                if layer.is_initialized:
                    layer.keys[both, :, :n], layer.values[both, :, :n] = (
                        layer.keys[other, :, :n],
                        layer.values[other, :, :n],
                    )
            self.ids[both], self.used[both] = self.ids[other], self.used[other]

    def prepare(self, row: int, tokens: Sequence[int]) -> int:
        """Make `row`, the first behind the batch, hold as much of `tokens` as any row has. Returns how many."""
        wanted = np.asarray(tokens, np.int32)
        equal = self.ids[:, : len(wanted)] == wanted
        common = np.where(equal.all(1), len(wanted), equal.argmin(1)) if len(wanted) else np.zeros(1, np.int64)
        source = int(common.argmax())
        known = int(common[source])
        self.clock += 1
        self.used[source] = self.clock
        oldest = row + int(np.argmin(self.used[row:]))  # of no use for longest: what `row` holds is kept there instead
        if source != row:
            self._copy(row, oldest, int((self.ids[row] >= 0).sum()))
            self._copy(source, row, known)
        self.used[row] = self.clock
        self.ids[row, known:] = -1
        return known

    def _copy(self, source: int, target: int, num_tokens: int) -> None:
        if num_tokens and source != target:
            for layer in self.layers:
                layer.keys[target, :, :num_tokens] = layer.keys[source, :, :num_tokens]
                layer.values[target, :, :num_tokens] = layer.values[source, :, :num_tokens]
        self.ids[target, :num_tokens], self.ids[target, num_tokens:] = self.ids[source, :num_tokens], -1
        self.used[target] = self.used[source]


def _grown(old: torch.Tensor, num_rows: int, num_tokens: int) -> torch.Tensor:
    new = old.new_zeros(num_rows, old.shape[1], num_tokens, old.shape[3])
    new[: old.shape[0], :, : old.shape[2]] = old
    return new
