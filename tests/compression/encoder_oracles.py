"""A vision tower that takes tokens away between its layers, as the papers say it, one token at a time.

A token is a dict: "x" its state, "key" its key of the layer, "size", "place". Tokens of equal merit: the earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Token = dict[str, Any]
Reduce = Callable[[list[Token], list[Token], Tensor, int, int, int], list[Token]]
"""(class token and padding, patch tokens, attention [heads, n, n], how many stay, layer, layers) -> those that stay"""


def tower(
    layers: list[Any], embedded: Tensor, has_class: bool, shown: list[int], counts: list[int], reduce: Reduce
) -> tuple[Tensor, list[int]]:
    """Like `reduction.run_layers`, of which `counts` are the policy's."""
    tokens = [{"x": x, "size": 1.0, "place": i - has_class, "is_class": i < has_class} for i, x in enumerate(embedded)]
    tokens.sort(key=lambda token: token["place"] in shown)
    lead = len(tokens) - len(shown)
    for number, layer in enumerate(layers):
        heads = layer.self_attn.num_heads
        x = layer.layer_norm1(torch.stack([token["x"] for token in tokens]))
        q, k, v = (
            project(x).view(len(x), heads, -1).transpose(0, 1)
            for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        weights = (q @ k.mT / math.sqrt(k.shape[-1])).exp() * x.new_tensor([token["size"] for token in tokens])
        attention = weights / weights.sum(-1, keepdim=True)
        out = layer.self_attn.out_proj((attention @ v).transpose(0, 1).reshape(len(x), -1))
        for i, token in enumerate(tokens):
            token["x"] = token["x"] + out[i]
            token["key"] = k[:, i].mean(0)
        first, patches = tokens[:lead], tokens[lead:]
        tokens = first + reduce(first, patches, attention, counts[number], number, len(layers))
        for token in tokens:
            token["x"] = token["x"] + layer.mlp(layer.layer_norm2(token["x"]))
    first, patches = tokens[: int(has_class)], sorted(tokens[lead:], key=lambda token: token["place"])
    return torch.stack([token["x"] for token in first + patches]), [token["place"] for token in patches]


def dealt(first: list[Token], tokens: list[Token]) -> tuple[list[Token], list[Token]]:
    """In turn, beginning with the class token, which looks for no partner."""
    both = [*(token for token in first if token["is_class"]), *tokens]
    return [token for token in both[::2] if not token["is_class"]], both[1::2]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def best(merits: list[float]) -> list[int]:
    """Indices, the largest merit first."""
    return sorted(range(len(merits)), key=lambda i: (-merits[i], i))


def join(target: Token, sources: list[Token]) -> Token:
    """Mean by size."""
    if not sources:
        return target
    group = [target, *sources]
    total = sum(token["size"] for token in group)
    mean = {name: sum(token[name] * token["size"] for token in group) / total for name in ("x", "key")}
    return {**target, **mean, "size": total}


def nearest(one: Token, others: list[Token], what: str = "key") -> tuple[float, int]:
    similar = [cosine(one[what], other[what]) for other in others]
    return max(similar), similar.index(max(similar))


def paired(sources: list[Token], targets: list[Token], drop: int) -> list[Token]:
    """The `drop` sources with the most similar partner join it; the others come first."""
    mates = [nearest(source, targets) for source in sources]
    gone = best([similarity for similarity, _ in mates])[:drop]
    joined = [join(t, [sources[i] for i in gone if mates[i][1] == j]) for j, t in enumerate(targets)]
    return [source for i, source in enumerate(sources) if i not in gone] + joined


def to_me(first: list[Token], tokens: list[Token], attention: Tensor, count: int, *_: int) -> list[Token]:
    while len(tokens) > count:
        sources, targets = dealt(first, tokens)
        tokens = paired(sources, targets, min(len(tokens) - count, len(tokens) // 2))
    return tokens


def dy_mu(thresholds: list[float]) -> Reduce:
    def reduce(first: list[Token], tokens: list[Token], a: Tensor, count: int, layer: int, layers: int) -> list[Token]:
        is_first = True
        while len(tokens) > 1 and (is_first or len(tokens) > count):
            is_first = False
            sources, targets = dealt(first, tokens)
            over = sum(nearest(s, targets)[0] > thresholds[min(layer, len(thresholds) - 1)] for s in sources)
            drop = min(max(over, len(tokens) - count), len(tokens) // 2)
            tokens = paired(sources, targets, drop) if drop else tokens
        return tokens

    return reduce


def pi_to_me(margin: float, alpha: float) -> Reduce:
    def reduce(
        first: list[Token], tokens: list[Token], attention: Tensor, count: int, layer: int, layers: int
    ) -> list[Token]:
        bound = margin - margin * layer / layers
        while len(tokens) > count:
            drop = min(len(tokens) - count, len(tokens) // 2)
            energy = []
            for one in tokens:
                near = [(1.0 if other is one else cosine(one["key"], other["key"])) - bound for other in tokens]
                energy.append(sum(x if x >= 0 else alpha * (math.exp(x) - 1) for x in near) / len(tokens))
            much = [tokens[i] for i in best(energy)[: 2 * drop]]
            sources, targets = much[::2], much[1::2]
            mates = [nearest(source, targets)[1] for source in sources]
            joined = [
                join(t, [s for s, mate in zip(sources, mates, strict=True) if mate == j]) for j, t in enumerate(targets)
            ]
            by_place = {token["place"]: token for token in [*tokens, *joined]}
            gone = {source["place"] for source in sources}
            tokens = [by_place[token["place"]] for token in tokens if token["place"] not in gone]
        return tokens

    return reduce


def diff_rate(merge: float) -> Reduce:
    def reduce(first: list[Token], tokens: list[Token], attention: Tensor, count: int, *_: int) -> list[Token]:
        lead = len(first)
        has_class = bool(first) and first[0]["is_class"]
        rows = attention.mean(0)[:1] if has_class else attention.mean(0)
        order = [tokens[i] for i in best(rows.mean(0)[lead:].tolist())]
        merging = round(merge * (len(tokens) - count))
        stay, sources = order[:count], order[count : count + merging]
        mates = [nearest(source, stay, "x") for source in sources]
        out = []
        for j, target in enumerate(stay):
            mine = [(s, similarity) for s, (similarity, mate) in zip(sources, mates, strict=True) if mate == j]
            mean = sum((s["x"] for s, _ in mine), target["x"]) / (1 + len(mine))
            out.append({**target, "x": mean, "size": target["size"] + sum(s["size"] * max(c, 0.0) for s, c in mine)})
        return out

    return reduce


def zero_tprune(similar: float) -> Reduce:
    def reduce(
        first: list[Token], tokens: list[Token], attention: Tensor, count: int, layer: int, layers: int
    ) -> list[Token]:
        rounds = 30 if 4 * layer < layers else 1 if 4 * (layers - layer) <= layers else 5
        lead, n = len(first), len(tokens)
        order = best(ranks(attention, rounds)[lead:])
        high, low = [tokens[i] for i in order[: (n + 1) // 2]], [tokens[i] for i in sorted(order[(n + 1) // 2 :])]
        twins = best([nearest(one, high)[0] for one in low])[: min(round(similar * (n - count)), n // 2)]
        gone = {low[i]["place"] for i in twins}
        left = [i for i, token in enumerate(tokens) if token["place"] not in gone]
        nodes = [*range(lead), *(lead + i for i in left)]
        among = attention[:, nodes][:, :, nodes]
        rest = ranks(among / among.sum(-1, keepdim=True), rounds)[lead:]
        return [tokens[left[i]] for i in sorted(best(rest)[:count])]

    return reduce


def ranks(attention: Tensor, rounds: int) -> list[float]:
    n, heads = attention.shape[1], []
    for head in attention.double().tolist():
        rank = [1 / n] * n
        for _ in range(rounds):
            rank = [sum(head[i][j] * rank[i] for i in range(n)) for j in range(n)]
        heads.append(rank)
    variances = [sum((n * r - 1) ** 2 for r in rank) / n for rank in heads]  # ranks sum to one
    used = [rank for rank, variance in zip(heads, variances, strict=True) if 0.01 <= variance <= 0.7] or heads
    return [math.sqrt(sum(rank[i] ** 2 for rank in used) / len(used)) for i in range(n)]
