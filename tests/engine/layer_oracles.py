"""Policies that drop image tokens between layers, written down anew: a dense transformer, layer by layer, over what is
left, and each paper's choice as loops over attention rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

from .imagery import Part


@dataclass
class Picked:
    """What a choice leaves of an image: of its tokens that are there, and what is put in their places."""

    tokens: list[int]
    """Patch tokens that stay"""
    instead: dict[int, Tensor] = field(default_factory=dict)
    """Token -> hidden state"""


@dataclass(frozen=True)
class Scene:
    """An image at a choice."""

    stage: int
    there: list[int]
    """Its patch tokens that are left"""
    patches: int
    keep: int
    attention: dict[int, list[float]]
    """Text row behind the image in its turn -> what it gives to each of these, mean over heads"""
    hidden: dict[int, Tensor]
    """Token -> what the layers below make of it"""
    relevance: dict[int, float]
    """Text row behind the image in its turn -> how much the image's tokens are like it"""
    keys: tuple[int, ...]
    params: Any
    """The plan's `vision`"""


Oracle = Callable[[Scene], Picked]


def relevance_of(image: Tensor, text: Tensor) -> list[float]:
    """SparseVLM 3.2: of each text token."""
    total = [0.0] * len(text)
    for v in image.double():
        dots = [float(v @ t) for t in text.double()]
        top = max(dots)
        parts = [math.exp(dot - top) for dot in dots]
        for i, part in enumerate(parts):
            total[i] += part / sum(parts) / len(image)
    return total


