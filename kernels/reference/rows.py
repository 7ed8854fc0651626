"""Rows of one set against rows of another, lane by lane, for tokens that are merged.

nearest   index[i] = argmax over j of cos(x_i, y_j), the lowest j on ties;   a row of zeros has cosine 0 with all
sums      s_j = Σ w_i x_i,  t_j = Σ w_i   over the rows i that go to j, in order
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

EPSILON = 1e-8


def nearest_rows(x: Tensor, x_counts: Tensor, y: Tensor, y_counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of x [lanes, n, D] f32 the row of y [lanes, m, D] f32 of the highest cosine.

    Args:
        x_counts, y_counts: [lanes] int32, how many rows of each lane there are; the rest is padding.

    Returns:
        index [lanes, n] int32 and cosine [lanes, n] f32: -1 and -2 for padding and where y has no row.
    """
    check_rows(x, x_counts, y, y_counts)
    index = torch.full(x.shape[:2], -1, dtype=torch.int32)
    cosine = torch.full(x.shape[:2], -2.0)
    for lane, (rows, others) in enumerate(zip(x_counts.tolist(), y_counts.tolist(), strict=True)):
        if rows and others:
            x_unit, y_unit = (
                normalize(part.double(), dim=-1, eps=EPSILON) for part in (x[lane, :rows], y[lane, :others])
            )
            best = (x_unit @ y_unit.T).max(dim=-1)
            index[lane, :rows], cosine[lane, :rows] = best.indices.int(), best.values.float()
    return index, cosine


def sum_rows(x: Tensor, weights: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Weighted sums of the rows of x [lanes, n, D] f32 that go together.

    Args:
        weights: [lanes, n] f32.
        index: [lanes, n] int32, below `count`: where a row goes; nowhere if negative.

    Returns:
        sums [lanes, count, D] and totals of the weights [lanes, count], f32.
    """
    check_sums(x, weights, index)
    if index.numel() and int(index.max()) >= count:
        raise IndexError(f"a row goes to {int(index.max())} of {count}")
    sums = torch.zeros(x.shape[0], count, x.shape[2])
    totals = torch.zeros(x.shape[0], count)
    for lane in range(x.shape[0]):
        for row, to in enumerate(index[lane].tolist()):
            if to >= 0:
                sums[lane, to] += weights[lane, row] * x[lane, row]
                totals[lane, to] += weights[lane, row]
    return sums, totals


def check_rows(x: Tensor, x_counts: Tensor, y: Tensor, y_counts: Tensor) -> None:
    """ValueError unless the shapes of `nearest_rows` fit each other; IndexError where counts leave the rows."""
    lanes, dim = x.shape[0], x.shape[-1]
    if x.dim() != 3 or y.dim() != 3 or (y.shape[0], y.shape[2]) != (lanes, dim) or dim % 16 or dim > 256:
        raise ValueError(f"rows {list(x.shape)} and {list(y.shape)} cannot be compared")
    for counts, rows in ((x_counts, x.shape[1]), (y_counts, y.shape[1])):
        if tuple(counts.shape) != (lanes,):
            raise ValueError(f"counts {list(counts.shape)} do not fit {lanes} lanes")
        if lanes and not 0 <= int(counts.min()) <= int(counts.max()) <= rows:
            raise IndexError(f"counts {counts.tolist()} of {rows} rows")


def check_sums(x: Tensor, weights: Tensor, index: Tensor) -> None:
    """ValueError unless the shapes of `sum_rows` fit each other."""
    if x.dim() != 3 or x.shape[2] % 8 or weights.shape != x.shape[:2] or index.shape != x.shape[:2]:
        raise ValueError(f"rows {list(x.shape)}, weights {list(weights.shape)}, index {list(index.shape)} do not fit")
