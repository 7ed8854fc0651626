"""Matrix products in the types that GPUs multiply: against float64, on the numbers that the types leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend, WeightKind
from winnow.kernels.triton.linear import PackedWeight, _wide_product, quantized_rows

from ..build import int32, randn

SIZES = [
    pytest.param(48, 64, id="whole vectors"),
    pytest.param(33, 96, id="odd rows"),  # not for the library's fp8
]
sizes = pytest.mark.parametrize(("rows", "cols"), SIZES)
kinds = pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "fp8"])
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "fp8": torch.bfloat16}
STEPS = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def _e4m3(x: Tensor) -> Tensor:
    """Rows as codes and a scale have them, in float64."""
    scale = x.float().abs().amax(1, keepdim=True) / 448
    return (x.float() / scale).to(torch.float8_e4m3fn).double() * scale.double()


def _product(x: Tensor, weight: Tensor, kind: WeightKind, is_quantized: bool) -> Tensor:
    """[T, N] float64: exact on what the kind makes of its factors."""
    if kind == "fp8":
        return (_e4m3(x) if is_quantized else x.double()) @ _e4m3(weight).T
    return x.double() @ weight.to(TYPES[kind]).double().T


@kinds
@sizes
@pytest.mark.parametrize("out_type", [None, torch.float32], ids=["out like x", "f32 out"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_product(
    triton: Backend, kind: WeightKind, rows: int, cols: int, out_type: torch.dtype | None, with_bias: bool
) -> None:
    weight, x = randn(rows, cols), randn(7, cols, seed=2).to(TYPES[kind])
    bias = randn(rows, seed=3).to(TYPES[kind]).float() if with_bias else None
    w = triton.pack(weight, kind, bias)
    assert (w.rows, w.cols, w.kind) == (rows, cols, kind)
    size = {"f32": 4, "bf16": 2, "f16": 2, "fp8": 1}[kind]
    assert w.nbytes >= rows * cols * size
    exact = _product(x, weight, kind, is_quantized=rows % 16 == 0) + (0 if bias is None else bias)
    out = None if out_type is None else torch.full((7, rows), torch.nan, dtype=out_type)
    y = triton.linear(x, w, out)
    assert y.dtype == (out_type or TYPES[kind])
    # For e4m3 the library gives bf16 whatever is wanted, and sums with fewer bits than f32 has.
    rounding = STEPS[torch.bfloat16 if kind == "fp8" else y.dtype]
    atol = (2**-10 if kind == "fp8" else 1e-6) * float(exact.abs().max())
    torch.testing.assert_close(y.double(), exact, atol=atol, rtol=2 * rounding)

    before = randn(7, rows, seed=4).to(y.dtype)
    total = before.clone()
    assert triton.linear(x, w, total, accumulate=True) is total
    largest = float(exact.abs().max() + before.abs().max())
    torch.testing.assert_close(total.double(), before.double() + exact, atol=2 * rounding * largest, rtol=0)


def test_rows_are_quantized_as_weights_are(triton: Backend) -> None:
    x = torch.cat([300 * randn(3, 200), 1e-3 * randn(2, 200), torch.zeros(1, 200)]).bfloat16()
    codes, scale = (part.cpu() for part in quantized_rows(x.to(triton.device())))
    w = triton.pack(x.float(), "fp8")
    assert isinstance(w, PackedWeight) and w.scale is not None
    assert torch.equal(scale, w.scale.cpu())
    # A quotient's last bit may be another, and turn a tie.
    close = (codes.float() - w.values.cpu().float()).abs() <= w.values.cpu().float().abs() / 8
    assert close.all() and (codes.float() == w.values.cpu().float()).float().mean() > 0.99


def test_a_row_that_fp8_multiplies_is_near_the_product(triton: Backend) -> None:
    """What quantizing both sides costs: about two percent of a result's size."""
    weight, x = randn(64, 512) / 512**0.5, randn(16, 512, seed=2).bfloat16()
    w = triton.pack(weight, "fp8")
    exact = x.double() @ weight.double().T
    error = (triton.linear(x, w).double() - exact).square().mean().sqrt()
    assert error < 0.05
    x, w = x.to(triton.device()), triton.pack(weight, "fp8")
    assert isinstance(w, PackedWeight)
    assert (_wide_product(x, w).double().cpu() - exact).square().mean().sqrt() < error


@kinds
def test_embed(triton: Backend, kind: WeightKind) -> None:
    weight, tokens = randn(50, 40), int32([49, 0, 7, 7, 31])
    w = triton.pack(weight, kind)
    expected = (_e4m3(weight) if kind == "fp8" else weight)[tokens].to(TYPES[kind])
    for where in ("cpu", triton.device()):
        out = triton.embed(tokens.to(where), w)
        assert out.dtype == TYPES[kind]
        torch.testing.assert_close(out, expected, atol=0, rtol=STEPS[TYPES[kind]])


@kinds
def test_no_rows_are_no_work(triton: Backend, kind: WeightKind) -> None:
    w = triton.pack(randn(16, 32), kind)
    assert triton.linear(torch.empty(0, 32, dtype=TYPES[kind]), w).shape == (0, 16)
    assert triton.embed(int32([]), w).shape == (0, 32)


def test_what_it_does_not_have(triton: Backend) -> None:
    with pytest.raises(ValueError, match="int8 weights: f32, bf16, f16, fp8"):
        triton.pack(randn(16, 32), "int8")
    with pytest.raises(ValueError, match="float32"):
        triton.linear(randn(2, 32).bfloat16(), triton.pack(randn(16, 32), "f32"))
    with pytest.raises(ValueError, match="bfloat16"):
        triton.linear(randn(2, 32), triton.pack(randn(16, 32), "bf16"))
