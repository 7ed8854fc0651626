"""Backends of this machine's own processors: where their tensors are, and in which page formats; the way to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.kernels.formats import PageFormat


def device() -> torch.device:
    return torch.device("cpu")


def page_formats() -> tuple[PageFormat, ...]:
    """All there are."""
    return tuple(PageFormat)


def to_device(host: Tensor, to: torch.device) -> Tensor:
    """`host`, or a copy on a GPU that is under way when this returns; the host's tensor may be changed at once then."""
    pinned = host.pin_memory() if to.type == "cuda" else host  # only pinned memory is copied meanwhile
    return pinned.to(to, non_blocking=True)
