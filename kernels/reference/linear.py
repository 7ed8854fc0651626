"""Matrix products with packed weights.

    f32     y = x Wᵀ + b
    int8    for each group g of 64 columns:  scale[n, g] = max_{k in g} |W[n, k]| / 127
            code[n, k] = round(W[n, k] / scale[n, g]), half to even;  y = x (code · scale)ᵀ + b

A group of zeros has scale 0 and codes 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.kernels.dispatch import WeightKind

ROWS = 16
"""Rows go through the product this many at a time, padded, so that the shape of a product, and with it the order of
its sums, never depends on how many rows a step has."""


GROUP = 64
"""Columns that share a scale."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix as this backend keeps it."""

    kind: WeightKind
    values: Tensor
    """[N, K]: f32, or int8 codes"""
    scale: Tensor | None
    """[N, groups] f32, for int8"""
    bias: Tensor | None
    """[N] f32"""

    @property
    def rows(self) -> int:
        return self.values.shape[0]

    @property
    def cols(self) -> int:
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scale, self.bias) if part is not None)


def pack(weight: Tensor, kind: WeightKind, bias: Tensor | None = None) -> PackedWeight:
    """Packs `weight` [N, K] f32 and `bias` [N] f32. The result shares no memory with them."""
    if weight.dim() != 2 or weight.dtype != torch.float32:
        raise ValueError(f"a weight must be a float32 matrix, not {weight.dtype} {list(weight.shape)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != torch.float32):
        raise ValueError(f"the bias of {weight.shape[0]} rows must be float32 of that length, not {list(bias.shape)}")
    bias = None if bias is None else bias.clone()
    if kind == "f32":
        return PackedWeight(kind, weight.clone(memory_format=torch.contiguous_format), None, bias)
    if kind != "int8":
        raise ValueError(f"unknown kind of weight {kind!r}")
    groups = -(-weight.shape[1] // GROUP)
    padded = torch.nn.functional.pad(weight, (0, groups * GROUP - weight.shape[1]))
    scale = padded.view(-1, groups, GROUP).abs().amax(dim=2) / 127
    wide = _over_columns(scale, weight.shape[1])
    codes = torch.where(wide > 0, weight / wide, 0).round().clamp(-127, 127).to(torch.int8)
    return PackedWeight(kind, codes, scale, bias)


def linear(x: Tensor, w: PackedWeight, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """x [T, K] f32 -> [T, N] f32, into `out` if given; with `accumulate`, added to `out`."""
    if x.dim() != 2 or x.shape[1] != w.cols or x.dtype != torch.float32:
        raise ValueError(f"x must be float32 [T, {w.cols}], not {x.dtype} {list(x.shape)}")
    if out is not None and (out.shape != (x.shape[0], w.rows) or out.dtype != torch.float32):
        raise ValueError(f"out must be float32 {[x.shape[0], w.rows]}, not {out.dtype} {list(out.shape)}")
    if out is None:
        if accumulate:
            raise ValueError("accumulate needs an out to add to")
        out = x.new_empty(x.shape[0], w.rows)
    matrix = _dequantized(w, slice(None)).T
    for first in range(0, x.shape[0], ROWS):
        rows = min(ROWS, x.shape[0] - first)
        block = x.new_zeros(ROWS, w.cols)
        block[:rows] = x[first : first + rows]
        y = (block @ matrix)[:rows]
        if w.bias is not None:
            y += w.bias
        out[first : first + rows] = out[first : first + rows] + y if accumulate else y
    return out


def embed(tokens: Tensor, w: PackedWeight) -> Tensor:
    """tokens [T] int32 -> their rows [T, K] f32; the bias has no part in it."""
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < w.rows:
        raise IndexError(f"a token is not among the {w.rows} rows of the embedding")
    return _dequantized(w, tokens.long())


def _dequantized(w: PackedWeight, rows: Tensor | slice) -> Tensor:
    values = w.values[rows]
    return values if w.scale is None else values.float() * _over_columns(w.scale[rows], w.cols)


def _over_columns(scale: Tensor, cols: int) -> Tensor:
    """[N, groups] -> [N, cols]."""
    return scale.repeat_interleave(GROUP, dim=1)[:, :cols]
