"""Budgets and keep sets against loops that do it token by token, and what must hold whatever the scores."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.engine.compression.select import keep_sets, layer_budgets

# Layers -------------------------------------------------------------------------------------------------------------


def pyramid(budget: int, layers: int, seen: int, beta: int = 20) -> list[float]:
    """kvpress' formula with an empty window, before rounding."""
    least = max(budget / beta, 1)
    most = 2 * budget - least
    if most >= seen:
        most, least = seen, 2 * budget - seen
    return [most - layer * (most - least) / (layers - 1) for layer in range(layers)]


@pytest.mark.parametrize(
    ("budget", "layers", "seen"),
    [(100, 30, 400), (300, 6, 400), (200, 32, 400), (400, 4, 400), (1, 5, 1), (1, 5, 100), (3, 6, 400), (57, 2, 91)],
)
def test_pyramid_is_the_formula_and_keeps_the_sum(budget: int, layers: int, seen: int) -> None:
    budgets = layer_budgets(budget, layers, "pyramid", seen)
    assert sum(budgets) == budget * layers
    for got, wanted in zip(budgets, pyramid(budget, layers, seen), strict=True):
        assert abs(got - wanted) < 1 + 1e-9


def test_pyramid_by_hand() -> None:
    assert layer_budgets(20, 3, "pyramid", 1000) == [39, 20, 1]  # 2b - b/20, b, b/20
    assert layer_budgets(300, 5, "pyramid", 400) == [400, 350, 300, 250, 200]  # the first layer keeps all there is
    assert layer_budgets(30, 3, "pyramid", 1000, protected=10) == [49, 30, 11]
    assert layer_budgets(400, 3, "pyramid", 1000) == [780, 400, 20]
    assert layer_budgets(10, 3, "pyramid", 1000, protected=10) == [10, 10, 10]  # nothing left to distribute
    assert layer_budgets(10, 4, "pyramid", 1000) == [19, 13, 7, 1]
    assert layer_budgets(11, 4, "pyramid", 1000) == [21, 14, 8, 1]  # 21, 14.3, 7.7, 1: the rest to the largest part


@given(
    budget=st.integers(1, 5000),
    layers=st.integers(1, 48),
    seen=st.integers(1, 5000),
    protected=st.integers(0, 6000),
    kind=st.sampled_from(["uniform", "pyramid"]),
)
def test_layer_budgets_hold(
    budget: int, layers: int, seen: int, protected: int, kind: Literal["uniform", "pyramid"]
) -> None:
    budgets = layer_budgets(budget, layers, kind, seen, protected=protected)
    assert len(budgets) == layers
    assert sum(budgets) == layers * min(budget, seen)
    assert budgets == sorted(budgets, reverse=True)
    assert all(max(1, min(protected, budget, seen)) <= part <= seen for part in budgets)
    if kind == "uniform" or budget >= seen:
        assert budgets == [min(budget, seen)] * layers


# Keep sets ----------------------------------------------------------------------------------------------------------


def oracle(
    scores: torch.Tensor,
    kept: list[list[int]],
    budgets: list[int],
    sinks: int,
    recent: int,
    adaptive: bool,
    floor: float = 0.2,
) -> list[list[list[int]]]:
    """Lane by lane and token by token."""
    out = []
    for layer, lanes in enumerate(kept):
        order, sure = [], []
        for head, held in enumerate(lanes):
            budget = min(budgets[layer], held)
            newest = min(recent, budget)
            protected = {*range(held - newest, held), *range(min(sinks, budget - newest))}
            score = scores[layer, head].tolist()
            rest = sorted(set(range(held)) - protected, key=lambda i: (-score[i], i))
            order.append(sorted(protected) + rest)
            sure.append(min(budget, max(len(protected), math.floor(budgets[layer] * floor) if adaptive else budget)))
        chosen = [set(lane[:count]) for lane, count in zip(order, sure, strict=True)]
        if adaptive:
            left = min(budgets[layer] * len(lanes), sum(lanes)) - sum(map(len, chosen))
            others = [(-scores[layer, head, i].item(), i, head) for head in range(len(lanes)) for i in order[head]]
            for _, i, head in sorted(other for other in others if other[1] not in chosen[other[2]])[:left]:
                chosen[head].add(i)
        out.append([sorted(lane) for lane in chosen])
    return out


