"""KVzip: keep what the model needs to repeat its prompt (Kim et al., 2025, arXiv:2505.23416).

    score(key) = max over the rows of a recital (see engine/recital.py) and the KV group's query heads of softmax(q.k)

It asks nothing of the question: what is kept serves any. Lanes compete with each other in all layers and heads; each
keeps what it has among the highest scores of all, as in the paper.

Where we depart: the paper takes the softmax over the part that is being repeated and the repetition, to save work; here
it is attention as it is, over the whole lane. For prompts of one part it is the same but for the sinks. A part is
repeated behind the whole prompt, template and question included, unless a plan's scope is the document.
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

    from winnow.engine.compression.evict_plan import Evict


class KVzip:
    """Keep what the model needs to repeat its prompt, whatever will be asked; the prompt is read twice."""

    signals = frozenset({Signal.ATTENTION})
    query_agnostic = True

    class Params(PolicyParams):
        chunk: int = Field(2048, ge=64, le=65536, description="tokens of the prompt that are repeated at a time")

        @model_validator(mode="after")
        def _is_possible(self) -> Any:
            if getattr(self, "during", "prefill") != "prefill":
                reason = "must be 'prefill' with kvzip: what is generated is not repeated"
                raise PydanticCustomError("impossible", reason, {"at": "during"})
            return self

    def voters(self, params: Params, seen: int) -> int:
        return 1  # stands for those of the recital: Evict.recites

    def recital_chunk(self, params: Params) -> int:
        return params.chunk

    def vote(self, params: Params, prompt_tokens: int) -> Vote:
        return Vote(reduce="max")

    def default_recent(self, params: Params, budget: int) -> int:
        return 0

    def score(self, view: LaneView, params: Params) -> Tensor:
        assert view.mass is not None
        return view.mass

    def lane_budgets(self, view: LaneView, params: Evict) -> Tensor:
        import torch

        assert view.mass is not None
        budget = params.budget_tokens(view.seen)
        recent = params.recent_tokens(budget)
        indices = torch.arange(view.mass.shape[-1], device=view.mass.device)
        is_sure = (indices < params.sinks) | (view.age < recent)
        scores = view.mass.masked_fill(is_sure, torch.inf).masked_fill(~view.is_held, -torch.inf)
        # Token by token, so that ties between lanes are shared out instead of going to the first one.
        order = scores.permute(2, 0, 1).flatten().sort(descending=True, stable=True).indices
        best = scores.new_zeros(scores.numel(), dtype=torch.bool)
        best[order[: budget * view.kept.numel()]] = True
        return (best.view(-1, *view.kept.shape).sum(0)).clamp_min(1)
