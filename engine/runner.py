"""Puts a step's tokens and lanes into tensors and passes them through the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from winnow.engine.models.decoder import Watch
from winnow.engine.pages import Ints, PageArena
from winnow.engine.probe import Probe
from winnow.engine.scheduler import ScheduledBatch
from winnow.kernels.kv import LaneBatch, PagedKV


class Model(Protocol):
    def forward(self, tokens: Tensor, batch: LaneBatch, kv: PagedKV, rows: Tensor) -> Tensor: ...

    def hidden(
        self, tokens: Tensor, batch: LaneBatch, kv: PagedKV, rows: Tensor, watch: Watch | None = None
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Look:
    """What a probe sees of a step."""

    probe: Probe
    slot: int
    position: int
    """Of the first of its rows"""
    rows: slice


class Runner:
    """Stateless beside the model and the arena."""

    def __init__(self, model: Model, arena: PageArena):
        self._model = model
        self._arena = arena

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> Tensor:
        """K and V of the step's tokens go to pages.

        Returns:
            [R, vocab] float32 logits after the last known token of each sequence and after each guess behind it,
            sequence after sequence (`ScheduledBatch.logit_rows`), then after its `more_rows`.
        """
        counts = batch.counts
        cu_rows = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=cu_rows[1:])
        starts = np.array([seq.computed for seq in batch.seqs], np.int32)
        positions = np.arange(cu_rows[-1], dtype=np.int32) + np.repeat(starts - cu_rows[:-1], counts)
        chunks = zip(batch.seqs, counts.tolist(), strict=True)
        tokens = np.concatenate([seq.tokens[seq.computed : seq.computed + count] for seq, count in chunks])
        votes = np.array([seq.vote_start for seq in batch.seqs], np.int64)
        first_vote = np.clip(votes - starts, 0, counts).astype(np.int32)
        lanes = LaneBatch(
            slots=torch.from_numpy(batch.slots),
            cu_rows=torch.from_numpy(cu_rows),
            positions=torch.from_numpy(positions),
            first_vote=torch.from_numpy(first_vote),
        )
        wanted = batch.drafts + 1
        shift = cu_rows[1:] - wanted - batch.logit_rows
        rows = torch.from_numpy(np.concatenate((np.arange(wanted.sum()) + np.repeat(shift, wanted), batch.more_rows)))
        looks = _looks(batch, starts, cu_rows)
        if looks:
            return self._probe(torch.from_numpy(tokens), lanes, rows, looks)
        return self._model.forward(torch.from_numpy(tokens), lanes, self._arena.kv, rows)

    def _probe(self, tokens: Tensor, lanes: LaneBatch, rows: Tensor, looks: list[Look]) -> Tensor:
        """The same, and shows probes what they ask for."""

        def watch(layer: int, queries: Tensor) -> None:
            for look in looks:
                look.probe.see_queries(layer, look.slot, look.position, queries[look.rows])

        asking = [look for look in looks if look.probe.wants_logits]
        wanted = [torch.arange(look.rows.start, look.rows.stop) for look in asking]
        hidden = self._model.hidden(tokens, lanes, self._arena.kv, torch.cat([rows, *wanted]), watch)
        own, *seen = hidden.split([len(rows), *map(len, wanted)])
        for look, part in zip(asking, seen, strict=True):
            look.probe.see_hidden(look.position, part, self._model.logits)
        return self._model.logits(own)


def _looks(batch: ScheduledBatch, starts: Ints, cu_rows: Ints) -> list[Look]:
    looks = []
    for seq, start, first, last in zip(batch.seqs, starts.tolist(), cu_rows[:-1], cu_rows[1:], strict=True):
        if seq.probe is not None and start + last - first > seq.probe.first_row:
            skipped = max(0, seq.probe.first_row - start)
            looks.append(Look(seq.probe, seq.slot, start + skipped, slice(int(first) + skipped, int(last))))
    return looks
