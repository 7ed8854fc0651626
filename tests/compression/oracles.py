"""The papers' scores [tokens] of one lane, written out with loops over a dense attention matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from .dense import SINKS, Dense, hashed


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


def ems(d: Dense, layer: int, head: int, window: int = 8) -> Tensor:
    scores = torch.zeros(d.tokens, dtype=torch.float64)
    for key in range(d.tokens):
        seen_by = group_of(d, layer, head)[:, key:, key]  # [q_per_kv, queries that could see it]
        scores[key] = max(float(seen_by.mean()), float(seen_by[:, -window:].mean()))
    return scores


def a2sf(d: Dense, layer: int, head: int, decay: float = 0.95) -> Tensor:
    age = torch.arange(d.tokens - 1, -1, -1, dtype=torch.float64)
    return torch.stack([(group_of(d, layer, head)[:, :, key] * decay**age).sum() for key in range(d.tokens)])


def keyformer(d: Dense, layer: int, head: int) -> Tensor:
    """At the temperature of the prompt, 1."""
    noise = torch.tensor([hashed(7, layer, head, key) + 2.0**-25 for key in range(d.tokens)], dtype=torch.float64)
    weights = group_of(d, layer, head) / -noise.log()  # e^(x + gumbel), of which the future's is 0
    return (weights / weights.sum(-1, keepdim=True)).sum((0, 1))


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


def lagkv(d: Dense, layer: int, head: int, lag: int = 8, is_ranked: bool = True) -> Tensor:
    scores = 1 + torch.arange(d.tokens, dtype=torch.float64)
    for start in range(SINKS, d.tokens - 2 * lag + 1, lag):
        spread = torch.zeros(lag, dtype=torch.float64)
        for tokens in (d.keys[layer, head].double(), d.values[layer, head].double()):
            reference = tokens[start + lag : start + 2 * lag]
            low, high = reference.min(0).values, reference.max(0).values
            deviation = torch.stack([((tokens[start + i] - low) / (high - low)).std() for i in range(lag)])
            spread += deviation.softmax(0) / 2
        for place, token in enumerate(sorted(range(lag), key=lambda i: float(spread[i]))):
            scores[start + token] = place / lag if is_ranked else spread[token]
    return scores


def expected_attention(
    d: Dense,
    layer: int,
    head: int,
    future: int = 512,
    use_covariance: bool = True,
    use_values: bool = True,
    epsilon: float = 0.0,
) -> Tensor:
    keys, dim = d.keys[layer, head].double(), d.keys.shape[-1]
    half, positions = dim // 2, torch.arange(d.tokens, d.tokens + future).double()
    turn = torch.zeros(dim, dim, dtype=torch.float64)
    for f in range(half):
        angle = positions * float(d.inv_freq[f])
        turn[f, f] = turn[half + f, half + f] = angle.cos().mean()
        turn[half + f, f] = angle.sin().mean()
        turn[f, half + f] = -turn[half + f, f]
    scores = torch.zeros(d.tokens, dtype=torch.float64)
    for member in range(head * d.q_per_kv, (head + 1) * d.q_per_kv):
        queries = d.queries[layer, member, SINKS:].double()
        mean, covariance = turn @ queries.mean(0), turn @ torch.cov(queries.T, correction=0) @ turn.T
        spread = covariance if use_covariance else torch.zeros_like(covariance)
        logits = torch.stack([k @ mean / dim**0.5 + k @ spread @ k / (2 * dim) for k in keys[SINKS:]])
        scores[SINKS:] += logits.softmax(0) / d.q_per_kv
    return (scores + epsilon) * d.values[layer, head].double().norm(dim=-1) if use_values else scores


def lacache(d: Dense, layer: int, head: int) -> Tensor:
    """With a span of half the layers ladders have two tokens, of which the lower layers keep the first."""
    return ladder(d.tokens, 2, 1, int(layer >= d.keys.shape[0] // 2))


def ladder(tokens: int, width: int, height: int, rung: int) -> Tensor:
    scores = torch.arange(tokens, dtype=torch.float64)
    left = list(range(SINKS, tokens))
    for _ in range(24):
        left = [token for i, token in enumerate(left) if rung <= i % width < rung + height]
        for token in left:
            scores[token] += tokens
    return scores


def streaming_llm(d: Dense, layer: int, head: int) -> Tensor:
    return torch.arange(d.tokens).double()


def random(d: Dense, layer: int, head: int) -> Tensor:
    return torch.tensor([hashed(7, layer, head, position) for position in range(d.tokens)])


ORACLES: dict[str, tuple[Callable[..., Tensor], int, dict[str, object]]] = {
    # policy: (score of a lane, recent tokens for a budget of 20, knobs)
    "snapkv": (snapkv, 8, {"window": 8}),
    "h2o": (h2o, 10, {}),
    "a2sf": (a2sf, 10, {}),
    "keyformer": (keyformer, 6, {}),
    "tova": (tova, 1, {}),
    "knorm": (knorm, 0, {}),
    "keydiff": (keydiff, 0, {}),
    "streaming_llm": (streaming_llm, 0, {}),
    "tri_attention": (tri_attention, 10, {}),
    "razor_attention": (razor_attention, 0, {"budget": 20}),
    "ems": (ems, 8, {"window": 8}),
    "lagkv": (lagkv, 0, {"lag": 8}),
    "expected_attention": (expected_attention, 0, {}),
    "lacache": (lacache, 10, {}),
    "random": (random, 0, {}),
}
