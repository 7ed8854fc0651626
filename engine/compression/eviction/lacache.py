"""LaCache: a ladder across the layers (Shi et al., 2025, arXiv:2507.14204).

    After the sinks the text is cut into ladders of W tokens. Of each, a layer keeps A neighbours: the first ones in the
    lowest `span` layers, and `span - overlap` layers higher those that begin a token later, up to the last ones:

        W = 1 + ceil((layers - span) / (span - overlap))     A = min(W, ceil(span / (span - overlap)))
        first rung of a layer = min(layer // (span - overlap), W - A)

    What is left makes ladders again, and so on: rounds(token) = how many times it would be kept.
    score(token) = (rounds, position)

So tokens go in the order of compaction: first those that no ladder keeps, the oldest before the newer, then those that
one round keeps, ... Every token stays for a while in some layers, and old text gets sparser but is spanned as a whole.
Half of the budget protects the newest tokens.

Where we depart: the reference keeps a cursor from call to call, to which its ladders reach; here a token's place in the
ladders follows from its position, so that what survives does not depend on when lanes were cut. Its code interleaves
the rungs over layers (layer mod rungs), where the paper's run from shallow to deep. Positions are not shifted.
A span of all layers makes no ladder: then the oldest tokens go first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 24
"""Ladders of two keep one token of 2^24 for as many rounds."""


class LaCache:
    """Keep a ladder of tokens, earlier ones in lower layers, that gets sparser with age; no token is looked at."""

    signals: frozenset[Signal] = frozenset()
    query_agnostic = True

    class Params(PolicyParams):
        span: int | None = Field(
            None, ge=1, le=10_000, description="layers in a row that keep a token; half of the model's if unset"
        )
        overlap: int = Field(
            0, ge=0, le=9_999, description="layers that a token shares with the next one of its ladder"
        )

        @model_validator(mode="after")
        def _overlap_is_less(self) -> LaCache.Params:
            if self.overlap and (self.span is None or self.overlap >= self.span):
                raise PydanticCustomError("overlap", "`overlap` must be less than a given `span`")
            return self

    def voters(self, params: Params, seen: int) -> int:
        return 0

    def default_recent(self, params: Params, budget: int) -> int:
        return budget // 2

    def score(self, view: LaneView, params: Params) -> Tensor:
        span = params.span or max(1, view.depth // 2)
        stride = span - params.overlap
        width = 1 + max(0, -(-(view.depth - span) // stride))
        height = min(width, -(-span // stride))
        rung = (view.layers // stride).clamp_max(width - height)[:, None, None]

        place = view.positions - view.sinks
        stays = place >= 0
        rounds = place.new_zeros(place.shape)
        for _ in range(ROUNDS):
            above = place % width - rung
            stays = stays & (above >= 0) & (above < height)
            rounds += stays
            place = place // width * height + above
        # Exact in float32 up to texts of 2^24 / ROUNDS tokens.
        return (rounds * view.seen + view.positions).float()
