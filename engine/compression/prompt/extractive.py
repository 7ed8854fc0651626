"""Extractive: keep the sentences that are about the question (RECOMP, Xu et al., 2023, arXiv:2310.04408; EXIT, Hwang et
al., 2024, arXiv:2412.12559).

    score(sentence) = cos(embedding(question), embedding(sentence))

The best sentences stay, in the order of the text. With `threshold` those below it go even where the budget has room, as
in EXIT, so that nothing may be left of a context that has no answer.

RECOMP trains its encoder and EXIT a classifier for the purpose; here any sentence encoder serves.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from winnow.engine.compression.prompt.policy import Floats, PromptParams, PromptSignal, PromptView, Unit


class Extractive:
    """Keep the sentences that are about the question."""

    signal = PromptSignal.EMBEDDINGS

    class Params(PromptParams):
        threshold: float | None = Field(
            None, ge=-1, le=1, allow_inf_nan=False, description="cosine below which a sentence goes in any case"
        )

        @property
        def drops_beyond_budget(self) -> bool:
            return self.threshold is not None

    def unit(self, params: Params) -> Unit:
        return "sentence"

    def score(self, view: PromptView, params: Params) -> Floats:
        assert view.embeddings is not None
        scores: Floats = view.embeddings[1:] @ view.embeddings[0]
        return scores if params.threshold is None else np.where(scores < params.threshold, -np.inf, scores)
