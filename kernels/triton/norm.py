"""Normalisation and activation: see kernels/reference/norm.py. A program has a row, or a part of one, to itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GATED = 1024
"""Numbers of a row that a program of `silu_mul` makes"""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, N] f32, bf16 or f16, weight [N] f32 -> like x, computed in f32."""
    rows, width = x.shape
    if weight.shape != (width,) or weight.dtype != torch.float32:
        raise ValueError(f"weight must be float32 [{width}], not {weight.dtype} {list(weight.shape)}")
    x = x.contiguous()
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    _rms_norm[(rows,)](x, weight, out, width, eps, BLOCK=block, num_warps=min(max(block // 512, 1), 16))
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2I] f32, bf16 or f16 -> [T, I], computed in f32."""
    rows, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate and up must be of one size, not halves of {both}")
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(rows, both // 2)
    block = min(triton.next_power_of_2(both // 2), GATED)
    _silu_mul[(rows, triton.cdiv(both // 2, block))](gate_up, out, both // 2, BLOCK=block, num_warps=4)
    return out


@triton.jit
def _rms_norm(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, width: tl.tensor, eps: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    numbers = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(numbers * numbers, axis=0) / width + eps)
    normed = numbers * scale * tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row + column, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + 2 * row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + 2 * row + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)
