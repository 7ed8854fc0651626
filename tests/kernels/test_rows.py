"""Nearest rows and sums of rows: every backend against plain loops, and the same bits by any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels import cpu
from winnow.kernels.dispatch import Backend

from .build import assert_same_bits, int32, randn

COUNTS = {
    "one row each": ([1], [1]),
    "blocks of rows - 1, ± 0 and + 1": ([23, 24, 25], [63, 64, 65]),
    "a lane that gives up nothing": ([0, 40], [30, 9]),
    "a lane that keeps nothing": ([40, 17], [0, 130]),
    "no lane has any": ([0, 0], [0, 0]),
    "many": ([300, 117, 1], [200, 1, 333]),
}
counts = pytest.mark.parametrize(("some", "others"), COUNTS.values(), ids=COUNTS.keys())


def _rows(count: list[int], dim: int, seed: int) -> Tensor:
    """Padding is NaN: nothing may read it."""
    x = randn(len(count), max(count) + 3, dim, seed=seed)
    for lane, rows in enumerate(count):
        x[lane, rows:] = torch.nan
    return x


@counts
@pytest.mark.parametrize("dim", [16, 64, 96])
def test_nearest_rows(ops: Backend, some: list[int], others: list[int], dim: int) -> None:
    x, y = _rows(some, dim, 1), _rows(others, dim, 2)
    index, cosine = ops.nearest_rows(x, int32(some), y, int32(others))
    for lane, (n, m) in enumerate(zip(some, others, strict=True)):
        assert (index[lane, n:] == -1).all() and (cosine[lane, n:] == -2).all()
        if not m:
            assert (index[lane] == -1).all() and (cosine[lane] == -2).all()
            continue
        for i in range(n):
            cosines = torch.cosine_similarity(x[lane, i].double()[None], y[lane, :m].double(), dim=-1)
            assert abs(float(cosine[lane, i]) - float(cosines.max())) < 1e-6
            assert float(cosines[index[lane, i]]) > float(cosines.max()) - 1e-6


def test_the_first_of_equal_rows_is_nearest_and_zeros_are_like_nothing(ops: Backend) -> None:
    x = torch.zeros(1, 2, 16)
    x[0, 0, 3] = 5.0
    y = torch.zeros(1, 70, 16)
    y[0, 7, 3] = y[0, 66, 3] = 2.0
    index, cosine = ops.nearest_rows(x, int32([2]), y, int32([70]))
    assert index.tolist() == [[7, 0]]
    assert cosine.tolist() == [[1.0, 0.0]]


@counts
def test_sum_rows(ops: Backend, some: list[int], others: list[int]) -> None:
    x, weights = _rows(some, 16, 3), randn(len(some), max(some) + 3, seed=4)
    most = max(others) + 1
    index = (torch.arange(x.shape[1]) * 7919 % (most + 1)).expand(
        len(some), -1
    ).int() - 1  # one in so many goes nowhere
    index = index.masked_fill(torch.arange(x.shape[1]) >= torch.tensor(some)[:, None], -1)
    sums, totals = ops.sum_rows(x, weights, index, most)
    for lane in range(len(some)):
        wanted, total = torch.zeros(most, 16, dtype=torch.float64), torch.zeros(most, dtype=torch.float64)
        for i in range(some[lane]):
            if (to := int(index[lane, i])) >= 0:
                wanted[to] += weights[lane, i].double() * x[lane, i].double()
                total[to] += weights[lane, i].double()
        torch.testing.assert_close(sums[lane].double(), wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(totals[lane].double(), total, atol=1e-4, rtol=1e-4)


def test_threads_and_padding_do_not_matter(native: Backend) -> None:
    some, others = [200, 97], [150, 33]
    x, y, weights = _rows(some, 32, 5), _rows(others, 32, 6), randn(2, 203)
    one = cpu.set_threads(0)
    results = []
    try:
        for threads, width in ((1, 203), (2, 203), (2, 200)):
            cpu.set_threads(threads)
            index, cosine = native.nearest_rows(x[:, :width].contiguous(), int32(some), y, int32(others))
            sums = native.sum_rows(x[:, :width].contiguous(), weights[:, :width].contiguous(), index, 150)
            results.append((index[:, :200], cosine[:, :200], *sums))
    finally:
        cpu.set_threads(one)
    for other in results[1:]:
        for part, wanted in zip(other, results[0], strict=True):
            assert_same_bits(part, wanted)


def test_what_does_not_fit_is_refused(ops: Backend) -> None:
    x, y, refused = randn(2, 5, 16), randn(2, 4, 16), pytest.raises((IndexError, ValueError))
    for some, others in (([5, 6], [4, 4]), ([5, 5], [4, 5]), ([-1, 5], [4, 4]), ([5], [4, 4])):
        with refused:
            ops.nearest_rows(x, int32(some), y, int32(others))
    with refused:
        ops.nearest_rows(x, int32([5, 5]), randn(2, 4, 32), int32([4, 4]))
    with refused:
        ops.nearest_rows(randn(2, 5, 8), int32([5, 5]), randn(2, 4, 8), int32([4, 4]))
    with refused:
        ops.sum_rows(x, randn(2, 5), int32([[0, 1, 2, 3, 4]] * 2), 4)
    with refused:
        ops.sum_rows(x, randn(2, 4), int32([[0, 1, 2, 3]] * 2), 4)
