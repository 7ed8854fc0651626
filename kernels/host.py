"""Backends of this machine's own processors: where their tensors are, and in which page formats; the way to a GPU."""

from __future__ import annotations

from collections.abc import Callable

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


def to_host(there: Tensor) -> Callable[[], Tensor]:
    """`there`, or a copy of a GPU's that is under way when this returns. What is returned waits for the copy, and for
    nothing that the GPU is told later."""
    if there.device.type == "cpu":
        return lambda: there
    host = torch.empty(there.shape, dtype=there.dtype, pin_memory=there.is_cuda)
    host.copy_(there, non_blocking=True)
    if not there.is_cuda:
        return lambda: host
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait
