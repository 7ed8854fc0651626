"""Numbers that depend on a request's seed and on a token's place, and on nothing else.

    number(seed, layer, head, position) = hash of the four, uniform in [0, 1)

The hash is SplitMix64 (Steele et al., 2014, doi:10.1145/2660193.2660195): no batch mate, chunk or earlier eviction has
a part in it. Torch is needed by its callers only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def uniform(seed: int, layers: Tensor, positions: Tensor, first_head: int = 0) -> Tensor:
    """[layers, heads, tokens] float32 in [0, 1), whole multiples of 2^-24.

    Args
        seed       64 bits
        layers     [layers] int64
        positions  [layers, heads, tokens] int64
        first_head which of the model's the first of these is
    """
    heads = positions.new_ones(positions.shape[1]).cumsum(0) + first_head
    state = _mix(positions.new_full((1,), _signed(seed)) + GAMMA)
    state = _mix(state + (layers + 1) * GAMMA)[:, None, None]
    state = _mix(state + (heads * GAMMA)[None, :, None])
    state = _mix(state + (positions + 1) * GAMMA)
    return _shift(state, 40).float() / (1 << 24)
