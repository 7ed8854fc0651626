"""Who reads by a rule: gives sequences under a `kv.read` plan what the kernels keep for them, and says its size."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from winnow.engine.compression.read import Read
from winnow.engine.compression.read_policy import LaneShape, Profile
from winnow.engine.errors import PlanNotSupported
from winnow.engine.lanes import room
from winnow.engine.pages import Ints, PageArena
from winnow.engine.sequence import Sequence
from winnow.kernels.layout import PageFormat
from winnow.kernels.reading import ReadRule, ReadState

NO_GROWTH: Ints = np.zeros(1, np.int32)


class Reader:
    """Makes rules, and the state of the sequences that read by them."""

    def __init__(self, arena: PageArena, shape: LaneShape, profiles: Mapping[str, Profile]):
        """`profiles`: by policy, of the lanes' heads."""
        self._arena = arena
        self._lanes = (shape.layers, shape.kv_heads, shape.q_heads, shape.head_dim)
        self._shape = shape
        self._profiles = profiles
        self._rule = lru_cache(maxsize=256)(self._make_rule)

    def _make_rule(self, read: Read) -> ReadRule:
        return read.rule(self._shape, self._profiles.get(read.policy, {}))

    def check(self, read: Read) -> None:
        """PlanNotSupported where the votes that choose are those of heads at several ranks."""
        if self._arena.ranks.size > 1 and self._rule(read).votes_by_layer:
            path = "compression.kv.read.policy"
            why = f"all heads of a layer choose together under '{read.policy}', and tensor_parallel keeps them apart"
            raise PlanNotSupported(path, f"{path}: {why}")

    def prepare(self, seq: Sequence) -> None:
        """Before a step of generated tokens, which the lanes count as kept already: rows of the prompt read all, and so
        do those that repeat it."""
        if seq.plan.read is None or seq.computed < seq.prompt_tokens or seq.reciting is not None:
            return
        if seq.slot not in self._arena.kv.reading:
            rule = self._rule(seq.plan.read)
            self._arena.kv.reading[seq.slot] = ReadState.empty(rule, *self._lanes, self._arena.kv.device)
        self._arena.kv.reading[seq.slot].begin_step()
        self.fit(seq)

    def withdrawn(self, seq: Sequence) -> None:
        """After the step that `prepare` was for lost all its rows."""
        if (state := self._arena.kv.reading.get(seq.slot)) is not None:
            state.forget_step()

    def fit(self, seq: Sequence) -> None:
        """Makes the state's room what its lanes' lengths are."""
        if (state := self._arena.kv.reading.get(seq.slot)) is not None:
            state.resize(*self._room(seq.slot, NO_GROWTH))

    def size(self, seq: Sequence, upto: int, growth: Ints) -> int:
        """Bytes that are held, or from the prompt's last row on promised, when the sequence has read up to `upto` and
        its lanes have gained `growth` [1] or [layers] tokens."""
        if seq.plan.read is None or upto < seq.prompt_tokens:
            return 0
        return ReadState.size(self._rule(seq.plan.read), *self._lanes, *self._room(seq.slot, growth))

    def most_bytes(self, read: Read, tokens: int) -> int:
        """Bytes that it may come to for lanes of as many tokens."""
        pages = self._arena.layout.pages(tokens)
        return ReadState.size(self._rule(read), *self._lanes, room(tokens), room(pages))

    def _room(self, slot: int, growth: Ints) -> tuple[int, int]:
        """Tokens, and pages in a float format, that there is room for."""
        arena = self._arena
        pages = arena.columns_for(np.array([slot], np.int32), growth[None])[0]
        if PageFormat(int(arena.formats[slot])).is_integer:
            pages = pages - arena.sealed[slot]
        return room(int((arena.kept[slot] + growth[:, None]).max())), room(int(pages.max()))
