"""transformers with masks of our own: for each layer, KV head and query, the keys that it may see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

NAME = "masked_per_kv_head"


@dataclass
class MaskedRun:
    """One dense pass over a text."""

    visible: Tensor
    """[layers, kv_heads, queries, tokens] bool"""
    logits: Tensor = field(init=False)
    """[tokens, vocab]"""
    queries: Tensor = field(init=False)
    """[layers, q_heads, tokens, head_dim] after RoPE"""
    keys: Tensor = field(init=False)
    """[layers, kv_heads, tokens, head_dim] after RoPE"""
    values: Tensor = field(init=False)
    """[layers, kv_heads, tokens, head_dim]"""
    attention: Tensor = field(init=False)
    """[layers, q_heads, queries, tokens] float32 probabilities"""


def causal(layers: int, kv_heads: int, tokens: int, window: int = 0) -> Tensor:
    """[layers, kv_heads, tokens, tokens]: what a query sees where nothing is evicted."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if window:
        mask &= ~mask.tril(-window)
    return mask.expand(layers, kv_heads, tokens, tokens).clone()


def hide_evicted(visible: Tensor, kept: dict[int, Tensor]) -> Tensor:
    """`visible` without what was evicted: from event E on, of the tokens before E only kept[E] [layers, kv_heads, n]
    (positions, padded with -1) are seen."""
    tokens = visible.shape[-1]
    for event, positions in kept.items():
        held = torch.zeros(*visible.shape[:2], tokens + 1, dtype=torch.bool)
        held.scatter_(2, positions.where(positions >= 0, tokens), True)
        visible[:, :, event:, :event] &= held[:, :, None, :event]
    return visible


def run_masked(
    model: PreTrainedModel,
    tokens: Sequence[int],
    visible: Tensor,
    look: Callable[[int, Tensor, Tensor], None] | None = None,
) -> MaskedRun:
    """Passes a text through a transformers model, every query seeing what `visible` lets it.

    `look(layer, q [q_heads, tokens, D], keys [kv_heads, tokens, D])` may change what a layer's queries see.
    """
    run = MaskedRun(visible)
    queries: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    attention: dict[int, Tensor] = {}

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        queries[module.layer_idx], keys[module.layer_idx] = query[0], key[0]
        values[module.layer_idx] = value[0]
        if look is not None:
            look(module.layer_idx, query[0], key[0])
        scores = query @ key.repeat_interleave(group, 1).mT * scaling
        seen = visible[module.layer_idx].repeat_interleave(group, 0)
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        attention[module.layer_idx] = probabilities[0]
        return (probabilities @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    with _attention(model, attend), torch.no_grad():
        run.logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    run.queries = torch.stack([queries[layer] for layer in sorted(queries)])
    run.keys = torch.stack([keys[layer] for layer in sorted(keys)])
    run.values = torch.stack([values[layer] for layer in sorted(values)])
    run.attention = torch.stack([attention[layer] for layer in sorted(attention)])
    return run


def dense_attention(
    model: PreTrainedModel, tokens: Sequence[int], attend: Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
) -> Tensor:
    """Logits [tokens, vocab] of a text under an attention of our own, which gets the layer, queries [q_heads, T, D],
    keys and values [kv_heads, T, D] after RoPE, and the scale."""

    def function(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        out = attend(module.layer_idx, query[0], key[0], value[0], scaling)
        return out.to(query.dtype).transpose(0, 1)[None].contiguous(), None

    with _attention(model, function), torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0]


def turned_back(heads: Tensor, inv_freq: Tensor) -> Tensor:
    """[..., tokens, head_dim] as they were before RoPE."""
    angles = torch.arange(heads.shape[-2], dtype=torch.float32)[:, None] * inv_freq
    first, second = heads.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos + second * sin, second * cos - first * sin], -1)


@contextmanager
def _attention(model: PreTrainedModel, function: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, function)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
