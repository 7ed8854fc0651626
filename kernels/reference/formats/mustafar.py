"""Mustafar: of each token only the numbers that are largest (Joo et al., 2025, arXiv:2505.22913).

    n numbers of a token's D stay: those largest in magnitude, of equal ones those of lower channels
    x'[d] = f16(clamp(x[d], ±65504))   if number d stayed, otherwise 0

The original prunes by a threshold, so that equal numbers stay together; here pages have a fixed size. It keeps one
number more: the threshold is the last that would go. Where the bytes lie says kernels/formats/mustafar.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.kernels.formats.mustafar import Mustafar
from winnow.kernels.reference.integers import F16_MAX

if TYPE_CHECKING:
    from winnow.kernels.reference.formats import Place

_BIT = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)


class MustafarCodec:
    """Bitmaps and numbers."""

    def __init__(self, sizes: Mustafar):
        self._sizes = sizes

    def seal(self, keys: Tensor, values: Tensor, place: Place | None) -> tuple[Tensor, ...]:
        """keys and values [n, C, D] f32 -> bitmap and numbers of both."""
        return (*self._seal(keys), *self._seal(values))

    def open(self, parts: tuple[Tensor, ...], tokens: int, dim: int, place: Place | None) -> tuple[Tensor, Tensor]:
        """As sealed -> keys and values [n, C, D] f32."""
        k_bitmap, k_numbers, v_bitmap, v_numbers = parts
        return self._open(k_bitmap, k_numbers, tokens, dim), self._open(v_bitmap, v_numbers, tokens, dim)

    def _seal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count = self._sizes.numbers(x.shape[-1])
        largest = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :count]
        stays = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, largest, True)
        bitmap = (stays.unflatten(-1, (-1, 8)) * _BIT).sum(-1, dtype=torch.uint8)
        numbers = x[stays].view(*x.shape[:-1], count)
        return bitmap, numbers.clamp(-F16_MAX, F16_MAX).half()

    def _open(self, bitmap: Tensor, numbers: Tensor, tokens: int, dim: int) -> Tensor:
        stays = (bitmap.unflatten(1, (tokens, -1))[..., None] & _BIT).flatten(2).bool()
        opened = torch.zeros(stays.shape)
        opened[stays] = numbers.view(torch.float16).flatten().float()
        return opened
