"""Which tokens behind an image say what matters of it: what `LayerPolicy.raters` of several policies answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def last(text: Tensor) -> Tensor:
    """[t] bool: the last token of the image's turn, which has seen all of it."""
    import torch

    chosen = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    chosen[-1] = True
    return chosen


def every(text: Tensor) -> Tensor:
    """[t] bool: all of them."""
    import torch

    return torch.ones(len(text), dtype=torch.bool, device=text.device)


def relevant(image: Tensor, text: Tensor) -> Tensor:
    """[t] bool: those that the image's tokens are more like than the mean (SparseVLM, section 3.2).

    r(t) = mean over the image's tokens v of softmax over t of v.t;  r(t) > mean r. All, where all are alike.
    """
    ratings = (image.double() @ text.double().T).softmax(1).mean(0)
    chosen = ratings > ratings.mean()
    return chosen if bool(chosen.any()) else every(text)
