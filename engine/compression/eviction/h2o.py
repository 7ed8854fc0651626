"""H2O: keep the heavy hitters and the newest tokens (Zhang et al., 2023, arXiv:2306.14048).

    score(key) = sum over all queries since the request began, and the KV group's query heads, of softmax(q.k)

Half of the budget protects the newest tokens, half goes to the highest scores.

Where we depart: the reference sums over the sequences of a batch and knows no KV groups; here the sum is over the
queries of one sequence and the query heads that share the lane. As in the paper it is a plain sum: older keys were
seen by more queries (kvpress' ObservedAttention divides by their number).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class H2O:
    """Keep the tokens that all queries together attended to most, and the newest ones."""

    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        pass

    def voters(self, params: Params, seen: int) -> None:
        return None

    def default_recent(self, params: Params, budget: int) -> int:
        return budget // 2

    def score(self, view: LaneView, params: Params) -> Tensor:
        assert view.mass is not None
        return view.mass
