"""What an eviction does to the tokens that stay, beside moving them: others are merged into them, and keys are turned
to their place in the cache.

Layer by layer, since keys and values of all layers together, in float32, may be larger than the arena.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from winnow.engine.compression.merge import MergeView, Survivors, rows
from winnow.engine.compression.merge_plan import Merge
from winnow.engine.compression.registry import merge_method
from winnow.kernels.dispatch import Backend


@dataclass(frozen=True)
class Change:
    """One eviction whose survivors change. Tensors are those of all layers, [layers, kv_heads, ...]."""

    merge: Merge | None
    turn: Turn | None
    kept: Tensor
    """[layers, kv_heads] int64"""
    keep: Tensor
    """[layers, kv_heads, most] int64, padded with -1"""
    count: Tensor
    """[layers, kv_heads] int64"""
    scores: Tensor
    """[layers, kv_heads, tokens] float32"""
    log_weights: Tensor | None
    """[layers, kv_heads, capacity] float32"""
    sinks: int
    recent: int

    def survivors(self, ops: Backend, layer: int, keys: Tensor, values: Tensor) -> Survivors:
        """What stays of a layer whose lanes hold `keys` and `values` [kv_heads, n, head_dim]."""
        stay = self._merged(ops, layer, keys, values)
        if self.turn is not None:
            stay = replace(stay, keys=self.turn.back(stay.keys))
        return stay

    def positions(self, layer: int, held: Tensor, first: Tensor, most: int) -> Tensor:
        """[kv_heads, most] int32: where survivors stand in the text from now on, from place `first` [kv_heads] on, of a
        layer whose tokens stand at `held` [kv_heads, tokens]."""
        places = first.unsqueeze(-1) + first.new_ones(most).cumsum(0) - 1
        if self.turn is not None:
            return places.int()
        keep = self.keep[layer].clamp_min(0)
        return held.gather(1, keep.gather(1, places.clamp_max(keep.shape[1] - 1)))

    def _merged(self, ops: Backend, layer: int, keys: Tensor, values: Tensor) -> Survivors:
        if self.merge is None:
            return Survivors(rows(keys, self.keep[layer]), rows(values, self.keep[layer]))
        tokens = keys.shape[1]
        scores = self.scores[layer, :, :tokens]
        log_weights = (
            scores.new_zeros(scores.shape) if self.log_weights is None else self.log_weights[layer, :, :tokens]
        )
        view = MergeView(
            keys=keys,
            values=values,
            kept=self.kept[layer],
            keep=self.keep[layer],
            count=self.count[layer],
            scores=scores,
            log_weights=log_weights,
            sinks=self.sinks,
            recent=self.recent,
            ops=ops,
        )
        return merge_method(self.merge.policy).merge(view, self.merge)


@dataclass(frozen=True)
class Turn:
    """Turns keys, which RoPE has turned to their old places, back to their new ones: the same in all lanes.

    k = R(new - old) k,  R the rotation of RoPE by so many places
    """

    cos: Tensor
    """[most, head_dim / 2] float32"""
    sin: Tensor

    @classmethod
    def to_places(cls, keep: Tensor, inv_freq: Tensor) -> Turn:
        """keep [most] int64: the old place of each token; inv_freq [head_dim / 2]."""
        back = keep - torch.arange(len(keep), device=keep.device)
        angles = back.double()[:, None] * inv_freq.double()
        return cls(angles.cos().float(), angles.sin().float())

    def back(self, keys: Tensor) -> Tensor:
        """keys [kv_heads, most, head_dim] after RoPE."""
        first, second = keys.chunk(2, dim=-1)
        return torch.cat([first * self.cos + second * self.sin, second * self.cos - first * self.sin], dim=-1)


def from_place(survivors: Survivors, first: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_heads, most, head_dim] of the tokens from place `first` [kv_heads] int64 on."""
    places = first.unsqueeze(-1) + first.new_ones(most).cumsum(0) - 1
    at = places.clamp_max(survivors.keys.shape[1] - 1)
    return rows(survivors.keys, at), rows(survivors.values, at)
