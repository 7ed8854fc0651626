"""TOVA: drop what the newest query attends to least (Oren et al., 2024, arXiv:2401.06104).

    score(key) = mean over all query heads of a layer of softmax(q_newest.k)

All lanes of a layer get the same scores and so keep the same tokens. Where lanes have become ragged by another plan
of budgets, the mean at a position is over the heads whose lanes still hold it.

Where we depart: the newest token is protected (as in kvpress), since the next query has not voted on it yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class TOVA:
    """Drop what the newest query attends to least, the same tokens in all heads of a layer."""

    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        pass

    def voters(self, params: Params, seen: int) -> int:
        return 1

    def default_recent(self, params: Params, budget: int) -> int:
        return 1

    def score(self, view: LaneView, params: Params) -> Tensor:
        assert view.mass is not None
        layers, is_held = view.mass.shape[0], view.is_held
        # By position, not by lane index: the lanes of a layer may hold different tokens.
        positions = view.positions.clamp_min(0)
        mass = view.mass.masked_fill(~is_held, 0.0)
        sums, heads = mass.new_zeros(2, layers, view.seen)
        for head in range(mass.shape[1]):  # one after the other: what is added at once is added in any order
            sums.scatter_add_(1, positions[:, head], mass[:, head])
            heads.scatter_add_(1, positions[:, head], is_held[:, head].float())
        mean = sums / (heads * view.q_per_kv).clamp_min(1.0)
        return mean.gather(1, positions.flatten(1)).view_as(view.mass)
