"""RMS norm and the SiLU gate: against float64, against the reference, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch

from winnow.kernels.dispatch import Backend

from .build import assert_same_bits, randn

COUNTS = [1, 2, 9, 33]  # 9: the first count that a kernel may share between threads


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("width", [8, 64, 576, 1000])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_rms_norm_is_the_formula(ops: Backend, count: int, width: int, size: float) -> None:
    x, weight = size * randn(count, width, seed=1), randn(width, seed=2)
    expected = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), eps=1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5).double(), expected, atol=2e-6, rtol=1e-6)


def test_rms_norm_of_zeros_is_zero(ops: Backend) -> None:
    assert not ops.rms_norm(torch.zeros(2, 16), torch.ones(16), 1e-6).any()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("width", [8, 96, 1536])
def test_silu_mul_is_the_formula(ops: Backend, count: int, width: int) -> None:
    gate_up = 4 * randn(count, 2 * width)
    gate, up = gate_up.double().chunk(2, dim=1)
    out = ops.silu_mul(gate_up)
    assert out.shape == (count, width)
    torch.testing.assert_close(out.double(), gate / (1 + (-gate).exp()) * up, atol=2e-6, rtol=2e-6)


def test_silu_mul_of_large_numbers_does_not_overflow(ops: Backend) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30])
    out = ops.silu_mul(torch.cat([gate, torch.ones(8)])[None])[0]
    torch.testing.assert_close(out, torch.where(gate > 0, gate, 0.0), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("count", COUNTS)
def test_both_match_the_reference(native: Backend, reference: Backend, count: int) -> None:
    x, weight = randn(count, 576), randn(576, seed=2)
    torch.testing.assert_close(
        native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), atol=2e-6, rtol=1e-6
    )
    torch.testing.assert_close(native.silu_mul(x), reference.silu_mul(x), atol=2e-6, rtol=2e-6)


def test_a_row_has_the_same_bits_in_any_company(ops: Backend) -> None:
    x, weight = randn(33, 576), randn(576, seed=2)
    normed, gated = ops.rms_norm(x, weight, 1e-5), ops.silu_mul(x)
    for first, last in [(0, 1), (5, 6), (32, 33), (0, 8), (0, 9), (3, 20)]:
        part = x[first:last].contiguous()
        assert_same_bits(ops.rms_norm(part, weight, 1e-5), normed[first:last])
        assert_same_bits(ops.silu_mul(part), gated[first:last])