def highest(scores: Sequence[float], count: int) -> list[int]:
    """Places of the highest, the first of equals, in order."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def last_row(scene: Scene) -> list[float]:
    return scene.attention[max(scene.attention)]


def mean_row(scene: Scene, rows: Sequence[int]) -> list[float]:
    return [sum(scene.attention[row][i] for row in rows) / len(rows) for i in range(len(scene.there))]


def salient(scene: Scene) -> list[int]:
    mean = sum(scene.relevance.values()) / len(scene.relevance)
    return [row for row, value in scene.relevance.items() if value > mean] or list(scene.relevance)


def fast_v(scene: Scene) -> Picked:
    return Picked([scene.there[i] for i in highest(last_row(scene), scene.keep)])


def pyramid_drop(scene: Scene) -> Picked:
    left = max(1, round(scene.patches * (scene.keep / scene.patches) ** ((scene.stage + 1) / 3)))
    return Picked([scene.there[i] for i in highest(last_row(scene), left)])


def adsc(scene: Scene) -> Picked:
    left = min(len(scene.there), max(1, round(scene.patches * (scene.keep / scene.patches) ** ((scene.stage + 1) / 3))))
    return Picked([scene.there[int((i + 0.5) * len(scene.there) / left)] for i in range(left)])


def duet_vlm(scene: Scene) -> Picked:
    left = max(1, round(scene.keep / (2, 4)[scene.stage]))
    return Picked([scene.there[i] for i in highest(mean_row(scene, salient(scene)), left)])


def zipvl(scene: Scene) -> Picked:
    mass = mean_row(scene, sorted(scene.attention)[-scene.params.probes :])
    count, got = 0, 0.0
    for part in sorted(mass, reverse=True):
        count, got = count + 1, got + part
        if got >= scene.params.tau * sum(mass):
            break
    return Picked([scene.there[i] for i in highest(mass, min(count, scene.keep))])


def must_drop(scene: Scene) -> Picked:
    left = max(1, round(scene.patches * (scene.keep / scene.patches) ** ((scene.stage + 1) / 4)))
    total = [sum(row[i] for row in scene.attention.values()) for i in range(len(scene.there))]
    single = [max(row[i] for row in scene.attention.values()) for i in range(len(scene.there))]
    is_key = [token in scene.keys for token in scene.there]
    stays = [
        i
        for i in range(len(total))
        if is_key[i] or total[i] >= scene.params.total * sum(total) or single[i] >= scene.params.single
    ]
    if not stays:
        stays = [max(range(len(total)), key=lambda i: total[i])]
    stays.sort(key=lambda i: (not is_key[i], -total[i]))
    return Picked(sorted(scene.there[i] for i in stays[:left]))


def sparse_vlm(scene: Scene) -> Picked:
    paper = [math.log(part / 576) / math.log(110 / 576) for part in (300, 200, 110)]
    left = min(len(scene.there), max(1, round(scene.patches * (scene.keep / scene.patches) ** paper[scene.stage])))
    scores = mean_row(scene, salient(scene))
    ranking = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    clusters, recycle, size = 0, scene.params.recycle, scene.params.cluster
    while min(math.ceil(int((len(scores) - left + clusters) * recycle) / size), left - 1) > clusters:
        clusters += 1
    picked = [scene.there[i] for i in ranking[: left - clusters]]
    if not clusters:
        return Picked(sorted(picked))
    pool = sorted(ranking[left - clusters :][: int((len(scores) - left + clusters) * recycle)])
    states = [scene.hidden[scene.there[i]].double() for i in pool]
    far = [[float((x - y).norm()) / len(x) ** 0.5 for y in states] for x in states]
    density = [math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) for row in far]
    widest = max(max(row) for row in far)
    order = sorted(range(len(pool)), key=lambda i: (-density[i], i))  # two that are nearest to each other are as dense
    apart = [min([far[i][j] for j in order[: order.index(i)]], default=widest) for i in range(len(pool))]
    centres = highest([a * b for a, b in zip(apart, density, strict=True)], clusters)
    members: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for i in range(len(pool)):
        if i not in centres:
            members[min(centres, key=lambda centre: far[i][centre])].append(i)
    instead = {
        scene.there[pool[centre]]: torch.stack([states[i] for i in group]).mean(0).float()
        for centre, group in members.items()
    }
    return Picked(sorted([*picked, *instead]), instead)


def apet(scene: Scene) -> Picked:
    states = [scene.hidden[token].double() for token in scene.there]
    left = min(len(states), max(1, round(scene.keep / 3)))
    mean = sum(states) / len(states)
    basis = [max(range(len(states)), key=lambda i: float((states[i] - mean).norm()))]
    while len(basis) < min(scene.params.basis, max(1, left // 2)):
        others = [i for i in range(len(states)) if i not in basis]
        basis.append(max(others, key=lambda i: min(float((states[i] - states[b]).norm()) for b in basis)))
    seeds = torch.stack([states[b] for b in basis])
    inverse = torch.linalg.inv(seeds @ seeds.T + 1e-5 * torch.eye(len(basis), dtype=torch.float64))
    errors = [float((x - (inverse @ seeds @ x) @ seeds).norm()) for x in states]
    worst = sorted((i for i in range(len(states)) if i not in basis), key=lambda i: -errors[i])[: left - len(basis)]
    members = {i: [i] for i in worst}
    for i, x in enumerate(states):
        if worst and i not in basis and i not in worst:
            near = [float(x @ states[j] / x.norm() / states[j].norm()) for j in sorted(worst)]
            members[sorted(worst)[near.index(max(near))]].append(i)
    instead = {scene.there[i]: torch.stack([states[j] for j in group]).mean(0).float() for i, group in members.items()}
    return Picked(sorted(scene.there[i] for i in [*basis, *worst]), instead)


def to_dre(scene: Scene) -> Picked:
    return Picked([])


ORACLES: dict[str, Oracle] = {
    "apet": apet,
    "to_dre": to_dre,
    "fast_v": fast_v,
    "pyramid_drop": pyramid_drop,
    "sparse_vlm": sparse_vlm,
    "adsc": adsc,
    "must_drop": must_drop,
    "duet_vlm": duet_vlm,
    "zipvl": zipvl,
}

PLACES: dict[str, list[int]] = {
    "apet": [16],
    "to_dre": [24],
    "fast_v": [2],
    "pyramid_drop": [8, 16, 24],
    "sparse_vlm": [3, 7, 16],
    "adsc": [8, 16, 24],
    "must_drop": [3, 7, 11, 15],
    "duet_vlm": [16, 24],
    "zipvl": [2, 8, 16, 24],
}
"""Layers of 32 before which they choose"""


def choices_at(name: str, depth: int) -> dict[int, int]:
    """Layer before which a choice comes -> which one."""
    return {min(max(1, round(place * depth / 32)), depth - 1): i for i, place in enumerate(PLACES[name])}


@dataclass
class Dropped:
    """A text read by a model that forgets image tokens between layers."""

    logits: Tensor
    """[tokens, vocab]"""
    held: list[list[int]]
    """Rows that each layer has read"""
    left: list[int]
    """Rows of the prompt that the last layer has read"""


def run(
    model: Any,
    tokens: Sequence[int],
    prompt: int,
    parts: Sequence[Part],
    keeps: Sequence[int],
    choices: dict[int, int],
    oracle: Oracle,
    params: Any,
    hidden_from: Callable[[int, int, int], bool] = lambda layer, query, row: False,
    shown: dict[int, Tensor] | None = None,
    positions: Sequence[int] | Tensor | None = None,
) -> Dropped:
    """Passes a text, whose first `prompt` tokens are the prompt, through a transformers model of the Llama family.

    Args
        hidden_from(layer, query, row): the query does not see the row in this layer, although it is there
        shown: what stands at rows that are pictures'
        positions: [tokens] of the tokens, if not their numbers, or [3, tokens] on three axes
    """
    body = getattr(model, "model", model)
    x = body.embed_tokens(torch.tensor(list(tokens))).clone()
    for row, embedding in (shown or {}).items():
        x[row] = embedding
    places = torch.arange(len(tokens)) if positions is None else torch.as_tensor(positions)
    embeddings, rows, held = x.clone(), list(range(len(tokens))), []
    attention = torch.zeros(0)
    for layer, block in enumerate(body.layers):
        if layer in choices:
            gone: set[int] = set()
            for part, keep in zip(parts, keeps, strict=True):
                scene = _scene(part, keep, choices[layer], rows, attention, x, embeddings, parts, params)
                if keep >= part.patches or not scene.there:
                    continue
                picked = oracle(scene)
                gone |= {part.rows[token] for token in scene.there} - {part.rows[token] for token in picked.tokens}
                for token, state in picked.instead.items():
                    x[rows.index(part.rows[token])] = state
            stay = [i for i, row in enumerate(rows) if row not in gone]
            rows, x = [rows[i] for i in stay], x[stay]
        held.append(rows)
        mask = torch.tensor([[row > query or hidden_from(layer, query, row) for row in rows] for query in rows])
        attention, x = _block(body, block, x, places[..., rows], mask)
    out = body.norm(x)
    logits = torch.zeros(len(tokens), model.lm_head.out_features)
    logits[rows] = model.lm_head(out)
    return Dropped(logits, held, [row for row in rows if row < prompt])


def _scene(
    part: Part,
    keep: int,
    stage: int,
    rows: list[int],
    attention: Tensor,
    x: Tensor,
    embeddings: Tensor,
    parts: Sequence[Part],
    params: Any,
) -> Scene:
    images = {row for other in parts for row in range(other.first, other.last)}
    behind = [row for row in range(part.last, part.turn_end) if row not in images]
    there = [token for token, row in enumerate(part.rows) if row in rows]
    at = [rows.index(part.rows[token]) for token in there]
    mean = attention.double().mean(0)
    return Scene(
        stage=stage,
        there=there,
        patches=part.patches,
        keep=keep,
        attention={row: mean[rows.index(row), at].tolist() for row in behind},
        hidden={token: x[i] for token, i in zip(there, at, strict=True)},
        relevance=dict(zip(behind, relevance_of(embeddings[part.rows], embeddings[behind]), strict=True)),
        keys=part.keys,
        params=params,
    )


def _block(body: Any, block: Any, x: Tensor, places: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One layer over some rows: attention [heads, rows, rows], and what it puts out."""
    attend, dim = block.self_attn, block.self_attn.head_dim
    normed = block.input_layernorm(x)
    q, k, v = (part(normed).unflatten(1, (-1, dim)) for part in (attend.q_proj, attend.k_proj, attend.v_proj))
    if hasattr(attend, "q_norm"):
        q, k = attend.q_norm(q), attend.k_norm(k)
    cos, sin = body.rotary_emb(x[None], places[..., None, :])
    q, k = (part * cos[0][:, None] + rotate_half(part) * sin[0][:, None] for part in (q, k))
    group = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(group, 1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5
    weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
    x = x + attend.o_proj(torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    return weights, x + block.mlp(block.post_attention_layernorm(x))
