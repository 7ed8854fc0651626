"""LLMLingua-2: a token classifier says which words matter (Pan et al., 2024, arXiv:2403.12968).

    score(word) = mean over the classifier's tokens of the word of p(preserve)

The classifier is the operator's: a checkpoint for token classification with two labels, of which the second is
"preserve", as the authors publish them on XLM-RoBERTa and multilingual BERT.

Where we depart: the reference takes the threshold of each chunk of 512 tokens by itself, so that a chunk of nothing
but filler keeps as much as any; the paper ranks the words of the whole context, and so do we. A word here is letters
and digits in a row or another sign, whatever the classifier's tokenizer; and the budget counts the serving model's
tokens.
"""

from __future__ import annotations

import numpy as np

from winnow.engine.compression.prompt.policy import Floats, PromptParams, PromptSignal, PromptView, Unit


class LLMLingua2:
    """Keep the words that a token classifier finds worth keeping."""

    signal = PromptSignal.LABELS

    class Params(PromptParams):
        pass

    def unit(self, params: Params) -> Unit:
        return "word"

    def score(self, view: PromptView, params: Params) -> Floats:
        assert view.labels is not None
        ends, keep = view.labels
        unit = view.units.at(ends)
        count = np.bincount(unit, minlength=len(view.units.starts))
        sums = np.bincount(unit, keep, len(view.units.starts))
        return sums / np.maximum(count, 1)  # a word that the classifier has no token for counts as filler
