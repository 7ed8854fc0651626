"""Recorded steps: on a GPU, a step in which every sequence has one row is launched as one CUDA graph.

A graph is recorded for a number of rows and for what kernels are chosen by: the formats of full pages, the side state
that lanes have, whether rows vote or choose what they read. What it reads of a step is brought to where it was when the
graph was recorded; a step of fewer rows is filled up with nobody's. It holds the tables' address: where they grow, it
is recorded again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from winnow.engine.models.decoder import Decoder
from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat

if TYPE_CHECKING:
    from winnow.kernels.triton.readers import Reading
    from winnow.kernels.triton.rules import Voting
    from winnow.kernels.triton.step import DeviceBatch, HostStep

log = logging.getLogger(__name__)

WORTH_IT = 2
"""Steps of a kind that were seen before one is recorded: it takes as long as several steps"""

MOST = 256
"""Graphs that are kept"""


class Kind(NamedTuple):
    rows: int
    sealed_formats: frozenset[PageFormat]
    rest_formats: frozenset[PageFormat]
    sides: tuple[str, ...]
    voting: Voting
    reading: Reading | None


@dataclass(frozen=True, slots=True)
class DeviceTokens:
    """Tokens of a step that nobody but the device knows yet."""

    rows: Tensor
    """[n] int64 of the step"""
    tokens: Tensor
    """[n] int32"""


@dataclass(frozen=True, slots=True)
class Recorded:
    step: DeviceBatch
    """What it reads"""
    rows: Tensor
    """So is this, whose memory must stay its own"""
    replay: Callable[[], object]


class Graphs:
    """The recorded steps of one model and arena."""

    def __init__(self, model: Decoder, kv: PagedKV, most_rows: int):
        from winnow.kernels.triton import step

        self._step = step
        self._model = model
        self._kv = kv
        self._sizes = sizes(most_rows)
        self._recorded: dict[Kind, Recorded] = {}
        self._refused: set[Kind] = set()
        self._seen: Counter[Kind] = Counter()
        self._table: Tensor | None = None
        self._is_gpu = kv.device.type == "cuda"
        self._logits = torch.empty((self._sizes[-1], model.config.vocab_size), device=kv.device)
        self._pool = self._new_pool()

    def warm_up(self, within_s: float) -> None:
        """Records steps of sequences without a plan until that has taken so long; large ones first, whose memory the
        others then share."""
        from winnow.kernels.triton.rules import NOBODY

        began = time.monotonic()
        self._forget_if_moved()
        for rows in reversed(self._sizes):
            if time.monotonic() - began > within_s:
                break
            self._record(Kind(rows, frozenset(), frozenset(), (), NOBODY, None))
        log.info("recorded %d steps in %.1f s", len(self._recorded), time.monotonic() - began)

    def run(self, tokens: Tensor, batch: LaneBatch, unread: DeviceTokens | None = None) -> Tensor | None:
        """[B, vocab] float32 logits after a step of one row for each sequence, valid until the next one; None, and only
        `batch` brought to the device, where there is no graph for it. `tokens` [B] int32 are in host memory; those that
        are `unread` mean nothing."""
        host, kv = self._step.host_step(batch, self._kv), self._kv
        host.parts["tokens"] = tokens
        recorded = self._find(host)
        if recorded is None:
            batch.native = self._step.bring(host, kv)
            return None
        there = recorded.step
        self._step.bring_into(there, self._step.padded(host, there.size, kv, there.reading), kv)
        if unread is not None:
            assert recorded.step.tokens is not None
            recorded.step.tokens[unread.rows] = unread.tokens
        recorded.replay()
        return self._logits[: len(tokens)]

    def _find(self, host: HostStep) -> Recorded | None:
        if host.size > self._sizes[-1]:
            return None
        if not all(host.ready):
            return None  # kernels will say what is wrong
        if host.angles_end > self._model.config.max_position:
            raise IndexError(f"a position is not below {self._model.config.max_position}")
        rows, reading = next(size for size in self._sizes if size >= host.size), host.reading
        if reading is not None:  # as few kinds as may be
            readers = min(rows, _power_of_two(reading.readers))
            reading = reading._replace(readers=readers, rows=readers, units=_power_of_two(reading.units))
        kind = Kind(rows, host.sealed_formats, host.rest_formats, host.sides, host.voting, reading)
        self._forget_if_moved()
        self._seen[kind] += 1
        if kind not in self._recorded and kind not in self._refused and self._seen[kind] >= WORTH_IT:
            self._record(kind)
        return self._recorded.get(kind)

    def _forget_if_moved(self) -> None:
        table = self._step.device_table(self._kv)
        if table is not self._table:
            self._recorded.clear()
            self._refused.clear()
            self._pool = self._new_pool()
            self._table = table

    def _new_pool(self) -> Any:
        """Memory that graphs share. It is gone with the last of them: then others must not ask for it."""
        return torch.cuda.graph_pool_handle() if self._is_gpu else None

    @torch.inference_mode()
    def _record(self, kind: Kind) -> None:
        if len(self._recorded) == MOST:
            del self._recorded[next(iter(self._recorded))]
        kv, device = self._kv, self._kv.device
        nobody = self._step.nobody(kind.rows, kv, *kind[1:])
        rows = torch.arange(kind.rows, device=device)
        out = self._logits[: kind.rows]

        def forward(step: DeviceBatch) -> None:
            step.forget_what_was_made()  # the making is part of the step
            parts = nobody.parts
            lanes = LaneBatch(parts["slots"], parts["cu_rows"], parts["positions"], parts["first_vote"], native=step)
            assert step.tokens is not None
            self._model.logits(self._model.hidden(step.tokens, lanes, kv, rows), out)

        step = self._step.bring(nobody, kv)
        try:
            if self._is_gpu:
                forward(self._step.bring(nobody, kv))  # compiles what is to be recorded
            self._recorded[kind] = Recorded(step, rows, self._capture(partial(forward, step)))
        except RuntimeError:  # for want of memory, say
            log.exception("%s cannot be recorded: such steps are launched kernel by kernel", kind)
            self._refused.add(kind)

    def _capture(self, launch: Callable[[], None]) -> Callable[[], object]:
        """What does again what `launch` does."""
        if not self._is_gpu:  # Triton's interpreter: the same without a graph
            return launch
        graph = torch.cuda.CUDAGraph()
        # The outer context has the stream back where the inner one fails on its way in.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self._pool):
            launch()
        return graph.replay


def _power_of_two(count: int) -> int:
    """The least that is not below."""
    return 1 << (count - 1).bit_length()


def sizes(most: int) -> list[int]:
    """Numbers of rows that steps are recorded for: none takes many more than it needs."""
    steps: Iterable[int] = (1, 2, 4, *range(8, 257, 8), *range(288, 1025, 32))
    return [*(size for size in steps if size < most), min(most, 1024)]
