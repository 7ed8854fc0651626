"""Normalisation and activation.

    rms_norm    y = x / √(mean(x²) + ε) · weight        mean over the last dimension
    silu_mul    y = g / (1 + e^-g) · u                  g, u: first and second half

Computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., N] f32, weight [N] f32 -> like x."""
    if x.shape[-1:] != weight.shape:
        raise ValueError(f"weight must be [{x.shape[-1]}], not {list(weight.shape)}")
    wide = x.double()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.double()).float()


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2I] f32 -> [T, I] f32."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up must be of one size, not halves of {gate_up.shape[-1]}")
    gate, up = gate_up.double().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).float()
