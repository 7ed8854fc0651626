"""What every merge method looks like: how tokens that are given up live on in those that stay (`kv.evict.merge`).

The engine shows a method the lanes of one layer after an eviction policy chose; the method returns the survivors, still
at their own positions. Methods import torch for type checkers only, as policies do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from winnow.engine.compression.policy import PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.kernels.dispatch import Backend


@dataclass(frozen=True)
class MergeView:
    """The lanes of one layer at an eviction. H is kv_heads, n tokens of the longest lane, m of the longest that stays;
    lanes are ragged, and what lies beyond their counts says nothing."""

    keys: Tensor
    """[H, n, head_dim] float32 after RoPE, zeros beyond kept"""
    values: Tensor
    """[H, n, head_dim] float32, zeros beyond kept"""
    kept: Tensor
    """[H] int64: tokens that each lane holds"""
    keep: Tensor
    """[H, m] int64: lane indices that stay, ascending, padded with -1"""
    count: Tensor
    """[H] int64: how many stay"""
    scores: Tensor
    """[H, n] float32: the eviction policy's; higher is kept"""
    log_weights: Tensor
    """[H, n] float32: log of how many tokens each stands for"""
    sinks: int
    """First tokens that were protected, in lanes that keep so many"""
    recent: int
    """Newest tokens that were protected, likewise"""
    ops: Backend

    @cached_property
    def given_up(self) -> tuple[Tensor, Tensor]:
        """The tokens that do not stay: lane indices [H, most] int64, ascending, -1 for padding, their number [H]."""
        from winnow.engine.compression.select import packed

        tokens = self.scores.shape[-1]
        stays = self.keep.new_zeros(self.keep.shape[0], tokens + 1)
        stays.scatter_(1, self.keep.where(self.keep >= 0, tokens), 1)
        lane_index = self.keep.new_ones(tokens).cumsum(0) - 1
        return packed((stays[:, :tokens] == 0) & (lane_index < self.kept.unsqueeze(-1)))


@dataclass(frozen=True)
class Survivors:
    """The tokens of one layer that stay, in the order of `MergeView.keep`."""

    keys: Tensor
    """[H, m, head_dim] float32"""
    values: Tensor
    """[H, m, head_dim] float32"""
    log_weights: Tensor | None = None
    """[H, m] float32; None: each counts once"""


def rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [H, k] int64 of x [H, n] or [H, n, D]; row 0 for padding (-1)."""
    at = index.clamp_min(0)
    if x.dim() == 3:
        at = at.unsqueeze(-1).expand(*at.shape, x.shape[-1])
    return x.gather(1, at)


class MergeMethod(Protocol):
    """One named method. Stateless; the registry makes one instance for the process."""

    signals: ClassVar[frozenset[Signal]]
    """What the scores of the eviction policy must be made of, for the method to weigh tokens by them"""

    Params: ClassVar[type[PolicyParams]]
    """The method's own knobs; the request's `merge` object holds them beside `policy`"""

    def merge(self, view: MergeView, params: Any) -> Survivors:
        """What stays of the layer. Lanes that give nothing up must stay as they are."""
