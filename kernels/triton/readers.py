"""Who reads by a rule in a step: rules and state on the device, and room for what is worked out layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from struct import pack, unpack
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from winnow.kernels.kv import LaneBatch, PagedKV
from winnow.kernels.layout import PageFormat
from winnow.kernels.reading import ReadMode, ReadRule, ReadState
from winnow.kernels.triton.device import upload

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


class Reading(NamedTuple):
    """Who reads by a rule in a step, as far as kernels are chosen by it."""

    readers: int
    """sequences that do"""
    rows: int
    """R: of all of them"""
    modes: tuple[frozenset[tuple[ReadMode, bool]], ...]
    """of each layer: the modes of its readers, and whether they choose pages"""
    pools: bool
    anchored: int
    """query heads of those that may take a choice over; 0 where nobody does"""
    units: int
    """tokens or pages of the longest lane"""


@dataclass(frozen=True, slots=True)
class Worked:
    """What is worked out layer by layer; kept as `DeviceBatch.worked`."""

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

    @classmethod
    def room(cls, reading: Reading, q_heads: int, kv_heads: int, device: torch.device) -> Worked:
        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        rows, units = reading.rows, reading.units
        votes = room(rows, kv_heads, units)
        return cls(
            spans=room(rows, kv_heads, SPAN.value, dtype=torch.int32),
            sources=room(rows, dtype=torch.int32),
            scores=room(rows, q_heads, units),
            norms=room(rows, q_heads),
            votes=votes,
            pooled=torch.empty_like(votes) if reading.pools else votes,
        )


def readers_of(batch: LaneBatch, kv: PagedKV) -> tuple[Reading | None, dict[str, Tensor]]:
    """The step's readers, if there are any, and what `DeviceBatch` has of them, by its names for it.

    ValueError or IndexError for states that do not fit the lanes.
    """
    states = {b: kv.reading[int(batch.slots[b])] for b in batch.choices}
    if not states:
        return None, {}
    bounds, slots, layers = batch.cu_rows.tolist(), batch.slots.tolist(), kv.table.shape[1]
    settings: list[list[int]] = []
    places: list[list[int]] = []
    kinds: list[set[tuple[ReadMode, bool]]] = [set() for _ in range(layers)]
    modes = torch.full((layers, len(slots)), int(ReadMode.ALL), dtype=torch.int32)
    for b, state in states.items():
        rule = state.rule
        check_reading(kv, slots[b], state)
        modes[:, b] = rule.modes
        for layer, mode in enumerate(rule.modes.tolist()):
            kinds[layer].add((ReadMode(mode), rule.by_bounds))
        first, rows = bounds[b], bounds[b + 1] - bounds[b]
        settings.append(
            [b, *_settings(state, batch.choices[b], kv.layout.head_dim), first, rows, len(places), *_bits(rule)]
        )
        places += [[len(settings) - 1, row] for row in range(rows)]
    by_tokens = any(not state.rule.by_bounds for state in states.values())
    reading = Reading(
        readers=len(states),
        rows=len(places),
        modes=tuple(map(frozenset, kinds)),
        pools=any(state.rule.pool > 1 for state in states.values()),
        anchored=_anchored_heads(states.values()),
        units=int(kv.kept[[slots[b] for b in states]].max()) if by_tokens else kv.table.shape[3],
    )
    parts = {
        "modes": modes,
        "settings": torch.tensor(settings, dtype=torch.int64),
        "places": torch.tensor(places, dtype=torch.int32),
    }
    return reading, parts


def no_readers(layers: int) -> dict[str, Tensor]:
    """What `readers_of` has of them where there are none."""
    return {
        "modes": torch.empty((layers, 0), dtype=torch.int32),
        "settings": torch.empty((0, SETTINGS.value), dtype=torch.int64),
        "places": torch.empty((0, 2), dtype=torch.int32),
    }


def padded_readers(parts: dict[str, Tensor], reading: Reading, size: int) -> dict[str, Tensor]:
    """Those of a step of one row for each sequence, with further ones, up to `size` and `reading.readers`, that read
    all and that nobody counts."""
    modes, settings, places = (parts[name] for name in ("modes", "settings", "places"))
    modes = pad(modes, (0, size - modes.shape[1]))
    if more := reading.readers - len(settings):
        b = int((modes == int(ReadMode.ALL)).all(0).int().argmax())
        other = settings.new_zeros(more, SETTINGS.value)
        other[:, OWNER.value] = other[:, FIRST_ROW.value] = b
        other[:, ROWS.value], other[:, TOUCHED.value] = 1, _nowhere().data_ptr()
        settings = torch.cat([settings, other])
        each = torch.arange(reading.readers, dtype=torch.int32)
        places = torch.stack([each, torch.zeros_like(each)], 1)
    return {"modes": modes, "settings": settings, "places": places}


@cache
def _nowhere() -> Tensor:
    """Takes the place of `ReadState.touched`."""
    return upload(torch.zeros(3, dtype=torch.int64))


def _anchored_heads(states: Iterable[ReadState]) -> int:
    """Of `Reading.anchored`; ValueError where states do not agree."""
    heads = {state.anchors.shape[1] for state in states if state.anchors is not None}
    if len(heads) > 1:
        raise ValueError(f"anchors of {sorted(heads)} query heads")
    return max(heads, default=0)


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


def check_reading(kv: PagedKV, slot: int, state: ReadState) -> None:
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
        _fits("anchors", state.anchors, torch.float32, (layers, state.anchors.shape[1], dim))
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
