"""ThinK: keys without the channels that say least about q.k (Xu et al., 2024, arXiv:2407.21018).

    k'[d] = f16(clamp(k[d], ±65504))   if channel d stays in the lane (`PagedKV.channels`), otherwise 0
    v'[d] = f16(clamp(v[d], ±65504))

Where the bytes lie says kernels/formats/think.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.kernels.formats.think import Think
from winnow.kernels.reference.formats.mustafar import F16_MAX

if TYPE_CHECKING:
    from winnow.kernels.reference.formats import Place

_BIT = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)


class ThinkCodec:
    """A bitmap, keys and values."""

    def __init__(self, sizes: Think):
        self._sizes = sizes

    def seal(self, keys: Tensor, values: Tensor, place: Place | None) -> tuple[Tensor, ...]:
        """keys and values [n, C, D] f32 -> bitmap, keys and values."""
        if place is None or place.channels is None:
            raise ValueError("nobody has chosen the channels of these lanes")
        stays = place.channels.bool()
        if int(stays.sum()) != self._sizes.channels(keys.shape[-1]):
            raise ValueError(f"{int(stays.sum())} channels of {len(stays)} stay")
        bitmap = (stays.unflatten(0, (-1, 8)) * _BIT).sum(-1, dtype=torch.uint8).expand(len(keys), -1)
        half = [part.clamp(-F16_MAX, F16_MAX).half() for part in (keys[..., stays].mT, values)]
        return bitmap, *half

    def open(self, parts: tuple[Tensor, ...], tokens: int, dim: int, place: Place | None) -> tuple[Tensor, Tensor]:
        """As sealed -> keys and values [n, C, D] f32."""
        bitmap, keys, values = parts
        stays = (bitmap[..., None] & _BIT).flatten(1).bool()
        opened = torch.zeros(len(stays), dim, tokens)
        opened[stays] = keys.view(torch.float16).float().view(-1, tokens)
        return opened.mT, values.view(torch.float16).float().unflatten(1, (tokens, dim))
