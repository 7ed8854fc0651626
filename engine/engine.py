"""The engine: requests in, tokens out. Everything it does is in `step`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from winnow.engine.calibration.frontier import resolve_quality
from winnow.engine.calibration.registry import check_profiles
from winnow.engine.calibration.store import NO_PROFILES, Profile
from winnow.engine.compression.apply import Compressor
from winnow.engine.compression.plan import Plan
from winnow.engine.compression.pressure import Pressure
from winnow.engine.compression.reach import longest_text
from winnow.engine.compression.read_policy import LaneShape
from winnow.engine.compression.reader import Reader
from winnow.engine.compression.side_state import SideState
from winnow.engine.compression.timeline import Timeline
from winnow.engine.config import EngineSettings
from winnow.engine.errors import ModelError, PlanNotSupported, PromptTooLong, RequestError
from winnow.engine.facts import info_of, stats_of
from winnow.engine.forced import Observer, forced_outputs, forced_rows, forced_spans
from winnow.engine.graphs import Graphs
from winnow.engine.memory import arena_pages
from winnow.engine.messages import (
    EngineInfo,
    EngineStats,
    FrontierPoint,
    Output,
    Rejected,
    Shorten,
    Shortened,
    Submit,
)
from winnow.engine.models.decoder import Decoder
from winnow.engine.pages import PageArena
from winnow.engine.prefix_cache import PrefixCache
from winnow.engine.recital import Recital, end_parts, keep_for_later, parts_of
from winnow.engine.runner import Runner
from winnow.engine.sampler import Draw, Sampler
from winnow.engine.sampling import SamplingTable, check_sampling, choice_seed
from winnow.engine.scheduler import ScheduledBatch, Scheduler
from winnow.engine.sequence import Sequence, probing, room_for
from winnow.engine.shortener import Shortener
from winnow.engine.speculation.speculation import check_combination, parse_speculation
from winnow.engine.speculation.speculator import Speculator
from winnow.kernels.dispatch import Backend
from winnow.kernels.host import to_device
from winnow.kernels.layout import PageLayout

log = logging.getLogger(__name__)

StepOutput = Output | Shortened | Rejected


@dataclass
class Totals:
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0


class Engine:
    """A model, an arena of pages, and the sequences that share them. Not thread-safe: one loop calls it."""

    def __init__(
        self,
        settings: EngineSettings,
        model: Decoder,
        ops: Backend,
        name: str = "default",
        profiles: Mapping[str, Profile] = NO_PROFILES,
        frontier: tuple[FrontierPoint, ...] = (),
    ):
        config = model.config
        layout = PageLayout(config.head_dim, settings.compute_format, settings.page_tokens)
        lanes = config.layers * config.kv_heads
        pages = arena_pages(settings, model, layout, ops)
        # One sequence must fit whole and uncompressed, with a page to spare in each lane for copies.
        fitting = (pages // lanes - 1) * layout.page_tokens
        self.max_model_len = min(settings.max_model_len or config.max_position, config.max_position, fitting)
        if self.max_model_len < 2 * layout.page_tokens:
            gib = pages * layout.page_bytes / 2**30
            raise ModelError(f"{gib:.2f} GiB of KV memory hold no sequence of this model")
        self.settings, self.name, self.config = settings, name, config
        self.profiles, self.frontier = profiles, frontier
        self.arena = PageArena(layout, pages, settings.max_seqs, config.layers, config.kv_heads, ops)
        self.cache = PrefixCache(self.arena) if settings.prefix_caching else None
        shape = LaneShape(config.layers, config.kv_heads, config.heads, config.head_dim)
        self.reader = Reader(self.arena, shape, profiles)
        self.side = SideState(self.arena, config, self.reader)
        self.compressor = Compressor(self.arena, self.cache, self.side, ops, config, profiles)
        self.table = SamplingTable(settings.max_seqs, config.vocab_size)
        self.pressure = Pressure(self.compressor, self.side, self.arena)
        self.scheduler = Scheduler(
            self.arena, self.cache, self.table, settings.max_step_tokens, self.side, self.pressure.relieve
        )
        self.graphs: Graphs | None = None
        if settings.device == "cuda" and settings.cuda_graphs:
            self.graphs = Graphs(model, self.arena.kv, settings.max_seqs)
        self.runner = Runner(model, self.arena, self.graphs)
        self.sampler = Sampler()
        self.speculator = Speculator(self.arena, self.side, self.table)
        self.shortener = Shortener(settings, config, self.arena.kv, ops)
        self.totals = Totals()
        self.on_forced: Observer | None = None
        self.has_windows = any(config.windows)
        self._arrivals = 0

    # The step --------------------------------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """One pass of the model over whoever can run; returns what there is to tell."""
        began = time.perf_counter()
        outputs: list[StepOutput] = [*self.shortener.poll()]
        try:
            self.speculator.propose(self.scheduler.running)
            batch = self.scheduler.schedule()
            if not batch.seqs:
                return outputs
            spans = forced_spans(batch)
            batch.more_rows = forced_rows(spans)
            logits = self.runner.run(batch)
            known = logits[: len(logits) - len(batch.more_rows)]
            outputs += forced_outputs(spans, logits[len(known) :], self.on_forced)
            draws = self.speculator.verify(batch, known, self.sampler)
            outputs += self._compress(batch)
            self._sample(batch, known, draws)
            outputs += self._commit(draws)
            outputs += self._answer_probes(batch)
        except Exception:
            outputs += self._give_up()
        self.totals.steps += 1
        self.totals.step_seconds += time.perf_counter() - began
        return outputs

    def _give_up(self) -> list[StepOutput]:
        """Ends everybody who may have had a part in a step that failed; whoever only waits is not among them."""
        suspects = self.scheduler.running[:] or list(self.scheduler.waiting)[:1]
        log.exception("a step failed; %d sequences are given up", len(suspects))
        outputs = [out for seq in suspects for out in self._lose(seq.request_id, "the engine failed on this batch")]
        self.check_integrity()
        return outputs

    def _compress(self, batch: ScheduledBatch) -> list[StepOutput]:
        """Notes what was computed, publishes read prompts, and carries out the plans that are due."""
        lost: list[StepOutput] = []
        for seq, count in zip(batch.seqs, batch.counts.tolist(), strict=True):
            before = seq.computed
            seq.advance(count)
            intact = seq.timeline.intact_tokens
            if before < intact <= seq.computed and self.cache is not None and not seq.stage_bounds:
                self.cache.publish(seq.block_keys[: intact // self.cache.block_tokens], seq.slot)
        end_parts(batch.seqs, self.arena)
        for seq in batch.seqs:
            # A sequence that is preempted here loses its place in this step; it will sample the same token later.
            try:
                while seq.is_running and seq.ends_a_stage:
                    self.scheduler.with_pages(self.compressor.end_stage, seq)
                if seq.is_running and seq.stands_at_an_event:
                    self.scheduler.with_pages(self.compressor.apply, seq)
                if seq.is_running and seq.is_to_be_squeezed and seq.reciting is None:
                    self.scheduler.with_pages(self.pressure.squeeze, seq)
            except Exception:  # one plan's failure is its own request's
                log.exception("the plan of request %s failed", seq.request_id)
                lost += self._lose(seq.request_id, "the engine failed to compress this request")
        return lost

    def _sample(self, batch: ScheduledBatch, logits: torch.Tensor, draws: dict[Sequence, Draw]) -> None:
        """Adds to `draws` one token for each other sequence that has read all it knows; the choices of a request share
        its first logits."""
        rows: list[int] = []
        seqs: list[Sequence] = []
        logits = keep_for_later(batch.seqs, batch.logit_rows, logits)
        for row, seq in zip(batch.logit_rows.tolist(), batch.seqs, strict=True):
            if not seq.is_running or seq.remaining or seq in draws or seq.probe is not None:
                continue
            if seq.sampled == 0:
                self.totals.prompt_tokens += seq.prompt_tokens
            group = [seq, *self.scheduler.fork(seq)]
            rows += [row] * len(group)
            seqs += group
        if not seqs:
            return
        if rows != list(range(len(logits))):
            logits = logits[to_device(torch.tensor(rows), logits.device)]
        slots = np.array([seq.slot for seq in seqs], np.int64)
        sampled = self.sampler.sample(logits, self.table.batch(slots))
        draws |= {seq: sampled.draw(row) for row, seq in enumerate(seqs)}

    def _commit(self, draws: dict[Sequence, Draw]) -> list[StepOutput]:
        """Appends the sampled tokens, ends what is over, and says so."""
        outputs: list[StepOutput] = []
        slots = [seq.slot for seq, draw in draws.items() for _ in draw.tokens if seq.is_running]
        tokens = [token for seq, draw in draws.items() for token in draw.tokens if seq.is_running]
        self.table.record(np.array(slots, np.int64), np.array(tokens, np.int64))
        for seq, draw in draws.items():
            if not seq.is_running:
                continue  # preempted, or lost with another choice of its request
            if draw.is_bad:
                if self.cache is not None:  # whoever begins alike must not begin with these pages
                    self.cache.drop(seq.block_keys)
                outputs += self._lose(seq.request_id, "the model's output for this prompt is not a number")
                continue
            seq.append(draw)
            self.totals.generated_tokens += len(draw.tokens)
            self.speculator.counters.count(draw)
            output = Output(request_id=seq.request_id, index=seq.index, token_ids=draw.tokens, logprobs=draw.logprobs)
            reason = self._finish_reason(seq)
            outputs.append(self._last(seq, output, reason) if reason else output)
        return outputs

    def _answer_probes(self, batch: ScheduledBatch) -> list[StepOutput]:
        """Says what was found out by sequences that have been read, and ends them."""
        outputs: list[StepOutput] = []
        for seq in batch.seqs:
            if seq.probe is not None and seq.is_running and not seq.remaining:
                answers = self.shortener.close(seq.request_id, seq.probe)
                if self.cache is not None and any(isinstance(answer, Rejected) for answer in answers):
                    self.cache.drop(seq.block_keys)
                self.scheduler.remove(seq)
                outputs += answers
        return outputs

    def _finish_reason(self, seq: Sequence) -> str | None:
        if seq.stops_at(int(seq.tokens[seq.length - 1]), seq.generated):
            return "stop"
        return "length" if seq.generated >= seq.sampling.max_tokens else None

    def _last(self, seq: Sequence, output: Output, reason: str) -> Output:
        """The choice's last output, with what it held; its pages are given back."""
        last = msgspec.structs.replace(
            output,
            finish_reason=reason,
            stop_token=output.token_ids[-1] if reason == "stop" and output.token_ids else None,
            cached_tokens=seq.cached_tokens,
            accepted_tokens=seq.accepted_tokens,
            rejected_tokens=seq.rejected_tokens,
            compression=self.scheduler.report(seq) if seq.is_running else seq.last_report,
        )
        if seq.is_running and self.cache is not None and seq.timeline.never_acts:
            # The next turn of a conversation begins with this one's tokens.
            self.cache.publish(self.cache.keys(seq.tokens[: seq.computed], seq.salt), seq.slot)
        self.scheduler.remove(seq)
        return last

    def _lose(self, request_id: str, message: str) -> list[StepOutput]:
        """Ends a request with an error that is not its sender's; said once, however many choices it had."""
        if not any(seq.request_id == request_id for seq in self.scheduler.sequences()):
            return []
        self.abort(request_id)
        return [Rejected(request_id, "internal", message)]

    # Requests --------------------------------------------------------------------------------------------------------

    def submit(self, request: Submit) -> None:
        """Queues a request. RequestError where it cannot be served; bounds are checked again here."""
        sampling, length = request.sampling, len(request.prompt)
        self._check_tokens("prompt", request.prompt)
        self._check_tokens("forced", request.forced)
        self._check_tokens("lead_ins", [token for part in request.lead_ins for token in part])
        check_sampling(sampling, self.config.vocab_size)
        if sampling.max_tokens < 1 + len(request.forced):
            least = 1 + len(request.forced)
            raise RequestError("max_tokens", f"max_tokens must be at least {least}, one more than tokens are forced")
        if request.forced and sampling.n > 1:
            raise RequestError("n", "n must be 1 where tokens are forced")
        if not 1 <= sampling.n <= self.settings.max_seqs:
            raise RequestError("n", f"n must be from 1 to {self.settings.max_seqs}")
        plan = resolve_quality(Plan.parse(request.plan), self.frontier, self.name)
        plan.check_windows(self.has_windows)
        longest = longest_text(plan, self.info)
        if length + sampling.max_tokens > longest:
            raise PromptTooLong(
                "max_tokens", f"{length} prompt tokens and {sampling.max_tokens} new ones exceed the model's {longest}"
            )
        speculation = parse_speculation(request.speculative)
        check_combination(speculation, plan)
        check_profiles(plan, self.profiles, self.name)
        if plan.shortens is not None:
            raise PlanNotSupported("compression.prompt", "compression.prompt: shorten a prompt before it is submitted")
        stage_bounds = () if plan.evict is None else plan.evict.stage_bounds(self.config.layers)
        if stage_bounds and self.has_windows:
            path = "compression.kv.evict.policy"
            raise PlanNotSupported(path, f"{path}: prompts of a model with sliding windows are not read in stages")
        parts = parts_of(plan.evict, np.array(request.prompt, np.int32), request.lead_ins, self.max_model_len - length)
        timeline = Timeline.of(plan, length, self.arena.layout)
        self.side.check_room(timeline, length + max([sampling.max_tokens, *map(len, parts)]))
        seed = int.from_bytes(os.urandom(8), "little") if sampling.seed is None else sampling.seed
        self._arrivals += 1
        first, *siblings = [
            Sequence(
                request_id=request.request_id,
                index=index,
                arrival=self._arrivals,
                sampling=sampling,
                plan=plan,
                timeline=timeline,
                tokens=room_for(request.prompt, sampling.max_tokens, request.forced),
                length=length + len(request.forced),
                prompt_tokens=length,
                seed=choice_seed(seed, index),
                plan_seed=seed & (1 << 64) - 1,
                salt=request.cache_salt,
                speculation=speculation,
                forced=len(request.forced),
                stage_bounds=stage_bounds,
                recital=Recital(parts) if parts else None,
            )
            for index in range(sampling.n)
        ]
        if self.cache is not None:
            keys = self.cache.keys(first.tokens[:length], first.salt)
            for seq in (first, *siblings):
                seq.block_keys = keys
        first.siblings = siblings
        self.scheduler.add(first)

    def shorten(self, request: Shorten) -> None:
        """Begins to shorten a prompt; the answer is among the outputs of a later step. RequestError as for `submit`."""
        self._check_tokens("prompt", request.prompt)
        job = self.shortener.open(request)
        if job.probe is None:
            return
        length = job.probe.tokens_to_read
        if length > self.max_model_len:
            self.shortener.forget(request.request_id)
            raise PromptTooLong(
                "prompt", f"{length} prompt tokens exceed the {self.max_model_len} of the model that is to rank them"
            )
        self._arrivals += 1
        seq = probing(request.request_id, request.prompt[:length], job.probe, self._arrivals, self.arena.layout)
        if self.cache is not None:
            seq.block_keys = self.cache.keys(seq.tokens, request.cache_salt)
        self.scheduler.add(seq)

    def _check_tokens(self, name: str, tokens: list[int]) -> None:
        if name == "prompt" and not tokens:
            raise RequestError(name, "the prompt has no tokens")
        if not all(0 <= token < self.config.vocab_size for token in tokens):
            raise RequestError(name, f"token ids must be below {self.config.vocab_size}")

    def abort(self, request_id: str) -> None:
        """Ends all choices of a request and gives their pages back."""
        self.shortener.forget(request_id)
        for seq in [seq for seq in self.scheduler.sequences() if seq.request_id == request_id]:
            self.scheduler.remove(seq)

    def finish(self, request_id: str, index: int) -> list[StepOutput]:
        """Ends one choice whose text is complete (a stop string) and reports on it."""
        for seq in self.scheduler.sequences():
            if seq.request_id == request_id and seq.index == index:
                return [self._last(seq, Output(request_id=request_id, index=index, token_ids=[]), "stop")]
        return []

    @property
    def can_step(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def is_idle(self) -> bool:
        return not self.can_step and self.shortener.is_idle

    # What it looks like ----------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return info_of(self)

    @property
    def stats(self) -> EngineStats:
        return stats_of(self)

    def check_integrity(self) -> None:
        """AssertionError if a page is lost, counted wrongly or in two places."""
        self.arena.check_integrity(np.empty(0, np.int32) if self.cache is None else self.cache.pages())
