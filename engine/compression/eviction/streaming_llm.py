"""StreamingLLM: keep the first tokens and the newest ones (Xiao et al., 2023, arXiv:2309.17453).

    score(token) = its logical position; the `sinks` first tokens are protected

With `positions: "original"` tokens keep their logical position, as in kvpress, so that a text still ends at the model's
context length. With "compact", as in the paper, a token's position is its place in the cache: what an eviction leaves
is turned back to where it now stands, new tokens are placed behind it, and a text may be as long as the server allows.

Where we depart: the paper evicts a token at a time, before each new one. Here the prompt is read `block` tokens at a
time over the window that the last eviction left, and generated tokens are evicted every `interval`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class StreamingLLM:
    """Keep the first tokens and the newest ones."""

    signals: frozenset[Signal] = frozenset()
    query_agnostic = True

    class Params(PolicyParams):
        positions: Literal["original", "compact"] = Field(
            "original", description="a token's position: in the text, or in the cache, so that a text has no end"
        )
        block: int = Field(
            256, ge=16, le=65536, description="tokens of the prompt between evictions, with compact positions"
        )

        @model_validator(mode="before")
        @classmethod
        def _compact_positions_need_evictions_all_along(cls, data: Any) -> Any:
            if isinstance(data, dict) and data.get("positions") == "compact":
                return {"during": "both"} | data
            return data

    def voters(self, params: Params, seen: int) -> int:
        return 0

    def default_recent(self, params: Params, budget: int) -> int:
        return 0  # the score itself prefers the newest, after the sinks have their part

    def score(self, view: LaneView, params: Params) -> Tensor:
        return view.positions.float()
