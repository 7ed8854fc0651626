"""SpecPC: a draft model's attention chooses the prompt's tokens (Galim et al., 2025, arXiv:2506.08373).

    paid(token)  = max over layers from `first_layer` on, over heads and over the last `window` queries i = 0, 1, ...
                   of i / (window - 1) * softmax(q_i.k)[token]
    score(token) = max of paid over the `pool` tokens around it

The draft model is the engine's own model where no other is configured: it then reads the whole prompt once more than
it has to, and what is saved is the memory of the dropped tokens and the time that decoding spends on them.

Where we depart: pooling stays within a marked part, since what is unmarked is kept in any case and its weight should
not pull in its neighbours. The reference also adds the neighbours of each token it chose, at the cost of others;
pooling by maximum has raised them already.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from pydantic import Field

from winnow.engine.compression.prompt.policy import Floats, PromptParams, PromptSignal, PromptView, Unit


class SpecPC:
    """Keep the tokens that the last queries of the draft model, or without one of the model itself, attend to."""

    signal = PromptSignal.ATTENTION

    class Params(PromptParams):
        window: int = Field(64, ge=1, le=1024, description="queries at the end of the prompt that vote")
        pool: int = Field(64, ge=1, le=1024, description="tokens over which the maximum is taken")
        first_layer: int | None = Field(
            None, ge=0, le=1023, description="lowest layer that votes; 8, or half of the layers of a shallow model"
        )

    def unit(self, params: Params) -> Unit:
        return "token"

    def score(self, view: PromptView, params: Params) -> Floats:
        assert view.attention is not None
        # Where a part begins, among the context's tokens: token i ends after the part's first character.
        starts = np.searchsorted(view.context.ends, view.context.part_starts, side="right")
        parts = np.split(view.attention, starts[1:])
        return view.units.means(np.concatenate([_pooled(part, params.pool) for part in parts]))


def voting_layers(first_layer: int | None, layers: int) -> range:
    """The layers that vote in a model of so many; empty if there are none."""
    return range(min(8, layers // 2) if first_layer is None else first_layer, layers)


def _pooled(paid: Floats, pool: int) -> Floats:
    """The maximum over `pool` neighbours: (pool - 1) // 2 before each token, the others after it."""
    before = (pool - 1) // 2
    padded = np.pad(paid, (before, pool - 1 - before))
    pooled: Floats = sliding_window_view(padded, pool).max(axis=-1) if len(paid) else paid
    return pooled
