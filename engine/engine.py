"""The engine: requests in, tokens out. Everything it does is in `step`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

from winnow.engine.answers import Answers, StepOutput
from winnow.engine.calibration.bases import bases_of
from winnow.engine.calibration.store import NO_PROFILES, Profile
from winnow.engine.compression.apply import Compressor
from winnow.engine.compression.pressure import Pressure
from winnow.engine.compression.read_policy import LaneShape
from winnow.engine.compression.reader import Reader
from winnow.engine.compression.side_state import SideState
from winnow.engine.config import EngineSettings
from winnow.engine.draft import Draft
from winnow.engine.drawing import Drawing
from winnow.engine.errors import ModelError, RequestError
from winnow.engine.facts import Totals, info_of, stats_of
from winnow.engine.graphs import Graphs
from winnow.engine.intake import Intake
from winnow.engine.memory import arena_pages
from winnow.engine.messages import (
    EngineInfo,
    EngineStats,
    FrontierPoint,
    Output,
    Shorten,
    Submit,
)
from winnow.engine.models.decoder import Decoder
from winnow.engine.pages import NO_PAGES, PageArena
from winnow.engine.pictures import Pictures
from winnow.engine.prefix_cache import PrefixCache
from winnow.engine.progress import Progress
from winnow.engine.ranks import Ranks
from winnow.engine.runner import Runner
from winnow.engine.sampler import Sampler
from winnow.engine.sampling import SamplingTable
from winnow.engine.scheduler import Scheduler
from winnow.engine.sequence import Sequence
from winnow.engine.shortener import Shortener
from winnow.engine.speculation.method import Tools
from winnow.engine.speculation.speculator import Speculator
from winnow.engine.tower_protocol import Eyes
from winnow.kernels.dispatch import Backend
from winnow.kernels.layout import PageLayout

log = logging.getLogger(__name__)


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
        draft: Engine | None = None,
        eyes: Eyes | None = None,
    ):
        """
        Args
            draft: of a smaller model with the same vocabulary
            eyes: the model's vision tower, if it has one
        """
        config, ranks = model.config, model.ranks
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
        self.arena = PageArena(layout, pages, settings.max_seqs, config.layers, config.kv_heads, ops, ranks)
        own = _own_part(profiles, ranks)
        if bases := bases_of(own, ops.device()):
            self.arena.kv.bases, self.arena.kv.rope = bases, model.rope
        self.cache = PrefixCache(self.arena) if settings.prefix_caching else None
        shape = LaneShape(config.layers, config.kv_heads, config.heads, config.head_dim)
        self.reader = Reader(self.arena, shape, own)
        self.side = SideState(self.arena, config, self.reader)
        self.compressor = Compressor(self.arena, self.cache, self.side, ops, config, profiles)
        self.table = SamplingTable(settings.max_seqs, config.vocab_size)
        self.pressure = Pressure(self.compressor, self.side, self.arena)
        sampler = Sampler(ranks=ranks)
        self.draft = None if draft is None else Draft(draft)
        self.speculator = Speculator(self.arena, self.side, Tools(self.table, sampler, self.draft))
        self.scheduler = Scheduler(
            self.arena,
            self.cache,
            self.table,
            settings.max_step_tokens,
            self.side,
            squeeze=self._make_way,
            propose=self.speculator.propose,
        )
        self.graphs: Graphs | None = None
        if settings.device == "cuda" and settings.cuda_graphs and ranks.size == 1:
            self.graphs = Graphs(model, self.arena.kv, settings.max_seqs)
        self.runner = Runner(model, self.arena, self.graphs)
        self.shortener = Shortener(settings, config, self.arena, ops)
        self.has_windows = any(config.windows)
        self.formats = tuple(fmt.label for fmt in ops.page_formats())
        self.intake = Intake(self)
        self.pictures: Pictures | None = None
        if eyes is not None:
            room = int(settings.image_cache_gib * 2**30)
            self.pictures = Pictures(eyes, model.embed, self.intake.sequence, room, ops.device())
        self.totals = Totals()
        self.answers = Answers(
            self.scheduler, self.cache, self.table, self.shortener, self.totals, self.speculator.counters
        )
        self.progress = Progress(
            self.scheduler,
            self.arena,
            self.cache,
            self.compressor,
            self.pressure,
            self.speculator,
            self.answers,
        )
        is_async = bool(settings.async_scheduling) and ranks.size == 1
        self.drawing = Drawing(self.scheduler, self.table, sampler, self.totals, self.answers, is_async)

    # The step --------------------------------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """One pass of the model over whoever can run; returns what there is to tell."""
        began = time.perf_counter()
        self.answers.tell(self.shortener.poll())
        if self.pictures is not None:
            self.pictures.step(self.scheduler, self.answers)
        if self.draft is not None:
            self.draft.step(self.scheduler, self.answers)
        try:
            batch = self.scheduler.schedule()  # who runs, with which tokens, guesses and pages
            if not batch.seqs:
                self.drawing.settle()
                return self.answers.take()
            logits = self.runner.run(batch, self.drawing.unread_ids)  # one pass of the model; K and V go to pages
            self.drawing.settle()  # what the last step drew is read now, if it was not before
            said = self.progress.note(batch, logits)  # wrong guesses leave them, plans that are due are carried out
            self.drawing.draw(batch, logits, said)  # a token for each who has read all it knows
            self.answers.commit(said)  # tokens join the texts; who is done ends, and is told
            self.answers.answer_probes(batch)
        except Exception:
            if self.arena.ranks.size > 1:
                raise  # the others may have got further, and nobody could tell
            self._give_up()
        self.totals.steps += 1
        self.totals.step_seconds += time.perf_counter() - began
        return self.answers.take()

    def _give_up(self) -> None:
        """Ends everybody who may have had a part in a step that failed; whoever only waits is not among them."""
        self.drawing.forget()
        suspects = self.scheduler.running[:] or list(self.scheduler.waiting)[:1]
        log.exception("a step failed; %d sequences are given up", len(suspects))
        for seq in suspects:
            self.answers.lose(seq.request_id, "the engine failed on this batch")
        self.check_integrity()

    def _make_way(self, seqs: Iterable[Sequence]) -> bool:
        """When pages run out: lets those go who have said their last, or compresses one of these further."""
        return self.drawing.settle() or self.pressure.relieve(seqs)

    # Requests --------------------------------------------------------------------------------------------------------

    def submit(self, request: Submit) -> None:
        """Queues a request. RequestError where it cannot be served."""
        if request.pictures:
            if self.pictures is None:
                raise RequestError("messages", "messages: this model reads text only")
            return self.pictures.add(request, *self.intake.check(request))
        seq = self.intake.sequence(request)
        if self.draft is not None and seq.plan.evict is not None and seq.plan.evict.looks_ahead:
            self.draft.look_ahead(seq, seq.plan.evict.looks_ahead)
        else:
            self.scheduler.add(seq)

    def shorten(self, request: Shorten) -> None:
        """Begins to shorten a prompt; the answer is among the outputs of a later step. RequestError as for `submit`."""
        if self.draft is not None and self.draft.reads(request):
            self.draft.engine.shorten(request)
        elif (seq := self.intake.reader(request)) is not None:
            self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """Ends all choices of a request and gives their pages back."""
        self.answers.abort(request_id)
        if self.pictures is not None:
            self.pictures.forget(request_id)
        if self.draft is not None:
            self.draft.forget(request_id)

    def finish(self, request_id: str, index: int) -> list[StepOutput]:
        """Ends one choice whose text is complete (a stop string) and reports on it."""
        for seq in self.scheduler.sequences():
            if seq.request_id == request_id and seq.index == index:
                return [self.answers.end(seq, Output(request_id=request_id, index=index, token_ids=[]), "stop")]
        return []

    @property
    def can_step(self) -> bool:
        is_draft_at_work = self.draft is not None and self.draft.engine.can_step
        is_looking = self.pictures is not None and self.pictures.is_at_work
        return is_draft_at_work or is_looking or bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def is_idle(self) -> bool:
        return not self.can_step and self.shortener.is_idle and (self.draft is None or self.draft.is_idle)

    def stop(self) -> None:
        """Ends the threads that work beside it."""
        self.shortener.stop()

    # What it looks like ----------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return info_of(self)

    @property
    def stats(self) -> EngineStats:
        return stats_of(self)

    def check_integrity(self) -> None:
        """AssertionError if a page is lost, counted wrongly or in two places."""
        if self.cache is not None:
            self.cache.check_integrity()
        self.arena.check_integrity(NO_PAGES if self.cache is None else self.cache.pages())
        if self.draft is not None:
            self.draft.engine.check_integrity()


def _own_part(profiles: Mapping[str, Profile], ranks: Ranks) -> dict[str, Profile]:
    """What has been measured of the heads whose lanes are at this rank: all of it is [layers, heads, ...]."""
    return {method: {name: ranks.part(x, 1) for name, x in profile.items()} for method, profile in profiles.items()}
