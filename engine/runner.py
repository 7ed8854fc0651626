"""Puts a step's tokens and lanes into tensors and passes them through the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.engine.graphs import DeviceTokens, Graphs
from winnow.engine.models.decoder import Watch
from winnow.engine.pages import Ints, PageArena
from winnow.engine.probe import Probe
from winnow.engine.scheduler import ScheduledBatch
from winnow.engine.sequence import KNOWN
from winnow.kernels.host import to_device
from winnow.kernels.kv import LaneBatch, PagedKV


class Model(Protocol):
    def logits(self, hidden: Tensor) -> Tensor: ...

    def embed(self, tokens: Tensor) -> Tensor: ...

    def through(
        self, x: Tensor, layers: range, batch: LaneBatch, kv: PagedKV, rows: Tensor, watch: Watch | None = None
    ) -> Tensor: ...

    def turns(self, places: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Probed:
    """Rows of a step that a probe sees."""

    probe: Probe
    slot: int
    position: int
    """Of the first of its rows"""
    rows: slice


@dataclass(frozen=True, slots=True)
class Scene:
    """What a step reads of pictures."""

    rows: NDArray[np.int64]
    """[m] of the step"""
    embeddings: Tensor
    """[m, hidden size] float32, in host memory"""


class Runner:
    """Stateless beside the model and the arena."""

    def __init__(self, model: Model, arena: PageArena, graphs: Graphs | None = None):
        self._model = model
        self._arena = arena
        self._graphs = graphs
        self._layers = range(arena.kv.table.shape[1])

    def _there(self, host: NDArray[Any]) -> Tensor:
        return to_device(torch.from_numpy(host), self._arena.kv.device)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, unread_ids: Tensor | None = None) -> Tensor:
        """K and V of the step's tokens go to pages.

        Args:
            unread_ids: the tokens whose rows there are `Sequence.unread`

        Returns:
            [R, vocab] float32 logits after the last known token of each sequence and after each guess behind it,
            sequence after sequence (`ScheduledBatch.logit_rows`), then after its `more_rows`. A sequence amid the
            stages of its prompt has none yet: its row is zero.
        """
        stages = [None if seq.staging is None else seq.staging.layers for seq in batch.seqs]
        if not any(stages):
            return self._whole(batch, unread_ids)
        ends, sizes = batch.counts.cumsum(), batch.drafts + 1
        owner = np.searchsorted(ends, batch.more_rows, side="right")
        logits: Tensor | None = None
        for layers in dict.fromkeys(stages):
            members = np.array([i for i, stage in enumerate(stages) if stage == layers])
            part = ScheduledBatch([batch.seqs[i] for i in members], batch.counts[members], batch.drafts[members])
            more = np.flatnonzero(np.isin(owner, members))
            moved = part.counts.cumsum() - ends[members]
            part.more_rows = batch.more_rows[more] + moved[np.searchsorted(members, owner[more])]
            made = self._whole(part, unread_ids) if layers is None else self._stage(part, layers)
            if made is None:
                continue
            if logits is None:
                logits = made.new_zeros(int(sizes.sum()) + len(batch.more_rows), made.shape[-1])
            own = np.arange(part.drafts.sum() + len(members))
            own += np.repeat(batch.logit_rows[members] - part.logit_rows, sizes[members])
            logits[self._there(np.concatenate((own, more + sizes.sum())))] = made
        return torch.zeros(len(batch.seqs), 1, device=self._arena.kv.device) if logits is None else logits

    def _whole(self, batch: ScheduledBatch, unread_ids: Tensor | None) -> Tensor:
        """[R, vocab] logits after chunks that pass through all layers."""
        counts, wanted = batch.counts, batch.drafts + 1
        ends = counts.cumsum(dtype=np.int32)
        starts = np.array([seq.rows_read for seq in batch.seqs], np.int32)
        places = starts - np.array([seq.turned_back for seq in batch.seqs], np.int32)
        step_rows = np.arange(ends[-1], dtype=np.int32)
        positions = step_rows + np.repeat(places - ends + counts, counts)
        chunks = zip(batch.seqs, counts.tolist(), strict=True)
        tokens = np.concatenate([seq.next_tokens(count) for seq, count in chunks])
        lanes = _lanes(batch, starts, positions)
        probed = _probed(batch, starts, lanes.cu_rows.numpy())
        scene = self._scene(batch, lanes, step_rows + np.repeat(starts - ends + counts, counts))
        unread = self._unread(batch, ends, unread_ids)
        is_decode = len(tokens) == len(batch.seqs) and not len(batch.more_rows)
        if self._graphs is not None and is_decode and not probed and scene is None and lanes.rope is None:
            logits = self._graphs.run(torch.from_numpy(tokens), lanes, unread)
            if logits is not None:
                return logits
        own = np.arange(wanted.sum()) + np.repeat(ends - wanted - batch.logit_rows, wanted)
        rows = self._there(np.concatenate((own, batch.more_rows)))
        x = self._embed(tokens, scene, unread)
        if probed:
            return self._probe(x, lanes, rows, probed)
        return self._model.logits(self._model.through(x, self._layers, lanes, self._arena.kv, rows))

    def _stage(self, batch: ScheduledBatch, layers: range) -> Tensor | None:
        """Passes chunks through the layers of a stage; [R, vocab] logits after them if it is the last."""
        stagings = [seq.staging for seq in batch.seqs if seq.staging is not None]
        counts = batch.counts.tolist()
        chunks = [slice(staging.done, staging.done + count) for staging, count in zip(stagings, counts, strict=True)]
        places = list(zip(stagings, chunks, strict=True))
        positions = np.concatenate([staging.rows[chunk] for staging, chunk in places])
        lanes = _lanes(batch, np.array([staging.done for staging in stagings], np.int32), positions)
        scene = self._scene(batch, lanes, positions)
        if layers.start == 0:
            tokens = np.concatenate([seq.tokens[chunk] for seq, chunk in zip(batch.seqs, chunks, strict=True)])
            x = self._embed(tokens, scene)
        else:
            x = torch.cat([staging.hidden[chunk] for staging, chunk in places if staging.hidden is not None])
        rows = self._there(np.concatenate((batch.counts.cumsum(dtype=np.int64) - 1, batch.more_rows)))
        watch: Watch | None = None
        if any(len(staging.stages.raters) for staging in stagings) and not stagings[0].is_last:

            def watch(layer: int, queries: Tensor) -> None:
                if layer == layers.stop - 1:
                    for staging, part in zip(stagings, queries.split(counts), strict=True):
                        staging.hear(part)

        made = self._model.through(x, layers, lanes, self._arena.kv, rows, watch)
        if stagings[0].is_last:
            return self._model.logits(made)
        for staging, hidden in zip(stagings, made.split(counts), strict=True):
            staging.hand_on(hidden)
        return None

    def _scene(self, batch: ScheduledBatch, lanes: LaneBatch, rows: Ints) -> Scene | None:
        """What is at rows of pictures in this step, if any are. Also tells the lanes where RoPE has the rows [T] of
        texts that pictures have moved, by their numbers in these texts."""
        if all(seq.sight is None for seq in batch.seqs):
            return None
        bounds = lanes.cu_rows.numpy()
        ahead = np.array([seq.ahead for seq in batch.seqs], np.int32)
        angles = np.repeat((lanes.positions.numpy() + np.repeat(ahead, batch.counts))[None], 3, 0)
        at, parts, axes = [], [], 1
        for i in [i for i, seq in enumerate(batch.seqs) if seq.is_looking]:
            sight, own = batch.seqs[i].sight, slice(bounds[i], bounds[i + 1])
            assert sight is not None
            if sight.axes is not None:
                angles[:, own], axes = sight.angles(rows[own]), max(axes, len(sight.axes))
            pictured, index = sight.pictured(rows[own])
            at.append(bounds[i] + pictured)
            parts.append(sight.embeddings[torch.from_numpy(index)])
        if axes > 1:
            lanes.rope = self._model.turns(self._there(angles.astype(np.int64)))
            lanes.angles = torch.arange(len(rows), dtype=torch.int32)
        else:
            lanes.angles = torch.from_numpy(angles[0])
        places = np.concatenate(at) if at else np.zeros(0, np.int64)
        return Scene(places, torch.cat(parts)) if len(places) else None

    def _unread(self, batch: ScheduledBatch, ends: Ints, ids: Tensor | None) -> DeviceTokens | None:
        """What sequences read that end before rows `ends` [B] of the step and whose token nobody has read yet."""
        drawn_at = np.array([seq.unread for seq in batch.seqs], np.int64)
        if ids is None or not (is_unread := drawn_at != KNOWN).any():
            return None
        rows, sources = self._there(np.stack((ends - 1, drawn_at))[:, is_unread]).unbind()
        return DeviceTokens(rows, ids[sources].int())

    def _embed(self, tokens: Ints, scene: Scene | None, unread: DeviceTokens | None = None) -> Tensor:
        """[T, hidden size]: what the first layer reads."""
        there = self._there(tokens)
        if unread is not None:
            there[unread.rows] = unread.tokens
        x = self._model.embed(there)
        if scene is not None:
            x[self._there(scene.rows)] = to_device(scene.embeddings, x.device).to(x.dtype)
        return x

    def _probe(self, x: Tensor, lanes: LaneBatch, rows: Tensor, probed: list[Probed]) -> Tensor:
        """The same, and shows probes what they ask for."""

        def watch(layer: int, queries: Tensor) -> None:
            for part in probed:
                part.probe.see_queries(layer, part.slot, part.position, queries[part.rows])

        asking = [part for part in probed if part.probe.wants_logits]
        wanted = [torch.arange(part.rows.start, part.rows.stop, device=rows.device) for part in asking]
        hidden = self._model.through(x, self._layers, lanes, self._arena.kv, torch.cat([rows, *wanted]), watch)
        own, *seen = hidden.split([len(rows), *map(len, wanted)])
        for part, its in zip(asking, seen, strict=True):
            part.probe.see_hidden(part.position, its, self._model.logits)
        return self._model.logits(own)


def _lanes(batch: ScheduledBatch, starts: Ints, positions: Ints) -> LaneBatch:
    """The lanes of chunks that begin `starts` [B] tokens after the first that their layers have read."""
    cu_rows = np.zeros(len(batch.seqs) + 1, np.int32)
    np.cumsum(batch.counts, out=cu_rows[1:])
    votes = np.array([seq.first_vote for seq in batch.seqs], np.int64)
    return LaneBatch(
        slots=torch.from_numpy(batch.slots),
        cu_rows=torch.from_numpy(cu_rows),
        positions=torch.from_numpy(positions),
        first_vote=torch.from_numpy(np.clip(votes - starts, 0, batch.counts).astype(np.int32)),
    )


def _probed(batch: ScheduledBatch, starts: Ints, cu_rows: Ints) -> list[Probed]:
    probed = []
    for seq, start, first, last in zip(batch.seqs, starts.tolist(), cu_rows[:-1], cu_rows[1:], strict=True):
        if seq.probe is not None and start + last - first > seq.probe.first_row:
            skipped = max(0, seq.probe.first_row - start)
            probed.append(Probed(seq.probe, seq.slot, start + skipped, slice(int(first) + skipped, int(last))))
    return probed
