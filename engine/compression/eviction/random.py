"""Random: the control that every other policy has to beat.

    score(token) = hash(seed, layer, head, position) in [0, 1)

A token's score depends on nothing else: not on the batch, nor on chunks, nor on how often the lane was cut before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.hashing import uniform
from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class Random:
    """Keep tokens at random, by the request's own seed."""

    signals: frozenset[Signal] = frozenset()
    query_agnostic = True

    class Params(PolicyParams):
        pass

    def voters(self, params: Params, seen: int) -> int:
        return 0

    def default_recent(self, params: Params, budget: int) -> int:
        return 0

    def score(self, view: LaneView, params: Params) -> Tensor:
        return uniform(view.seed, view.layers, view.positions)
