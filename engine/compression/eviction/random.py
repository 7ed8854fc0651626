"""Random: the control that every other policy has to beat.

    score(token) = hash(seed, layer, head, position) in [0, 1)

The hash is SplitMix64 (Steele et al., 2014, doi:10.1145/2660193.2660195), so a token's score depends on nothing else:
not on the batch, nor on chunks, nor on how often the lane was cut before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.engine.compression.policy import LaneView, PolicyParams
from winnow.engine.compression.signals import Signal

if TYPE_CHECKING:
    from torch import Tensor


def _signed(value: int) -> int:
    """The int64 with the same 64 bits; torch has no unsigned arithmetic."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: the arithmetic one copies the sign bit in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; products wrap."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


class Random:
    """Keep tokens at random, by the request's own seed."""

    signals: frozenset[Signal] = frozenset()

    class Params(PolicyParams):
        pass

    def voters(self, params: Params, seen: int) -> int:
        return 0

    def default_recent(self, params: Params, budget: int) -> int:
        return 0

    def score(self, view: LaneView, params: Params) -> Tensor:
        heads = view.kept.new_ones(view.kept.shape[1]).cumsum(0)
        state = _mix(view.kept.new_full((1,), _signed(view.seed)) + GAMMA)
        state = _mix(state + (view.layers + 1) * GAMMA)[:, None, None]
        state = _mix(state + (heads * GAMMA)[None, :, None])
        state = _mix(state + (view.positions + 1) * GAMMA)
        return _shift(state, 40).float() / (1 << 24)  # 24 bits: exact in float32
