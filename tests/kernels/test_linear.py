"""Matrix products: against float64, against the reference, and, on the CPU, the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from winnow.kernels.dispatch import Backend, WeightKind

from .build import assert_same_bits, int32, randn

SIZES = [
    pytest.param(1, 8, id="one output"),
    pytest.param(7, 24, id="less than a panel"),
    pytest.param(33, 64, id="two panels and one row"),
    pytest.param(64, 64, id="whole panels"),
    pytest.param(130, 264, id="columns beyond a block"),
    pytest.param(259, 600, id="odd rows"),
]
kinds = pytest.mark.parametrize("kind", ["f32", "int8"])


def _int8_matrix(weight: torch.Tensor) -> torch.Tensor:
    parts = []
    for group in weight.split(64, dim=1):
        scale = group.abs().amax(1, keepdim=True) / 127
        parts.append((group / scale).round() * scale)
    return torch.cat(parts, dim=1)


@kinds
@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_product(ops: Backend, kind: WeightKind, rows: int, cols: int, with_bias: bool) -> None:
    weight, x = randn(rows, cols, seed=1), randn(19, cols, seed=2)
    bias = randn(rows, seed=3) if with_bias else None
    exact = x.double() @ (weight if kind == "f32" else _int8_matrix(weight)).double().T + (0 if bias is None else bias)
    tolerance = 1e-6 * cols**0.5 * 4
    w = ops.pack(weight, kind, bias)
    assert (w.rows, w.cols, w.kind) == (rows, cols, kind)
    assert w.nbytes >= rows * cols * (4 if kind == "f32" else 1)
    y = ops.linear(x, w)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, atol=tolerance, rtol=1e-5)

    out = torch.full((19, rows), torch.nan)
    assert ops.linear(x, w, out) is out
    assert_same_bits(out, y)
    before = randn(19, rows, seed=4)
    total = before.clone()
    assert ops.linear(x, w, total, accumulate=True) is total
    torch.testing.assert_close(total.double(), before + exact, atol=tolerance, rtol=1e-5)


@kinds
@pytest.mark.parametrize("count", [1, 2, 6, 17, 70, 200])
def test_linear_matches_the_reference(native: Backend, reference: Backend, kind: WeightKind, count: int) -> None:
    weight, x, bias = randn(259, 600, seed=1) / 600**0.5, randn(count, 600, seed=2), randn(259, seed=3)
    weight[5] = 0  # a row without a scale
    expected = reference.linear(x, reference.pack(weight, kind, bias))
    torch.testing.assert_close(native.linear(x, native.pack(weight, kind, bias)), expected, atol=2e-5, rtol=1e-5)


@kinds
def test_no_rows_are_no_work(ops: Backend, kind: WeightKind) -> None:
    w = ops.pack(randn(9, 8), kind)
    assert ops.linear(torch.empty(0, 8), w).shape == (0, 9)
    assert ops.embed(int32([]), w).shape == (0, 8)


@kinds
def test_a_packed_weight_is_a_copy(ops: Backend, kind: WeightKind) -> None:
    weight, x = randn(9, 8), randn(3, 8, seed=3)
    w = ops.pack(weight, kind)
    before = ops.linear(x, w)
    weight.zero_()
    assert_same_bits(ops.linear(x, w), before)


@kinds
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_embed_reads_rows_in_any_order(ops: Backend, kind: WeightKind, rows: int, cols: int) -> None:
    weight = randn(rows, cols)
    tokens = torch.cat(
        [torch.randperm(rows, generator=torch.Generator().manual_seed(1)), torch.tensor([0, rows - 1, 0])]
    )
    expected = (weight if kind == "f32" else _int8_matrix(weight))[tokens]
    out = ops.embed(tokens.int(), ops.pack(weight, kind))
    torch.testing.assert_close(out, expected, atol=0 if kind == "f32" else 1e-6, rtol=0)


@kinds
def test_embed_matches_the_reference(native: Backend, reference: Backend, kind: WeightKind) -> None:
    weight, tokens = randn(50, 40), int32([49, 0, 7, 7, 31])
    assert_same_bits(
        native.embed(tokens, native.pack(weight, kind)), reference.embed(tokens, reference.pack(weight, kind))
    )


@kinds
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_a_row_has_the_same_bits_in_any_company(cpu: Backend, kind: WeightKind, rows: int, cols: int) -> None:
    w, x = cpu.pack(randn(rows, cols, seed=1), kind, randn(rows, seed=2)), randn(230, cols, seed=3)
    together = cpu.linear(x, w)
    for count in [*range(1, 71), 96, 97, 193]:
        assert_same_bits(cpu.linear(x[:count].contiguous(), w), together[:count])
        assert_same_bits(cpu.linear(x[230 - count :].contiguous(), w), together[230 - count :])
    base = randn(230, rows, seed=4)
    added = cpu.linear(x, w, base.clone(), accumulate=True)
    for count in (1, 5, 13, 64):
        assert_same_bits(cpu.linear(x[:count].contiguous(), w, base[:count].clone(), accumulate=True), added[:count])
