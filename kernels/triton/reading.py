"""Choosing what decode rows read, on the device: the rule is that of kernels/reading.py. Nothing here waits for it."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.reading import ReadMode
from winnow.kernels.triton import reading_bytes, reading_choice, reading_scores, reading_spans, reading_votes
from winnow.kernels.triton.columns import pages_of
from winnow.kernels.triton.config import PAGE_SCORE_REGISTERS, TOKEN_SCORE_REGISTERS
from winnow.kernels.triton.readers import Reading, Worked
from winnow.kernels.triton.step import device_batch

COLUMNS = 32
"""The most programs that share a lane's pages, or its candidates"""
CANDIDATES = 1024
"""That a program takes at a time"""
PAGES = 16
"""Bounds likewise"""


def choose_reads(q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> None:
    """q [T, Hq, D] f32, bf16 or f16: writes `batch.choices` for rows of sequences in `kv.reading`, and counts bytes."""
    heads, dim = kv.table.shape[2], kv.layout.head_dim
    if q.dim() != 3 or q.shape[0] != len(batch.positions) or q.shape[2] != dim or q.shape[1] % heads:
        raise ValueError(f"q {list(q.shape)} is not [{len(batch.positions)}, heads, {dim}] for {heads} KV heads")
    native = device_batch(batch, kv, layer)
    reading = native.reading
    if reading is None:
        return
    if reading.anchored not in (0, q.shape[1]):
        raise ValueError(f"anchors of {reading.anchored} query heads do not fit {q.shape[1]}")
    if native.worked is None:
        native.worked = Worked.room(reading, q.shape[1], heads, kv.device)
    worked = native.worked
    given: dict[str, Any] = {
        "settings": native.settings,
        "modes": native.modes,
        "layer": layer,
        "size": native.size,
    }
    rows = {**given, "places": native.places, "spans": worked.spans}
    known = pages_of(native, kv)
    lanes = {name: known[name] for name in ("lanes", "layers", "heads", "D", "COMPUTE", "FORMATS", "CAPACITIES")}
    held, held_capacity = native.side("positions")
    reading_spans.span_rows[(heads, reading.rows)](
        **rows,
        **lanes,
        sources=worked.sources,
        positions=native.positions,
        held=held,
        held_capacity=held_capacity,
        window=window,
        BLOCK=CANDIDATES,
    )
    modes = reading.modes[layer]
    if any(mode in (ReadMode.ALL_AND_CHOOSE, ReadMode.CHOSEN) for mode, _ in modes):
        _choose(q.contiguous(), reading, worked, modes, rows, known, lanes, scale)
    if any(mode >= ReadMode.CHOSEN for mode, _ in modes):
        reading_bytes.touch[(min(known["width"], COLUMNS), heads, reading.rows)](**rows, **lanes)


def _choose(
    q: Tensor,
    reading: Reading,
    worked: Worked,
    modes: frozenset[tuple[ReadMode, bool]],
    rows: dict[str, Any],
    known: dict[str, Any],
    lanes: dict[str, Any],
    scale: float,
) -> None:
    """Of all rows that choose in a layer, whose spans are known."""
    heads, q_heads, dim = known["heads"], *q.shape[1:]
    columns, group = min(known["width"], COLUMNS), q_heads // heads
    by_row = (columns, heads, reading.rows)
    given = {name: rows[name] for name in ("settings", "spans", "modes", "layer", "size")}
    if reading.anchored:
        numbers = q_heads * dim
        reading_spans.compare_rows[(reading.readers,)](
            q=q,
            **given,
            sources=worked.sources,
            heads=heads,
            NUMBERS=numbers,
            BLOCK=triton.next_power_of_2(numbers),
        )
    scored = {**rows, **known, "q": q, "scores": worked.scores, "units": reading.units, "scale": scale, "GROUP": group}
    if any(is_by_bounds for _, is_by_bounds in modes):
        reading_spans.bound_pages[(columns, heads, reading.readers)](**given, **known, CHANNELS=16)
        reading_scores.score_pages[by_row](**scored, PAGES=PAGES, maxnreg=PAGE_SCORE_REGISTERS)
    if not all(is_by_bounds for _, is_by_bounds in modes):
        queries = max(16, triton.next_power_of_2(group))
        reading_scores.score_tokens[by_row](
            **scored, sources=worked.sources, QUERIES=queries, maxnreg=TOKEN_SCORE_REGISTERS
        )
    voted = {**rows, "sources": worked.sources, "units": reading.units, "heads": heads, "BLOCK": CANDIDATES}
    reading_votes.normalise[(q_heads, reading.rows)](**voted, scores=worked.scores, norms=worked.norms, GROUP=group)
    reading_votes.cast_votes[by_row](**voted, scores=worked.scores, norms=worked.norms, votes=worked.votes, GROUP=group)
    if reading.pools:
        reading_votes.pool_votes[by_row](**voted, votes=worked.votes, pooled=worked.pooled)
    reading_choice.select[(heads, reading.rows)](
        **voted,
        **{name: part for name, part in lanes.items() if name != "heads"},
        votes=worked.pooled,
        PAGE_TOKENS=triton.next_power_of_2(max(known["CAPACITIES"][fmt] for fmt in known["FORMATS"])),
        PAGES=PAGES,
    )
    if reading.anchored:
        reading_choice.take_over[(heads, reading.rows)](**rows, sources=worked.sources, heads=heads, BLOCK=CANDIDATES)
        reading_choice.keep_choice[(reading.readers,)](**given, sources=worked.sources, heads=heads, BLOCK=CANDIDATES)
