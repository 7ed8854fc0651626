"""What a prompt policy is, and what it is shown.

A prompt policy shortens a prompt before the model reads it. It touches the context only: the parts that the sender
marked as such. The context is cut into units, a policy scores them, and `units.keep_units` fills the budget with the
best. What is left is a subset of the prompt's own tokens, in their order: everything unmarked stays to the bit.

Like eviction policies these are stateless and import no torch: the server reads their knobs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from winnow.engine.compression.policy import PolicyParams

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

Unit = Literal["token", "word", "phrase", "sentence"]


class PromptSignal(StrEnum):
    """What a policy must know of the context; the engine finds out before it asks for scores."""

    SURPRISAL = "surprisal"
    """-log p of each token, from one pass of the draft model over the prompt, or of the model where there is none"""
    ATTENTION = "attention"
    """What the prompt's last queries pay to each token, from one pass of the same model"""
    EMBEDDINGS = "embeddings"
    """A vector of unit length for the question and for each unit's text, by an embedding model"""
    LABELS = "labels"
    """The probability that a token classifier would keep each of its own tokens"""

    @property
    def reads_prompt(self) -> bool:
        """Whether the draft model, or the model where there is none, must read the whole prompt, which therefore has to
        fit its context."""
        return self in (PromptSignal.SURPRISAL, PromptSignal.ATTENTION)


class PromptParams(PolicyParams):
    """Base of a prompt policy's own knobs."""

    @property
    def drops_beyond_budget(self) -> bool:
        """Whether a knob may drop what the budget would keep."""
        return False


@dataclass(frozen=True)
class Context:
    """The marked parts of one prompt, one after the other."""

    text: str
    """All parts joined by nothing; characters are counted in it"""
    part_starts: Ints
    """[parts] first character of each part"""
    positions: Ints
    """[tokens] place of each context token in the prompt, ascending"""
    ends: Ints
    """[tokens] end of each token's text"""
    question: str
    """What the request asks, for policies that rank by it"""

    @property
    def tokens(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Units:
    """The pieces of a context that stay or go as a whole."""

    starts: Ints
    """[units] first character of each; a unit reaches to the next one"""
    of: Ints
    """[tokens] the unit of each token, ascending"""

    @property
    def sizes(self) -> Ints:
        """[units] tokens; 0 for text without a token of its own"""
        return np.bincount(self.of, minlength=len(self.starts))

    def at(self, ends: Ints) -> Ints:
        """The units of pieces of text that end at these characters."""
        return np.searchsorted(self.starts, ends - 1, side="right") - 1

    def texts(self, text: str) -> list[str]:
        """The units' texts, without the space around them."""
        bounds = [*self.starts.tolist(), len(text)]
        return [text[first:last].strip() for first, last in itertools.pairwise(bounds)]

    def means(self, values: Floats) -> Floats:
        """[units] mean over the tokens of each unit; NaN for a unit without tokens."""
        sums = np.bincount(self.of, weights=values, minlength=len(self.starts))
        with np.errstate(invalid="ignore"):
            means: Floats = sums / self.sizes
        return means


@dataclass(frozen=True)
class PromptView:
    """A context and what was found out about it: the signal that the policy names; the others are None."""

    context: Context
    units: Units
    surprisal: Floats | None = None
    """[tokens] nats; NaN for a token that nothing precedes"""
    attention: Floats | None = None
    """[tokens] the largest weighted probability"""
    embeddings: Floats | None = None
    """[1 + units, d] the question's first; zeros for a unit without text"""
    labels: tuple[Ints, Floats] | None = None
    """Of the classifier's tokens: end of its text [m], probability that it stays [m]"""


class PromptPolicy(Protocol):
    """One named method. Stateless; the registry makes one instance for the process."""

    signal: ClassVar[PromptSignal]

    Params: ClassVar[type[PromptParams]]
    """The method's own knobs; the request's `prompt` object holds them beside the common ones"""

    def unit(self, params: Any) -> Unit:
        """What stays or goes as a whole."""

    def score(self, view: PromptView, params: Any) -> Floats:
        """[units] higher is kept; -inf is dropped even where the budget has room."""
