"""Elastic plans: when pages run out, whoever wrote `on_pressure` is compressed further before anybody is preempted.

A squeeze happens between events, wherever the sequence stands, and once: from there on `Plan.under_pressure` rules. The
position is kept, so that a sequence that is preempted later and read anew is squeezed there again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from winnow.engine.compression.apply import Compressor
from winnow.engine.compression.side_state import SideState
from winnow.engine.compression.timeline import NEVER
from winnow.engine.pages import OutOfPages, PageArena
from winnow.engine.sequence import Sequence


class Pressure:
    """Squeezes sequences."""

    def __init__(self, compressor: Compressor, side: SideState, arena: PageArena):
        self._compressor = compressor
        self._side = side
        self._arena = arena
        self.squeezes = 0
        """Sequences squeezed since the engine started"""
        self.spare: Callable[[], bool] = lambda: False
        """Gives back pages of the arena that none of the engine's sequences hold; false if there are none"""

    def relieve(self, seqs: Iterable[Sequence]) -> bool:
        """Squeezes the sequence to which that gives back most pages, the last of several; false if there is none. What
        can be spared comes first."""
        if self.spare():
            return True
        gains = [(self._gain(seq), place, seq) for place, seq in enumerate(seqs) if seq.can_be_squeezed]
        for gain, _, seq in sorted(gains, key=lambda entry: entry[:2], reverse=True):
            if gain <= 0:
                break
            try:
                self.squeeze(seq)
                return True
            except OutOfPages:  # its pages are others' too, and copies find no place: the next one's may be its own
                continue
        return False

    def squeeze(self, seq: Sequence) -> None:
        """Puts a sequence's plan for when pages run out into force. OutOfPages leaves it untouched."""
        further, squeezed_at = seq.plan.on_pressure, seq.squeezed_at
        assert further is not None
        seq.squeeze(self._arena.layout)
        try:
            self._compressor.compress(seq, None if further.evict is None else seq.plan.evict)
        except OutOfPages:
            seq.relax()
            seq.squeezed_at = squeezed_at
            self._side.settle(seq)
            raise
        self.squeezes += squeezed_at == NEVER

    def _gain(self, seq: Sequence) -> int:
        """Pages that a squeeze will free, about: heads and layers may share a budget out."""
        arena, layout, plan = self._arena, self._arena.layout, seq.plan.under_pressure
        assert plan is not None
        count = arena.kept[seq.slot]
        if plan.evict is not seq.plan.evict:
            count = np.minimum(count, plan.budget_tokens(seq.computed))
        fmt = plan.sealed_format(layout.compute)
        packed = layout.capacity(fmt)
        sealed = (count - plan.residual).clip(0) // packed if fmt is not layout.compute else 0 * count
        columns = sealed - (sealed * packed - count) // layout.page_tokens
        return arena.ranks.total(int((arena.columns[seq.slot] - columns).sum()))
