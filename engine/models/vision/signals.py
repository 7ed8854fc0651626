"""What a vision tower saw on its way, computed when a policy asks for it.

What each layer read is kept, in host memory, and nothing else: attention comes from the layer's own queries and keys,
made again for the rows that are needed. Nothing forces the tower itself to attend eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SCORES = 1 << 22
"""Attention scores that are in memory at a time where columns are added up"""


@dataclass(frozen=True)
class Attention:
    """What a layer attends by, over the rows of an image: patches, and class tokens where there are any."""

    queries: Tensor
    """[rows, heads, dim], as they are compared with keys"""
    keys: Tensor
    """[rows, heads, dim]"""
    raw_keys: Tensor
    """The same before they are rotated, where they are"""
    groups: Sequence[tuple[int, int]]
    """Rows that see one another, first and the one behind the last: crops, frames or windows"""


@dataclass(frozen=True)
class TowerSignals:
    """`compression.vision.features.Signals` of a tower's layers."""

    states: Sequence[Tensor]
    """What each layer reads, and what the last one puts out: rows of `width` numbers, in any shape; in host memory"""
    attends: Callable[[int, Tensor], Attention]
    """(layer, what it reads) -> what it attends by, where the tower computes"""
    to_tokens: Callable[[Tensor], Tensor]
    """[rows, D] -> [N, D] of placeholders"""
    has_class: bool
    """Whether the first row of each group stands for its whole crop"""
    matrix_rows: int
    """Rows of the attention matrix of a crop or frame"""

    @property
    def layers(self) -> int:
        return len(self.states) - 1

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)

    @torch.inference_mode()
    def attention(self, layer: int) -> Tensor:
        at = self._attention_of(layer)
        paid = torch.empty(len(at.keys), device=at.keys.device)
        for first, end in at.groups:
            q, k = (x[first:end].transpose(0, 1).float() for x in (at.queries, at.keys))
            if self.has_class:
                paid[first:end] = _attention(q[:, :1], k).mean(0)[0]
            else:
                paid[first:end] = _column_sums(q, k) / self.matrix_rows
        return self.to_tokens(paid[:, None].cpu())[:, 0]

    @torch.inference_mode()
    def keys(self, layer: int) -> Tensor:
        return self.to_tokens(self._attention_of(layer).raw_keys.flatten(1).float().cpu())

    @torch.inference_mode()
    def hidden(self, layer: int) -> Tensor:
        return self.to_tokens(self.states[self._index(layer) + 1].flatten(0, -2).float())

    def _attention_of(self, layer: int) -> Attention:
        at = self._index(layer)
        return self.attends(at, self.states[at])

    def _index(self, layer: int) -> int:
        if not -self.layers <= layer < 0:
            raise IndexError(f"layer {layer} of {self.layers}: they are counted from the end, the last is -1")
        return self.layers + layer


def _attention(queries: Tensor, keys: Tensor) -> Tensor:
    """[heads, q, dim], [heads, n, dim] -> [heads, q, n]"""
    scores = queries @ keys.transpose(1, 2) * keys.shape[2] ** -0.5
    return scores.softmax(-1)


def _column_sums(queries: Tensor, keys: Tensor) -> Tensor:
    """[heads, n, dim] twice -> [n]: attention paid to each row by all rows, mean over heads, blockwise."""
    heads, n = keys.shape[:2]
    sums = torch.zeros(n, device=keys.device)
    for block in queries.split(max(1, _SCORES // (heads * n)), dim=1):
        sums += _attention(block, keys).sum(1).mean(0)
    return sums
