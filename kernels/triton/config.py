"""Sizes of the kernels' tiles, by architecture."""

from __future__ import annotations

from dataclasses import dataclass

from winnow.kernels.triton.device import architecture


@dataclass(frozen=True, slots=True)
class Tile:
    """How `attend` is cut and compiled."""

    M: int
    """Queries, rows by heads of a group, of a block"""
    N: int
    """Tokens that are read at a time"""
    num_warps: int
    num_stages: int


SPLITS = 32
"""Programs that share a part of a lane in decode; a power of two"""
LEAST_TOKENS = 512
"""The fewest tokens worth a program of their own"""


def attend_tile(is_decode: bool, group: int, dim: int, is_f32: bool) -> Tile:
    """For query heads in groups of `group`. In f32, where there are no tensor cores, tiles are small."""
    least = max(16, 1 << (group - 1).bit_length())
    if is_f32:
        return Tile(least, 32, 4, 1)
    if is_decode:
        return Tile(least, 64 if dim <= 128 else 32, 4, 3)
    if dim > 128:
        return Tile(max(least, 64), 32, 4, 3)
    if architecture() < 90:
        return Tile(max(least, 64), 64, 8, 3)
    # A warp group, four warps, computes 64 rows; two share what is read and made into numbers.
    return Tile(max(least, 128), 64, 8, 3)
