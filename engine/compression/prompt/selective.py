"""Selective context: drop what the model could have guessed (Li et al., 2023, arXiv:2310.06201).

    score(unit) = mean over its tokens of -log p(token | everything before it)

p is that of the server's draft model, or of the serving model where it has none. The reference asks GPT-2 about each
sentence alone, keeps the units above a percentile of their scores, and takes its phrases from a parser; here one pass
reads the prompt as it stands, the budget is in tokens, and a phrase reaches up to a punctuation mark.

A token that nothing precedes has no probability: it does not count, and a unit of nothing else stays.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from winnow.engine.compression.prompt.policy import Floats, PromptParams, PromptSignal, PromptView, Unit


class Selective:
    """Drop what the draft model, or without one the model itself, could have guessed (self-information)."""

    signal = PromptSignal.SURPRISAL

    class Params(PromptParams):
        unit: Literal["token", "phrase", "sentence"] = Field("phrase", description="what stays or goes as a whole")

    def unit(self, params: Params) -> Unit:
        return params.unit

    def score(self, view: PromptView, params: Params) -> Floats:
        assert view.surprisal is not None
        units, is_known = view.units, ~np.isnan(view.surprisal)
        sums = np.bincount(units.of, np.where(is_known, view.surprisal, 0.0), len(units.starts))
        known = np.bincount(units.of, is_known, len(units.starts))
        return np.where(known > 0, sums / np.maximum(known, 1), np.inf)
