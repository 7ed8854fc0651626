"""Bipartite soft matching: tokens are dealt into two sets, and those of one look for a partner in the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.engine.compression.vision.encoder import LayerTokens, Reduction
from winnow.engine.compression.vision.ranking import top, unit

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """Each source with its partner, the first of the most similar targets."""

    sources: Tensor
    """[s] int64"""
    targets: Tensor
    """[t] int64: all other tokens"""
    partners: Tensor
    """[s] int64: the target of each"""
    similarity: Tensor
    """[s] float32: the cosine of each to its partner"""

    def merged(self, drop: int) -> Reduction:
        """The `drop` most similar pairs merge, or so many that half of the tokens are left.

        The sources that are left come first from then on, if any merges: the next layer deals otherwise.
        """
        import torch

        total = len(self.sources) + len(self.targets)
        chosen = top(self.similarity, min(drop, total // 2))
        is_left = torch.ones_like(self.sources, dtype=torch.bool).index_fill_(0, chosen, False)
        stay = torch.cat((self.sources[is_left], self.targets))
        stay = stay if drop else stay.sort().values
        return Reduction.merging(stay, self.sources[chosen], self.partners[chosen], total)


def dealt(tokens: LayerTokens) -> Pairs:
    """The tokens are dealt in turn. The class token, too, as one that finds no partner."""
    order, first = tokens.order, int(tokens.has_class)
    sources, targets = order[first::2], order[1 - first :: 2]
    return Pairs(sources, targets, *partners(unit_keys(tokens), sources, targets))


def unit_keys(tokens: LayerTokens) -> Tensor:
    """[n, dim] float32: the mean over heads of each token's key, at unit length."""
    return unit(tokens.keys.float().mean(1))


def partners(units: Tensor, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For each source the most similar of the targets [s], the first of several, and their cosine [s].

    Args
        units [n, dim] of length one
    """
    similarity, best = (units[sources] @ units[targets].T).max(1)
    return targets[best], similarity
