"""Who reads by a rule in a step: rules and state on the device, and room for what is worked out layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack, unpack
from weakref import WeakKeyDictionary

import torch
import triton.language as tl
from torch import Tensor

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.reading import ReadMode, ReadRule, ReadState
from winnow.kernels.triton.device import upload
from winnow.kernels.triton.step import DeviceBatch

SETTINGS = tl.constexpr(26)
"""Numbers of a reader, as follows"""
SPAN = tl.constexpr(8)
"""Numbers of a row and lane: first token and end of the window, of the candidates as tokens, and as they are; whether
all are chosen; how many tokens are wanted"""

(
    OWNER,  # b
    TOKENS,
    SINKS,
    RECENT,
    POOL,
    BY_BOUNDS,
    BY_LAYER,
    REUSES,
    CHANNELS,  # how many
    CHANNEL_LIST,  # addresses from here on, and sizes of what they lead to
    BOUNDS,
    BOUNDED_PAGES,
    BOUNDED,
    ANCHORS,
    ANCHORED,
    ANCHOR_CHOICE,
    ANCHOR_TOKENS,
    TOUCHED,
    CHOICES,
    CHOICE_TOKENS,
    FIRST_ROW,  # in the batch
    ROWS,
    FIRST_READER_ROW,  # among the rows of all readers
    SHARE,  # the bits of a float64
    SIMILARITY,  # so too
) = (tl.constexpr(i) for i in range(25))

_channels: WeakKeyDictionary[ReadRule, Tensor] = WeakKeyDictionary()


@dataclass(slots=True)
class Readers:
    """The sequences of a step that read by a rule; kept as `DeviceBatch.readers`."""

    count: int
    rows: int
    """R: of all of them"""
    modes: list[set[tuple[ReadMode, bool]]]
    """of each layer: the modes of its readers, and whether they choose pages"""
    pools: bool
    reuses: bool
    units: int
    """tokens or pages of the longest lane"""
    settings: Tensor
    """[readers, SETTINGS] int64"""
    places: Tensor
    """[R, 2] int32: reader of a row, and which of its rows it is"""
    spans: Tensor
    """[R, kv_heads, SPAN] int32"""
    sources: Tensor
    """[R] int32: whose choice a row takes over: NONE, the state's or that of one of its sequence's rows"""
    scores: Tensor
    """[R, q_heads, units] f32: logits of the candidates, each in its own place"""
    norms: Tensor
    """[R, q_heads] f32: their log-sum-exp"""
    votes: Tensor
    """[R, kv_heads, units] f32"""
    pooled: Tensor
    """As `votes`, or the same where nobody pools"""


def readers_of(batch: LaneBatch, kv: PagedKV, native: DeviceBatch, q_heads: int) -> Readers:
    """The step's readers; ValueError or IndexError for states that do not fit the lanes."""
    bounds, slots, layers = batch.cu_rows.tolist(), batch.slots.tolist(), kv.table.shape[1]
    settings: list[list[int]] = []
    places: list[list[int]] = []
    modes: list[set[tuple[ReadMode, bool]]] = [set() for _ in range(layers)]
    states = {b: kv.reading[slots[b]] for b in batch.choices}
    for b, state in states.items():
        rule = state.rule
        check_reading(kv, slots[b], state, q_heads)
        for layer, mode in enumerate(rule.modes.tolist()):
            modes[layer].add((ReadMode(mode), rule.by_bounds))
        first, rows = bounds[b], bounds[b + 1] - bounds[b]
        settings.append(
            [b, *_settings(state, batch.choices[b], kv.layout.head_dim), first, rows, len(places), *_bits(rule)]
        )
        places += [[len(settings) - 1, row] for row in range(rows)]
    reading = [slots[b] for b in states]
    by_tokens = any(not state.rule.by_bounds for state in states.values())
    units = int(kv.kept[reading].max()) if by_tokens else kv.table.shape[3]
    heads, rows, device = kv.table.shape[2], len(places), kv.device
    pools = any(state.rule.pool > 1 for state in states.values())

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    votes = room(rows, heads, units)
    return Readers(
        count=len(states),
        rows=rows,
        modes=modes,
        pools=pools,
        reuses=any(state.rule.reuses for state in states.values()),
        units=units,
        settings=upload(torch.tensor(settings, dtype=torch.int64)),
        places=upload(torch.tensor(places, dtype=torch.int32)),
        spans=room(rows, heads, SPAN.value, dtype=torch.int32),
        sources=room(rows, dtype=torch.int32),
        scores=room(rows, q_heads, units),
        norms=room(rows, q_heads),
        votes=votes,
        pooled=torch.empty_like(votes) if pools else votes,
    )


