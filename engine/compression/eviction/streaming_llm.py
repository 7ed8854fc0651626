"""StreamingLLM: keep the first tokens and the newest ones (Xiao et al., 2023, arXiv:2309.17453).

    score(token) = its logical position; the `sinks` first tokens are protected

The reference re-rotates keys to their place in the cache. Tokens keep their logical position here, as in kvpress, so
that a long conversation still ends at the context length; what is kept is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


class StreamingLLM:
    """Keep the first tokens and the newest ones."""

    signals: frozenset[Signal] = frozenset()

    class Params(PolicyParams):
        pass

    def voters(self, params: Params, seen: int) -> int:
        return 0

    def default_recent(self, params: Params, budget: int) -> int:
        return 0  # the score itself prefers the newest, after the sinks have their part

    def score(self, view: LaneView, params: Params) -> Tensor:
        return view.positions.float()
