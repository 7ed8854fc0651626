"""Choosing what decode rows read (the rule is stated in kernels/reading.py), and counting what they touch.

    a row that sees the tokens [low, seen) of a lane, low being its window's:
        protected   t < sinks, t >= seen - recent          pages: whole pages that hold such a token
        bound(q, page) = scale · Σ_d max(q_d · least_d, q_d · greatest_d)      over the page's keys

    least and greatest are rounded outward to bf16; where numbers are codes with a scale and a zero they are the ends of
    the grid, zero and zero + levels · scale (of the block of tokens with the highest bound).

Bytes: a page with a chosen token costs its keys and the chosen values, or all values and scales where it is quantized.
Choosing costs the channels or bounds that are looked at, and the keys of pages when their bounds are made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.reading import ReadMode, ReadRule, ReadState
from winnow.kernels.reference.codec import decode_pages
from winnow.kernels.reference.lanes import Sequence, lane_pages, lane_part, sealed_formats, sequences
from winnow.kernels.reference.pages import read_lane


@dataclass(frozen=True, slots=True)
class _Page:
    """A page of a lane: the tokens [first, end) that it has room for, and its format."""

    id: int
    first: int
    end: int
    fmt: PageFormat


@dataclass(frozen=True, slots=True)
class _Row:
    """One row and what it sees of one lane."""

    sequence: Sequence
    index: int
    layer: int
    head: int
    low: int
    seen: int
    pages: list[_Page]


def choose_reads(q: Tensor, batch: LaneBatch, kv: PagedKV, layer: int, scale: float, window: int) -> None:
    """q [T, Hq, D] f32: writes `batch.choices` for the rows of sequences in `kv.reading`, and counts bytes."""
    groups = q.double().unflatten(1, (kv.table.shape[2], -1)) * scale
    if not batch.choices:
        batch.make_room_for_choices(kv)
    for b, sequence in enumerate(sequences(batch, kv, layer, q.shape[0])):
        if (state := kv.reading.get(sequence.slot)) is None:
            continue
        mode = ReadMode(int(state.rule.modes[layer]))
        for index in range(sequence.count):
            rows = [_row(kv, batch, sequence, index, layer, head, window) for head in range(groups.shape[1])]
            at = sequence.rows.start + index
            for row in rows:
                _count(state, row, kv, batch.choices[b], mode)
            state.touched[2] += layer == 0
            if mode in (ReadMode.CHOSEN, ReadMode.ALL_AND_CHOOSE):
                choice = _choose(groups[at], q[at], rows, kv, state)
                batch.choices[b][index, :, : choice.shape[1]] = choice
                batch.choices[b][index, :, choice.shape[1] :] = 0
                if mode is ReadMode.CHOSEN:
                    for row in rows:
                        state.touched[0] += _bytes(kv, row, batch.choices[b][index, row.head])


def _row(kv: PagedKV, batch: LaneBatch, sequence: Sequence, index: int, layer: int, head: int, window: int) -> _Row:
    seen = int(kv.kept[sequence.slot, layer, head]) - sequence.count + index + 1
    low = 0
    if window > 0:
        positions = torch.arange(seen)
        if sequence.slot in kv.positions:
            positions = lane_part(kv.positions[sequence.slot], layer, head, seen).long()
        low = int((positions <= int(batch.positions[sequence.rows.start + index]) - window).sum())
    fmt, _ = sealed_formats(kv, sequence.slot)
    pages: list[_Page] = []
    sealed, rest, open_ = lane_pages(kv, sequence.slot, layer, head)
    if len(rest):
        raise ValueError("a lane in two formats cannot be read by a rule")
    for kind, ids in ((fmt, sealed), (kv.layout.compute, open_)):
        for page in ids.tolist():
            first = pages[-1].end if pages else 0
            pages.append(_Page(page, first, first + kv.layout.capacity(kind), kind))
    return _Row(sequence, index, layer, head, low, seen, pages)


def _choose(groups: Tensor, q: Tensor, rows: list[_Row], kv: PagedKV, state: ReadState) -> Tensor:
    """groups [Hkv, G, D] f64, scaled; q [Hq, D] f32 -> [Hkv, n] uint8"""
    rule, layer = state.rule, rows[0].layer
    choice = torch.zeros(len(rows), max(row.seen for row in rows), dtype=torch.uint8)
    if rule.votes_by_layer and len({row.seen for row in rows}) > 1:
        raise ValueError("heads that vote together need lanes of equal length")
    spans = [_candidates(rule, row) for row in rows]
    wanted = [max(1, int(row.seen * rule.share)) if rule.share > 0 else rule.tokens for row in rows]
    everything = [sum(end - first for first, end in span) <= want for span, want in zip(spans, wanted, strict=True)]
    again = rule.reuses and not all(everything) and _takes_over(state, layer, q)
    votes: list[Tensor] = []
    for row, group, span, all_ in zip(rows, groups, spans, everything, strict=True):
        seen = torch.zeros(row.seen, dtype=torch.bool)
        seen[row.low :] = True
        for first, end in span:
            seen[first:end] = False
        choice[row.head, : row.seen] = seen
        if rule.by_bounds:
            _make_bounds(kv, state, row)
        votes.append(torch.zeros(len(span)) if all_ or again else _votes(kv, state, row, group, span))
    if rule.votes_by_layer:
        votes = [torch.stack(votes).sum(0)] * len(votes)
    for row, span, vote, want, all_ in zip(rows, spans, votes, wanted, everything, strict=True):
        if all_:
            taken = list(range(len(span)))
        elif again:
            assert state.anchor_choice is not None
            taken = [i for i, (first, _) in enumerate(span) if state.anchor_choice[layer, first]]
        else:
            taken = _highest(vote, span, rule, want)
        for i in taken:
            choice[row.head, max(row.low, span[i][0]) : span[i][1]] = 1
        if rule.reuses and not all_ and not again:
            assert state.anchor_choice is not None
            state.anchor_choice[layer] = 0
            state.anchor_choice[layer, [span[i][0] for i in taken]] = 1
            state.anchored[layer] = row.seen
    return choice


def _candidates(rule: ReadRule, row: _Row) -> list[tuple[int, int]]:
    """The candidates of a lane, as the tokens [first, end) that each holds."""
    newest = max(row.low, row.seen - rule.recent)
    if not rule.by_bounds:
        return [(t, t + 1) for t in range(max(row.low, rule.sinks), newest)]
    is_candidate = [
        page.end > row.low and page.end <= newest and page.first >= min(rule.sinks, row.seen) for page in row.pages
    ]
    return [(max(row.low, page.first), page.end) for page, yes in zip(row.pages, is_candidate, strict=True) if yes]


def _votes(kv: PagedKV, state: ReadState, row: _Row, group: Tensor, span: list[tuple[int, int]]) -> Tensor:
    """group [G, D] f64 -> [candidates] f64; counts the bytes that are looked at."""
    rule = state.rule
    pages = [page for page in row.pages if any(page.first <= first < page.end for first, _ in span)]
    if rule.channels is None:
        logits = torch.stack([_bound(kv, state, row, page, group) for page in pages], -1)
    else:
        channels = rule.channels[row.layer, row.head].long()
        keys, _ = read_lane(kv, row.sequence.slot, row.layer, row.head)
        logits = group[:, channels] @ keys[:, channels].double().T
        logits = logits[:, [first for first, _ in span]]
        for page in pages:
            at = kv.layout.offsets(page.fmt)
            scales = at.v_scale - at.k_scale if page.fmt.is_quantized else 0
            if page.fmt.is_integer:
                scales = scales // kv.layout.head_dim * len(channels)
            state.touched[0] += (page.end - page.first) * len(channels) * page.fmt.bits // 8 + scales
    return logits.softmax(-1).sum(0)


def _highest(vote: Tensor, span: list[tuple[int, int]], rule: ReadRule, wanted: int) -> list[int]:
    """Candidates of the highest votes until they hold `wanted` tokens; the first of equals is taken."""
    reach, count = rule.pool // 2, len(vote)
    pooled = [float(vote[max(0, i - reach) : i + reach + 1].max()) for i in range(count)]
    taken: list[int] = []
    for i in sorted(range(count), key=lambda i: (-pooled[i], i)):
        if wanted <= 0:
            break
        taken.append(i)
        wanted -= span[i][1] - span[i][0]
    return taken


def _takes_over(state: ReadState, layer: int, q: Tensor) -> bool:
    """Whether the last choice is near enough; if not, this row's queries are the next to be compared."""
    assert state.anchors is not None
    if int(state.anchored[layer]) > 0:
        cosine = torch.nn.functional.cosine_similarity(q.double().flatten(), state.anchors[layer].double().flatten(), 0)
        if float(cosine) >= state.rule.similarity:
            return True
    state.anchors[layer] = q
    return False


