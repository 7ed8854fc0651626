"""Forced tokens: an output that begins with what the caller says, whatever the model would have said.

They are read after the prompt's plan was carried out, as generated tokens are, but in chunks as long as the events of
the plan allow. A row's bits do not depend on its chunk, so they are judged as decoding token by token would judge them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from winnow.engine.messages import Output, TokenLogprob
from winnow.engine.pages import Ints
from winnow.engine.sampler import token_logprobs
from winnow.engine.sequence import Sequence as Seq

if TYPE_CHECKING:
    from winnow.engine.scheduler import ScheduledBatch

Observer = Callable[[str, Tensor], None]
"""Is shown the logits [tokens, vocab] before the next forced tokens of a request, by its id"""


@dataclass(frozen=True, slots=True)
class Span:
    """The forced tokens of one sequence that a step's rows foretell."""

    seq: Seq
    tokens: Ints
    rows: NDArray[np.int64]
    """[tokens] rows of the step; empty where no probabilities were asked for"""


def forced_spans(batch: ScheduledBatch) -> list[Span]:
    """What is to be told of forced tokens in a step that has not run yet; a token is told once, preempted or not."""
    spans = []
    row = 0
    for seq, count in zip(batch.seqs, batch.counts.tolist(), strict=True):
        if seq.told < seq.forced and seq.reciting is None:
            # The row of a token foretells the next one.
            first = seq.prompt_tokens + seq.told
            last = min(seq.reads_from + count, seq.prompt_tokens + seq.forced - 1)
            if first <= last:
                rows = np.arange(first, last + 1) - 1 - seq.reads_from + row
                spans.append(Span(seq, seq.tokens[first : last + 1], rows[: None if seq.reports_logprobs else 0]))
                seq.told += last + 1 - first
        row += count
    return spans


def forced_rows(spans: Sequence[Span]) -> NDArray[np.int64]:
    """`ScheduledBatch.more_rows`"""
    return np.concatenate([span.rows for span in spans]) if spans else np.zeros(0, np.int64)


def forced_outputs(spans: Sequence[Span], logits: Tensor, observe: Observer | None) -> list[Output]:
    """What there is to tell; `logits` [S, vocab] belong to `forced_rows`."""
    outputs, start = [], 0
    for span in spans:
        logprobs: list[TokenLogprob] | None = None
        if len(span.rows):
            mine = logits[start : start + len(span.rows)]
            start += len(span.rows)
            if observe is not None:
                observe(span.seq.request_id, mine)
            logprobs = token_logprobs(mine, span.tokens, np.full(len(mine), span.seq.sampling.logprobs))
        if span.seq.is_running:  # and not lost with another choice of its request
            outputs.append(Output(span.seq.request_id, span.seq.index, span.tokens.tolist(), logprobs))
    return outputs
