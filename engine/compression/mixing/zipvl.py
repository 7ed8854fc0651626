"""ZipVL: as many tokens at many bits as a layer's attention needs (He et al., 2024, arXiv:2410.08584).

    mass(key)  = sum over all queries and all heads of the layer of softmax(q.k)
    p          = size of the smallest set of tokens that has `tau` of the layer's mass
    score(key) = mass(key) over the number of queries that could see it

The p tokens with the highest scores are held in `format` by all lanes of the layer, the others in `rest`: where
attention is spread out more tokens keep their bits. Every `every` generated tokens, those that have come since are
judged; what is stored already stays as it is.

Where we depart: all queries vote. The paper's probes, 64 of the newest queries and 64 at random, estimate the sums
where FlashAttention hides the attention matrix, which our kernels sum up as they go. And prefill reads all tokens: the
paper also skips the unimportant ones there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class ZipVL:
    """Hold the tokens that make up most of a layer's attention in `format`, the others in `rest`."""

    format = "int4"
    rest = None
    demotes = False
    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        tau: float = Field(0.975, gt=0, le=1, description="share of a layer's attention mass that keeps its bits")
        every: int = Field(100, ge=1, le=65536, description="generated tokens between two judgements")

    def choice(self, params: Params) -> dict[str, Any]:
        knobs = {"budget": params.tau, "sinks": 0, "recent": 0, "during": "both", "interval": params.every}
        return knobs | {"tau": params.tau}

    def voters(self, params: PolicyParams, seen: int) -> None:
        return None

    def default_recent(self, params: PolicyParams, budget: int) -> int:
        return 0

    def lane_budgets(self, view: LaneView, params: Params) -> Tensor:
        assert view.mass is not None
        # Nothing is evicted, so the lanes of a layer hold the same tokens in the same places.
        descending = view.mass.double().sum(1).sort(dim=-1, descending=True).values
        reached = descending.cumsum(-1)
        before = reached - descending
        needed = (before < params.tau * reached[:, -1:]).sum(-1)
        return needed.clamp_min(1).unsqueeze(-1).expand_as(view.kept)

    def score(self, view: LaneView, params: PolicyParams) -> Tensor:
        assert view.mass is not None
        per_key = view.mass.sum(1, keepdim=True).expand_as(view.mass)
        return per_key / (view.age + 1).clamp_min(1)
