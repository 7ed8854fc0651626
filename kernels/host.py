"""Where backends of this machine's own processors keep what they compute on, and the way from there to a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def device() -> torch.device:
    return torch.device("cpu")


def to_device(host: Tensor, to: torch.device) -> Tensor:
    """`host`, or a copy on a GPU that is under way when this returns; the host's tensor may be changed at once then."""
    pinned = host.pin_memory() if to.type == "cuda" else host  # only pinned memory is copied meanwhile
    return pinned.to(to, non_blocking=True)
