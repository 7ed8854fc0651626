"""PromptDistill: a middle layer chooses, and the layers above it read only that (Jin et al., 2025, arXiv:2503.23274).

    score(token) = pool( mean over all query heads of layer l of softmax(q_last.k) ),  q_last the prompt's last query

The layers above l are never run over the other tokens: that saves their work and their memory. The tokens keep their
positions. `lower: "truncate"` also evicts the others from the layers up to l when the prompt is read (the paper's
cache truncation), "keep" leaves them there.

Where we depart: the reference averages the raw products of the heads, in which a head with large keys outweighs the
others; here each head's votes sum to one. It chooses layer 13 of 32; unset, ours is at the same depth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class PromptDistill:
    """A middle layer chooses, and the layers above it read only what it chose."""

    signals = frozenset({Signal.ATTENTION})
    query_agnostic = False

    class Params(PolicyParams):
        layer: int | None = Field(
            None, ge=0, le=1024, description="layer that chooses, from 0; at 13/32 of the depth if unset"
        )
        pool: int = Field(5, ge=1, le=63, description="width of the average pooling along the tokens; odd")
        lower: Literal["keep", "truncate"] = Field(
            "truncate", description="what the layers up to `layer` hold of the others once the prompt is read"
        )

        @model_validator(mode="after")
        def _is_possible(self) -> Any:
            if self.pool % 2 == 0:
                raise PydanticCustomError("odd", "must be odd", {"at": "pool"})
            for name, only in (("during", "prefill"), ("head_budget", "uniform"), ("layer_budget", "uniform")):
                if getattr(self, name, only) != only:
                    reason = f"must be '{only}' with prompt_distill: one layer chooses for all that follow, once"
                    raise PydanticCustomError("impossible", reason, {"at": name})
            if getattr(self, "merge", None) is not None:
                reason = "is not possible with prompt_distill: what is not chosen has no keys in the upper layers"
                raise PydanticCustomError("impossible", reason, {"at": "merge"})
            return self

    def voters(self, params: Params, seen: int) -> int:
        return 1

    def default_recent(self, params: Params, budget: int) -> int:
        return 1

    def choosing_layer(self, params: Params, layers: int) -> int:
        return 13 * layers // 32 if params.layer is None else params.layer

    def truncates(self, params: Params) -> bool:
        return params.lower == "truncate"

    def score(self, view: LaneView, params: Params) -> Tensor:
        from torch.nn.functional import avg_pool1d

        assert view.mass is not None
        mean = view.mass.masked_fill(~view.is_held, 0.0).sum(1, keepdim=True) / (view.mass.shape[1] * view.q_per_kv)
        return avg_pool1d(mean, params.pool, stride=1, padding=params.pool // 2).expand_as(view.mass)
