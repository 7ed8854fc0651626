"""What pages hold coordinates in: bases of the keys and of the values of every lane, the same for all sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bases:
    """Of one page format, r = rank of the layout's head dimension. Orthonormal, but for their own rounding."""

    keys: Tensor
    """[layers, kv_heads, head_dim, r] f32"""
    values: Tensor
    """[layers, kv_heads, r, head_dim] f32"""


@dataclass(frozen=True, slots=True)
class Rope:
    """RoPE's tables, for formats that hold keys as they are before it."""

    cos: Tensor
    """[positions, head_dim / 2] f32"""
    sin: Tensor
    factor: float = 1.0
    """What both were multiplied by beside (yarn), and the keys with them"""
