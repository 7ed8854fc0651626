"""Keyformer: heavy hitters under noise (Adnan et al., 2024, arXiv:2403.09054).

    score(key) = sum over all queries since the request began, and the KV group's query heads, of
                 softmax((q.k + noise(key)) / temperature)
    temperature = `temperature` for the prompt's queries, and `heating` more for each generated token

The noise is Gumbel's: keys that happen to score low now get a chance, since what an eviction leaves out of the softmax
would otherwise make the strong ones stronger. 30 % of the budget protects the newest tokens. The reference keeps 60 %
of the text and evicts every 8 generated tokens: `budget`, `interval`.

Where we depart: noise belongs to a key, by the request's seed, the layer, the KV head and the position; the reference
draws it anew for each query from the process' generator, which no request could repeat, and where the sum over queries
averages it out. As in the reference, the sum is over the queries of one sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal
from winnow.kernels.vote import Vote

if TYPE_CHECKING:
    from torch import Tensor


class Keyformer:
    """Keep the tokens that all queries together attended to most, with some noise, and the newest ones."""

    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        temperature: float = Field(1.0, ge=0.05, le=20, description="of the softmax while the prompt is read")
        heating: float = Field(0.01, ge=0, le=1, description="added to the temperature with each generated token")

    def voters(self, params: Params, seen: int) -> None:
        return None

    def vote(self, params: Params, prompt_tokens: int) -> Vote:
        return Vote(temperature=params.temperature, heating=params.heating, warm_from=prompt_tokens - 1, is_noisy=True)

    def default_recent(self, params: Params, budget: int) -> int:
        return budget * 3 // 10

    def score(self, view: LaneView, params: Params) -> Tensor:
        assert view.mass is not None
        return view.mass
