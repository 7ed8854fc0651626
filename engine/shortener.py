"""Shortens prompts before they are read: finds out what a policy must know, lets it score, and keeps the best.

What the serving model must say comes from a probe, a sequence among the others (see probe.py). Models that read text
run in threads of their own, one text each, while the engine steps on. Nothing here waits.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.engine.compression.plan import Plan
from winnow.engine.compression.prompt.plan import Prompt
from winnow.engine.compression.prompt.policy import Context, Floats, Ints, PromptSignal, PromptView, Units
from winnow.engine.compression.prompt.spec_pc import voting_layers
from winnow.engine.compression.prompt.units import cut, keep_units, starts_of
from winnow.engine.compression.registry import PROMPT, prompt_policy
from winnow.engine.config import EngineSettings
from winnow.engine.errors import PlanNotSupported, RequestError
from winnow.engine.messages import Rejected, Shorten, Shortened
from winnow.engine.models import encoders
from winnow.engine.models.config import ModelConfig
from winnow.engine.pages import PageArena
from winnow.engine.probe import AttentionProbe, Probe, SurprisalProbe
from winnow.kernels.dispatch import Backend

log = logging.getLogger(__name__)

CHUNK_CHARS = 1500
"""Sentences that a classifier reads together: fewer than its 512 tokens in most languages"""


@dataclass
class Job:
    """One prompt on its way."""

    message: Shorten
    prompt: Prompt
    context: Context
    units: Units
    signal: PromptSignal
    probe: Probe | None = None
    work: list[Future[Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.probe is None and all(future.done() for future in self.work)


class Shortener:
    """Belongs to one engine."""

    def __init__(self, settings: EngineSettings, config: ModelConfig, arena: PageArena, ops: Backend):
        """ModelError where a setting names no model."""
        self._config, self._arena, self._ops = config, arena, ops
        self._models = TextModels(settings)
        self._jobs: dict[str, Job] = {}

    @property
    def missing(self) -> dict[str, str]:
        """Policies that cannot be had here, and why."""
        lacking = {
            PromptSignal.EMBEDDINGS: encoders.NO_EMBEDDING_MODEL if self._models.embedding is None else "",
            PromptSignal.LABELS: encoders.NO_CLASSIFIER if self._models.classifier is None else "",
        }
        return {name: why for name in PROMPT if (why := lacking.get(prompt_policy(name).signal, ""))}

    @property
    def is_idle(self) -> bool:
        return not self._jobs

    def open(self, message: Shorten) -> Job:
        """Begins to shorten a prompt. A job with a probe goes on when `close` is called; any other by itself.

        Raises
            RequestError
        """
        prompt = Plan.parse({"prompt": message.plan}).prompt
        assert prompt is not None
        context = context_of(message)
        policy = prompt_policy(prompt.policy)
        job = Job(message, prompt, context, cut(context, policy.unit(prompt)), policy.signal)
        if prompt.drops_beyond_budget or prompt.budget_tokens(context.tokens) < context.tokens:
            self._begin(job)
        self._jobs[message.request_id] = job
        return job

    def _begin(self, job: Job) -> None:
        tokens, context, prompt = job.message.prompt, job.context, job.prompt
        match job.signal:
            case PromptSignal.SURPRISAL:
                first, last = int(context.positions[0]), int(context.positions[-1])
                job.probe = SurprisalProbe(np.array(tokens, np.int32), first, last)
            case PromptSignal.ATTENTION:
                knobs: Any = prompt
                layers = voting_layers(knobs.first_layer, self._config.layers)
                if not layers:
                    path = "compression.prompt.first_layer"
                    raise PlanNotSupported(path, f"{path}: this model has {self._config.layers} layers")
                seen = len(tokens), knobs.window, layers
                job.probe = AttentionProbe(self._config, self._arena.kv, self._ops, *seen, self._arena.ranks)
            case PromptSignal.EMBEDDINGS:
                texts = [context.question, *job.units.texts(context.text)]
                # Equal texts are read once, and so have equal vectors.
                futures = {text: self._models.embed(text) for text in dict.fromkeys(texts)}
                job.work = [futures[text] for text in texts]
            case PromptSignal.LABELS:
                job.work = [self._models.label(text) for text in chunks_of(context)]

    def poll(self) -> list[Shortened | Rejected]:
        """What has become of the prompts whose texts were read meanwhile."""
        over = [job for job in self._jobs.values() if job.is_over]
        return [answer for job in over for answer in self._answer(job)]

    def close(self, request_id: str, probe: Probe) -> list[Shortened | Rejected]:
        """What has become of a prompt whose probe was read."""
        job = self._jobs[request_id]
        # Of a prompt's first token nothing can be known; NaN anywhere else is the model's.
        if np.isnan(probe.values[job.context.positions[job.context.positions > 0]]).any():
            del self._jobs[request_id]
            return [Rejected(request_id, "internal", "the model's output for this prompt is not a number")]
        return self._answer(job, probe.values.astype(np.float64))

    def forget(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        for future in job.work if job is not None else ():
            future.cancel()

    def stop(self) -> None:
        self._models.stop()

    def _answer(self, job: Job, values: Floats | None = None) -> list[Shortened | Rejected]:
        request_id = job.message.request_id
        del self._jobs[request_id]
        try:
            keep = np.ones(len(job.units.starts), bool)
            if values is not None or job.work:
                scores = prompt_policy(job.prompt.policy).score(_view(job, values), job.prompt)
                keep = keep_units(scores, job.units.sizes, job.prompt.budget_tokens(job.context.tokens))
        except Exception:
            log.exception("a prompt could not be shortened")
            return [Rejected(request_id, "internal", "the prompt could not be shortened")]
        dropped = job.context.positions[~keep[job.units.of]]
        kept = np.delete(np.array(job.message.prompt, np.int64), dropped)
        return [Shortened(request_id, kept.tolist(), job.context.tokens, job.context.tokens - len(dropped))]


def _view(job: Job, values: Floats | None) -> PromptView:
    """`values` [prompt tokens] are the probe's, where there was one."""
    context, units = job.context, job.units
    if values is not None:
        known = values[context.positions]
        if job.signal is PromptSignal.SURPRISAL:
            return PromptView(context, units, surprisal=known)
        return PromptView(context, units, attention=known)
    found = [future.result() for future in job.work]
    if job.signal is PromptSignal.EMBEDDINGS:
        return PromptView(context, units, embeddings=np.stack(found))
    firsts = np.cumsum([0, *(len(text) for text in chunks_of(context)[:-1])])
    ends = [first + ends for first, (ends, _) in zip(firsts, found, strict=True)]
    return PromptView(context, units, labels=(np.concatenate(ends), np.concatenate([keep for _, keep in found])))


