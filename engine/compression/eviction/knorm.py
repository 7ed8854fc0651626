"""KNorm: keep the keys of small norm (Devoto et al., 2024, arXiv:2406.11430).

    score(key) = -||k||

Keys of small norm tend to receive much attention. The norm is the same before and after RoPE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class KNorm:
    """Keep the tokens whose keys have the smallest norm."""

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
        norm: Tensor = view.keys.norm(dim=-1)
        return -norm
