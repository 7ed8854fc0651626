"""The papers' choices of what a token reads, written out with loops over the whole keys of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PAGE = 16


@dataclass
class Look:
    """One generated token in one layer of a model, and what earlier looks left behind."""

    layer: int
    layers: int
    token: int
    """its position"""
    q: Tensor
    """[q_heads, D] float64"""
    keys: Tensor
    """[kv_heads, token + 1, D] float64, after RoPE, its own included"""
    memory: dict[Any, Any] = field(default_factory=dict)

    @property
    def group(self) -> int:
        return len(self.q) // len(self.keys)

    def logits(self, head: int, channels: list[int] | None = None) -> Tensor:
        """[tokens] of one query head, over all or some channels"""
        at = list(range(self.q.shape[1])) if channels is None else channels
        return self.keys[head // self.group][:, at] @ self.q[head, at] * self.q.shape[1] ** -0.5


def every(look: Look) -> list[set[int]]:
    return [set(range(look.token + 1)) for _ in look.keys]


def best(votes: dict[int, float], count: int) -> list[int]:
    return sorted(votes, key=lambda i: (-votes[i], i))[:count]


def softmax_votes(logits: list[Tensor], candidates: list[int]) -> dict[int, float]:
    total = sum((part[candidates].softmax(0) for part in logits), torch.zeros(len(candidates), dtype=torch.float64))
    return dict(zip(candidates, total.tolist(), strict=True))


def quest(look: Look, tokens: int = 512, dense_layers: int = 2) -> list[set[int]]:
    if look.layer < dense_layers:
        return every(look)
    chosen = []
    full = list(range(look.token // PAGE))  # the page being written is read anyway
    for lane in range(len(look.keys)):
        for page in full:
            if (look.layer, lane, page) not in look.memory:
                look.memory[look.layer, lane, page] = ends(look.keys[lane, page * PAGE : (page + 1) * PAGE])
        bounds = []
        for head in range(lane * look.group, (lane + 1) * look.group):
            q = look.q[head] * len(look.q[head]) ** -0.5
            parts = [(q * low, q * high) for low, high in (look.memory[look.layer, lane, page] for page in full)]
            bounds.append(torch.stack([torch.maximum(*part).sum() for part in parts]))
        pages = best(softmax_votes(bounds, full), -(-tokens // PAGE))
        chosen.append({token for page in pages for token in range(page * PAGE, (page + 1) * PAGE)})
        chosen[-1] |= set(range(len(full) * PAGE, look.token + 1))
    return chosen


def ends(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest number of each channel, on the bf16 grid beyond them."""
    columns = keys.T.tolist()
    low = torch.tensor([on_grid(min(column), math.floor) for column in columns], dtype=torch.float64)
    return low, torch.tensor([on_grid(max(column), math.ceil) for column in columns], dtype=torch.float64)


def on_grid(x: float, rounded: Callable[[float], int]) -> float:
    """bf16 has eight bits of fraction."""
    fraction, exponent = math.frexp(x)
    return math.ldexp(rounded(fraction * 256) / 256, exponent)


def tidal_decode(look: Look, tokens: int = 256, dense_layers: int = 2, corrector: float = 0.4) -> list[set[int]]:
    chooses = look.layer in (dense_layers, int(corrector * look.layers))
    if look.layer >= dense_layers and not chooses:
        return look.memory[look.token]
    if chooses and look.layer >= dense_layers:
        chosen = []
        for lane in range(len(look.keys)):
            logits = [look.logits(head) for head in range(lane * look.group, (lane + 1) * look.group)]
            chosen.append({look.token, *best(softmax_votes(logits, list(range(look.token))), tokens)})
        look.memory[look.token] = chosen
    return every(look)


def double_sparsity(
    look: Look, profile: dict[str, Tensor], tokens: float = 1 / 16, channels: float = 0.25, dense_layers: int = 2
) -> list[set[int]]:
    if look.layer < dense_layers:
        return every(look)
    chosen = []
    for lane in range(len(look.keys)):
        heavy = profile["channels"][look.layer, lane].tolist()[: int(channels * look.q.shape[1])]
        logits = [look.logits(head, heavy) for head in range(lane * look.group, (lane + 1) * look.group)]
        votes = softmax_votes(logits, list(range(look.token)))
        chosen.append({look.token, *best(votes, int(tokens * (look.token + 1)))})
    return chosen


def token_select(
    look: Look, tokens: int = 2048, sinks: int = 128, recent: int = 512, pool: int = 1, similarity: float = 0.9
) -> list[set[int]]:
    always = {t for t in range(look.token + 1) if t < sinks or t > look.token - recent}
    candidates = [t for t in range(look.token + 1) if t not in always]
    if len(candidates) <= tokens:
        return every(look)
    q, (anchor, old) = look.q.flatten(), look.memory.get(look.layer, (None, None))
    if anchor is None or float(q @ anchor / (q.norm() * anchor.norm())) < similarity:
        votes = softmax_votes([look.logits(head) for head in range(len(look.q))], candidates)
        near = {t: max(votes.get(u, 0.0) for u in range(t - pool // 2, t + pool // 2 + 1)) for t in candidates}
        old = best(near, tokens)
        look.memory[look.layer] = (q, old)
    return [always | set(old) for _ in look.keys]


READ_ORACLES: dict[str, tuple[Callable[..., list[set[int]]], dict[str, Any]]] = {
    # policy: (what each lane reads for a token, knobs)
    "quest": (quest, {"tokens": 48, "dense_layers": 1}),
    "tidal_decode": (tidal_decode, {"tokens": 40, "dense_layers": 1}),
    "double_sparsity": (double_sparsity, {"tokens": 0.15, "dense_layers": 1}),
    "token_select": (token_select, {"tokens": 40, "sinks": 3, "recent": 12, "pool": 3, "similarity": 0.7}),
}
