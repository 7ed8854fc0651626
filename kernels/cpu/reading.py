"""Hands the rule and state of a sequence that chooses what it reads to the native module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from winnow.kernels.kv import PagedKV
from winnow.kernels.reading import ReadState


def set_reading(native: Any, b: int, state: ReadState, choice: Tensor, kv: PagedKV) -> None:
    """Sequence `b` of a batch reads as `state` says; its rows choose in `choice` [rows, kv_heads, tokens] uint8."""
    rule, bounds, anchors, anchor_choice = state.rule, state.bounds, state.anchors, state.anchor_choice
    _, layers, heads, _ = kv.table.shape
    dim = kv.layout.head_dim
    _fits("modes", rule.modes, torch.uint8, (layers,))
    _fits("bounded", state.bounded, torch.int32, (layers, heads))
    _fits("anchored", state.anchored, torch.int32, (layers,))
    _fits("touched", state.touched, torch.int64, (3,))
    if rule.channels is not None:
        _fits("channels", rule.channels, torch.int32, (layers, heads, rule.channels.shape[-1]))
    if bounds is not None:
        _fits("bounds", bounds, torch.bfloat16, (layers, heads, bounds.shape[2], 2, dim))
    if anchors is not None:
        _fits("anchors", anchors, torch.float32, (layers, anchors.shape[1], dim))
    if anchor_choice is not None:
        _fits("anchor_choice", anchor_choice, torch.uint8, (layers, anchor_choice.shape[1]))
    native.set_reading(
        b,
        rule.modes.data_ptr(),
        rule.by_bounds,
        rule.votes_by_layer,
        rule.tokens,
        rule.share,
        rule.sinks,
        rule.recent,
        rule.pool,
        rule.similarity,
        0 if rule.channels is None else rule.channels.data_ptr(),
        0 if rule.channels is None else rule.channels.shape[2],
        0 if bounds is None else bounds.data_ptr(),
        state.bounded.data_ptr(),
        0 if bounds is None else bounds.shape[2],
        0 if anchors is None else anchors.data_ptr(),
        state.anchored.data_ptr(),
        0 if anchor_choice is None else anchor_choice.data_ptr(),
        0 if anchor_choice is None else anchor_choice.shape[1],
        0 if anchors is None else anchors.shape[1],
        choice.data_ptr(),
        choice.shape[2],
        state.touched.data_ptr(),
    )


def _fits(name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if part.dtype != dtype or tuple(part.shape) != shape or not part.is_contiguous():
        raise ValueError(f"{name} must be contiguous {dtype} {list(shape)}, not {part.dtype} {list(part.shape)}")
