"""A2SF: heavy hitters of the recent past (Jo and Shin, 2024, arXiv:2407.20485).

    score(key) = sum over all queries q since the request began, and the KV group's query heads, of
                 decay^(newest - q) softmax(q.k)

H2O's sum favours old keys, which more queries have seen: here each query's part fades with every one that comes after
it. The newest `recent` tokens are protected: 16 as in the paper, or half of the budget where that is less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal
from winnow.kernels.vote import Vote

if TYPE_CHECKING:
    from torch import Tensor

RECENT = 16


class A2SF:
    """Keep the tokens that queries attended to most, what newer queries say counting more."""

    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        decay: float = Field(
            0.95, gt=0, le=1, description="what a query's say is multiplied by when the next one votes"
        )

    def voters(self, params: Params, seen: int) -> None:
        return None

    def vote(self, params: Params, prompt_tokens: int) -> Vote:
        return Vote(decay=params.decay)

    def default_recent(self, params: Params, budget: int) -> int:
        return min(RECENT, budget // 2)

    def score(self, view: LaneView, params: Params) -> Tensor:
        assert view.mass is not None
        return view.mass
