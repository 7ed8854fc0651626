"""GEAR: four-bit codes, outliers beside them, and the rest of the error at low rank (Kang et al., 2024,
arXiv:2403.05527).

For each side of a page, rows X [R, N] (keys by channel, values by token):

    outliers       the k least and the k greatest of a row, of equal ones the first and the last; kept in float16
    X0             X with the row's mean in their places, so that they do not stretch its scale
    codes          of X0 as those of int4 (kernels/reference/codec.py); X1 what they mean
    E [C, D]       X - X1, and 0 for outliers, tokens by channels
    tokens, channels   T [C, 2] orthonormal and H [D, 2] = Eᵀ T, in float16, by power iteration from a fixed start
    x'             the outlier, or x1 + T Hᵀ

Sums are float64: their order does not matter to what is stored. The original adds T Hᵀ to outliers too, and finds
those of a value among all heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.kernels.formats import PageFormat
from winnow.kernels.formats.gear import Gear
from winnow.kernels.reference.integers import F16_MAX, pack, quantize, unpack

if TYPE_CHECKING:
    from winnow.kernels.reference.formats import Place

LOOPS = 3
"""Of power iteration, as in the original's examples"""


class GearCodec:
    """Codes, outliers and factors."""

    def __init__(self, sizes: Gear):
        self._sizes = sizes

    def seal(self, keys: Tensor, values: Tensor, place: Place | None) -> tuple[Tensor, ...]:
        """keys and values [n, C, D] f32 -> the parts of both."""
        return (*self._seal(keys.mT, is_keys=True), *self._seal(values, is_keys=False))

    def open(self, parts: tuple[Tensor, ...], tokens: int, dim: int, place: Place | None) -> tuple[Tensor, Tensor]:
        """As sealed -> keys and values [n, C, D] f32."""
        half = len(parts) // 2
        keys = self._open(parts[:half], (dim, tokens), is_keys=True)
        return keys.mT, self._open(parts[half:], (tokens, dim), is_keys=False)

    def _seal(self, x: Tensor, is_keys: bool) -> tuple[Tensor, ...]:
        """x [n, R, N] -> its parts."""
        k, columns = self._sizes.outliers(x.shape[-1]), x.shape[-1]
        numbers, order = x.sort(dim=-1, stable=True)
        places = torch.cat([order[..., :k], order[..., -k:]], dim=-1)
        outliers = torch.cat([numbers[..., :k], numbers[..., -k:]], dim=-1)
        mean = x.double().mean(dim=-1, keepdim=True).float()
        codes, scale, zero = quantize(x.scatter(-1, places, mean.expand_as(places)), PageFormat.INT4)
        error = (x - _decoded(codes, scale, zero)).scatter(-1, places, 0.0).double()
        factors = low_rank(error.mT if is_keys else error, self._sizes.rank)
        tokens, channels = (factor.float().clamp(-F16_MAX, F16_MAX).half() for factor in factors)
        outliers = outliers.clamp(-F16_MAX, F16_MAX).half()
        at = places.to(torch.uint8 if columns <= 256 else torch.uint16)
        return pack(codes, PageFormat.INT4), scale, zero, outliers, tokens, channels, at

    def _open(self, parts: tuple[Tensor, ...], size: tuple[int, int], is_keys: bool) -> Tensor:
        """[n, R, N]"""
        rows, columns = size
        codes, *numbers, at = parts
        scale, zero, outliers, tokens, channels = (part.view(torch.float16) for part in numbers)
        x = _decoded(unpack(codes.unflatten(1, (rows, -1)), PageFormat.INT4), scale, zero)
        by_token, by_channel = (side.float().unflatten(1, (-1, self._sizes.rank)) for side in (tokens, channels))
        of_row, of_column = (by_channel, by_token) if is_keys else (by_token, by_channel)
        change = torch.zeros_like(x)
        for r in range(self._sizes.rank):  # in their order, as other backends add them
            change = change + of_row[..., r, None] * of_column[:, None, :, r]
        places = at.view(torch.uint8 if columns <= 256 else torch.uint16).unflatten(1, (rows, -1)).long()
        return (x + change).scatter(-1, places, outliers.float().unflatten(1, (rows, -1)))


def low_rank(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """error [n, C, D] float64 -> factors [n, C, rank], orthonormal, and [n, D, rank], whose product is near it."""
    dim = error.shape[-1]
    index = torch.arange(1, dim * rank + 1, dtype=torch.int64)
    channels = ((index * 2654435761) % 2**32).double().div(2**32).view(dim, rank).expand(len(error), -1, -1)
    for _ in range(LOOPS - 1):
        channels = error.mT @ (error @ channels)
    tokens = orthonormal(error @ orthonormal(channels))
    return tokens, error.mT @ tokens


def orthonormal(x: Tensor) -> Tensor:
    """Gram-Schmidt over the columns of x [n, rows, rank]; zeros for a column that is a sum of those before it."""
    columns: list[Tensor] = []
    for column in x.unbind(-1):
        size = column.square().sum(-1, keepdim=True)
        for other in columns:
            column = column - (column * other).sum(-1, keepdim=True) * other
        left = column.square().sum(-1, keepdim=True)
        columns.append(torch.where(left > 1e-20 * size, column / left.sqrt(), 0.0))
    return torch.stack(columns, dim=-1)


def _decoded(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return codes.float() * scale.float()[..., None] + zero.float()[..., None]