class TextModels:
    """The models that read text, loaded when first asked, and the threads that run them.

    A thread computes with one core and yields to the engine's. As many texts are read at a time as the engine may use
    threads.
    """

    def __init__(self, settings: EngineSettings):
        self.embedding = encoders.embedding_folder(settings.embedding_model)
        self.classifier = encoders.classifier_folder(settings.llmlingua2_model)
        self._threads = settings.threads or os.cpu_count() or 1
        self._loading = threading.Lock()
        self._loaded: dict[type, Any] = {}

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, "text", initializer=_give_way)

    def embed(self, text: str) -> Future[Floats]:
        return self._submit(encoders.SentenceEncoder, self.embedding, lambda encoder: encoder.embed(text))

    def label(self, text: str) -> Future[tuple[Ints, Floats]]:
        return self._submit(encoders.TokenClassifier, self.classifier, lambda classifier: classifier.label(text))

    def _submit(self, kind: type, path: Path | None, work: Callable[[Any], Any]) -> Future[Any]:
        if path is None:
            raise RequestError("compression.prompt.policy", "compression.prompt.policy: its model is not here")

        def run() -> Any:
            with self._loading:
                if kind not in self._loaded:
                    self._loaded[kind] = kind(path)
            return work(self._loaded[kind])

        return self._pool.submit(run)

    def stop(self) -> None:
        """Waits for what is being loaded or read: transformers patches its classes while it loads a model, and would
        leave them so if another one were loaded meanwhile."""
        if "_pool" in self.__dict__:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _give_way() -> None:
    torch.set_num_threads(1)  # of this thread
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def context_of(message: Shorten) -> Context:
    """The marked parts; RequestError unless they are in order, within the prompt, and tokens end within their text."""
    positions, ends, starts, upto, chars = [], [], [], 0, 0
    for part in message.parts:
        last = part.first + len(part.ends)
        bounds = [1, *part.ends, max(1, len(part.text))]
        if part.first < upto or last > len(message.prompt) or bounds != sorted(bounds):
            raise RequestError("prompt", "the prompt's context is not where it is said to be")
        positions.append(np.arange(part.first, last))
        ends.append(chars + np.array(part.ends, np.int64))
        starts.append(chars)
        upto, chars = last, chars + len(part.text)
    if not upto or not sum(map(len, ends)):
        raise RequestError("prompt", "the prompt has no context")
    return Context(
        text="".join(part.text for part in message.parts),
        part_starts=np.array(starts, np.int64),
        positions=np.concatenate(positions),
        ends=np.concatenate(ends),
        question=message.question,
    )


def chunks_of(context: Context) -> list[str]:
    """The context's text in pieces of whole sentences; a sentence that is too long is a piece by itself."""
    bounds = [*context.part_starts.tolist(), len(context.text)]
    chunks: list[str] = []
    for first, last in itertools.pairwise(bounds):
        text = context.text[first:last]
        start, cuts = 0, [*starts_of(text, "sentence")[1:], len(text)]
        for here, following in zip(cuts, [*cuts[1:], None], strict=True):
            if following is None or following - start > CHUNK_CHARS:
                chunks.append(text[start:here])
                start = here
    return chunks
