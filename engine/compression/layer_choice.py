"""Between two stages of a prompt (engine/staging.py): which rows of its images the layers above are to read.

    a(row) = mean over heads of softmax(q.k / sqrt(d)) of each rater, over all rows up to its own

in the stage's last layer.
Computed from the raters' queries alone, in float64, once the whole prompt has been read by the layer: neither the
chunks nor what follows a rater has a part in it, so that a later turn about an image leaves the same of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from winnow.engine.compression.vision.plan import Vision
from winnow.engine.compression.vision.policy import LayerView
from winnow.engine.errors import PlanNotSupported
from winnow.engine.pages import Ints
from winnow.engine.picture_rows import Sight
from winnow.engine.staging import ImageRows, Stages, Staging
from winnow.kernels.host import to_device

SCORES = 1 << 22
"""Attention scores that are in memory at a time: raters are as many as the text behind an image is long"""


@torch.inference_mode()  # what is handed on was made in it
def rows_left(vision: Vision, staging: Staging, keys: Tensor | None) -> Ints:
    """Indices of the stage's rows that stay, ascending; what stands for several rows from now on is put in its place.

    keys [kv_heads, rows, head_dim] float32, of the stage's last layer; None where no rater is asked
    """
    stays, hidden = np.ones(len(staging.rows), bool), staging.hidden
    assert hidden is not None
    choice = staging.stages.choices[staging.stage]
    for image in staging.stages.images:
        at = np.flatnonzero(np.isin(staging.rows, image.rows))
        if not len(at):  # an earlier choice has left nothing of it
            continue
        known = np.searchsorted(image.rows, staging.rows[at])
        places = _there(at, hidden)
        view = LayerView(
            choice=choice,
            tokens=_there(image.tokens[known], hidden),
            patches=image.patches,
            keep=image.keep,
            attention=hidden.new_zeros((0, len(at))) if keys is None else _attention(staging, image, keys, places),
            hidden=hidden[places].float(),
            is_key=_there(image.is_key[known], hidden),
        )
        chosen = vision.choose(view)
        stays[at] = False
        stays[at[chosen.rows.cpu().numpy()]] = True
        if chosen.hidden is not None:
            hidden[places[chosen.rows]] = chosen.hidden.to(hidden.dtype)
    return np.flatnonzero(stays).astype(np.int32)


def image_rows(
    vision: Vision, sight: Sight, prompt: Sequence[int], embed: Callable[[list[int]], Tensor]
) -> list[ImageRows]:
    """Of the pictures that lose anything. PlanNotSupported where no text follows one in its turn.

    Args
        prompt: tokens of what is read
        embed: tokens of text -> [t, hidden] float32, in host memory
    """
    images = []
    for shown in sight.shown:
        is_patch, keep = np.isin(shown.tokens, shown.patches), vision.tokens(len(shown.patches))
        if keep >= len(shown.patches):
            continue
        rows = sight.rows[shown.rows]
        behind = np.setdiff1d(np.arange(rows[-1] + 1, shown.turn_end), sight.rows)
        if not len(behind):
            path = "compression.vision.policy"
            why = f"'{vision.policy}' leaves what text behind an image needs, and there is none in an image's turn"
            raise PlanNotSupported(path, f"{path}: {why}")
        raters = behind[:0]
        if vision.asks_raters:
            text = embed([prompt[row] for row in behind])
            raters = behind[vision.raters(sight.embeddings[shown.rows][torch.from_numpy(is_patch)], text).numpy()]
        images.append(
            ImageRows(
                rows=rows[is_patch],
                tokens=np.searchsorted(shown.patches, shown.tokens[is_patch]).astype(np.int32),
                is_key=shown.is_key[is_patch],
                patches=len(shown.patches),
                keep=keep,
                raters=raters,
            )
        )
    return images


def stages_of(vision: Vision, depth: int, images: Sequence[ImageRows]) -> Stages | None:
    """The stages of a prompt with these images in a model of `depth` layers; None where none of them loses anything.
    PlanNotSupported if the model is not that deep."""
    choices = vision.choices(depth)
    if not images:
        return None
    raters = np.unique(np.concatenate([image.raters for image in images])).astype(np.int32)
    return Stages((0, *choices, depth), tuple(choices.values()), tuple(images), raters)


def truncated(staging: Staging, kept: Ints) -> tuple[Tensor, Ints]:
    """At the prompt's end: keep sets [layers, kv_heads, n] int64, padded with -1, and counts of lanes that from the
    first layer which chose on hold only what the last choice has left; those of the layers below hold all.

    kept [layers, kv_heads] int32: what they hold now
    """
    keep = np.full((*kept.shape, int(kept.max())), -1, np.int64)
    count, bounds = kept.copy(), staging.stages.bounds
    first = bounds[1] - 1
    keep[:first] = np.arange(keep.shape[-1])
    for rows, start, stop in zip((*staging.read, staging.rows), bounds, bounds[1:], strict=False):
        layers = slice(max(first, start), stop)
        keep[layers, :, : len(staging.rows)] = np.searchsorted(rows, staging.rows)
        count[layers] = len(staging.rows)
    return torch.from_numpy(keep), count


def _attention(staging: Staging, image: ImageRows, keys: Tensor, places: Tensor) -> Tensor:
    """[raters, n] float32: what the image's raters give to the rows at `places` [n] among the stage's."""
    assert staging.queries is not None
    its = np.searchsorted(staging.stages.raters, image.raters)
    own = _there(staging.rater_places[its], keys)
    queries = staging.queries[_there(its, keys)].double().unflatten(1, (len(keys), -1))
    last = int(staging.rater_places[its[-1]])
    rows = torch.arange(last + 1, device=keys.device)
    total = queries.new_zeros((len(own), len(places)))
    at_once = max(1, SCORES // (queries.shape[2] * len(rows)))
    for head, lane in enumerate(keys[:, : last + 1].double()):
        for heard, asked, at in zip(
            total.split(at_once), queries[:, head].split(at_once), own.split(at_once), strict=True
        ):
            scores = torch.einsum("rgd,nd->grn", asked, lane) * keys.shape[-1] ** -0.5
            heard += scores.masked_fill_(rows > at[:, None], -torch.inf).softmax(-1)[..., places].sum(0)
    return (total / (len(keys) * queries.shape[2])).float()


def _there(index: np.ndarray, like: Tensor) -> Tensor:
    kind = torch.bool if index.dtype == np.bool_ else torch.int64
    return to_device(torch.from_numpy(np.ascontiguousarray(index)).to(kind), like.device)
