"""Probes: sequences that only read, and tell something about their tokens.

A probe runs among the others like any prompt: in chunks, with prefix hits, preempted when pages run out. What it finds
is a function of its tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.engine.models.config import ModelConfig
from winnow.engine.ranks import ALONE, Ranks
from winnow.kernels.dispatch import Backend
from winnow.kernels.host import to_device
from winnow.kernels.kv import PagedKV

ROWS = 64
"""Rows whose logits are there at a time"""


class Probe(Protocol):
    """What is asked of the rows of one sequence."""

    first_row: int
    """The first position whose row is looked at; rows before it may come from the prefix cache"""

    @property
    def values(self) -> NDArray[np.float32]:
        """The answer, complete when the sequence has been read."""

    @property
    def tokens_to_read(self) -> int:
        """How much of the prompt must be read."""

    @property
    def wants_logits(self) -> bool:
        """Whether `see_hidden` is called."""

    def see_queries(self, layer: int, slot: int, position: int, queries: Tensor) -> None:
        """Rotated queries [rows, heads, head_dim] of one layer, from `position` on; the keys are in their pages."""

    def see_hidden(self, position: int, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
        """What the head makes logits of: [rows, hidden_size], from `position` on."""


class SurprisalProbe:
    """-log p of the tokens first..last of a prompt, each given all before it.

    `values` [tokens] holds NaN where nothing was asked, and for a token that nothing precedes.
    """

    wants_logits = True

    def __init__(self, tokens: NDArray[np.int32], first: int, last: int):
        self.first_row = max(0, first - 1)
        self.values = np.full(len(tokens), np.nan, np.float32)
        self.tokens_to_read = last
        self._tokens = torch.from_numpy(tokens[: last + 1].astype(np.int64))

    def see_queries(self, layer: int, slot: int, position: int, queries: Tensor) -> None:
        pass

    def see_hidden(self, position: int, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
        at = position + 1
        following = to_device(self._tokens[at : at + len(hidden)], hidden.device)
        found = []
        for rows, tokens in zip(hidden.split(ROWS), following.split(ROWS), strict=True):
            found.append(torch.log_softmax(logits(rows), dim=1).gather(1, tokens[:, None])[:, 0])
        self.values[at : at + len(hidden)] = -torch.cat(found).cpu().numpy()


@dataclass
class AttentionProbe:
    """What the last `window` queries of a prompt pay to each token: max over layers, heads and queries i = 0, 1, ... of
    i / (window - 1) * softmax(q_i.k)."""

    config: ModelConfig
    kv: PagedKV
    ops: Backend
    tokens: int
    window: int
    layers: range
    ranks: Ranks = ALONE
    """Who has the other heads"""
    wants_logits = False
    first_row: int = field(init=False)
    _most: Tensor = field(init=False)
    """[tokens] float32: the greatest of what has been paid so far"""
    _waiting: dict[int, Tensor] = field(init=False, default_factory=dict)
    """layer -> queries [window, heads, head_dim], where a chunk ends within the window"""

    def __post_init__(self) -> None:
        self.window = min(self.window, self.tokens)
        self.first_row = self.tokens - self.window
        self._most = torch.zeros(self.tokens, device=self.kv.device)

    @property
    def values(self) -> NDArray[np.float32]:
        most: NDArray[np.float32] = self.ranks.maximum(self._most.clone()).cpu().numpy()
        return most

    @property
    def tokens_to_read(self) -> int:
        return self.tokens

    def see_queries(self, layer: int, slot: int, position: int, queries: Tensor) -> None:
        if layer not in self.layers:
            return
        first = position - self.first_row
        last = first + len(queries)
        if first or last < self.window:  # a chunk ends within the window
            held = self._waiting.setdefault(layer, queries.new_empty(self.window, *queries.shape[1:]))
            held[first:last] = queries
            queries = held
        if last == self.window:  # not before: the bits of a sum may depend on how many tokens it runs over
            self._waiting.pop(layer, None)
            self._most = torch.maximum(self._most, self._paid(layer, slot, queries.float()))

    def see_hidden(self, position: int, hidden: Tensor, logits: Callable[[Tensor], Tensor]) -> None:
        pass

    def _paid(self, layer: int, slot: int, queries: Tensor) -> Tensor:
        """[tokens] float32 of one layer. Products go through the backend: their bits do not depend on threads."""
        config = self.config
        keys, _ = self.ops.read_lanes(self.kv, slot, layer)
        column = torch.arange(self.tokens, device=keys.device)
        row = column[self.first_row :, None]
        is_hidden = column > row
        if sliding := config.windows[layer]:
            is_hidden |= column <= row - sliding
        weight = (row - self.first_row) / (self.window - 1) if self.window > 1 else torch.ones_like(row)
        paid = torch.zeros_like(self._most)
        for kv_head, group in enumerate((queries * config.head_dim**-0.5).chunk(config.kv_heads, dim=1)):
            key = self.ops.pack(keys[kv_head].contiguous(), "f32")
            for query in group.unbind(1):
                scores = self.ops.linear(query.contiguous(), key).masked_fill_(is_hidden, -torch.inf)
                paid = torch.maximum(paid, (scores.softmax(dim=1) * weight).amax(dim=0))
        return paid
