"""An engine on the bench: it is stepped by hand, and what each choice did is written down."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from winnow.engine.answers import StepOutput
from winnow.engine.calibration.store import Profile
from winnow.engine.compression.plan import Plan
from winnow.engine.config import EngineSettings
from winnow.engine.engine import Engine
from winnow.engine.messages import Output, Picture, Rejected, SamplingParams, Shorten, Shortened, Submit
from winnow.engine.models.decoder import Decoder
from winnow.engine.scheduler import ScheduledBatch
from winnow.engine.sequence import Sequence as EngineSequence
from winnow.engine.tower_protocol import Eyes
from winnow.kernels.dispatch import Backend, backend
from winnow.kernels.layout import PageFormat, PageLayout

from .profiles import profiles_of

Choice = tuple[str, int]


@dataclass
class Seen:
    """What one choice of a request did."""

    tokens: list[int] = field(default_factory=list)
    logits: dict[int, Tensor] = field(default_factory=dict)
    """tokens computed -> [vocab], from the end of the prompt on"""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """event -> [layers, kv_heads, most] int64: positions that the lanes held after it, padded with -1"""
    outputs: list[Output] = field(default_factory=list)
    rejected: Rejected | None = None

    @property
    def last(self) -> Output:
        output = self.outputs[-1]
        assert output.finish_reason is not None
        return output

    @property
    def is_over(self) -> bool:
        return self.rejected is not None or bool(self.outputs and self.outputs[-1].finish_reason)


def assert_same(seen: Seen, wanted: Seen) -> None:
    """The same tokens, the same bits in every logit, and the same tokens kept at every event."""
    assert seen.tokens == wanted.tokens
    for where in ("logits", "kept"):
        of, other = getattr(seen, where), getattr(wanted, where)
        for at in of.keys() & other.keys():
            assert same_bits(of[at], other[at]), f"{where} differ at {at}"


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal, and not-a-numbers are too."""
    return one.shape == other.shape and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


