"""Rows of one set against rows of another, lane by lane, for tokens that are merged (see kernels/reference/rows.py).

A row's result is one chain of operations in the order of the other set's rows, whatever padding lies beside them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.reference.rows import EPSILON, check_rows, check_sums
from winnow.kernels.triton.tiles import padded

LEAST_NORM = tl.constexpr(EPSILON)


def nearest_rows(x: Tensor, x_counts: Tensor, y: Tensor, y_counts: Tensor) -> tuple[Tensor, Tensor]:
    check_rows(x, x_counts, y, y_counts)
    lanes, rows, dim = x.shape
    index = torch.empty((lanes, rows), dtype=torch.int32, device=x.device)
    cosine = torch.empty((lanes, rows), device=x.device)
    if index.numel():
        x_counts, y_counts = (counts.to(torch.int32).contiguous() for counts in (x_counts, y_counts))
        x, y = _unit_rows(x, x_counts), _unit_rows(y, y_counts)
        sizes = {"D": dim, "CHANNELS": 16 if dim % 32 else 32, "TILE": 64}
        _nearest[lanes, triton.cdiv(rows, 64)](
            x, x_counts, y, y_counts, index, cosine, rows, y.shape[1], **sizes, num_warps=8
        )
    return index, cosine


def sum_rows(x: Tensor, weights: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    check_sums(x, weights, index)
    x, weights = _floats(x), _floats(weights)
    lanes, rows, dim = x.shape
    sums = torch.zeros((lanes, count, dim), device=x.device)
    totals = torch.zeros((lanes, count), device=x.device)
    if not sums.numel() or not index.numel():
        return sums, totals
    if int(index.max()) >= count:
        raise IndexError(f"a row goes to {int(index.max())} of {count}")
    # Rows that go together, side by side in their order.
    to, order = index.to(torch.int32).sort(dim=-1, stable=True)
    places = torch.arange(count + 1, dtype=torch.int32, device=x.device).expand(lanes, -1).contiguous()
    bounds = torch.searchsorted(to.contiguous(), places, out_int32=True)
    _sum[count, lanes](x, weights, order.to(torch.int32), bounds, sums, totals, rows, count, D=dim, TILE=16)
    return sums, totals


def _unit_rows(x: Tensor, counts: Tensor) -> Tensor:
    """x / |x|, and zero where x is, or where there is no row."""
    x = _floats(x)
    unit = torch.empty_like(x)
    if x.numel():
        _unit[triton.cdiv(x.shape[1], 16), len(x)](x, counts, unit, x.shape[1], D=x.shape[2], TILE=16)
    return unit


@triton.jit
def _unit(
    x: tl.tensor, counts: tl.tensor, unit: tl.tensor, rows: tl.tensor, D: tl.constexpr, TILE: tl.constexpr
) -> None:
    """Program (tile of rows, lane)."""
    lane = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    channel = tl.arange(0, padded(D))[None, :]
    at = lane * rows * D + row * D + channel
    is_row = (row < tl.load(counts + lane)) & (channel < D)
    numbers = tl.load(x + at, mask=is_row, other=0.0)
    norm = tl.maximum(tl.sqrt_rn(tl.sum(numbers * numbers, 1)), LEAST_NORM)
    numbers = tl.div_rn(numbers, tl.broadcast_to(norm[:, None], numbers.shape))
    tl.store(unit + at, numbers, mask=(row < rows) & (channel < D))


@triton.jit
def _nearest(
    x: tl.tensor,
    x_counts: tl.tensor,
    y: tl.tensor,
    y_counts: tl.tensor,
    index: tl.tensor,
    cosine: tl.tensor,
    x_rows: tl.tensor,
    y_rows: tl.tensor,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program (lane, tile of x)."""
    lane = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held, others = tl.load(x_counts + lane), tl.load(y_counts + lane)
    channel = tl.arange(0, CHANNELS)
    mine = x + lane * x_rows * D + row[:, None] * D + channel[None, :]
    best = tl.full([TILE], -2.0, tl.float32)
    nearest = tl.full([TILE], -1, tl.int32)
    for first in range(0, others, TILE):
        other = first + tl.arange(0, TILE)
        theirs = y + lane * y_rows * D + other[None, :] * D + channel[:, None]
        products = tl.zeros([TILE, TILE], tl.float32)
        for at in range(0, D, CHANNELS):
            a = tl.load(mine + at, mask=(row < x_rows)[:, None], other=0.0)
            b = tl.load(theirs + at, mask=(other < others)[None, :], other=0.0)
            products = tl.dot(a, b, products, input_precision="ieee")
        products = tl.where((other < others)[None, :], products, -2.0)
        top, place = tl.max(products, 1, return_indices=True, return_indices_tie_break_left=True)
        nearest = tl.where(top > best, first + place, nearest)
        best = tl.maximum(best, top)
    nearest = tl.where(row < held, nearest, -1)
    best = tl.where(row < held, best, -2.0)
    tl.store(index + lane * x_rows + row, nearest, mask=row < x_rows)
    tl.store(cosine + lane * x_rows + row, best, mask=row < x_rows)


@triton.jit
def _sum(
    x: tl.tensor,
    weights: tl.tensor,
    order: tl.tensor,
    bounds: tl.tensor,
    sums: tl.tensor,
    totals: tl.tensor,
    rows: tl.tensor,
    count: tl.tensor,
    D: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Program (sum, lane)."""
    to, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = tl.load(bounds + lane * (count + 1) + to)
    end = tl.load(bounds + lane * (count + 1) + to + 1)
    channel = tl.arange(0, padded(D))
    total = tl.zeros([padded(D)], tl.float32)
    weight = 0.0
    for first in range(begin, end, TILE):
        place = first + tl.arange(0, TILE)
        row = tl.load(order + lane * rows + place, mask=place < end, other=0)
        w = tl.load(weights + lane * rows + row, mask=place < end, other=0.0)
        inside = (place < end)[:, None] & (channel < D)[None, :]
        numbers = tl.load(x + (lane * rows + row)[:, None] * D + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(numbers * w[:, None], 0)
        weight += tl.sum(w, 0)
    tl.store(sums + (lane * count + to) * D + channel, total, mask=channel < D)
    tl.store(totals + lane * count + to, weight)


def _floats(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise ValueError(f"expected f32, not {x.dtype}")
    return x.contiguous()
