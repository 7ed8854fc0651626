"""EMS' score: keep what all queries look at, or the newest ones (Li et al., 2024, arXiv:2412.08521).

    global(key) = mean over the queries that could see it, and the KV group's query heads, of softmax(q.k)
    local(key)  = the same over the last `window` queries
    score(key)  = max(global(key), local(key))

A sum over all queries favours old keys, which more of them could see, and the newest queries favour keys near them: as
means both are probabilities, and the greater one counts. The window is protected up to half of the budget, as snapkv
does. What is evicted is merged into what is kept unless `merge` is null: see merging/ems.py.

Where we depart: the paper has no public code, and does not say how the two scores are brought to one scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class EMS:
    """Keep what all queries or the newest ones look at, and merge the best of the rest into it."""

    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        window: int = Field(32, ge=1, le=1024, description="newest queries whose attention is the local score")

    def voters(self, params: Params, seen: int) -> None:
        return None

    def newest_voters(self, params: Params, seen: int) -> int:
        return min(params.window, max(1, seen // 2))

    def default_recent(self, params: Params, budget: int) -> int:
        return min(params.window, max(1, budget // 2))

    def score(self, view: LaneView, params: Params) -> Tensor:
        assert view.mass is not None and view.newest_mass is not None
        sees = (view.seen - view.positions).clamp_min(1) * view.q_per_kv
        newest = sees.clamp_max(max(1, view.newest_votes) * view.q_per_kv)
        return (view.mass / sees).maximum(view.newest_mass / newest)