# Bounds --------------------------------------------------------------------------------------------------------------


def _make_bounds(kv: PagedKV, state: ReadState, row: _Row) -> None:
    """Notes the bounds of the pages that became full."""
    assert state.bounds is not None
    floats = [page for page in row.pages if not page.fmt.is_integer]
    known = int(state.bounded[row.layer, row.head])
    full = sum(page.end <= max(row.low, row.seen - state.rule.recent) for page in floats)
    for i in range(known, full):
        page = floats[i]
        keys, _ = decode_pages(kv.data[page.id][None], kv.layout, page.fmt)
        least, greatest = keys.amin(0), keys.amax(0)
        state.bounds[row.layer, row.head, i] = torch.stack([-_up(-least), _up(greatest)])
        state.touched[0] += kv.layout.offsets(page.fmt).values
    state.bounded[row.layer, row.head] = max(known, full)


def _up(x: Tensor) -> Tensor:
    """The least bf16 that is not below x."""
    near = x.bfloat16()
    return torch.where(near.float() < x, torch.nextafter(near, near.new_tensor(torch.inf)), near)


def _bound(kv: PagedKV, state: ReadState, row: _Row, page: _Page, group: Tensor) -> Tensor:
    """No key of the page has a greater product with the queries group [G, D] f64: [G] f64. Counts what it looks at."""
    assert state.bounds is not None
    if not page.fmt.is_integer:
        floats = [other.id for other in row.pages if not other.fmt.is_integer]
        ends = state.bounds[row.layer, row.head, floats.index(page.id)].double()[:, None]
        state.touched[0] += 4 * kv.layout.head_dim
    else:
        at = kv.layout.offsets(page.fmt)
        scale, zero = kv.data[page.id, at.k_scale : at.v_scale].view(torch.float16).double().chunk(2)
        ends = torch.stack([zero, zero + (2**page.fmt.bits - 1) * scale]).unflatten(1, (-1, kv.layout.head_dim))
        state.touched[0] += at.v_scale - at.k_scale
    # Blocks of tokens with a grid of their own have bounds of their own.
    return torch.maximum(group[:, None] * ends[0], group[:, None] * ends[1]).sum(-1).amax(1)


