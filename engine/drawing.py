"""Who is given a token by a step, and from which row of its logits; and when the token is read.

What is drawn stays where the logits are, and its copy is on its way to the host. With `async_scheduling` nobody waits
for it: the next step is planned and launched meanwhile, and reads the tokens where they are. That needs no ids, since
lengths are known ahead. Only then, with the device at work, are they read, one step late:

    host      launch 1   plan, launch 2   read 1, draw 2, plan, launch 3   read 2, ...
    device             1                2                               3

So whatever goes by ids still has them: penalties, stop tokens, plans that are due and what is told. Who turns out to
have ended is taken out of the step that is under way, as wrong guesses are: the row leaves its lanes. So is a sequence
whose token could not be told without the host (`Sampled.late`), which reads the right one in the next step. A row that
votes or chooses what it reads could not be read again (`Sequence.leaves_traces`): its token is made sure of where it is
drawn.

Ids are read at once where somebody guesses from them, since guesses are verified by the host in any case (see
speculation/speculator.py), and before anybody has to give way for want of pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from winnow.engine.answers import Answers
from winnow.engine.facts import Totals
from winnow.engine.recital import keep_for_later
from winnow.engine.sampler import Draw, Drawn, Sampler
from winnow.engine.sampling import SamplingTable
from winnow.engine.scheduler import ScheduledBatch, Scheduler
from winnow.engine.sequence import Sequence
from winnow.kernels.host import to_device


@dataclass(frozen=True, slots=True)
class Unread:
    """What a step has drawn."""

    seqs: list[Sequence]
    """Whose token is in each row"""
    drawn: Drawn


class Drawing:
    """Samples for sequences that have read all they know."""

    def __init__(
        self,
        scheduler: Scheduler,
        table: SamplingTable,
        sampler: Sampler,
        totals: Totals,
        answers: Answers,
        is_async: bool,
    ):
        """
        Args
            is_async: tokens are read one step late
        """
        self._scheduler = scheduler
        self._table = table
        self._sampler = sampler
        self._totals = totals
        self._answers = answers
        self._is_async = is_async
        self._unread: Unread | None = None

    @property
    def unread_ids(self) -> Tensor | None:
        """[R] int64, where the logits are: the tokens whose rows are `Sequence.unread`."""
        return None if self._unread is None else self._unread.drawn.ids

    def draw(self, batch: ScheduledBatch, logits: Tensor, said: dict[Sequence, Draw]) -> None:
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
            return
        if rows != list(range(len(logits))):
            logits = logits[to_device(torch.tensor(rows), logits.device)]
        slots = np.array([seq.slot for seq in seqs], np.int64)
        is_read_ahead = self._is_async and all(seq.can_read_ahead for seq in seqs)
        is_sure = np.array([is_read_ahead and seq.leaves_traces for seq in seqs])
        self._unread = Unread(seqs, self._sampler.launch(logits, self._table.batch(slots), is_sure))
        for row, seq in enumerate(seqs):
            seq.unread = row
        if not is_read_ahead:
            self.settle()

    def settle(self) -> bool:
        """Reads what was drawn, if that has not been done: tokens join the texts, and who is done ends. False if there
        was nothing to read."""
        if self._unread is None:
            return False
        unread, self._unread = self._unread, None
        sampled = unread.drawn.read()
        for row in np.flatnonzero(sampled.late):
            self._scheduler.withdraw(unread.seqs[row])
        # Who is not there any more, or was preempted, draws no token, or the same one later.
        self._answers.commit({seq: sampled.draw(row) for row, seq in enumerate(unread.seqs) if seq.unread == row})
        return True

    def forget(self) -> None:
        """Nobody is there any more to say what was drawn."""
        self._unread = None
