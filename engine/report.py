"""What a sequence holds, and what all ranks that share its heads do together (see engine/ranks.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from winnow.engine.messages import CompressionReport
from winnow.engine.ranks import Ranks
from winnow.kernels.layout import PageFormat

if TYPE_CHECKING:
    from winnow.engine.pages import PageArena


def report_of(arena: PageArena, slot: int, seen: int) -> CompressionReport:
    """What a sequence's lanes hold at this rank, beside what `seen` tokens hold uncompressed."""
    kept, reading = arena.kept[slot], arena.kv.reading.get(slot)
    bytes_read, bytes_read_dense, rows = (0, 0, 0) if reading is None else reading.touched.tolist()
    return CompressionReport(
        tokens_seen=seen,
        tokens_kept_min=int(kept.min()),
        tokens_kept_mean=round(float(kept.mean()), 2),
        tokens_kept_max=int(kept.max()),
        bytes_uncompressed=arena.layout.pages(seen) * arena.lanes * arena.layout.page_bytes,
        bytes_held=(len(arena.held(slot)) + arena.ballast(slot)) * arena.layout.page_bytes,
        tokens_by_format=_by_format(arena, slot),
        tokens_read=rows,
        bytes_read=bytes_read,
        bytes_read_dense=bytes_read_dense,
    )


def _by_format(arena: PageArena, slot: int) -> dict[str, float]:
    """Mean tokens of a lane in each page format."""
    parts = ((arena.sealed[slot], arena.formats[slot]), (arena.rest[slot], arena.rest_formats[slot]))
    totals = dict.fromkeys((arena.layout.compute, *(PageFormat(code) for _, code in parts)), 0)
    totals[arena.layout.compute] = int(arena.kept[slot].sum())
    for pages, code in parts:
        tokens = int(pages.sum()) * int(arena.capacity[code])
        totals[arena.layout.compute] -= tokens
        totals[PageFormat(code)] += tokens
    return {fmt.label: round(tokens / arena.lanes, 2) for fmt, tokens in totals.items()}


def joined(report: CompressionReport, ranks: Ranks) -> CompressionReport:
    """Of all ranks' lanes, from what each says of its own."""
    if ranks.size == 1:
        return report
    means = {"tokens_kept_mean": report.tokens_kept_mean, **report.tokens_by_format}
    names = ("bytes_uncompressed", "bytes_held", "bytes_read", "bytes_read_dense")
    ends, sums = (report.tokens_kept_min, report.tokens_kept_max), [getattr(report, name) for name in names]
    table = ranks.tables(np.array([*ends, *means.values(), *sums], np.float64))
    averages = dict(zip(means, table[:, 2 : 2 + len(means)].mean(0).round(2).tolist(), strict=True))
    totals = dict(zip(names, table[:, 2 + len(means) :].sum(0).astype(int).tolist(), strict=True))
    return msgspec.structs.replace(
        report,
        tokens_kept_min=int(table[:, 0].min()),
        tokens_kept_mean=averages.pop("tokens_kept_mean"),
        tokens_kept_max=int(table[:, 1].max()),
        tokens_by_format=averages,
        **totals,
    )
