"""MiniCache: one direction for a token's vectors in two layers, by SLERP (Liu et al., 2024, arXiv:2405.14366).

    x, y in the lower and the upper layer, in float64:
    u = x / max(|x|, 1e-30),  v = y / max(|y|, 1e-30)        O = arccos(clamp(u.v, ±1))
    e = sin((1 - t) O) / sin O · u + sin(t O) / sin O · v    or (1 - t)·u + t·v where sin O < 1e-6
    e' = f16(e / max(|e|, 1e-30)),  norms f16(min(|x|, 65504)) and f16(min(|y|, 65504))
    x' = |x| e',  y' = |y| e'

At t = 1 both layers have the upper one's direction. Where the bytes lie says kernels/formats/mini_cache.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from winnow.kernels.reference.formats.mustafar import F16_MAX

if TYPE_CHECKING:
    from winnow.kernels.reference.formats import Place

TINY = 1e-30
SMALL_SINE = 1e-6


class MiniCacheCodec:
    """Directions, norms and the number of the lower layer."""

    def seal(self, keys: Tensor, values: Tensor, place: Place | None) -> tuple[Tensor, ...]:
        """keys and values [n, C, D] f32 of the lower layer; those of the upper one are `place.upper`."""
        if place is None or place.upper is None:
            raise ValueError("a page of two layers is sealed from the tokens of both")
        upper_keys, upper_values = (side.view_as(keys) for side in place.upper)
        k, k_norms = _merged(keys, upper_keys, place.t)
        v, v_norms = _merged(values, upper_values, place.t)
        return k.transpose(1, 2), k_norms, v, v_norms, torch.full((len(keys), 1), place.layer, dtype=torch.int32)

    def open(self, parts: tuple[Tensor, ...], tokens: int, dim: int, place: Place | None) -> tuple[Tensor, Tensor]:
        """As sealed -> keys and values [n, C, D] f32 of the layer of `place`, the lower one without."""
        is_upper = False if place is None else parts[4].view(torch.int32) != place.layer
        is_upper = torch.as_tensor(is_upper).expand(len(parts[0]), 1)
        k, v = (parts[i].view(torch.float16).float() for i in (0, 2))
        k_norms, v_norms = (parts[i].view(torch.float16).float().unflatten(1, (2, tokens, 1)) for i in (1, 3))
        keys, values = k.unflatten(1, (dim, tokens)).transpose(1, 2), v.unflatten(1, (tokens, dim))
        pick = is_upper[..., None]
        return (
            keys * torch.where(pick, k_norms[:, 1], k_norms[:, 0]),
            values * torch.where(pick, v_norms[:, 1], v_norms[:, 0]),
        )


def slerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    """The direction at `t` of the way from x's to y's: x and y [..., D] -> [..., D] float64, of norm 1."""
    u, v = (side.double() / _norm(side.double()).clamp_min(TINY) for side in (x, y))
    angle = (u * v).sum(-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    is_arc = sine >= SMALL_SINE
    of_u = torch.where(is_arc, ((1 - t) * angle).sin() / sine.clamp_min(SMALL_SINE), 1 - t)
    of_v = torch.where(is_arc, (t * angle).sin() / sine.clamp_min(SMALL_SINE), t)
    e = of_u * u + of_v * v
    return e / _norm(e).clamp_min(TINY)


def _merged(x: Tensor, y: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """[n, C, D] f32 -> directions [n, C, D] and norms [n, 2, C], f16."""
    norms = torch.stack([_norm(side.double()).squeeze(-1) for side in (x, y)], dim=1)
    return slerp(x, y, t).half(), norms.clamp_max(F16_MAX).half()


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()
