"""How vision policies pick tokens: ties go to the one that stands first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def top(scores: Tensor, count: int) -> Tensor:
    """[count] int64, ascending: the indices of the largest of scores [n]."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def evenly(total: int, count: int) -> Tensor:
    """[count] int64, ascending: floor((i + 1/2) * total / count)."""
    import torch

    return (2 * torch.arange(count) + 1) * total // (2 * count)
