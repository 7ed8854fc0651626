"""Codes with a scale and a zero, and how they lie in bytes: see kernels/reference/codec.py."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.formats import PageFormat

F16_MAX = 65504.0
MIN_SCALE = 1e-6


def quantize(x: Tensor, fmt: PageFormat) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., group] f32 -> codes [..., group] uint8, one a byte; scale and zero [...] f16."""
    levels = 2**fmt.bits - 1
    lo, hi = x.amin(dim=-1), x.amax(dim=-1)
    scale = ((hi - lo) / levels).clamp(MIN_SCALE, F16_MAX).half()
    zero = lo.clamp(-F16_MAX, F16_MAX).half()
    codes = ((x - zero.float()[..., None]) / scale.float()[..., None] + 0.5).floor().clamp(0, levels)
    return codes.to(torch.uint8), scale, zero


def pack(codes: Tensor, fmt: PageFormat) -> Tensor:
    """codes [..., group], one a byte -> [..., bytes]"""
    if fmt is PageFormat.INT4:
        low, high = codes.chunk(2, dim=-1)
        return low | (high << 4)
    if fmt is PageFormat.INT2:
        first, second, third, fourth = codes.unflatten(-1, (-1, 4)).unbind(-1)
        return first | (second << 2) | (third << 4) | (fourth << 6)
    return codes


def unpack(packed: Tensor, fmt: PageFormat) -> Tensor:
    """The inverse of `pack`."""
    if fmt is PageFormat.INT4:
        return torch.cat([packed & 15, packed >> 4], dim=-1)
    if fmt is PageFormat.INT2:
        return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    return packed
