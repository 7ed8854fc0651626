"""Prefill in stages: upper layers read only the tokens of the prompt that were chosen below them.

    stage 0   layers [0, b1)        over the whole prompt, chunk by chunk; what they hand on is kept beside the pages
    stage 1   layers [b1, b2)       over the chosen rows, at their own positions
    ...
    last      layers [bn, depth)    over what the last choice has left

Lanes of a layer never hold what was not chosen below it. A stage begins when the one before it is over, whatever the
chunks, so that a choice is made over the whole prompt. What is handed on is one hidden state a token, in memory of its
own, until the prompt is read.

Two kinds of policies choose: one of `kv.evict` (prompt_distill), among all rows, or one of `vision`, among rows that
stand for patches of images. The latter are shown what some rows of text attend to in the stage's last layer: the
queries of these, its raters, are noted as the chunks pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.engine.pages import Ints
from winnow.kernels.host import to_device


@dataclass(frozen=True, eq=False)
class ImageRows:
    """Rows of a prompt that stand for patches of an image, which may be dropped between layers."""

    rows: Ints
    """[n] their places in the prompt, ascending"""
    tokens: Ints
    """[n] which of the image's patch tokens they are"""
    is_key: NDArray[np.bool_]
    """[n] `View.is_key`"""
    patches: int
    """Patch tokens that the image had before anything was pruned"""
    keep: int
    """How many of these the plan leaves"""
    raters: NDArray[np.integer[Any]]
    """[r] rows of text whose attention says what matters, ascending, behind the image"""


@dataclass(frozen=True, eq=False)
class Stages:
    """In which stages a prompt is read."""

    bounds: tuple[int, ...]
    """First layer of each stage, and the number of layers"""
    choices: tuple[int, ...] = ()
    """Which choice of the vision policy comes between two stages; () where a policy of `kv.evict` chooses"""
    images: tuple[ImageRows, ...] = ()
    raters: Ints = field(default_factory=lambda: np.zeros(0, np.int32))
    """[r] the raters of all images, each once, ascending; none where no policy asks what they attend to"""


@dataclass(eq=False)
class Staging:
    """How far a sequence has got with its prompt."""

    stages: Stages
    rows: Ints
    """[rows] places in the prompt that this stage reads, ascending"""
    stage: int = 0
    done: int = 0
    """Rows that it has read"""
    hidden: Tensor | None = None
    """[rows, hidden size] float32: what it reads, and where it has read them what it hands on; None, before anything is
    handed on, if it reads the prompt's own tokens"""
    queries: Tensor | None = None
    """[raters, heads, head_dim]: those of the stage's last layer, after RoPE"""
    read: list[Ints] = field(default_factory=list)
    """The rows of the stages before this one"""

    @classmethod
    def begin(cls, stages: Stages, prompt_tokens: int) -> Staging:
        return cls(stages, np.arange(prompt_tokens, dtype=np.int32))

    @property
    def layers(self) -> range:
        return range(self.stages.bounds[self.stage], self.stages.bounds[self.stage + 1])

    @property
    def left(self) -> int:
        return len(self.rows) - self.done

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.stages.bounds) - 2

    @property
    def rater_places(self) -> Ints:
        """[raters] where they are among the stage's rows."""
        return np.searchsorted(self.rows, self.stages.raters).astype(np.int32)

    def hand_on(self, hidden: Tensor) -> None:
        """Keeps what the stage's layers made [count, hidden size] of its next rows, in place of what they read."""
        if self.hidden is None:
            self.hidden = hidden.new_empty((len(self.rows), hidden.shape[-1]))
        self.hidden[self.done : self.done + len(hidden)] = hidden

    def hear(self, queries: Tensor) -> None:
        """Keeps the raters' among the queries [count, heads, head_dim] of its next rows."""
        places = self.rater_places
        first, last = np.searchsorted(places, (self.done, self.done + len(queries)))
        if first == last:
            return
        if self.queries is None:
            self.queries = queries.new_empty((len(places), *queries.shape[1:]))
        heard = to_device(torch.from_numpy(places[first:last] - self.done).long(), queries.device)
        self.queries[first:last] = queries[heard]

    def next(self, chosen: Ints) -> None:
        """Begins the next stage with these of the rows (ascending indices)."""
        assert self.hidden is not None
        self.hidden = self.hidden[to_device(torch.from_numpy(chosen).long(), self.hidden.device)]
        self.read.append(self.rows)
        self.rows, self.queries = self.rows[chosen], None
        self.stage += 1
        self.done = 0

    def growth(self, count: int, upto: int) -> Ints:
        """[layers] tokens that lanes gain when the stage reads `count` more rows; later stages gain `upto`."""
        gains = np.zeros(self.stages.bounds[-1], np.int32)
        gains[self.layers.start : self.layers.stop] = count
        gains[self.layers.stop :] = upto
        return gains
