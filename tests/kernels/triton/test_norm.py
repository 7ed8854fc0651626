"""RMS norm and the SiLU gate in both types of activations, at widths that blocks do not divide."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from winnow.kernels.dispatch import Backend

from ..build import randn

STEPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
types = pytest.mark.parametrize("dtype", STEPS, ids=["f32", "bf16", "f16"])
widths = pytest.mark.parametrize("width", [8, 64, 576, 1000, 1100])


def _close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=2e-6, rtol=STEPS[dtype])


@types
@widths
@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_rms_norm(triton: Backend, reference: Backend, dtype: torch.dtype, width: int, size: float) -> None:
    x, weight = (size * randn(3, width)).to(dtype), randn(width, seed=2)
    _close(triton.rms_norm(x, weight, 1e-5), reference.rms_norm(x.float(), weight, 1e-5), dtype)


@types
@widths
def test_silu_mul(triton: Backend, reference: Backend, dtype: torch.dtype, width: int) -> None:
    gate_up = (4 * randn(3, 2 * width)).to(dtype)
    _close(triton.silu_mul(gate_up), reference.silu_mul(gate_up.float()), dtype)


def test_rows_of_a_view(triton: Backend) -> None:
    x, weight = randn(6, 64), randn(64, seed=2)
    assert torch.equal(triton.rms_norm(x.t().contiguous().t(), weight, 1e-5), triton.rms_norm(x, weight, 1e-5))


def test_no_rows_are_no_work(triton: Backend) -> None:
    assert triton.rms_norm(torch.empty(0, 64), torch.ones(64), 1e-5).shape == (0, 64)
    assert triton.silu_mul(torch.empty(0, 64)).shape == (0, 32)