def lists(index: torch.Tensor, count: torch.Tensor) -> list[list[list[int]]]:
    found = [[[i for i in lane if i >= 0] for lane in lanes] for lanes in index.tolist()]
    assert [[len(lane) for lane in lanes] for lanes in found] == count.tolist()
    assert index.shape[-1] == count.max()
    for lanes in index.tolist():
        for lane in lanes:
            held = sum(i >= 0 for i in lane)
            assert all(i == -1 for i in lane[held:]), "padding comes last"
    return found


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    layers, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 24))
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, -3.0]) if draw(st.booleans()) else st.floats(-1e6, 1e6, width=32)
    numbers = draw(st.lists(values, min_size=layers * heads * tokens, max_size=layers * heads * tokens))
    held = st.lists(st.integers(1, tokens), min_size=heads, max_size=heads)
    return {
        "scores": torch.tensor(numbers).view(layers, heads, tokens),
        "kept": draw(st.lists(held, min_size=layers, max_size=layers)),
        "budgets": draw(st.lists(st.integers(1, tokens + 5), min_size=layers, max_size=layers)),
        "sinks": draw(st.integers(0, 30)),
        "recent": draw(st.integers(0, 30)),
        "adaptive": draw(st.booleans()),
    }


@settings(max_examples=150, deadline=None)
@given(case=cases(), floor=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_keep_sets_are_the_oracles(case: dict, floor: float) -> None:
    kept, budgets, sinks, recent = case["kept"], case["budgets"], case["sinks"], case["recent"]
    index, count = keep_sets(
        case["scores"],
        torch.tensor(kept),
        torch.tensor(budgets),
        sinks,
        recent,
        "adaptive" if case["adaptive"] else "uniform",
        floor,
    )
    found = lists(index, count)
    assert found == oracle(**case, floor=floor)
    for layer, lanes in enumerate(found):
        heads, budget = len(lanes), budgets[layer]
        for head, lane in enumerate(lanes):
            held = kept[layer][head]
            assert lane == sorted(set(lane))
            assert all(0 <= i < held for i in lane)
            newest = min(recent, budget, held)
            assert set(range(held - newest, held)) <= set(lane)
            assert set(range(min(sinks, min(budget, held) - newest))) <= set(lane)
            if not case["adaptive"]:
                assert len(lane) == min(budget, held)
            assert len(lane) >= min(held, math.floor(budget * floor))
        if case["adaptive"]:
            assert sum(map(len, lanes)) == min(budget * heads, sum(kept[layer]))
        if budget >= max(kept[layer]):
            assert [len(lane) for lane in lanes] == kept[layer]


def test_adaptive_is_adakv() -> None:
    """As in kvpress: the first int(budget * floor) of each head are safe, then the worst of all heads are pruned."""
    generator = torch.Generator().manual_seed(3)
    heads, tokens, budget = 4, 50, 20
    scores = torch.rand(1, heads, tokens, generator=generator) * torch.tensor([1.0, 0.2, 3.0, 0.01])[:, None]
    safe = scores.clone()
    safe.scatter_(-1, scores.topk(int(budget * 0.2), dim=-1).indices, torch.inf)
    pruned = safe.flatten().topk(heads * (tokens - budget), largest=False).indices
    keep = torch.ones(heads * tokens, dtype=torch.bool).index_fill(0, pruned, False).view(heads, tokens)
    index, count = keep_sets(scores, torch.full((1, heads), tokens), torch.tensor([budget]), 0, 0, "adaptive")
    assert lists(index, count)[0] == [lane.nonzero()[:, 0].tolist() for lane in keep]
    assert count[0, 3] == 4  # the floor
    assert count[0, 2] > 40


def test_ties_go_to_the_lower_index() -> None:
    flat = torch.zeros(1, 2, 10)
    index, _ = keep_sets(flat, torch.tensor([[10, 7]]), torch.tensor([4]), 0, 1)
    assert index.tolist() == [[[0, 1, 2, 9], [0, 1, 2, 6]]]
    index, count = keep_sets(flat, torch.tensor([[10, 10]]), torch.tensor([4]), 0, 0, "adaptive")
    assert count.tolist() == [[4, 4]]  # equal heads get equal shares


@pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
def test_odd_scores(head_budget: Literal["uniform", "adaptive"]) -> None:
    """NaN is the lowest; an infinite score does not beat a protected token; padding never wins."""
    inf, nan = math.inf, math.nan
    scores = torch.tensor([[[nan, inf, -inf, 1.0, 0.0, inf]]])
    index, _ = keep_sets(scores, torch.tensor([[5]]), torch.tensor([3]), 0, 1, head_budget)
    assert index.tolist() == [[[1, 3, 4]]]
    index, _ = keep_sets(scores, torch.tensor([[5]]), torch.tensor([5]), 0, 0, head_budget)
    assert index.tolist() == [[[0, 1, 2, 3, 4]]]


def test_newest_come_before_sinks() -> None:
    scores = torch.arange(10.0).view(1, 1, 10)
    index, _ = keep_sets(scores, torch.tensor([[10]]), torch.tensor([3]), sinks=4, recent=2)
    assert index.tolist() == [[[0, 8, 9]]]
    index, _ = keep_sets(scores, torch.tensor([[10]]), torch.tensor([3]), sinks=4, recent=64)
    assert index.tolist() == [[[7, 8, 9]]]
