"""The product whose rows do not depend on company: against float64, and bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend, WeightKind
from winnow.kernels.triton import matmul
from winnow.kernels.triton.linear import use_batch_invariant

from ..build import randn

kinds = pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "fp8"])
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "fp8": torch.bfloat16}
SIZES = [
    pytest.param(48, 64, id="one tile"),
    pytest.param(200, 70, id="parts of tiles"),
    pytest.param(40, 150, id="two segments"),
]


@pytest.fixture(autouse=True)
def _batch_invariant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On, for a GPU that two programs fill: segments are added up by a second kernel where rows fill one tile."""
    monkeypatch.setattr(matmul, "PROGRAMS", 2)
    monkeypatch.setattr(matmul, "LEAST_SEGMENT", 64)
    use_batch_invariant(True)
    yield
    use_batch_invariant(False)


def _weight(rows: int, cols: int, kind: WeightKind) -> tuple[Tensor, Tensor]:
    """f32, and float64 as the kind has it."""
    weight = randn(rows, cols) / cols**0.5
    if kind != "fp8":
        return weight, weight.to(TYPES[kind]).double()
    scale = weight.abs().amax(1, keepdim=True) / 448
    return weight, (weight / scale).to(torch.float8_e4m3fn).double() * scale.double()


@kinds
@pytest.mark.parametrize(("rows", "cols"), SIZES)
@pytest.mark.parametrize("count", [3, 130])
def test_linear_is_the_product(triton: Backend, kind: WeightKind, rows: int, cols: int, count: int) -> None:
    weight, exact_weight = _weight(rows, cols, kind)
    x, bias = randn(count, cols, seed=2).to(TYPES[kind]), randn(rows, seed=3).to(TYPES[kind]).float()
    exact = x.double() @ exact_weight.T
    y = triton.linear(x, triton.pack(weight, kind))
    assert y.dtype == TYPES[kind]
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[y.dtype]
    torch.testing.assert_close(y.double(), exact, atol=4e-6, rtol=rounding)
    out = torch.full((count, rows), torch.nan)
    triton.linear(x, triton.pack(weight, kind, bias), out)
    torch.testing.assert_close(out.double(), exact + bias, atol=4e-6, rtol=1e-6)
    total = out.to(TYPES[kind])
    expected = total.double() + exact + bias
    triton.linear(x, triton.pack(weight, kind, bias), total, accumulate=True)
    torch.testing.assert_close(total.double(), expected, atol=4e-6, rtol=rounding)


@kinds
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_a_row_has_the_same_bits_in_any_company(triton: Backend, kind: WeightKind, rows: int, cols: int) -> None:
    w = triton.pack(_weight(rows, cols, kind)[0], kind, randn(rows, seed=3))
    x, before = randn(150, cols, seed=2).to(TYPES[kind]), randn(150, rows, seed=4)
    together = triton.linear(x, w, before.clone(), accumulate=True)
    for first, last in [(5, 6), (149, 150), (3, 67), (20, 149)]:
        part = triton.linear(x[first:last].contiguous(), w, before[first:last].clone(), accumulate=True)
        assert torch.equal(part, together[first:last])
