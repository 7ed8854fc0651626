"""Who reads by a rule: gives sequences under a `kv.read` plan what the kernels keep for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from winnow.engine.compression.read import Read
from winnow.engine.compression.read_policy import LaneShape, Profile
from winnow.engine.pages import PageArena
from winnow.engine.sequence import Sequence
from winnow.kernels.layout import PageFormat
from winnow.kernels.reading import ReadRule, ReadState


class Reader:
    """Makes rules, and the state of the sequences that read by them."""

    def __init__(self, arena: PageArena, shape: LaneShape, profiles: Mapping[str, Profile]):
        """`profiles`: by policy, of the model that is served."""
        self._arena = arena
        self._shape = shape
        self._profiles = profiles
        self._rule = lru_cache(maxsize=256)(self._make_rule)

    def _make_rule(self, read: Read) -> ReadRule:
        return read.rule(self._shape, self._profiles.get(read.policy, {}))

    def prepare(self, seq: Sequence) -> None:
        """Before a step of generated tokens, which the lanes count as kept already: rows of the prompt read all, and so
        do those that repeat it."""
        if seq.plan.read is None or seq.computed < seq.prompt_tokens or seq.reciting is not None:
            return
        arena, shape = self._arena, self._shape
        state = arena.kv.reading.get(seq.slot)
        if state is None:
            rule = self._rule(seq.plan.read)
            lanes = (shape.layers, shape.kv_heads, shape.q_heads, shape.head_dim)
            state = ReadState.empty(rule, *lanes, arena.kv.device)
            arena.kv.reading[seq.slot] = state
        pages = arena.columns[seq.slot]
        if PageFormat(int(arena.formats[seq.slot])).is_integer:
            pages = pages - arena.sealed[seq.slot]
        state.reserve(int(arena.kept[seq.slot].max()), int(pages.max()))
