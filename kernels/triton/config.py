"""Sizes of the kernels' tiles, by architecture."""

from __future__ import annotations

from dataclasses import dataclass

from winnow.kernels.layout import PageFormat
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

# Registers of a thread. ptxas, where nobody names a limit, spills a few of some kernels' for one more block on a
# multiprocessor; it does not where it is given even the limit that it would have chosen.

LSE_REGISTERS = 128
"""At most, in `merge` where it writes log-sum-exps"""
VOTE_REGISTERS = 255
"""In the kernels of votes"""
PAGE_SCORE_REGISTERS = 128
"""In `score_pages`"""
TOKEN_SCORE_REGISTERS = 64
"""In `score_tokens`"""


def attend_tile(is_decode: bool, group: int, dim: int, is_f32: bool, fmt: PageFormat) -> Tile:
    """For query heads in groups of `group` over pages in `fmt`; M of decode goes by none of the pages.

    In f32, where there are no tensor cores, tiles are small.
    """
    least = max(16, 1 << (group - 1).bit_length())
    if is_f32:
        return Tile(least, 32, 4, 1)
    if is_decode:
        return Tile(least, 64 if dim <= 128 else 32, 4, 3)
    # The two halves of an int4 page, as numbers, leave registers for half as many rows; with the asynchronous products
    # of Blackwell, whose blocks have 64 rows at least, for none that are read ahead.
    if dim > 128 and architecture() >= 100:
        return Tile(max(least, 64), 32, 8, 1 if fmt is PageFormat.INT4 else 3)
    if dim > 128:
        is_tight = fmt is PageFormat.INT4 or (fmt.is_quantized and architecture() < 90)
        return Tile(max(least, 32 if is_tight else 64), 32, 8, 3)
    if architecture() < 90:
        return Tile(max(least, 32 if fmt is PageFormat.INT4 and dim > 64 else 64), 64, 8, 3)
    # A warp group, four warps, computes 64 rows; two share what is read and made into numbers.
    return Tile(max(least, 128), 64, 8, 3)


def attend_registers(
    is_decode: bool, is_codes: bool, dim: int, is_f32: bool, fmt: PageFormat, is_windowed: bool, is_choosy: bool
) -> int | None:
    """The most that a thread of `attend` may have, over pages in `fmt`, read as codes or not; None: as ptxas sees fit.

    `is_choosy`: rows may have chosen what they read.
    """
    arch = architecture()
    if is_codes and is_decode and arch < 100:
        # Four blocks of threads share a multiprocessor then, and hide each other's waits. Where that spills, fewer do.
        has_room = not is_choosy and dim <= 128 and (arch >= 90 or fmt is not PageFormat.INT4 or dim > 64)
        return 128 if has_room else None
    if is_decode and fmt is PageFormat.INT2 and dim > 64 and arch == 90 and not is_choosy:
        return 168  # three blocks
    if is_decode and fmt is PageFormat.FP8 and not is_codes and dim > 128:
        return 168
    if (fmt is PageFormat.F16 and is_choosy) or (is_f32 and is_windowed):
        return 128
    return None
