"""How long a text may get under a plan. The server asks before the engine does, of the same numbers."""

from __future__ import annotations

from collections.abc import Iterable

from winnow.engine.compression.plan import Plan
from winnow.engine.errors import PlanNotSupported
from winnow.engine.messages import EngineInfo, Picture


def longest_text(plan: Plan, info: EngineInfo) -> int:
    """Most tokens of prompt and output: the model's context, or beyond it the server's limit on streams, whose window
    alone must fit the context. PlanNotSupported where it does not."""
    evict = plan.evict
    if evict is None or not evict.is_compact:
        return info.max_model_len
    path = "compression.kv.evict"
    if info.has_windows:
        message = f"{path}.positions: 'compact' does not go with this model's own attention windows"
        raise PlanNotSupported(f"{path}.positions", message)
    window = evict.budget_tokens(info.max_stream_len) + max(evict.block_tokens, evict.interval)
    if window > info.max_model_len:
        raise PlanNotSupported(
            f"{path}.budget",
            f"{path}.budget: compact positions come to {window} tokens with a block or an interval, "
            f"and the model's context holds {info.max_model_len}",
        )
    return info.max_stream_len


def dropped_tokens(prompt: list[int], pictures: Iterable[Picture], plan: Plan, info: EngineInfo) -> int:
    """How many of a prompt's tokens the model is spared, about: exactly where all tokens of pictures stand for patches.
    The engine knows when it has seen the pictures."""
    vision, dropped = plan.prunes, 0
    if vision is None or not vision.shrinks_prompts:
        return 0
    for picture in (one for one in pictures if one.kind in vision.kinds):
        tokens = prompt[picture.first : picture.first + picture.span].count(info.sees[picture.kind])
        dropped += tokens - vision.tokens(tokens)
    return dropped
