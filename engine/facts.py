"""What an engine says of itself: to the server, and through it to metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from winnow.engine.messages import EngineInfo, EngineStats

if TYPE_CHECKING:
    from winnow.engine.engine import Engine


@dataclass
class Totals:
    """What it has done since it started."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0


def info_of(engine: Engine) -> EngineInfo:
    """What does not change while the engine lives."""
    layout = engine.arena.layout
    return EngineInfo(
        model=engine.name,
        max_model_len=engine.max_model_len,
        vocab_size=engine.config.vocab_size,
        layers=engine.config.layers,
        kv_heads=engine.config.kv_heads * engine.arena.ranks.size,
        head_dim=engine.config.head_dim,
        compute_format=layout.compute.label,
        page_bytes=layout.page_bytes,
        page_tokens=layout.page_tokens,
        total_pages=engine.arena.total,
        weights=engine.settings.weights,
        device=engine.settings.device,
        profiles=tuple(sorted(engine.profiles)),
        frontier=engine.frontier,
        missing_policies=engine.shortener.missing,
        max_stream_len=max(engine.max_model_len, engine.settings.max_stream_len),
        has_windows=engine.has_windows,
        draft_max_len=None if engine.draft is None else engine.draft.max_len,
        formats=engine.formats,
        sees={} if engine.pictures is None else dict(engine.pictures.eyes.sees),
    )


def stats_of(engine: Engine) -> EngineStats:
    """What it has done, and what it holds now."""
    counters, freed, drafts = engine.scheduler.counters, engine.compressor.freed, engine.speculator.counters
    cached = 0 if engine.cache is None else engine.cache.reclaimable()
    draft = None if engine.draft is None else stats_of(engine.draft.engine)
    waiting = [*engine.scheduler.waiting, *([] if engine.draft is None else engine.draft.waiting)]
    pictures = engine.pictures
    looking = [] if pictures is None else pictures.waiting
    return EngineStats(
        running=len(engine.scheduler.running),
        waiting=len(waiting) + len(looking),
        waiting_tokens=sum(seq.length for seq in waiting) + sum(len(request.prompt) for request in looking),
        pages_free=engine.arena.free_count,
        pages_cached=cached,
        pages_total=engine.arena.total,
        prompt_tokens_total=engine.totals.prompt_tokens,
        generated_tokens_total=engine.totals.generated_tokens,
        prefix_hit_tokens_total=counters.hit_tokens,
        prefix_query_tokens_total=counters.queried_tokens,
        documents=0 if engine.cache is None else len(engine.cache.documents),
        document_hit_tokens_total=counters.document_hit_tokens,
        document_query_tokens_total=counters.document_queried_tokens,
        preemptions_total=counters.preemptions,
        evicted_tokens_total=engine.compressor.freed.tokens,
        freed_bytes_total=freed.bytes,
        squeezes_total=engine.pressure.squeezes,
        drafts_total=drafts.drafts,
        draft_tokens_total=drafts.draft_tokens,
        accepted_tokens_total=drafts.accepted_tokens,
        accepted_tokens_by_place=drafts.accepted_at,
        draft_pages_free=0 if draft is None else draft.pages_free + draft.pages_cached,
        draft_pages_total=0 if draft is None else draft.pages_total,
        images_total=0 if pictures is None else pictures.counters.seen,
        image_hits_total=0 if pictures is None else pictures.counters.found,
        image_seconds_total=0.0 if pictures is None else pictures.counters.seconds,
        image_cache_bytes=0 if pictures is None else pictures.album.held_bytes,
        steps_total=engine.totals.steps,
        step_seconds_total=engine.totals.step_seconds,
    )