def _settings(state: ReadState, choice: Tensor, dim: int) -> list[int]:
    """From TOKENS to CHOICE_TOKENS."""
    rule = state.rule
    channels = _channels_on_device(rule, dim)
    return [
        rule.tokens,
        rule.sinks,
        rule.recent,
        rule.pool,
        rule.by_bounds,
        rule.votes_by_layer,
        rule.reuses,
        0 if channels is None else channels.shape[2],
        _address(channels),
        _address(state.bounds),
        0 if state.bounds is None else state.bounds.shape[2],
        _address(state.bounded),
        _address(state.anchors),
        _address(state.anchored),
        _address(state.anchor_choice),
        0 if state.anchor_choice is None else state.anchor_choice.shape[1],
        _address(state.touched),
        _address(choice),
        choice.shape[2],
    ]


def _bits(rule: ReadRule) -> list[int]:
    """SHARE, SIMILARITY, and what fills the row up."""
    return [*unpack("<2q", pack("<2d", rule.share, rule.similarity)), 0]


def _address(part: Tensor | None) -> int:
    return 0 if part is None else part.data_ptr()


def _channels_on_device(rule: ReadRule, dim: int) -> Tensor | None:
    """A rule's channels, checked and brought over when it is first read by."""
    if rule.channels is None:
        return None
    if rule not in _channels:
        if int(rule.channels.min()) < 0 or int(rule.channels.max()) >= dim:
            raise IndexError(f"a channel is not among {dim}")
        _channels[rule] = upload(rule.channels)
    return _channels[rule]


def check_reading(kv: PagedKV, slot: int, state: ReadState, q_heads: int) -> None:
    """ValueError or IndexError unless a slot's rule and state fit its lanes."""
    rule, (_, layers, heads, _), dim = state.rule, kv.table.shape, kv.layout.head_dim
    kept, tokens = kv.kept[slot], int(kv.kept[slot].max())
    if bool(kv.rest[slot].any()):
        raise ValueError("a lane in two formats cannot be read by a rule")
    if rule.votes_by_layer and bool((kept != kept[:, :1]).any()):
        raise ValueError("heads that vote together need lanes of equal length")
    _fits("modes", rule.modes, torch.uint8, (layers,))
    _fits("bounded", state.bounded, torch.int32, (layers, heads))
    _fits("anchored", state.anchored, torch.int32, (layers,))
    _fits("touched", state.touched, torch.int64, (3,))
    if rule.channels is not None:
        _fits("channels", rule.channels, torch.int32, (layers, heads, rule.channels.shape[-1]))
    elif state.bounds is None:
        raise ValueError("a rule that judges pages needs bounds")
    else:
        _fits("bounds", state.bounds, torch.bfloat16, (layers, heads, state.bounds.shape[2], 2, dim))
        if state.bounds.shape[2] < (full := _full_pages(kv, slot)):
            raise IndexError(f"bounds for {state.bounds.shape[2]} pages of {full}")
    if rule.reuses:
        if state.anchors is None or state.anchor_choice is None:
            raise ValueError("a rule that takes choices over needs room for one")
        _fits("anchors", state.anchors, torch.float32, (layers, q_heads, dim))
        _fits("anchor_choice", state.anchor_choice, torch.uint8, (layers, state.anchor_choice.shape[1]))
        if state.anchor_choice.shape[1] < tokens:
            raise IndexError(f"{tokens} tokens in a lane, but anchors for {state.anchor_choice.shape[1]}")


def _full_pages(kv: PagedKV, slot: int) -> int:
    """Pages in a float format before the newest token, in any of a slot's lanes."""
    fmt, sealed = PageFormat(int(kv.formats[slot])), kv.sealed[slot].long()
    pages = (kv.kept[slot] - sealed * kv.layout.capacity(fmt) - 1).clamp_min(0) // kv.layout.page_tokens
    return int((pages if fmt.is_integer else pages + sealed).max())


def _fits(name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if part.dtype != dtype or tuple(part.shape) != shape or not part.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, not {part.dtype} {list(part.shape)}")
