"""What a sequence reads of its pictures: a prompt without the placeholders that were dropped, and what stands at those
that stayed.

    whole prompt   [ text | image image image image | text ]      a placeholder for each token of the picture
    what is read   [ text | image image | text ]                  rows 0, 1, 2, ...

Lanes, events, windows and the prefix cache's blocks go by rows. Where RoPE has a row is its angle: its place in the
whole prompt, or with contiguous positions its number. Models with M-RoPE have three for each row, one for each axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.engine.compression.vision.policy import View
from winnow.engine.pages import Ints

Indices = NDArray[np.int64]

MARK_WORDS = 8
"""int32 words by which the prefix cache knows a row beside its token: the digest of its view (4), which token of the
picture it is, from 1 on, and how far its angles are ahead of it (3)"""


@dataclass(frozen=True)
class Look:
    """A picture, and what is left of it."""

    digest: bytes
    """16 bytes, equal where picture, policy and the text that it goes by are"""
    places: Indices
    """[N] its placeholders in the whole prompt"""
    view: View
    turn_end: int
    """`Picture.turn_end`"""
    patches: Tensor | None = None
    """`Left.patches`"""

    @property
    def is_pruned(self) -> bool:
        return len(self.view.tokens) < len(self.places)


@dataclass(frozen=True)
class Shown:
    """One picture in the prompt that is read."""

    rows: slice
    """Of `Sight.rows`"""
    tokens: Indices
    """[n] ascending: which of the picture's tokens these are"""
    total: int
    """How many it has"""
    turn_end: int
    """Row behind the last one of the turn that it came in"""
    patches: Indices
    """[P] which of the picture's tokens stand for patches"""
    is_key: NDArray[np.bool_]
    """[n] `View.is_key`"""


@dataclass(frozen=True, eq=False)
class Sight:
    """The choices of a request share it, and it stays when they are preempted."""

    rows: Ints
    """[m] ascending: rows of the prompt that are pictures'"""
    embeddings: Tensor
    """[m, hidden] float32, in host memory: what stands there"""
    shown: tuple[Shown, ...]
    axes: Ints | None
    """[1 or 3, prompt] the angles of the prompt's rows; None where any row's, later ones' too, is its number"""
    ahead: int
    """What is to be added to the numbers of later rows"""
    marks: Ints
    """[prompt, MARK_WORDS]: zeros for text at its place"""

    @property
    def tokens(self) -> int:
        """Of all pictures, before any were dropped."""
        return sum(shown.total for shown in self.shown)

    @property
    def has_axes(self) -> bool:
        """The prompt's rows have angles on three axes."""
        return self.axes is not None and len(self.axes) == 3

    def pictured(self, rows: Ints) -> tuple[Indices, Indices]:
        """Which of these ascending rows are pictures', and which of `embeddings` stand there."""
        at = np.searchsorted(self.rows, rows)
        is_picture = self.rows[np.minimum(at, len(self.rows) - 1)] == rows
        return np.flatnonzero(is_picture), at[is_picture]

    def angles(self, rows: Ints) -> Ints:
        """[1 or 3, n] of these rows, of the prompt or behind it, where they have any."""
        assert self.axes is not None
        angles = np.repeat(rows[None] + np.int32(self.ahead), len(self.axes), 0)
        is_prompt = rows < self.axes.shape[1]
        angles[:, is_prompt] = self.axes[:, rows[is_prompt]]
        return angles

    def marks_of(self, count: int) -> Ints:
        """[count, MARK_WORDS] of the first rows of a text, which may be longer than the prompt."""
        behind = np.zeros((max(0, count - len(self.marks)), MARK_WORDS), np.int32)
        behind[:, 5:] = self.ahead
        return np.concatenate((self.marks[:count], behind))


def sight_of(prompt: Ints, looks: Sequence[Look], positions: Ints | None, is_contiguous: bool) -> tuple[Ints, Sight]:
    """The prompt that is read, and what it shows.

    Args
        looks: of all its pictures, in order
        positions: [3, n] of the whole prompt's tokens (M-RoPE); None where they are their numbers
        is_contiguous: no gaps are left; of three axes, each loses those that pruning has made in a picture
    """
    stays = np.ones(len(prompt), bool)
    for look in looks:
        stays[look.places] = False
        stays[look.places[look.view.tokens.numpy()]] = True
    row_of = np.cumsum(stays) - 1
    places = np.flatnonzero(stays)
    rows = [row_of[look.places[look.view.tokens.numpy()]].astype(np.int32) for look in looks]
    bounds = np.cumsum([0, *map(len, rows)]).tolist()
    shown = tuple(
        Shown(
            rows=slice(first, last),
            tokens=look.view.tokens.numpy(),
            total=len(look.places),
            turn_end=int(stays[: look.turn_end].sum()),
            patches=(look.view.tokens if look.patches is None else look.patches).numpy(),
            is_key=np.zeros(len(look.view.tokens), bool) if look.view.is_key is None else look.view.is_key.numpy(),
        )
        for look, first, last in zip(looks, bounds[:-1], bounds[1:], strict=True)
    )
    numbers = np.arange(len(places), dtype=np.int32)
    if positions is None:
        axes = (numbers if is_contiguous else places.astype(np.int32))[None]
        end = int(axes.max()) + 1 + (0 if is_contiguous else len(prompt) - 1 - int(places[-1]))
    elif is_contiguous:
        spans = [(int(own[0]), int(own[-1]) + 1, look.is_pruned) for look, own in zip(looks, rows, strict=True)]
        axes = _closed_up(positions[:, places], spans)
        end = int(axes.max()) + 1
    else:
        axes, end = positions[:, places], int(positions.max()) + 1
    ahead = end - len(places)
    sight = Sight(
        rows=np.concatenate(rows),
        embeddings=torch.cat([look.view.embeddings for look in looks]),
        shown=shown,
        axes=axes if ahead or (axes != numbers).any() else None,
        ahead=ahead,
        marks=_marks(looks, rows, axes - numbers),
    )
    return prompt[places], sight


def _closed_up(axes: Ints, spans: Sequence[tuple[int, int, bool]]) -> Ints:
    """Angles [3, n] of what is left, counted anew: text goes on behind the highest angle before it, and along each axis
    those that a pruned picture has left follow one another. spans: first row, row behind the last, whether pruned."""
    closed, row, angle = np.empty_like(axes), 0, 0
    for first, last, is_pruned in [*spans, (axes.shape[1], axes.shape[1], False)]:
        closed[:, row:first] = angle + np.arange(first - row, dtype=np.int32)
        row, angle = last, angle + first - row
        if first < last:
            part = axes[:, first:last] - axes[:, first:last].min()
            if is_pruned:
                part = np.stack([np.unique(axis, return_inverse=True)[1] for axis in part])
            closed[:, first:last] = angle + part
            begins, ends = axes[:, first:last].min(), axes[:, last : last + 1]
            angle += int(part.max()) + 1 if is_pruned or not ends.size else int(ends.min() - begins)
    return closed


def _marks(looks: Sequence[Look], rows: Sequence[Ints], ahead: Ints) -> Ints:
    """ahead: [1 or 3, prompt]"""
    marks = np.zeros((ahead.shape[1], MARK_WORDS), np.int32)
    for look, own in zip(looks, rows, strict=True):
        marks[own, :4] = np.frombuffer(look.digest, np.int32)
        marks[own, 4] = look.view.tokens.numpy() + 1
    marks[:, 5:] = ahead.T
    return marks
