"""Where backends of this machine's own processors keep what they compute on."""

from __future__ import annotations

import torch


def device() -> torch.device:
    return torch.device("cpu")
