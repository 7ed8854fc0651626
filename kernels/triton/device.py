"""Where Triton's kernels run: on the GPU, or, to check them where there is none, in Triton's interpreter."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton import knobs


@cache
def device() -> torch.device:
    """The current GPU; the CPU where TRITON_INTERPRET=1 was set before this was imported. RuntimeError without both."""
    if knobs.runtime.interpret:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("the triton backend needs a GPU, or TRITON_INTERPRET=1 to check its kernels without one")
    return torch.device("cuda", torch.cuda.current_device())


def upload(host: Tensor) -> Tensor:
    """A copy on the device that is under way when this returns; the host's tensor may be changed at once."""
    if device().type == "cpu":
        return host.clone()
    return host.pin_memory().to(device(), non_blocking=True)
