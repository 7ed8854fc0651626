"""SpecKV: keep what a draft model's continuation of the prompt looks at (Galim et al., 2025, arXiv:2506.08373).

    score(key) = pool( max over the last `window` queries of the prompt, those of the lookahead, and the KV group's
                       query heads of softmax(q.k) )

for keys before the window; `pool` is the maximum over `pool` neighbouring keys. The draft model says up to `lookahead`
tokens behind the prompt, the likeliest each time and no more than the request may; the model reads them behind the
prompt as if they were its own, and their keys and values are dropped again. The window itself is protected.

Where we depart, as in snapkv: a prompt that is shorter than twice the window lets its newer half vote, and the window
is protected up to half of the budget; what is left unprotected of it competes by its own maximum, without pooling. The
lookahead ends where the draft model would end its answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal
from winnow.kernels.vote import Vote

if TYPE_CHECKING:
    from torch import Tensor


class SpecKV:
    """Keep what a draft model's continuation of the prompt looks at."""

    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        lookahead: int = Field(32, ge=1, le=1024, description="tokens that the draft model says behind the prompt")
        window: int = Field(64, ge=1, le=1024, description="queries at the end of the prompt that vote too")
        pool: int = Field(7, ge=1, le=63, description="keys over which the maximum is taken; odd")

        @model_validator(mode="after")
        def _is_possible(self) -> Any:
            if self.pool % 2 == 0:
                raise PydanticCustomError("odd", "must be odd", {"at": "pool"})
            if getattr(self, "during", "prefill") != "prefill":
                reason = "must be 'prefill' with spec_kv: it looks ahead from the end of the prompt"
                raise PydanticCustomError("impossible", reason, {"at": "during"})
            return self

    def voters(self, params: Params, seen: int) -> int:
        return min(params.window, max(1, seen // 2))

    def lookahead(self, params: Params) -> int:
        return params.lookahead

    def vote(self, params: Params, prompt_tokens: int) -> Vote:
        return Vote(reduce="max")

    def default_recent(self, params: Params, budget: int) -> int:
        return min(params.window, max(1, budget // 2))

    def score(self, view: LaneView, params: Params) -> Tensor:
        from torch.nn.functional import max_pool1d

        assert view.mass is not None
        is_before_window = view.age >= view.votes
        before = view.mass.masked_fill(~is_before_window, 0.0)
        pooled = max_pool1d(before, params.pool, stride=1, padding=params.pool // 2)
        return pooled.where(is_before_window, view.mass)
