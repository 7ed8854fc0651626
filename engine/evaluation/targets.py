"""Whom the harness asks: what an ask is, what an answer tells, and the engine in this process.

`server.py` has the other one, a server.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from winnow.engine.errors import EvalError, RequestError
from winnow.engine.evaluation.measures import Foretold, Whole, log_softmax

if TYPE_CHECKING:
    from winnow.engine.evaluation.seeing import Seeing

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
    context: str = ""
    """Text of the prompt's beginning, which a plan may shorten"""
    question: str = ""
    """Text of the rest of it"""
    image: bytes | None = None
    """A PNG file. The prompt is then a chat of one turn, this and `question`, and the model may end its answer"""


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
    image_tokens: int = 0
    """Of the prompt"""
    image_kept: int = 0
    """Of these, how many the language model read"""


def goes_by_marks(plan: dict[str, Any]) -> str | None:
    """What a plan says that a server does not take with images, since it goes by marked text; None if nothing."""
    if "prompt" in plan:
        return "compression.prompt"
    return "compression.kv.scope" if plan.get("kv", {}).get("scope") is not None else None


class Target(Protocol):
    """A model that can be asked."""

    weights: str
    max_model_len: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def ask(self, asks: Sequence[Ask]) -> list[Answer | RequestError]:
        """All of them at once; a RequestError stands for each that is refused or fails."""


class EngineTarget:
    """An engine in this process. All asks of a call share its batches."""

    def __init__(
        self,
        model: str,
        weights: str | None,
        threads: int | None,
        kv_memory_gib: float,
        device: str = "cpu",
        draft_model: str | None = None,
    ):
        # Here, so that the harness asks a server without torch.
        from winnow.engine.build import build_engine
        from winnow.engine.config import EngineSettings
        from winnow.engine.models.tokenizer import load_tokenizer
        from winnow.engine.recital import lead_ins

        self._model = model
        self._tokenizer = load_tokenizer(model)
        self.lead_ins = lead_ins(self._tokenizer)
        settings = {"model": model, "device": device, "threads": threads, "kv_memory_gib": kv_memory_gib}
        settings |= {"draft_model": draft_model}
        if weights is not None:  # else the device's default
            settings["weights"] = weights
        self.engine = build_engine(EngineSettings.model_validate(settings))
        self.weights: str = self.engine.settings.weights
        self.max_model_len = self.engine.max_model_len

    @cached_property
    def _seeing(self) -> Seeing:
        from winnow.engine.evaluation.seeing import Seeing
        from winnow.engine.models.vision.processor import load_processor

        processor = load_processor(self._model, self._tokenizer)
        if processor is None:
            raise EvalError(f"{self._model} sees no images")
        return Seeing(self._tokenizer, processor, self.engine.info.sees["image"])

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, False)

    def _prompts(self, asks: Sequence[Ask]) -> list[list[int] | RequestError]:
        """What the model reads, before any of it is submitted."""
        known: dict[str, list[int] | RequestError] = {}
        prompts: list[list[int] | RequestError] = []
        for ask in asks:
            if ask.image is not None and (marks := goes_by_marks(ask.plan)) is not None:
                prompts.append(RequestError(marks, f"{marks}: not for prompts with images or videos"))
                continue
            key = json.dumps([ask.plan.get("prompt"), ask.context, ask.question])
            if "prompt" in ask.plan and key not in known:
                try:
                    known[key] = self._shortened(ask)
                except RequestError as error:
                    known[key] = error
            prompts.append(known[key] if "prompt" in ask.plan else ask.prompt)
        return prompts

    def _shortened(self, ask: Ask) -> list[int]:
        """What the plan leaves of the prompt. RequestError if it cannot be had."""
        from winnow.engine.compression.prompt.policy import PromptSignal
        from winnow.engine.compression.registry import prompt_policy
        from winnow.engine.messages import ContextPart, Rejected, Shorten, Shortened

        policy = ask.plan["prompt"]["policy"]
        if why := self.engine.shortener.missing.get(policy):
            raise RequestError("compression.prompt.policy", why)
        if prompt_policy(policy).signal is PromptSignal.EMBEDDINGS and not ask.question.strip():
            raise RequestError("compression.prompt.policy", f"'{policy}' ranks by the question, and there is none")
        tokens, bounds = self._tokenizer.encode_with_bounds(ask.context + ask.question, False)
        part = ContextPart(ask.context, 0, [end for _, end in bounds if end <= len(ask.context)])
        self.engine.shorten(Shorten("shorten", tokens, [part], ask.plan["prompt"], ask.question.strip()))
        while True:
            for output in self.engine.step():
                if isinstance(output, Rejected):
                    raise RequestError(output.param, output.message)
                if isinstance(output, Shortened):
                    return output.prompt

    def ask(self, asks: Sequence[Ask]) -> list[Answer | RequestError]:
        from winnow.engine.messages import Output, Rejected, SamplingParams, Submit

        shown: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
        self.engine.progress.on_forced = lambda request_id, logits: shown[request_id].append(
            log_softmax(logits.cpu().numpy())
        )
        outputs: dict[str, list[Output]] = defaultdict(list)
        refused: dict[str, RequestError] = {}
        left = self._prompts(asks)
        for i, ask in enumerate(asks):
            ends = self._tokenizer.eos_token_ids if ask.image is not None else ()
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=len(ask.forced) + ask.new,
                seed=SEED,
                ignore_eos=not ends,
                stop_token_ids=ends,
                logprobs=0 if ask.foretells else None,
            )
            try:
                prompt = left[i]
                if isinstance(prompt, RequestError):
                    raise prompt
                plan = {part: of for part, of in ask.plan.items() if part != "prompt"}
                submit = Submit(str(i), prompt, sampling, plan, forced=ask.forced, lead_ins=self.lead_ins)
                if ask.image is not None:
                    prompt, picture = self._seeing.prompt(ask.image, ask.question)
                    submit = structs.replace(submit, prompt=prompt, pictures=[picture])
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
                self._tokenizer.decode(tokens, skip_special_tokens=ask.image is not None),
                foretold,
                report.bytes_held,
                report.bytes_uncompressed,
                read,
                report.image_tokens,
                report.image_tokens_kept,
            )

        return [answer(i, ask) for i, ask in enumerate(asks)]
