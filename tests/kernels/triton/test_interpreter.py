"""Without a GPU: the interpreter computes in bf16 and fp8 as a GPU does. With one, that a GPU does."""

from __future__ import annotations

import torch
import triton as lang
import triton.language as tl
from torch import Tensor

from winnow.kernels.dispatch import Backend

from ..build import randn


@lang.jit
def _arithmetic(x: tl.tensor, y: tl.tensor, out: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + SIZE + at, a * b)
    tl.store(out + 2 * SIZE + at, tl.where(a < b, a, tl.full([SIZE], 0.3, tl.bfloat16)))
    tl.store(out + 3 * SIZE + at, (a.to(tl.float32) / 3).to(tl.bfloat16))


@lang.jit
def _product(x: tl.tensor, y: tl.tensor, out: tl.tensor, SIZE: tl.constexpr) -> None:
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    place = row * SIZE + column
    tl.store(out + place, tl.dot(tl.load(x + place), tl.load(y + place)))


@lang.jit
def _convert(x: tl.tensor, out: tl.tensor, SIZE: tl.constexpr) -> None:
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


def _numbers(triton: Backend) -> Tensor:
    """[64] f32: ordinary ones, ones that round up to a power of two, tiny ones, large ones."""
    numbers = torch.cat([randn(48), torch.tensor([1.999, -0.9999, 3.99, 15.9, 1e-3, 2e-3, -1e-4, 0.0])])
    return torch.cat([numbers, torch.tensor([1e30, -1e30, 448, 463, 500, -500, 17.0, 19.0])]).to(triton.device())


def test_arithmetic_in_bf16_is_rounded_from_f32(triton: Backend) -> None:
    x = _numbers(triton).bfloat16()
    y = x.flip(0).contiguous()
    out = torch.empty(4, 64, dtype=torch.bfloat16, device=x.device)
    _arithmetic[(1,)](x, y, out, SIZE=64)
    expected = torch.stack([x + y, x * y, torch.where(x < y, x, 0.3), (x.float() / 3).bfloat16()])
    assert torch.equal(out, expected)


def test_a_product_of_bf16_is_exact_but_for_its_sums(triton: Backend) -> None:
    x, y = (randn(32, 32, seed=seed).bfloat16().to(triton.device()) for seed in (1, 2))
    out = torch.empty(32, 32, device=x.device)
    _product[(1,)](x, y, out, SIZE=32)
    torch.testing.assert_close(out.double(), x.double() @ y.double(), atol=1e-5, rtol=1e-5)


def test_fp8_is_rounded_to_nearest_and_saturates(triton: Backend) -> None:
    x = _numbers(triton)
    codes = torch.empty(64, dtype=torch.float8_e4m3fn, device=x.device)
    _convert[(1,)](x, codes, SIZE=64)
    assert torch.equal(codes.float(), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    back = torch.empty(64, device=x.device)
    _convert[(1,)](codes, back, SIZE=64)
    assert torch.equal(back, codes.float())
