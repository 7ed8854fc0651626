"""Where Triton's kernels run: on the GPU, or, to check them where there is none, in Triton's interpreter. And which
page formats they read."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from winnow.kernels.formats import PageFormat


@cache
def device() -> torch.device:
    """The current GPU; the CPU where TRITON_INTERPRET=1 was set before this was imported. RuntimeError without both."""
    if knobs.runtime.interpret:
        return torch.device("cpu")
    try:
        return driver.active.get_active_torch_device()
    except RuntimeError as error:
        hint = "the triton backend needs a GPU, or TRITON_INTERPRET=1 to check its kernels without one"
        raise RuntimeError(hint) from error


def page_formats() -> tuple[PageFormat, ...]:
    """Page formats that kernels read as they lie; none is opened here."""
    return tuple(fmt for fmt in PageFormat if not fmt.is_opened)


@cache
def architecture() -> int:
    """The GPU's compute capability times ten: 80 is an A100, 90 a Hopper, 100 a B200. In the interpreter 90."""
    return 90 if knobs.runtime.interpret else int(driver.active.get_current_target().arch)


def upload(host: Tensor) -> Tensor:
    """A copy on the device that is under way when this returns; the host's tensor may be changed at once."""
    if device().type == "cpu":
        return host.clone()
    return host.pin_memory().to(device(), non_blocking=True)
