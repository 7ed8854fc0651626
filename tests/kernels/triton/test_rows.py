"""Nearest rows and sums of rows in Triton, on small cases of kernels/test_rows.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend

from ..build import assert_same_bits, int32, randn

COUNTS = {
    "one row each": ([1], [1]),
    "a tile of rows - 1, ± 0 and + 1": ([63, 64, 65], [65, 64, 63]),
    "lanes that give up nothing, or keep nothing": ([0, 40, 17], [30, 0, 9]),
    "no lane has any": ([0, 0], [0, 0]),
}
counts = pytest.mark.parametrize(("some", "others"), COUNTS.values(), ids=COUNTS.keys())


def _rows(count: list[int], dim: int, seed: int) -> Tensor:
    """Padding is NaN: nothing may read it."""
    x = randn(len(count), max(count) + 3, dim, seed=seed)
    for lane, rows in enumerate(count):
        x[lane, rows:] = torch.nan
    return x


@counts
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_nearest_rows(triton: Backend, reference: Backend, some: list[int], others: list[int], dim: int) -> None:
    x, y = _rows(some, dim, 1), _rows(others, dim, 2)
    index, cosine = triton.nearest_rows(x, int32(some), y, int32(others))
    expected, expected_cosine = reference.nearest_rows(x, int32(some), y, int32(others))
    assert torch.equal(index, expected)
    torch.testing.assert_close(cosine, expected_cosine, atol=1e-6, rtol=0)


def test_the_first_of_equal_rows_is_nearest_and_zeros_are_like_nothing(triton: Backend) -> None:
    x, y = torch.zeros(1, 2, 16), torch.zeros(1, 140, 16)
    x[0, 0, 3] = 5.0
    y[0, 7, 3] = y[0, 20, 3] = y[0, 130, 3] = 2.0
    index, cosine = triton.nearest_rows(x, int32([2]), y, int32([140]))
    assert index.tolist() == [[7, 0]]
    assert cosine.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 40])
def test_sum_rows(triton: Backend, reference: Backend, rows: int) -> None:
    """All rows of the second lane go to one sum; padding, and some others, go nowhere."""
    x, weights = _rows([rows, rows], 48, 3), randn(2, rows + 3, seed=4)
    index = torch.stack([torch.arange(rows + 3) * 7919 % 6 - 1, torch.full((rows + 3,), 4)]).int()
    index[:, rows:] = -1
    for part, expected in zip(
        triton.sum_rows(x, weights, index, 5), reference.sum_rows(x, weights, index, 5), strict=True
    ):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(IndexError):
        triton.sum_rows(x, weights, index, 4)


def test_nothing_is_summed_to_nothing(triton: Backend) -> None:
    sums, totals = triton.sum_rows(torch.zeros(2, 0, 16), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int32), 3)
    assert sums.shape == (2, 3, 16)
    assert not sums.any()
    assert not totals.any()
    assert triton.sum_rows(randn(1, 2, 16), randn(1, 2), int32([[-1, -1]]), 0)[0].shape == (1, 0, 16)


def test_padding_does_not_matter(triton: Backend) -> None:
    x, y, weights = _rows([70, 33], 32, 5), _rows([50, 21], 32, 6), randn(2, 73)
    results = []
    for width in (73, 70):
        args = (x[:, :width].contiguous(), int32([70, 33]), y[:, : width - 20].contiguous(), int32([50, 21]))
        index, cosine = triton.nearest_rows(*args)
        results.append((index[:, :70], cosine[:, :70], *triton.sum_rows(args[0], weights[:, :width], index, 50)))
    for part, expected in zip(*results, strict=True):
        assert_same_bits(part, expected)
