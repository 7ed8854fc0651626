"""RazorAttention: keep all that retrieval heads hold, and the newest tokens of the others (Tang et al., 2024,
arXiv:2407.15891).

    score(token) = its logical position

Retrieval heads are those with the highest induction scores (a share `induction` of the model's heads) and the highest
echo scores (`echo`), measured once for a model: `winnow calibrate --method razor_attention`. Their lanes keep
everything; every other lane keeps `sinks` and, up to its budget but no less than `floor`, the newest tokens.

    paper                                here
    C, the compression ratio             1 / budget: 0.2 is the paper's 5
    S0 = 4000, the shortest buffer       floor; 0 unless asked for, since it would leave contexts below 4000 whole
    the compensation token               merge: compensation, unless another or null is asked for

Where we depart: sinks are part of the budget. Query heads that share keys and values stand or fall together: a lane's
scores are the best of its group, and shares are of lanes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.engine.compression.plan import Evict


class RazorAttention:
    """Keep all tokens in the heads that retrieve, and the first and the newest ones in the others."""

    signals: frozenset[Signal] = frozenset()
    query_agnostic = True

    class Params(PolicyParams):
        induction: float = Field(0.14, ge=0, le=1, description="share of lanes that keep all for their induction score")
        echo: float = Field(0.01, ge=0, le=1, description="share of lanes that keep all for their echo score")
        floor: int = Field(0, ge=0, le=10_000_000, description="fewest tokens of the other lanes, whatever the budget")

    def voters(self, params: Params, seen: int) -> int:
        return 0

    def default_recent(self, params: Params, budget: int) -> int:
        return 0  # the score itself prefers the newest, after the sinks have their part

    def score(self, view: LaneView, params: Params) -> Tensor:
        return view.positions.float()

    def lane_budgets(self, view: LaneView, params: Evict) -> Tensor:
        assert view.profile is not None and isinstance(params, RazorAttention.Params)
        retrieves = self._best(view, "induction", params.induction) | self._best(view, "echo", params.echo)
        others = max(params.budget_tokens(view.seen), params.floor)
        return view.kept.where(retrieves[view.layers], view.kept.clamp_max(others)).clamp_min(1)

    def _best(self, view: LaneView, kind: str, share: float) -> Tensor:
        """[model's layers, kv_heads] bool: the given share of lanes, rounded up, that score highest."""
        import torch

        assert view.profile is not None
        scores = view.profile[kind].unflatten(1, (-1, view.q_per_kv)).amax(-1)
        order = scores.flatten().argsort(descending=True, stable=True)
        best = scores.new_zeros(scores.numel(), dtype=torch.bool)
        best[order[: math.ceil(share * scores.numel())]] = True
        return best.view(scores.shape)