class Bench:
    """An engine whose steps are taken one by one. `seen` has every choice."""

    def __init__(
        self,
        model: Decoder,
        pages: int = 1 << 15,
        ops: Backend | None = None,
        profiles: Mapping[str, Profile] | None = None,
        draft: Decoder | None = None,
        draft_pages: int = 1 << 13,
        eyes: Eyes | None = None,
        **settings: Any,
    ):
        """
        Args
            pages: size of the arena
            ops: which the model is loaded for; that of the CPU by default
            profiles: of the model, calibrated if not given
            draft: a draft model, and the size of its arena
            eyes: the model's vision tower
        """
        settings = dict[str, Any]({"weights": "f32", "max_seqs": 64}) | settings
        page_tokens = settings.get("page_tokens", 16)
        gib = _gib_of(pages, model, page_tokens)
        profiles = profiles_of(model) if profiles is None else profiles
        ops = backend("cpu") if ops is None else ops
        helper: Engine | None = None
        if draft is not None:
            settings |= {"draft_model": "draft", "draft_memory_gib": _gib_of(draft_pages, draft, page_tokens)}
        own = EngineSettings(kv_memory_gib=gib, **settings)
        if draft is not None and own.of_draft is not None:
            helper = Engine(own.of_draft, draft, ops)
        self.engine = Engine(own, model, ops, profiles=profiles, draft=helper, eyes=eyes)
        self.seen: dict[Choice, Seen] = defaultdict(Seen)
        self.shortened: dict[str, Shortened] = {}
        self.batches: list[list[tuple[Choice, int]]] = []
        """Who took part in each step, with how many tokens"""
        self.complaints: list[str] = []
        """What is wrong with a step: the engine would catch what is raised within"""
        self._rows: list[tuple[Choice, int, int, list[int], Tensor]] = []
        """What a step computed: (choice, prompt tokens, tokens computed, guess behind them, logits after each)"""
        self._watch_logits()
        self._watch_keep_sets()

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        tokens: int = 8,
        plan: dict[str, Any] | None = None,
        salt: str = "",
        speculative: dict[str, Any] | None = None,
        lead_ins: Sequence[list[int]] = (),
        forced: Sequence[int] = (),
        document: int = 0,
        pictures: Sequence[Picture] = (),
        **sampling: Any,
    ) -> None:
        params = SamplingParams(**({"temperature": 0.0, "max_tokens": tokens, "seed": 7} | sampling))
        more = (speculative or {}, list(forced), list(lead_ins), document, list(pictures))
        self.engine.submit(Submit(request_id, list(prompt), params, plan or {}, salt, *more))

    def shorten(self, message: Shorten) -> Shortened:
        """What is left of one prompt, with nobody else there."""
        self.engine.shorten(message)
        self.run()
        rejected = self.seen[message.request_id, 0].rejected if message.request_id not in self.shortened else None
        assert rejected is None, rejected
        return self.shortened.pop(message.request_id)

    def step(self) -> list[StepOutput]:
        outputs = self._note(self.engine.step())
        assert not self.complaints
        return outputs

    def finish(self, request_id: str, index: int = 0) -> list[Output]:
        outputs = self._note(self.engine.finish(request_id, index))
        return [output for output in outputs if isinstance(output, Output)]

    def run(self, after_step: Callable[[], None] = lambda: None, most: int = 20_000) -> dict[Choice, Seen]:
        """Steps until nothing is left to do."""
        for _ in range(most):
            if self.engine.is_idle:
                self.engine.check_integrity()
                return dict(self.seen)
            if not self.engine.can_step:
                time.sleep(0.001)  # threads of its own are at work
            self.step()
            after_step()
        raise AssertionError(f"the engine is not done after {most} steps")

    def alone(self, prompt: Sequence[int], tokens: int = 8, plan: dict[str, Any] | None = None, **more: Any) -> Seen:
        """One request from beginning to end."""
        self.submit("alone", prompt, tokens, plan, **more)
        self.run()
        return self.seen.pop(("alone", 0))

    @property
    def running(self) -> list[EngineSequence]:
        return self.engine.scheduler.running

    def sequence(self, request_id: str, index: int = 0) -> EngineSequence:
        for seq in self.engine.scheduler.sequences():
            if (seq.request_id, seq.index) == (request_id, index):
                return seq
        raise KeyError(request_id)

    @property
    def held_pages(self) -> int:
        """Pages that are neither free nor only the prefix cache's."""
        stats = self.engine.stats
        return stats.pages_total - stats.pages_free - stats.pages_cached

    def _note(self, outputs: Iterable[StepOutput]) -> list[StepOutput]:
        outputs = list(outputs)
        for output in outputs:
            if isinstance(output, Shortened):
                self.shortened[output.request_id] = output
            elif isinstance(output, Rejected):
                self.seen[output.request_id, 0].rejected = output
            else:
                seen = self.seen[output.request_id, output.index]
                assert not seen.is_over, "an output after the last one"
                seen.outputs.append(output)
                seen.tokens += output.token_ids
        self._note_logits()
        return outputs

    def _watch_logits(self) -> None:
        run = self.engine.runner.run

        def watched(batch: ScheduledBatch, unread_ids: Tensor | None = None) -> Tensor:
            logits = run(batch, unread_ids)
            self.batches.append([])
            parts = (part.tolist() for part in (batch.counts, batch.logit_rows, batch.drafts))
            for seq, count, first, drafts in zip(batch.seqs, *parts, strict=True):
                choice, computed = (seq.request_id, seq.index), seq.reads_from + count - drafts
                self.batches[-1].append((choice, count))
                if computed >= seq.prompt_tokens and seq.reciting is None:
                    guess = seq.tokens[seq.length : seq.length + drafts].tolist()
                    rows = logits[first : first + drafts + 1].cpu().clone()
                    self._rows.append((choice, seq.prompt_tokens, computed, guess, rows))
            return logits

        withdraw = self.engine.scheduler.withdraw

        def without(seq: EngineSequence) -> None:
            if seq.under_way:  # what it read does not count
                self._rows = [row for row in self._rows if row[0] != (seq.request_id, seq.index)]
            withdraw(seq)

        # The engine is the bench's own: nothing is ever put back, which is what mypy warns of.
        self.engine.runner.run = watched  # type: ignore[method-assign]
        self.engine.scheduler.withdraw = without  # type: ignore[method-assign]

    def _note_logits(self) -> None:
        """Of the rows behind a guess those count whose guess was said."""
        for choice, prompt, computed, guess, rows in self._rows:
            seen, first = self.seen[choice], computed - prompt
            for ahead, row in enumerate(rows):
                if ahead and seen.tokens[first : first + ahead] != guess[:ahead]:
                    break
                if not same_bits(seen.logits.setdefault(computed + ahead, row), row):
                    self.complaints.append(f"{choice} read {computed + ahead} tokens again: other logits")
        self._rows.clear()

    def _watch_keep_sets(self) -> None:
        settle, arena = self.engine.side.settle, self.engine.arena

        def watched(seq: EngineSequence) -> None:
            if not seq.timeline.evicts_at(seq.computed):
                return settle(seq)
            kept = arena.kv.kept[seq.slot].long()
            positions = arena.kv.positions[seq.slot][..., : int(kept.max())].cpu().long()
            held = positions.masked_fill(torch.arange(positions.shape[-1]) >= kept[..., None], -1)
            choice = (seq.request_id, seq.index)
            known = self.seen[choice].kept.setdefault(seq.computed, held)
            if not same_bits(known, held):
                self.complaints.append(f"{choice} was evicted at {seq.computed} again: other tokens stay")
            settle(seq)

        self.engine.side.settle = watched  # type: ignore[method-assign]


def _gib_of(pages: int, model: Decoder, page_tokens: int) -> float:
    layout = PageLayout(model.config.head_dim, PageFormat.F32, page_tokens)
    return (pages + 0.5) * layout.page_bytes / 2**30


def pages_for(model: Decoder, tokens: int, page_tokens: int = 16) -> int:
    """Pages of an arena whose longest sequence is of `tokens` tokens."""
    return model.config.layers * model.config.kv_heads * (-(-tokens // page_tokens) + 1)


def pages_beside(model: Decoder, plan: dict[str, Any], prompt: int, tokens: int) -> int:
    """Pages that stand for what a plan notes of as many tokens, at most."""
    return Bench(model).engine.side.most_pages(Plan.parse(plan), prompt, tokens)
