"""SnapKV: keep what the newest queries look at (Li et al., 2024, arXiv:2404.14469).

    score(key) = pool( mean over the last `window` queries and the KV group's query heads of softmax(q.k) )

for keys before the window; `pool` is an average over `pool` neighbouring keys, zeros beyond the ends, as in kvpress
(the paper pools by maximum). The window itself is protected.

Where we depart:
- A prompt that is shorter than twice the window lets its newer half vote; the references refuse it.
- The window is protected up to half of the budget. The references need a budget greater than the window and would
  otherwise keep nothing but the end of the prompt. What is left unprotected of the window competes by the mean over
  those queries that could see it, without pooling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class SnapKV:
    """Keep what the newest queries look at."""

    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        window: int = Field(64, ge=1, le=1024, description="queries at the end that vote")
        pool: int = Field(5, ge=1, le=63, description="width of the average pooling along the keys; odd")

        @field_validator("pool")
        @classmethod
        def _is_odd(cls, pool: int) -> int:
            if pool % 2 == 0:
                raise PydanticCustomError("odd", "must be odd")
            return pool

    def voters(self, params: Params, seen: int) -> int:
        return min(params.window, max(1, seen // 2))

    def default_recent(self, params: Params, budget: int) -> int:
        return min(params.window, max(1, budget // 2))

    def score(self, view: LaneView, params: Params) -> Tensor:
        from torch.nn.functional import avg_pool1d

        assert view.mass is not None
        age = view.age
        # A key of the window was seen by the queries that are not older than it.
        mean = view.mass / (age + 1).clamp(1, max(1, view.votes)) / view.q_per_kv
        is_before_window = age >= view.votes
        votes = mean.masked_fill(~is_before_window, 0.0)
        pooled = avg_pool1d(votes, params.pool, stride=1, padding=params.pool // 2)
        return pooled.where(is_before_window, mean)