# Bytes ---------------------------------------------------------------------------------------------------------------


def _count(state: ReadState, row: _Row, kv: PagedKV, choice: Tensor, mode: ReadMode) -> None:
    """Counts what reading all takes, and what the row reads where it does not choose first."""
    everything = torch.zeros(row.seen, dtype=torch.uint8)
    everything[_first_read(kv, row) :] = 1
    state.touched[1] += _bytes(kv, row, everything)
    if mode in (ReadMode.ALL, ReadMode.ALL_AND_CHOOSE):
        state.touched[0] += _bytes(kv, row, everything)
    elif mode is ReadMode.CHOSEN_BEFORE:
        state.touched[0] += _bytes(kv, row, choice[row.index, row.head])


def _first_read(kv: PagedKV, row: _Row) -> int:
    """First token that reading all touches: attention takes about 128 tokens of a format at a time."""
    begin, tokens = 0, 0
    for i, page in enumerate(row.pages):
        capacity = page.end - page.first
        new = i > 0 and (page.fmt is not row.pages[i - 1].fmt or tokens + capacity > max(128, capacity))
        begin, tokens = (page.first, capacity) if new else (begin, tokens + capacity)
        if page.end > row.low:
            return begin
    return begin


def _bytes(kv: PagedKV, row: _Row, choice: Tensor) -> int:
    """Bytes that attention reads of a lane for the tokens of a choice [n] uint8 that the row sees."""
    total, dim = 0, kv.layout.head_dim
    for page in row.pages:
        values = int(choice[page.first : min(page.end, row.seen)].sum())
        if values:
            at, capacity = kv.layout.offsets(page.fmt), page.end - page.first
            total += (capacity + (capacity if page.fmt.is_quantized else values)) * dim * page.fmt.bits // 8
            total += at.end - at.k_scale if page.fmt.is_quantized else 0
    return total
