"""A matrix product that gives a row the same bits in any company.

    y[t, n] = Σ_s (Σ_{k in segment s} x[t, k] W[n, k]) · scale[n] + b[n]

The size of a tile and the segments of K depend on the weight alone, and with them how often sums are rounded, and in
which order. Where there are too few tiles to fill a GPU, each segment of a tile is a program of its own, and a second
kernel adds up what they leave, in the order in which one program does it otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.triton.device import architecture
from winnow.kernels.triton.tiles import e4m3

PROGRAMS = 128
"""A product of fewer programs leaves much of a GPU idle"""
LEAST_SEGMENT = 512
"""A shorter segment costs more to add up than it brings"""
SUMMED = 1024
"""Numbers of a row that a program adds up"""


class Tile(NamedTuple):
    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def tile_of(values: Tensor) -> Tile:
    """By the weight's type and the GPU."""
    if values.dtype == torch.float32:
        return Tile(64, 64, 32, warps=8, stages=2)
    return Tile(128, 128, 64 if architecture() >= 90 else 32, warps=8, stages=3)


def product(
    x: Tensor, values: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, accumulate: bool
) -> Tensor:
    """x [T, K] f32, bf16 or f16 times values [N, K], into out [T, N] of x's type or f32, or added to it.

    `values` are of x's type; or, beside bf16, e4m3 codes whose rows have a scale [N] f32. bias [N] is like x.
    """
    rows, (cols, depth) = len(x), values.shape
    tile = tile_of(values)
    across, steps = triton.cdiv(cols, tile.cols), triton.cdiv(depth, tile.depth)
    segments = min(triton.cdiv(PROGRAMS, across), max(depth // LEAST_SEGMENT, 1))
    steps = triton.cdiv(steps, segments)
    down = triton.cdiv(rows, tile.rows)
    is_whole = segments == 1 or down * across >= PROGRAMS
    sums = out if is_whole else out.new_empty((segments, rows, cols), dtype=torch.float32)
    if values.dtype == torch.float8_e4m3fn:
        values = values.view(torch.uint8)
    _product[(down, across, 1 if is_whole else segments)](
        x.contiguous(), values, scale, bias, sums, rows, cols, depth, steps, segments if is_whole else 1,
        IS_WHOLE=is_whole, ADDS=accumulate and is_whole, ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if not is_whole:
        grid = (rows, triton.cdiv(cols, SUMMED))
        _sum_segments[grid](sums, scale, bias, out, rows, cols, segments, ADDS=accumulate, COLS=SUMMED)
    return out


@triton.jit(do_not_specialize=["rows", "steps", "segments"])
def _product(
    x: tl.tensor,
    values: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    depth: tl.tensor,
    steps: tl.tensor,
    segments: tl.tensor,
    IS_WHOLE: tl.constexpr,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    is_row, is_col = row < rows, col < cols
    k = tl.arange(0, DEPTH)
    from_x = x + row.to(tl.int64)[:, None] * depth + k[None, :]
    from_values = values + col.to(tl.int64)[:, None] * depth + k[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for segment in range(tl.program_id(2), tl.program_id(2) + segments):
        sums = tl.zeros([ROWS, COLS], tl.float32)
        for step in range(segment * steps, tl.minimum((segment + 1) * steps, tl.cdiv(depth, DEPTH))):
            start = step * DEPTH
            is_k = (start + k < depth)[None, :]
            a = tl.load(from_x + start, mask=is_row[:, None] & is_k, other=0.0)
            b = tl.load(from_values + start, mask=is_col[:, None] & is_k, other=0)
            if values.dtype.element_ty == tl.uint8:
                b = e4m3(b).to(tl.float32).to(a.dtype)
            sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
        total += sums
    place = row.to(tl.int64)[:, None] * cols + col[None, :]
    inside = is_row[:, None] & is_col[None, :]
    if IS_WHOLE:
        _finish(total, scale, bias, out + place, col[None, :], inside, is_col[None, :], ADDS)
    else:
        partial = tl.program_id(2).to(tl.int64) * rows * cols
        tl.store(out + partial + place, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "segments"])
def _sum_segments(
    sums: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    cols: tl.tensor,
    segments: tl.tensor,
    ADDS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    place = tl.program_id(0).to(tl.int64) * cols + col
    inside = col < cols
    total = tl.zeros([COLS], tl.float32)
    partial = sums + place
    for _ in range(segments):
        total += tl.load(partial, mask=inside, other=0.0)
        partial += rows.to(tl.int64) * cols
    _finish(total, scale, bias, out + place, col, inside, inside, ADDS)


@triton.jit
def _finish(
    total: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    col: tl.tensor,
    inside: tl.tensor,
    is_col: tl.tensor,
    ADDS: tl.constexpr,
) -> None:
    if scale is not None:
        total *= tl.load(scale + col, mask=is_col, other=0.0) * 256  # what `e4m3` leaves out
    if bias is not None:
        total += tl.load(bias + col, mask=is_col, other=0.0).to(tl.float32)
    if ADDS:
        total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)
