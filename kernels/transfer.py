"""From host memory to a device's, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(host: Tensor, device: torch.device) -> Tensor:
    """`host` in the memory of `device`: a copy that is under way when this returns, of what `host` holds now. Where
    that is the host's own memory, it is the tensor itself."""
    pinned = host.pin_memory() if device.type == "cuda" else host  # only pinned memory is copied meanwhile
    return pinned.to(device, non_blocking=True)
