"""Whom the harness asks: what an ask is, what an answer tells, and the engine in this process.

`server.py` has the other one, a server.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from winnow.engine.errors import RequestError
from winnow.engine.evaluation.measures import Foretold, Whole, log_softmax

SEED = 1
"""Of every request: what a random policy keeps is the same each time"""


@dataclass(frozen=True)
class Ask:
    """One greedy request."""

    prompt: list[int]
    """What the plan compresses when it is read"""
    plan: dict[str, Any]
    forced: list[int] = field(default_factory=list)
    """What follows the prompt, uncompressed"""
    new: int = 1
    """Tokens to generate after that"""
    foretells: bool = False
    """Whether the probabilities of the forced tokens are wanted"""


@dataclass(frozen=True)
class Answer:
    text: str
    """What was generated"""
    foretold: Foretold | None
    """Of the forced tokens but the first, which the model foretells before its memory is compressed"""
    held: int
    """Bytes of the request's pages at its end, and of what is kept beside them to choose what is read"""
    uncompressed: int
    """Bytes of the same tokens under no plan"""
    read: float | None = None
    """Share of the bytes that generated tokens would read under no plan; None where they read all that is held"""


class Target(Protocol):
    """A model that can be asked."""

    weights: str
    max_model_len: int

    def encode(self, text: str) -> list[int]: ...

    def ask(self, asks: Sequence[Ask]) -> list[Answer | RequestError]:
        """All of them at once; a RequestError stands for each that is refused or fails."""


class EngineTarget:
    """An engine in this process. All asks of a call share its batches."""

    def __init__(self, model: str, weights: str | None, threads: int | None, kv_memory_gib: float, device: str = "cpu"):
        # Here, so that the harness asks a server without torch.
        from winnow.engine.config import EngineSettings
        from winnow.engine.models.tokenizer import load_tokenizer
        from winnow.engine.process import build_engine
        from winnow.engine.recital import lead_ins

        self._tokenizer = load_tokenizer(model)
        self._lead_ins = lead_ins(self._tokenizer)
        settings = {"model": model, "device": device, "threads": threads, "kv_memory_gib": kv_memory_gib}
        if weights is not None:  # else the device's default
            settings["weights"] = weights
        self.engine = build_engine(EngineSettings.model_validate(settings))
        self.weights: str = self.engine.settings.weights
        self.max_model_len = self.engine.max_model_len

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def ask(self, asks: Sequence[Ask]) -> list[Answer | RequestError]:
        from winnow.engine.messages import Output, Rejected, SamplingParams, Submit

        shown: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
        self.engine.progress.on_forced = lambda request_id, logits: shown[request_id].append(
            log_softmax(logits.cpu().numpy())
        )
        outputs: dict[str, list[Output]] = defaultdict(list)
        refused: dict[str, RequestError] = {}
        for i, ask in enumerate(asks):
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=len(ask.forced) + ask.new,
                seed=SEED,
                ignore_eos=True,
                logprobs=0 if ask.foretells else None,
            )
            try:
                submit = Submit(str(i), ask.prompt, sampling, ask.plan, forced=ask.forced, lead_ins=self._lead_ins)
                self.engine.submit(submit)
            except RequestError as error:
                refused[str(i)] = error
        while not self.engine.is_idle:
            for output in self.engine.step():
                if isinstance(output, Rejected):
                    refused[output.request_id] = RequestError(output.param, output.message)
                elif isinstance(output, Output):
                    outputs[output.request_id].append(output)

        def answer(i: int, ask: Ask) -> Answer | RequestError:
            if str(i) in refused:
                return refused[str(i)]
            of = outputs[str(i)]
            report = of[-1].compression
            assert report is not None
            tokens = [token for output in of for token in output.token_ids][len(ask.forced) :]
            foretold = None
            if ask.foretells:
                foretold = Whole(np.concatenate(shown[str(i)])[1:], np.array(ask.forced[1:]))
            read = report.bytes_read / report.bytes_read_dense if report.bytes_read_dense else None
            return Answer(
                self._tokenizer.decode(tokens, False), foretold, report.bytes_held, report.bytes_uncompressed, read
            )

        return [answer(i, ask) for i, ask in enumerate(asks)]
