"""The papers' scores [tokens] of one lane, written out with loops over a dense attention matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from .dense import Dense

SINKS = 2


def best(scores: Tensor, budget: int, recent: int) -> set[int]:
    """The newest `recent`, the first SINKS, then the highest scores [tokens]."""
    tokens = len(scores)
    kept = [*range(tokens - recent, tokens), *range(SINKS)]
    rest = sorted((i for i in range(SINKS, tokens - recent)), key=lambda i: (-float(scores[i]), i))
    return set((kept + rest)[:budget])


def group_of(d: Dense, layer: int, head: int) -> Tensor:
    """[q_per_kv, queries, tokens]"""
    return d.attention[layer, head * d.q_per_kv : (head + 1) * d.q_per_kv]


def snapkv(d: Dense, layer: int, head: int, window: int = 8, pool: int = 5) -> Tensor:
    before = d.tokens - window
    votes = group_of(d, layer, head)[:, before:, :before].mean(1)  # [q_per_kv, keys before the window]
    scores = torch.full((d.tokens,), 2.0, dtype=torch.float64)  # the window beats every probability
    for key in range(before):
        near = [float(votes[:, j].mean()) for j in range(key - pool // 2, key + pool // 2 + 1) if 0 <= j < before]
        scores[key] = sum(near) / pool
    return scores


def h2o(d: Dense, layer: int, head: int) -> Tensor:
    return group_of(d, layer, head).sum((0, 1))


def tova(d: Dense, layer: int, head: int) -> Tensor:
    return d.attention[layer, :, -1].mean(0)


def knorm(d: Dense, layer: int, head: int) -> Tensor:
    return -d.keys[layer, head].double().norm(dim=-1)


def keydiff(d: Dense, layer: int, head: int) -> Tensor:
    keys = d.keys[layer, head].double()
    anchor = normalize(keys, dim=-1).mean(0, keepdim=True)
    return -cosine_similarity(keys, anchor, dim=-1)


def tri_attention(d: Dense, layer: int, head: int, horizon: int = 65536) -> Tensor:
    stats, omega = d.profiles["tri_attention"], d.inv_freq.double()
    positions = torch.arange(d.tokens).double()
    real, imaginary = d.keys[layer, head].double().chunk(2, dim=-1)
    key = torch.complex(real, imaginary) * torch.exp(-1j * positions[:, None] * omega)  # before RoPE
    offsets = [2**i for i in range(40) if 2**i <= horizon]
    by_head = []
    for q_head in range(head * d.q_per_kv, (head + 1) * d.q_per_kv):
        centre = torch.complex(*stats["mean"][layer, q_head].double().chunk(2))
        phi = centre.angle() - key.angle()
        score = torch.zeros(d.tokens, dtype=torch.float64)
        for offset in offsets:
            distance = d.tokens - 1 - positions + offset
            waves = centre.abs() * key.abs() * torch.cos(omega * distance[:, None] + phi)
            score += waves.sum(-1) / len(offsets)
        score += ((stats["length"][layer, q_head].double() - centre.abs()) * key.abs()).sum(-1)
        by_head.append((score - score.mean()) / score.std(correction=0))
    return torch.stack(by_head).amax(0)


def razor_attention(d: Dense, layer: int, head: int) -> Tensor:
    return torch.arange(d.tokens).double()


def retrieves(d: Dense, layer: int, head: int) -> bool:
    """Whether a lane is among the best 14 % by induction or the best 1 % by echo."""
    layers, kv_heads = d.keys.shape[:2]
    for kind, share in (("induction", 0.14), ("echo", 0.01)):
        scores = d.profiles["razor_attention"][kind]
        best = {
            (i, j): max(float(scores[i, j * d.q_per_kv + q]) for q in range(d.q_per_kv))
            for i in range(layers)
            for j in range(kv_heads)
        }
        ranked = sorted(best, key=lambda lane: (-best[lane], lane))
        if (layer, head) in ranked[: math.ceil(share * len(ranked))]:
            return True
    return False


def budget_of(policy: str, d: Dense, layer: int, head: int, budget: int) -> int:
    """Tokens that a lane keeps where a plan says `budget`."""
    return d.tokens if policy == "razor_attention" and retrieves(d, layer, head) else budget


def streaming_llm(d: Dense, layer: int, head: int) -> Tensor:
    return torch.arange(d.tokens).double()


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def hashed(seed: int, layer: int, head: int, position: int) -> float:
    state = seed
    for part in (0, layer, head, position):
        state = mix((state + (part + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return (state >> 40) / 2**24


def random(d: Dense, layer: int, head: int) -> Tensor:
    return torch.tensor([hashed(7, layer, head, position) for position in range(d.tokens)])


ORACLES: dict[str, tuple[Callable[..., Tensor], int, dict[str, object]]] = {
    # policy: (score of a lane, recent tokens for a budget of 20, knobs)
    "snapkv": (snapkv, 8, {"window": 8}),
    "h2o": (h2o, 10, {}),
    "tova": (tova, 1, {}),
    "knorm": (knorm, 0, {}),
    "keydiff": (keydiff, 0, {}),
    "streaming_llm": (streaming_llm, 0, {}),
    "tri_attention": (tri_attention, 10, {}),
    "razor_attention": (razor_attention, 0, {"budget": 20}),
    "random": (random, 0, {}),
}
