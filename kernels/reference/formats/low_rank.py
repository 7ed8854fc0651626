"""Keys and values by their leading coordinates in a basis of their lane: matryoshka and cskv.

U is the basis of the lane's keys, W that of its values, both [D, r] with orthonormal columns (`PagedKV.bases`); k, v a
token at position p of the text, and R(p) RoPE's turn by its angles:

    matryoshka      x = k                    k' = U x'           (MatryoshkaKV, Lin et al., 2024, arXiv:2410.14731)
    cskv            x = R(p)ᵀ k              k' = R(p) U x'      (CSKV, Wang et al., 2024, arXiv:2409.10593)
    x' = f16(Uᵀ x)      v' = W f16(Wᵀ v)      clamped to ±65504

In float64, rounded to float32 and then to float16. RoPE's tables may have a factor (yarn), which keys have too: the way
back divides by its square, so that there and back is the same key. kernels/formats/low_rank.py says where bytes lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.kernels.bases import Bases
from winnow.kernels.formats.low_rank import LowRank
from winnow.kernels.reference.formats.mustafar import F16_MAX

if TYPE_CHECKING:
    from winnow.kernels.formats import PageFormat
    from winnow.kernels.reference.formats import Place


class LowRankCodec:
    """Coordinates of keys and of values."""

    def __init__(self, fmt: PageFormat, sizes: LowRank):
        self._fmt = fmt
        self._sizes = sizes

    def seal(self, keys: Tensor, values: Tensor, place: Place | None) -> tuple[Tensor, ...]:
        """keys and values [n, C, D] f32 -> coordinates of keys [n, r, C] and of values [n, C, r]."""
        place, bases = self._at(place)
        keys, values = keys.double(), values.double()
        if self._sizes.before_rope:
            keys = _turned_back(keys, *_angles(place, keys))
        of_keys, of_values = keys @ bases.keys.double(), values @ bases.values.double().mT
        return _half(of_keys).mT, _half(of_values)

    def open(self, parts: tuple[Tensor, ...], tokens: int, dim: int, place: Place | None) -> tuple[Tensor, Tensor]:
        """As sealed -> keys and values [n, C, D] f32."""
        place, bases = self._at(place)
        of_keys, of_values = (part.view(torch.float16).double() for part in parts)
        keys = of_keys.unflatten(1, (-1, tokens)).mT @ bases.keys.double().mT
        if self._sizes.before_rope:
            keys = _turned(keys, *_angles(place, keys)[:2])
        return keys.float(), (of_values.unflatten(1, (tokens, -1)) @ bases.values.double()).float()

    def _at(self, place: Place | None) -> tuple[Place, Bases]:
        """The bases of the lane."""
        if place is None or self._fmt not in place.kv.bases:
            raise ValueError(f"pages in {self._fmt.label} need the lane's bases")
        bases = place.kv.bases[self._fmt]
        return place, Bases(bases.keys[place.layer, place.head], bases.values[place.layer, place.head])


def _angles(place: Place, keys: Tensor) -> tuple[Tensor, Tensor, float]:
    """cos and sin, [n, C, D/2] f64, of the tokens of keys [n, C, D], and the factor that is in them."""
    rope = place.kv.rope
    if rope is None:
        raise ValueError("keys before RoPE need its tables")
    positions = place.positions.view(keys.shape[:2])
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < len(rope.cos):
        raise IndexError(f"a position is not among the {len(rope.cos)} that cos and sin cover")
    return rope.cos[positions].double(), rope.sin[positions].double(), rope.factor


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _turned_back(x: Tensor, cos: Tensor, sin: Tensor, factor: float) -> Tensor:
    return _turned(x, cos, -sin) / factor**2


def _half(x: Tensor) -> Tensor:
    return x.float().clamp(-F16_MAX, F16_MAX).half()
