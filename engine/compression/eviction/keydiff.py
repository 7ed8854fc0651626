"""KeyDiff: keep the keys that differ most from the others (Park et al., 2025, arXiv:2504.15364).

    score(key) = -cos(k, anchor),  anchor = mean over the lane's tokens of k/||k||

The paper applies it block by block to bound the memory of the prefill; here, as in kvpress, the whole lane is scored
at once, so that the outcome does not depend on how a prompt was cut into chunks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-8


class KeyDiff:
    """Keep the tokens whose keys point away from the lane's mean direction."""

    signals = frozenset({Signal.KEYS})
    query_agnostic = True

    class Params(PolicyParams):
        pass

    def voters(self, params: Params, seen: int) -> int:
        return 0

    def default_recent(self, params: Params, budget: int) -> int:
        return 0

    def score(self, view: LaneView, params: Params) -> Tensor:
        assert view.keys is not None
        unit = view.keys / view.keys.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
        # The sum points where the mean does; padding is zeros, and has no part in it.
        anchor = unit.sum(dim=2)
        anchor = anchor / anchor.norm(dim=-1, keepdim=True).clamp_min(EPSILON)
        return -(unit @ anchor.unsqueeze(-1)).squeeze(-1)
