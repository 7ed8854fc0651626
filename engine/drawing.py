"""Who is given a token by a step, and from which row of its logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from winnow.engine.facts import Totals
from winnow.engine.recital import keep_for_later
from winnow.engine.sampler import Draw, Sampler
from winnow.engine.sampling import SamplingTable
from winnow.engine.scheduler import ScheduledBatch, Scheduler
from winnow.engine.sequence import Sequence
from winnow.kernels.host import to_device


class Drawing:
    """Samples for sequences that have read all they know."""

    def __init__(self, scheduler: Scheduler, table: SamplingTable, sampler: Sampler, totals: Totals):
        self._scheduler = scheduler
        self._table = table
        self._sampler = sampler
        self._totals = totals

    def draw(self, batch: ScheduledBatch, logits: Tensor, said: dict[Sequence, Draw]) -> dict[Sequence, Draw]:
        """One token for each who has none in `said`; the choices of a request, which begin here, share its first
        logits."""
        rows: list[int] = []
        seqs: list[Sequence] = []
        logits = keep_for_later(batch.seqs, batch.logit_rows, logits)
        for row, seq in zip(batch.logit_rows.tolist(), batch.seqs, strict=True):
            if not seq.is_running or seq.remaining or seq in said or seq.probe is not None:
                continue
            if seq.sampled == 0:
                self._totals.prompt_tokens += seq.prompt_tokens
            group = [seq, *self._scheduler.fork(seq)]
            rows += [row] * len(group)
            seqs += group
        if not seqs:
            return {}
        if rows != list(range(len(logits))):
            logits = logits[to_device(torch.tensor(rows), logits.device)]
        slots = np.array([seq.slot for seq in seqs], np.int64)
        sampled = self._sampler.sample(logits, self._table.batch(slots))
        return {seq: sampled.draw(row) for row, seq in enumerate(seqs)}
