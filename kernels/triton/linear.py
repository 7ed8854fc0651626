"""Matrix products with packed weights: the vendor's libraries, and for fp8 a kernel that quantizes what goes in.

    f32, bf16, f16   y = x Wᵀ + b                                                  x of the same type
    fp8         W[n] = scale[n] · codes[n],  scale[n] = max |W[n]| / 448           codes e4m3, x bf16
                x[t] likewise, where the GPU multiplies e4m3;  y = (codes[t] · codes[n]) · scale[t] · scale[n] + b

Sums are in f32. The libraries cut them by how many rows there are, so a row's last bits may depend on its company.
After `use_batch_invariant` all products are those of kernels/triton/matmul.py, where x stays bf16 beside fp8 too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from winnow.kernels.dispatch import WeightKind
from winnow.kernels.triton import matmul
from winnow.kernels.triton.device import architecture, device, upload

TYPES: dict[WeightKind, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "fp8": torch.bfloat16,
}
"""Of activations beside each kind of weight"""

FP8_MAX = 448.0
SMALLEST = 1e-12
"""A row whose numbers are all smaller has the scale of this one"""
PACKED_AT_ONCE = 1 << 24
"""Numbers that `pack` quantizes at once: what it needs beside its input and its result"""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix on the device."""

    kind: WeightKind
    values: Tensor
    """[N, K]: f32, bf16, f16, or e4m3 codes"""
    scale: Tensor | None
    """[N] f32, for fp8"""
    bias: Tensor | None
    """[N], in the activations' type"""

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def cols(self) -> int:
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scale, self.bias) if part is not None)


_is_batch_invariant = False


def use_batch_invariant(on: bool) -> None:
    """From now on a row of a product has the same bits in any company, or the libraries' speed."""
    global _is_batch_invariant
    _is_batch_invariant = on


def pack(weight: Tensor, kind: WeightKind, bias: Tensor | None = None) -> PackedWeight:
    """Packs `weight` [N, K] f32, bf16 or f16 and `bias` [N] f32, from anywhere. The result shares no memory with it."""
    if kind not in TYPES:
        raise ValueError(f"the triton backend has no {kind} weights: {', '.join(TYPES)}")
    if weight.dim() != 2 or weight.dtype not in TYPES.values():
        raise ValueError(f"a weight must be a matrix of floats, not {weight.dtype} {list(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != torch.float32):
        raise ValueError(f"the bias of {weight.shape[0]} rows must be float32 of that length, not {list(bias.shape)}")
    to, dtype = device(), TYPES[kind]
    bias = None if bias is None else bias.to(to, dtype, copy=True)
    if kind != "fp8":
        return PackedWeight(kind, weight.to(to, dtype, copy=True).contiguous(), None, bias)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=to)
    scale = torch.empty(len(weight), device=to)
    at_once = max(PACKED_AT_ONCE // max(weight.shape[1], 1), 1)
    for part, its_codes, its_scale in zip(
        weight.split(at_once), codes.split(at_once), scale.split(at_once), strict=True
    ):
        numbers = part.to(to, torch.float32)
        torch.div(numbers.abs().amax(1).clamp_min(SMALLEST), FP8_MAX, out=its_scale)
        its_codes.copy_(numbers / its_scale[:, None])
    return PackedWeight(kind, codes, scale, bias)


def linear(x: Tensor, w: PackedWeight, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """x [T, K] -> [T, N] of x's type, or into `out` if given, which may be f32; with `accumulate`, added to `out`."""
    if x.dim() != 2 or x.shape[1] != w.cols or x.dtype != TYPES[w.kind]:
        raise ValueError(f"x must be {TYPES[w.kind]} [T, {w.cols}], not {x.dtype} {list(x.shape)}")
    if out is None:
        if accumulate:
            raise ValueError("accumulate needs an out to add to")
        if len(x) and not _is_batch_invariant and _multiplies_fp8(w):
            return _fp8_product(x, w)
        out = x.new_empty(len(x), w.rows)
    if out.shape != (len(x), w.rows) or out.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"out must be {x.dtype} {[len(x), w.rows]} or float32, not {out.dtype} {list(out.shape)}")
    if not len(x):
        return out
    if _is_batch_invariant:
        return matmul.product(x, w.values, w.scale, w.bias, out, accumulate)
    if w.scale is None and out.dtype == x.dtype:
        if accumulate:
            torch.addmm(out, x, w.values.T, out=out)
            return out if w.bias is None else out.add_(w.bias)
        if w.bias is None:
            return torch.mm(x, w.values.T, out=out)
        return torch.addmm(w.bias, x, w.values.T, out=out)
    y = _fp8_product(x, w) if _multiplies_fp8(w) else _wide_product(x, w)
    return out.add_(y) if accumulate else out.copy_(y)


def embed(tokens: Tensor, w: PackedWeight) -> Tensor:
    """tokens [T] int32 -> their rows [T, K] in the activations' type; the bias has no part in it.

    Tokens in the host's memory are checked. Those on the device are not: that would be to wait for them.
    """
    if tokens.device.type == "cpu":
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < w.rows:
            raise IndexError(f"a token is not among the {w.rows} rows of the embedding")
        tokens = upload(tokens)
    if w.scale is None:
        return w.values.index_select(0, tokens)
    codes = w.values.view(torch.uint8).index_select(0, tokens).view(torch.float8_e4m3fn)
    return (codes.float() * w.scale.index_select(0, tokens)[:, None]).bfloat16()


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] f32 or bf16 -> codes [T, K] e4m3 and scale [T] f32. Needs a GPU that has e4m3."""
    rows, width = x.shape
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(rows, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    _quantized_rows[(rows,)](
        x, codes, scale, width, FP8_MAX=FP8_MAX, SMALLEST=SMALLEST, BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return codes, scale


def _multiplies_fp8(w: PackedWeight) -> bool:
    """The library wants sizes that are whole vectors."""
    return w.scale is not None and architecture() >= 89 and w.rows % 16 == 0 and w.cols % 16 == 0


def _fp8_product(x: Tensor, w: PackedWeight) -> Tensor:
    """[T, N] bf16"""
    assert w.scale is not None
    codes, scale = quantized_rows(x)
    scales, dtype = (scale[:, None], w.scale[None, :]), torch.bfloat16
    return torch._scaled_mm(codes, w.values.T, *scales, bias=w.bias, out_dtype=dtype, use_fast_accum=True)


def _wide_product(x: Tensor, w: PackedWeight) -> Tensor:
    """[T, N] f32: of bf16 or f16 that is multiplied without rounding the sums, of codes that are widened first."""
    values = w.values.to(x.dtype)
    y = x.float() @ values.float().T if x.device.type == "cpu" else torch.mm(x, values.T, out_dtype=torch.float32)
    if w.scale is not None:
        y *= w.scale
    return y if w.bias is None else y.add_(w.bias)


@triton.jit
def _quantized_rows(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    width: tl.tensor,
    FP8_MAX: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    numbers = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(numbers), axis=0), SMALLEST) / FP8_MAX
    tl.store(scales + row, scale)
    tl.store(codes + row * width + column, (numbers / scale).to(codes.dtype.element_ty), mask=inside)
