"""Prompts some of whose rows are said to be an image's, for policies that drop tokens between layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from winnow.engine.compression.layer_choice import stages_of
from winnow.engine.compression.plan import Plan
from winnow.engine.messages import SamplingParams, Submit
from winnow.engine.models.decoder import Decoder
from winnow.engine.staging import ImageRows, Stages

from .bench import Bench, Seen


@dataclass(frozen=True)
class Part:
    """Rows [first, last) of a prompt stand for an image; every `marks`-th of them for no patch. Its turn ends before
    row `turn_end`."""

    first: int
    last: int
    turn_end: int
    marks: int = 0
    keys: tuple[int, ...] = ()
    """Which of its patch tokens are key tokens"""
    had: int = 0
    """Patch tokens before some were dropped, if more"""

    @property
    def patches(self) -> int:
        return max(self.had, len(self.rows))

    @property
    def rows(self) -> list[int]:
        """Of patches."""
        inside = range(self.first, self.last)
        return [row for row in inside if not self.marks or (row - self.first + 1) % self.marks]


def stages_for(model: Decoder, prompt: Sequence[int], plan: dict[str, Any], parts: Sequence[Part]) -> Stages | None:
    """What the engine makes of pictures."""
    vision = Plan.parse(plan).drops_between_layers
    if vision is None:
        return None
    images = []
    for part in parts:
        keep = vision.tokens(len(part.rows))
        if keep >= len(part.rows):
            continue
        others = {row for other in parts for row in range(other.first, other.last)}
        behind = [row for row in range(part.last, part.turn_end) if row not in others]
        tokens = torch.tensor(prompt, dtype=torch.int32)
        raters: list[int] = []
        if vision.asks_raters:
            chosen = vision.raters(model.embed(tokens[part.rows]), model.embed(tokens[behind]))
            raters = [row for row, is_one in zip(behind, chosen.tolist(), strict=True) if is_one]
        images.append(
            ImageRows(
                rows=np.array(part.rows, np.int32),
                tokens=np.arange(len(part.rows), dtype=np.int32),
                is_key=np.isin(np.arange(len(part.rows)), part.keys),
                patches=len(part.rows),
                keep=keep,
                raters=np.array(raters, np.int32),
            )
        )
    return stages_of(vision, model.config.layers, images)


def submit(
    bench: Bench,
    model: Decoder,
    request_id: str,
    prompt: Sequence[int],
    parts: Sequence[Part],
    tokens: int,
    plan: dict[str, Any],
    forced: Sequence[int] = (),
    speculative: dict[str, Any] | None = None,
    **sampling: Any,
) -> None:
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": tokens, "seed": 7} | sampling))
    guesses = speculative or {}
    request = Submit(request_id, list(prompt), params, plan, forced=list(forced), speculative=guesses)
    seq = bench.engine.intake.sequence(request)
    for each in (seq, *seq.siblings):
        each.stages = stages_for(model, prompt, plan, parts)
    bench.engine.scheduler.add(seq)


def alone(
    model: Decoder, prompt: Sequence[int], parts: Sequence[Part], tokens: int, plan: dict[str, Any], **settings: Any
) -> Seen:
    bench = Bench(model, **settings)
    submit(bench, model, "alone", prompt, parts, tokens, plan)
    bench.run()
    return bench.seen["alone", 0]
