"""Attention inside each segment of a packed row, without leaks, masks or a call per segment.

Rules kept here, each with a test in tests/learner/test_attention.py:
1. No token sees another segment of its row, also where segments share the tokens that they begin with.
2. A token that several segments share is one row of keys and values: its gradient is the sum over all of them.
3. Segments of like length are computed together, padded at the end, where nothing causal can see it.

Attention alone is computed over whole segments; everything else in a layer runs over the row, where a shared token
stands once. So sharing saves no attention, which below some ten thousand tokens is the small part, and any prefix tree
works with the plain causal kernel. Memory is O(tokens read); time is the sum of squares of the segments' lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "matpo_packed"
PADDED_FRACTION, PADDED_TOKENS = 0.15, 16
"""A segment is computed together with one that is longer by this share and this many tokens: work against calls."""


class PackedAttention:
    """Where the segments of one row find their tokens. Made once per row, used by every layer."""

    def __init__(
        self, segment_lengths: Sequence[int], segment_rows: NDArray[np.int64], device: torch.device | None = None
    ) -> None:
        """Tokens of each of the S segments [S], and the row positions of these tokens, segment after segment.

        Every row position belongs to a segment.
        """
        self.stacks: list[tuple[int, Tensor]] = []  # length L of each stack of segments, its row positions [B * L]
        segments = sorted(np.split(segment_rows, np.cumsum(segment_lengths)[:-1]), key=len, reverse=True)
        read, real = [], []
        for stack in _stacks([len(segment) for segment in segments]):
            length = len(segments[stack.start])
            rows = np.zeros((stack.stop - stack.start, length), dtype=np.int64)  # padded with any row: it is not seen
            for row, segment in zip(rows, segments[stack], strict=True):
                row[: len(segment)] = segment
            self.stacks.append((length, torch.as_tensor(rows.reshape(-1), device=device)))
            read.append(rows.reshape(-1))
            real += [np.arange(length) < len(segment) for segment in segments[stack]]
        all_read, places = np.concatenate(read), np.flatnonzero(np.concatenate(real))
        source = np.empty(int(segment_rows.max()) + 1, dtype=np.int64)
        source[all_read[places]] = places  # of the segments that share a token, any one: they compute the same
        self.source = torch.as_tensor(source, device=device)  # [T]: where each token's output is in the stacks


def _stacks(lengths: Sequence[int]) -> list[slice]:
    """Cut lengths, longest first, into runs of like length."""
    cuts = [0]
    for i, length in enumerate(lengths):
        longest = lengths[cuts[-1]]
        if longest - length > PADDED_FRACTION * longest + PADDED_TOKENS:
            cuts.append(i)
    return [slice(low, high) for low, high in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, d]
    key: Tensor,  # [1, key heads, T, d]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: PackedAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each segment of one packed row, as transformers calls it. Returns [1, T, heads, d]."""
    _, heads, _, width = query.shape
    flat = [x[0].transpose(0, 1).flatten(1) for x in (query, key, value)]  # [T, heads * d]
    outputs = []
    for length, rows in packing.stacks:
        q, k, v = (x.index_select(0, rows).view(-1, length, x.shape[1] // width, width).transpose(1, 2) for x in flat)
        if q.shape[1] > k.shape[1] and not q.is_cpu:  # not every CUDA kernel knows grouped heads
            k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        mask = _band(length, sliding_window, q.device)
        output = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] > k.shape[1]
        )
        outputs.append(output.transpose(1, 2).reshape(-1, heads * width))
    return torch.cat(outputs).index_select(0, packing.source).view(1, -1, heads, width), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask of a sliding-window layer for segments longer than the window; None where plain causal is the same."""
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window)


AttentionInterface.register(ATTENTION, packed_attention)
