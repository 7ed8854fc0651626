"""ZipCache: the most salient tokens at four bits, the others at two (He et al., 2024, arXiv:2405.14256).

    salience(key) = score(key) = mean over the queries that could see it, and the KV group's heads, of softmax(q.k)

The `share` with the greatest salience is held in `format`. Every `every` generated tokens, those that have come since
are judged; what is stored already stays as it is, as in the reference.

Where we depart:
- All queries vote. The paper's mean is over all of them; its probes, the newest 5 % of the queries and 5 % at random,
  estimate it where FlashAttention hides the attention matrix, which our kernels sum up as they go.
- The reference divides by the queries that could see a key as if all of them were probes; here divisor and sum agree.
- Values are quantized token by token, int2 in blocks of 32 channels with scales of their own, as KIVI does. The paper
  divides channels by the root of their greatest value instead, to save those scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class ZipCache:
    """Hold the most salient tokens in `format`, the others in `rest`."""

    format = "int4"
    rest = None
    demotes = False
    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        share: float = Field(0.6, gt=0, le=1, description="tokens of a lane that are held in `format`")
        every: int = Field(100, ge=1, le=65536, description="generated tokens between two judgements")

    def choice(self, params: Params) -> dict[str, Any]:
        return {"budget": params.share, "sinks": 0, "recent": 0, "during": "both", "interval": params.every}

    def voters(self, params: PolicyParams, seen: int) -> None:
        return None

    def default_recent(self, params: PolicyParams, budget: int) -> int:
        return 0

    def score(self, view: LaneView, params: PolicyParams) -> Tensor:
        assert view.mass is not None
        # Nothing is evicted: a key was seen by its own query and by those of all newer tokens.
        return view.mass / (view.age + 1).clamp_min(1) / view.q_per_kv
