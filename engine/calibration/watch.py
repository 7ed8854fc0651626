"""Watching a model: what its attention is given, layer by layer, while it reads prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from winnow.engine.models.decoder import Decoder
from winnow.kernels.dispatch import Backend
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageLayout


@dataclass(frozen=True)
class Glimpse:
    """What one layer's attention is given for a whole prompt, after RoPE; its tokens are at positions 0, 1, ..."""

    layer: int
    queries: Tensor
    """[q_heads, tokens, head_dim] float32"""
    keys: Tensor
    """[kv_heads, tokens, head_dim] float32"""
    values: Tensor
    """[kv_heads, tokens, head_dim] float32"""
    scale: float
    """What q.k is multiplied by"""
    window: int
    """Tokens that a query sees, itself included; 0: all"""


class _Watching:
    """A backend that does what another one does, and shows its attention's input."""

    def __init__(self, ops: Backend, see: Callable[[Glimpse], None]):
        self._ops = ops
        self._see = see

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attention(self, q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> Tensor:
        keys, values = self._ops.read_lanes(kv, int(batch.slots[0]), layer)
        self._see(Glimpse(layer, q.transpose(0, 1), keys, values, scale, window))
        return self._ops.attention(q, batch, kv, layer, scale, window)


@torch.inference_mode()
def watch(decoder: Decoder, prompt: Sequence[int], see: Callable[[Glimpse], None]) -> None:
    """Passes one prompt through the model in one step and shows every layer's attention to `see`."""
    config, length = decoder.config, len(prompt)
    layout = PageLayout(config.head_dim)
    lanes, width = (1, config.layers, config.kv_heads), layout.pages(length)
    pages = config.layers * config.kv_heads * width
    kv = PagedKV.allocate(layout, pages, *lanes, width)
    kv.table.copy_(torch.arange(pages, dtype=torch.int32).view(*lanes, width))
    kv.kept[:] = length
    batch = LaneBatch(
        slots=torch.zeros(1, dtype=torch.int32),
        cu_rows=torch.tensor([0, length], dtype=torch.int32),
        positions=torch.arange(length, dtype=torch.int32),
        first_vote=torch.tensor([length], dtype=torch.int32),
    )
    watching = decoder.with_ops(lambda ops: cast(Backend, _Watching(ops, see)))
    watching.forward(torch.tensor(prompt, dtype=torch.int32), batch, kv, torch.tensor([length - 1]))


def unrotated(rotated: Tensor, inv_freq: Sequence[float]) -> Tensor:
    """Vectors [heads, tokens, head_dim] of the tokens 0, 1, ... turned back by RoPE's angles; float64.

    What RoPE multiplies cos and sin by (yarn) stays in.
    """
    angles = torch.arange(rotated.shape[1]).double()[:, None] * torch.tensor(inv_freq, dtype=torch.float64)
    real, imaginary = rotated.double().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([real * cos + imaginary * sin, imaginary * cos - real * sin], dim=-1)
